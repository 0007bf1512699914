"""Intersection over union per class of a semantic segmentation."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from callbacks.class_tables import ClassTables, Rows, rounded
from visualization.drawing import class_name
from visualization.plots import plot_class_iou


class ClassIoU(ClassTables):
    """Write pixels of the ground truth, IoU and accuracy (0..1, empty without pixels) per class, and the IoU as bars.

    Reads ``iou`` (C,) and ``confusion_matrix`` (C, C), rows are true classes, of ``epoch_results[split]`` (see
    ``lightning_modules/segmentation/metrics.py``). Writes ``per_class_iou_<split>.csv`` and
    ``<split>_iou_step=...png``; see `ClassTables`.
    """

    title = "intersection over union"
    requires = frozenset({"iou", "confusion_matrix"})
    table = "per_class_iou"
    figure = "iou"
    wandb_key = "class_iou"

    def rows(self, results: dict[str, Tensor], names: Any) -> Rows:
        counts = results["confusion_matrix"]
        pixels, correct = counts.sum(1).tolist(), counts.diagonal().tolist()
        return [
            {
                "class": class_name(i, names),
                "pixels": pixels[i],
                "iou": rounded(value),
                "accuracy": round(correct[i] / pixels[i], 4) if pixels[i] else "",
            }
            for i, value in enumerate(results["iou"].tolist())
        ]

    def plot(self, results: dict[str, Tensor], rows: Rows, names: Any, title: str) -> Image.Image:
        return plot_class_iou(results["iou"], names, title)
