"""Boxes on images: found, false and missed objects; records and rows."""

from __future__ import annotations

import json

import numpy as np
import torch

from tests.callbacks.tiny import NAMES
from tests.visualization.predictions import DETECTION_SIZE, DETECTIONS, GRAY, GROUND_TRUTH, colors
from visualization.detections import (
    MISSED,
    DetectionView,
    count_detections,
    match_detections,
)
from visualization.drawing import GREEN, RED

VIEW = DetectionView()


def test_each_object_is_found_once_and_by_its_class() -> None:
    assert match_detections(DETECTIONS["boxes"], [0, 0, 2, 1], GROUND_TRUTH["target"]) == [0, None, None, None]
    assert count_detections(DETECTIONS, GROUND_TRUTH["target"]) == (2, 1, 2)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert match_detections(DETECTIONS["boxes"], [0, 0, 2, 1], nothing) == [None] * 4
    assert count_detections(DETECTIONS, nothing) == (0, 0, 3)


def test_boxes_are_drawn_at_the_image_size() -> None:
    drawn = VIEW.draw(GRAY, DETECTIONS, GROUND_TRUTH, NAMES, DETECTION_SIZE)
    assert drawn.width == GRAY.width
    assert drawn.height > GRAY.height
    assert colors(drawn, 75) >= {GREEN, RED, MISSED}
    columns = np.asarray(drawn)[75]
    missed = np.flatnonzero((columns == MISSED).all(1))
    assert {int(missed.min()), int(missed.max())} <= {150, 190}  # only the difficult one is missed
    assert (columns[:10] == 128).all()
    wrong_alone = {**DETECTIONS, "boxes": DETECTIONS["boxes"][2:], "scores": DETECTIONS["scores"][2:]}
    wrong_alone["labels"] = DETECTIONS["labels"][2:]
    assert GREEN not in colors(VIEW.draw(GRAY, wrong_alone, GROUND_TRUTH, NAMES, DETECTION_SIZE), 75)


def test_without_truth_a_class_has_its_color() -> None:
    drawn = VIEW.draw(GRAY, DETECTIONS, {}, None, DETECTION_SIZE)
    assert not colors(drawn, 75) & {GREEN, RED, MISSED}
    empty = {key: value[:0] for key, value in DETECTIONS.items()}
    assert VIEW.draw(GRAY, empty, {}, None, DETECTION_SIZE).size == drawn.size


def test_records_are_in_the_pixels_of_the_file() -> None:
    assert VIEW.matches(DETECTIONS)
    record = VIEW.record(DETECTIONS, NAMES, (2.0, 3.0))
    assert record["detections"][0]["box"] == [10, 33, 50, 123]
    assert [item["class"] for item in record["detections"]] == [NAMES[0], NAMES[0], NAMES[2], NAMES[1]]
    assert len(VIEW.rows(record)) == 4
    assert VIEW.rows(record)[1][:3] == [4, 2, NAMES[0]]
    json.dumps(record)
    nothing = VIEW.record({key: value[:0] for key, value in DETECTIONS.items()}, NAMES, (1.0, 1.0))
    assert nothing["remark"] == "nothing found"
    assert VIEW.rows(nothing)[0][0] == 0
