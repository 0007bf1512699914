"""Average precision per class and precision-recall curves of a detector."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from callbacks.class_tables import ClassTables, Rows, rounded
from visualization.drawing import class_name
from visualization.plots import plot_precision_recall


class AveragePrecision(ClassTables):
    """Write objects, detections and average precision (0..1, empty without objects) per class, and the curves.

    Reads ``ap`` (C,), ``precision`` (C, 101), ``objects`` (C,) and ``detections`` (C,) of ``epoch_results[split]`` (see
    ``lightning_modules/detection/metrics.py``). Writes ``per_class_ap_<split>.csv`` and
    ``<split>_precision_recall_step=...png``; see `ClassTables`.
    """

    title = "average precision"
    requires = frozenset({"ap", "precision", "objects", "detections"})
    table = "per_class_ap"
    figure = wandb_key = "precision_recall"
    missing = "no object"

    def rows(self, results: dict[str, Tensor], names: Any) -> Rows:
        columns = (results[name].tolist() for name in ("objects", "detections", "ap"))
        return [
            {"class": class_name(i, names), "objects": objects, "detections": detections, "ap": rounded(ap)}
            for i, (objects, detections, ap) in enumerate(zip(*columns, strict=True))
        ]

    def plot(self, results: dict[str, Tensor], rows: Rows, names: Any, title: str) -> Image.Image:
        return plot_precision_recall(results["precision"], results["ap"], names, title)
