"""Contact sheets on disk: which samples, which files, and failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.figures import Figures
from tests.callbacks.tiny import NAMES, Tiny, loader, read_table, trainer
from visualization.drawing import GREEN, RED


def has(figure: Image.Image, color: tuple[int, int, int]) -> bool:
    return bool((np.asarray(figure) == color).all(axis=-1).sum() > 100)


def test_a_run_leaves_sheets_matrix_and_tables(tmp_path: Path) -> None:
    t = trainer(tmp_path, callbacks=[Figures(count=12), ConfusionMatrix()], max_epochs=2, num_sanity_val_steps=2)
    t.fit(Tiny(), loader(), loader())
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == [
        "val_confusion_step=00000003.png",
        "val_confusion_step=00000006.png",
        "val_step=00000003.png",
        "val_step=00000006.png",
    ]
    sheet = Image.open(tmp_path / "figures" / "val_step=00000006.png")
    assert has(sheet, GREEN)
    assert has(sheet, RED)
    assert sheet.width == 4 * (256 + 12) + 12
    rows = read_table(tmp_path / "per_class_val.csv")
    assert [row["class"] for row in rows] == NAMES
    assert [row["count"] for row in rows] == ["4", "0", "8"]
    assert [row["accuracy"] for row in rows] == ["0.75", "", "0.625"]
    assert [row["most_confused_with"] for row in rows] == ["größer", "", "red"]


def test_old_sheets_go_but_the_first_stays(tmp_path: Path) -> None:
    t = trainer(tmp_path, callbacks=[Figures(count=1, keep=3)], max_epochs=6)
    t.fit(Tiny(), loader(), loader())
    steps = sorted(int(path.stem.split("=")[1]) for path in (tmp_path / "figures").iterdir())
    assert steps == [3, 15, 18]


def test_the_test_split_has_its_own_sheet(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[Figures()]).test(Tiny(), loader(), verbose=False)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["test_step=00000000.png"]


def test_a_failure_is_one_line_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "figures").write_text("a file where the folder should be")
    t = trainer(tmp_path, callbacks=[Figures(), ConfusionMatrix()], max_epochs=3)
    t.fit(Tiny(), loader(), loader())
    assert t.current_epoch == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 2


def test_predictions_nobody_draws_are_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Other(Tiny):
        def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            return {"depth": torch.zeros(len(batch["id"]), 4)}

    trainer(tmp_path, callbacks=[Figures()]).fit(Other(), loader(), loader())
    assert not (tmp_path / "figures").exists()
    assert "skipped" not in capsys.readouterr().err
