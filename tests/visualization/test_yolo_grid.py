"""The grid of YOLO v1."""

from __future__ import annotations

import torch

from tests.callbacks.tiny import NAMES
from tests.visualization.predictions import DETECTION_SIZE, DETECTIONS, GRAY, GROUND_TRUTH, colors
from visualization.detections import (
    MISSED,
    DetectionView,
)
from visualization.drawing import INK, PAPER
from visualization.samples import Sample
from visualization.yolo_grid import YOLOGridView, draw_grid


def test_the_grid_shows_the_responsible_box() -> None:
    boxes = torch.zeros(2, 2, 2, 4)
    boxes[0, 0, 0], boxes[0, 0, 1] = torch.tensor([0.0, 0, 90, 10]), torch.tensor([10.0, 5, 40, 20])
    cells = {"boxes": boxes, "confidence": torch.zeros(2, 2, 2), "classes": torch.rand(2, 2, 3)}
    cells["confidence"][0, 0] = torch.tensor([0.0, 0.4])
    ground_truth = {"target": {"boxes": torch.tensor([[10.0, 5, 38, 20]]), "labels": torch.tensor([0])}}
    drawn = draw_grid(GRAY, {"cells": cells}, ground_truth, DETECTION_SIZE)
    assert MISSED in colors(drawn, 1)  # the frame of the cell that holds the center
    assert PAPER in colors(drawn.crop((20, 10, 81, 40)), 10)  # the second box, at the image's scale
    assert MISSED not in colors(draw_grid(GRAY, {"cells": cells}, {}, DETECTION_SIZE), 1)
    assert INK in colors(draw_grid(GRAY, {"cells": cells}, {}, DETECTION_SIZE), 25)


def test_a_sheet_has_the_grid_beside_the_boxes() -> None:
    image = GRAY.resize(DETECTION_SIZE)
    plain = DetectionView().tile(image, DETECTIONS, GROUND_TRUTH, NAMES)
    cells = {"boxes": torch.rand(2, 2, 1, 4), "confidence": torch.rand(2, 2, 1), "classes": torch.rand(2, 2, 3)}
    pair = YOLOGridView().tile(image, {**DETECTIONS, "cells": cells}, GROUND_TRUTH, NAMES)
    assert pair.width > 1.9 * plain.width
    columns, rows = DetectionView().table(
        [Sample(torch.zeros(3, 50, 100, dtype=torch.uint8), DETECTIONS, GROUND_TRUTH)], NAMES
    )
    assert dict(zip(columns, rows[0], strict=True))["found"] == 1
