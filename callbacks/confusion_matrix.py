"""Confusion matrix and accuracy per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from torch import Tensor

from callbacks.class_tables import ClassTables, Rows, write_csv
from visualization.drawing import class_name
from visualization.plots import plot_confusion_matrix

MAX_READABLE = 100  # classes of a readable figure; of more classes the most confused pairs are listed too
PAIRS = 20


class ConfusionMatrix(ClassTables):
    """Plot the confusion matrix, and write samples, accuracy (0..1) and most frequent confusion per class.

    Reads ``confusion_matrix`` (C, C), rows are true classes, of ``epoch_results[split]``. Writes
    ``per_class_<split>.csv`` and ``<split>_confusion_step=...png`` (see `ClassTables`), and for more than 100 classes
    ``confused_pairs_<split>.csv`` with the 20 most frequent confusions.
    """

    title = "confusion matrix"
    requires = frozenset({"confusion_matrix"})
    table = "per_class"
    figure = "confusion"
    wandb_key = "confusion_matrix"
    printed = False

    def rows(self, results: dict[str, Tensor], names: Any) -> Rows:
        rows = []
        for i, row in enumerate(results["confusion_matrix"].long()):
            total = int(row.sum())
            others = row.clone()
            others[i] = 0
            j = int(others.argmax())
            confused = int(others[j])
            rows.append(
                {
                    "class": class_name(i, names),
                    "count": total,
                    "accuracy": round(int(row[i]) / total, 6) if total else "",
                    "most_confused_with": class_name(j, names) if confused else "",
                    "confused_share": round(confused / total, 6) if confused else "",
                }
            )
        return rows

    def plot(self, results: dict[str, Tensor], rows: Rows, names: Any, title: str) -> Image.Image:
        return plot_confusion_matrix(results["confusion_matrix"], names, title)

    def write(self, results: dict[str, Tensor], names: Any, split: str, trainer: pl.Trainer) -> None:
        super().write(results, names, split, trainer)
        counts = results["confusion_matrix"]
        if len(counts) > MAX_READABLE:
            pairs = confused_pairs(counts, names)
            write_csv(Path(trainer.default_root_dir) / f"confused_pairs_{split}.csv", pairs)


def confused_pairs(counts: Tensor, class_names: Sequence[str] | None, count: int = PAIRS) -> Rows:
    """Return the most frequent confusions first: ground truth, predicted, count, share of the true class's samples."""
    wrong = counts.long().clone().fill_diagonal_(0)
    values, flat = wrong.flatten().topk(min(count, wrong.numel()))
    totals = counts.long().sum(dim=1)
    rows = []
    for value, index in zip(values.tolist(), flat.tolist(), strict=True):
        true, predicted = divmod(index, len(counts))
        if value:
            share = round(value / int(totals[true]), 6)
            names = class_name(true, class_names), class_name(predicted, class_names)
            rows.append({"ground_truth": names[0], "predicted": names[1], "count": value, "share": share})
    return rows
