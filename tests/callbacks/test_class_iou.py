"""Tables and bars of IoU."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from callbacks.class_iou import ClassIoU
from callbacks.class_tables import format_table
from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.figures import Figures
from tests.callbacks.tiny import loader, trainer
from tests.visualization.predictions import MASK_NAMES, Segments
from visualization.plots import plot_class_iou


def test_the_classes_are_written_drawn_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [ClassIoU(), ConfusionMatrix(), Figures(count=4)]
    trainer(tmp_path, callbacks=callbacks).fit(Segments(), loader(), loader())
    assert "accuracy" not in capsys.readouterr().out
    with open(tmp_path / "per_class_iou_val.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [*MASK_NAMES, "absent"]
    assert [row["iou"] for row in rows] == ["0.0", "1.0", "0.0", ""]
    assert [row["pixels"] for row in rows] == ["1200", "1200", "0", "0"]
    assert [row["accuracy"] for row in rows] == ["0.0", "1.0", "", ""]
    for name in ("val_iou_step", "val_confusion_step", "val_step"):
        assert list((tmp_path / "figures").glob(f"{name}=*.png")), name
    assert (tmp_path / "per_class_val.csv").exists()
    trainer(tmp_path, callbacks=[ClassIoU()]).validate(Segments(), loader(), verbose=False)
    assert "absent" in capsys.readouterr().out
    with pytest.raises(ValueError, match="keep >= 2"):
        ClassIoU(keep=1)


def test_bars_of_many_classes() -> None:
    iou = torch.linspace(0, 1, 100)
    iou[3] = torch.nan
    figure = plot_class_iou(iou, None, "$title$")
    assert figure.height < 2200
    rows = ClassIoU().rows({"iou": iou, "confusion_matrix": torch.eye(100, dtype=torch.int64)}, None)
    assert format_table(rows).count("\n") == 100
    assert plot_class_iou(torch.full((3,), torch.nan), MASK_NAMES, "nothing").width == 840
