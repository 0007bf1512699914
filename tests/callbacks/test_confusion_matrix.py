"""Confusion matrices and confused pairs."""

from __future__ import annotations

from pathlib import Path

import torch

from callbacks.confusion_matrix import ConfusionMatrix, confused_pairs
from tests.callbacks.tiny import Tiny, loader, read_table, trainer


def test_many_classes_give_a_plain_map_and_the_confused_pairs(tmp_path: Path) -> None:
    counts = torch.diag(torch.full((120,), 10))
    counts[3, 7], counts[50, 2] = 6, 30

    class Many(Tiny):
        def on_validation_epoch_end(self) -> None:
            self.epoch_results["val"] = {"confusion_matrix": counts}

    trainer(tmp_path, callbacks=[ConfusionMatrix()]).fit(Many(names=None), loader(), loader())
    rows = read_table(tmp_path / "confused_pairs_val.csv")
    assert [(row["ground_truth"], row["predicted"], row["count"], row["share"]) for row in rows] == [
        ("class 50", "class 2", "30", "0.75"),
        ("class 3", "class 7", "6", "0.375"),
    ]
    assert len(ConfusionMatrix().rows({"confusion_matrix": counts}, None)) == 120
    assert confused_pairs(torch.eye(3), None) == []
