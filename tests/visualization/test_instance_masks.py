"""Masks of objects: drawn, stored and recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from callbacks.prediction_writer import PredictionWriter
from tests.callbacks.tiny import Files, trainer, write_image
from tests.visualization.predictions import MASK_NAMES, Segments, halves
from visualization.detections import DetectionView
from visualization.drawing import class_color
from visualization.instance_masks import InstanceMaskView, overlay_masks
from visualization.segmentation import (
    SegmentationView,
)

GRAY = Image.new("RGB", (120, 80), (128, 128, 128))


def objects() -> dict[str, torch.Tensor]:
    """Two objects that overlap, best first, and one whose score is too low to be drawn."""
    masks = torch.zeros(3, 40, 60, dtype=torch.bool)
    masks[0, 10:30, 5:20], masks[1, 10:30, 19:40], masks[2] = True, True, True
    boxes = torch.tensor([[5.0, 10, 20, 30], [19, 10, 40, 30], [0, 0, 60, 40]])
    return {"boxes": boxes, "scores": torch.tensor([0.9, 0.5, 0.1]), "labels": torch.tensor([1, 1, 0]), "masks": masks}


def test_masks_of_objects_have_a_color_each() -> None:
    prediction = objects()
    drawn = np.asarray(overlay_masks(GRAY, prediction["masks"][:2]))
    for i, x in ((0, 20), (1, 60)):
        assert np.abs(drawn[40, x].astype(int) - (128 + np.array(class_color(i)).astype(int)) / 2).max() <= 2
    assert (drawn[70] == 128).all()
    assert np.abs(drawn[40, 38].astype(int) - drawn[40, 20]).max() == 0  # the best one lies on top
    boxed = InstanceMaskView().draw(GRAY, prediction, {}, MASK_NAMES, (60, 40))
    plain = DetectionView().draw(GRAY, {k: v for k, v in prediction.items() if k != "masks"}, {}, MASK_NAMES, (60, 40))
    assert (np.asarray(boxed)[40, 20] != np.asarray(plain)[40, 20]).any()
    assert (np.asarray(boxed)[78, 5] == 128).all()


def test_masks_of_objects_are_stored_by_rank() -> None:
    ids = InstanceMaskView().mask(objects())
    assert (ids[20, 19], ids[20, 20], ids[0, 0]) == (1, 2, 0)
    boxes_only = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    assert DetectionView().mask(boxes_only) is None
    kept = InstanceMaskView().reduce(objects())
    assert len(kept["masks"]) == len(kept["scores"]) == 2
    assert SegmentationView().reduce(halves(0, 1)).shape == (40, 60)


class Objects(Segments):
    """A module that predicts the same objects in each image."""

    def _maps(self, batch: dict[str, Any]) -> list[Any]:
        return [objects() for _ in batch["image"]]


def test_prediction_of_objects_has_boxes_and_masks(tmp_path: Path) -> None:
    path = write_image(tmp_path / "in" / "a.jpg", (120, 80))

    class Wide(Files):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"image": torch.full((3, 40, 60), 90, dtype=torch.uint8), "id": str(self.paths[i])}

    t = trainer(tmp_path / "run", callbacks=[PredictionWriter(str(tmp_path / "in"))])
    t.predict(Objects(), DataLoader(Wide([path])), return_predictions=False)  # type: ignore[arg-type]
    (record,) = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert record["detections"][1]["box"] == [38, 20, 80, 60]
    with Image.open(tmp_path / "run" / record["mask"]) as mask:
        assert mask.size == (120, 80)
        assert np.unique(np.array(mask)).tolist() == [0, 1, 2]
    assert "masks" not in record
