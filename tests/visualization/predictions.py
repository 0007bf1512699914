"""Images and predictions that several tests draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from lightning_modules.segmentation.metrics import segmentation_metrics
from tests.callbacks.tiny import Tiny

GRAY = Image.new("RGB", (200, 100), (128, 128, 128))
# Left: an object of class 0, found twice. Middle: one of class 1, predicted as class 2. Right: a difficult one, missed.
# Coordinates are in half the image's pixels.
GROUND_TRUTH: dict[str, Any] = {
    "target": {
        "boxes": torch.tensor([[5.0, 10, 25, 40], [40, 10, 60, 40], [75, 10, 95, 40]]),
        "labels": torch.tensor([0, 1, 1]),
        "difficult": torch.tensor([False, False, True]),
    },
    "id": "cells.jpg",
}
DETECTIONS: dict[str, Any] = {
    "boxes": torch.tensor([[5.0, 11, 25, 41], [6, 10, 26, 40], [40, 10, 60, 40], [0, 0, 99, 49]]),
    "scores": torch.tensor([0.9, 0.8, 0.7, 0.1]),
    "labels": torch.tensor([0, 0, 2, 1]),
}
DETECTION_SIZE = (100, 50)


def colors(figure: Image.Image, row: int) -> set[tuple[int, ...]]:
    return {tuple(int(v) for v in pixel) for pixel in np.asarray(figure)[row]}


MASK_NAMES = ["background", "größer", "$cost_$"]


def halves(left: int, right: int, height: int = 40, width: int = 60) -> torch.Tensor:
    ids = torch.full((height, width), left)
    ids[:, width // 2 :] = right
    return ids


class Segments(Tiny):
    """A module that predicts class 1 on the left half and class 2 on the right; a fourth class does not occur."""

    def __init__(self) -> None:
        super().__init__([*MASK_NAMES, "absent"])

    def _maps(self, batch: dict[str, Any]) -> list[torch.Tensor]:
        return [halves(1, 2, *image.shape[1:]) for image in batch["image"]]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self._maps(batch)

    test_step = predict_step = validation_step

    def on_validation_epoch_end(self) -> None:
        metrics = segmentation_metrics(4)
        metrics.update([halves(1, 2)], [halves(1, 0)])
        self.epoch_results["val"] = {key: value for key, value in metrics.compute().items() if value.ndim}
