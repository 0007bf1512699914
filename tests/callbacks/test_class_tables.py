"""Tables of several callbacks, and their text."""

from __future__ import annotations

from pathlib import Path

import torch

from callbacks.average_precision import AveragePrecision
from callbacks.class_iou import ClassIoU
from callbacks.class_tables import ClassTables, format_table
from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.joint_tables import JointTables
from tests.callbacks.tiny import NAMES, Tiny, loader, read_table, trainer


class AllResults(Tiny):
    """A module whose evaluation has results for several tables."""

    def on_validation_epoch_end(self) -> None:
        self.epoch_results["val"] = {
            "confusion_matrix": torch.tensor([[3, 1, 0], [0, 2, 0], [2, 1, 5]]),
            "iou": torch.tensor([0.5, 0.25, 1.0]),
            "ap": torch.tensor([0.5, 0.75, torch.nan]),
            "precision": torch.rand(3, 101),
            "objects": torch.tensor([4, 2, 0]),
            "detections": torch.tensor([5, 6, 7]),
        }


def test_no_table_or_figure_replaces_another(tmp_path: Path) -> None:
    callbacks: list[ClassTables] = [ConfusionMatrix(), AveragePrecision(), ClassIoU()]
    trainer(tmp_path, callbacks=callbacks).fit(AllResults(), loader(), loader())
    keys = {name: list(read_table(tmp_path / f"{name}_val.csv")[0]) for name in ("per_class", "per_class_ap")}
    assert keys["per_class"][:3] == ["class", "count", "accuracy"]
    assert keys["per_class_ap"] == ["class", "objects", "detections", "ap"]
    assert [row["class"] for row in read_table(tmp_path / "per_class_iou_val.csv")] == NAMES
    assert len(list((tmp_path / "figures").iterdir())) == 3
    everything = [*callbacks, JointTables("pckh"), JointTables("pck")]
    for attribute in ("table", "figure", "wandb_key"):
        assert len({getattr(callback, attribute) for callback in everything}) == len(everything)


def test_text_is_aligned_and_names_missing_values() -> None:
    rows = [{"class": "a", "count": 10, "ap": 1.0}, {"class": "long", "count": 2, "ap": ""}]
    assert format_table(rows, "none").splitlines() == [
        "class  count      ap",
        "a         10  1.0000",
        "long       2    none",
    ]
    assert format_table([]) == ""
