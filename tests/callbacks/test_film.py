"""Frames of an optimized image, and their film."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from callbacks.film import FPS, LAST_FRAME_SECONDS, Film, write_film
from tests.callbacks.tiny import Tiny, loader, trainer
from visualization.drawing import to_pil


class Optimizes(Tiny):
    """A module that predicts one image, brighter in each epoch."""

    film = True

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return {"stylized": torch.full((1, 3, 33, 47), 10 * self.current_epoch, dtype=torch.uint8)}


def test_a_run_leaves_frames_and_a_film(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, callbacks=[Film()], max_epochs=3).fit(Optimizes(), loader(), loader(1))
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == [
        f"step={step:08d}.png" for step in (3, 6, 9)
    ]
    assert "3 images" in capsys.readouterr().out
    video = cv2.VideoCapture(str(tmp_path / "film.mp4"))
    frames = 0
    while video.read()[0]:
        frames += 1
    assert frames == 3 + round(FPS * LAST_FRAME_SECONDS)
    size = video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)
    assert size == (46, 32)  # the codec needs even sides


def test_a_film_needs_two_frames_and_other_modules_have_none(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    to_pil(torch.zeros(3, 8, 8)).save(tmp_path / "frames" / "step=00000001.png")
    write_film(tmp_path)
    assert not (tmp_path / "film.mp4").exists()
    trainer(tmp_path / "other", callbacks=[Film()]).fit(Tiny(), loader(), loader())
    assert not (tmp_path / "other" / "frames").exists()
