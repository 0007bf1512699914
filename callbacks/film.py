"""Painted images beside what they were made of, and the film of an image that is learned.

The prediction of an image: ``stylized`` uint8 (3,H,W), and ``random`` bool, whether features of random weights were
looked at, which every drawing says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as pl
from PIL import Image

from errors import UserError
from visualization.drawing import to_picture
from visualization.style import is_stylized

FPS = 8  # of a film
LAST = 2.0  # seconds that its last frame stays


class Film(pl.Callback):
    """Keeps an image that is learned after each epoch, and makes a film of it in the end.

    Writes ``<run>/frames/step=<global step, 8 digits>.png``, and ``<run>/film.mp4`` when the training ends. It does so
    for modules that say ``film = True`` and whose prediction is one image.
    """

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        if not getattr(pl_module, "film", False) or trainer.sanity_checking or not trainer.is_global_zero:
            return
        if trainer.state.fn == "fit" and is_stylized(outputs):
            folder = Path(trainer.default_root_dir) / "frames"
            folder.mkdir(parents=True, exist_ok=True)
            to_picture(outputs["stylized"][0].cpu()).save(folder / f"step={trainer.global_step:08d}.png")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if getattr(pl_module, "film", False) and trainer.is_global_zero:
            try:
                write_film(Path(trainer.default_root_dir))
            except OSError as error:
                print(f"film: left out ({error})", file=sys.stderr, flush=True)


def write_film(run: Path) -> None:
    """Joins ``run/frames`` to ``run/film.mp4``.

    Raises:
        OSError: OpenCV cannot write a film here.
    """
    frames = sorted((run / "frames").glob("step=*.png"))
    if len(frames) < 2:
        return
    pictures = [np.asarray(Image.open(frame).convert("RGB"))[..., ::-1] for frame in frames]
    height, width = (side // 2 * 2 for side in pictures[-1].shape[:2])  # codecs want even sides
    if not height or not width:
        return
    video = cv2.VideoWriter(str(run / "film.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (width, height))
    if not video.isOpened():
        raise UserError(f"{run / 'film.mp4'}: OpenCV cannot write this video")
    for picture in [*pictures, *[pictures[-1]] * round(FPS * LAST)]:
        video.write(np.ascontiguousarray(picture[:height, :width]))
    video.release()
    print(f"film: {run / 'film.mp4'}, {len(frames)} images", flush=True)
