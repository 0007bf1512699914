"""Detected people: skeletons on a sheet, and records in the pixels of the file."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from datamodules.pose.joints import MPII_JOINTS
from visualization.people import PeopleView, draw_skeletons


def test_a_sheet_has_detected_people() -> None:
    near = torch.rand(16, 2, generator=torch.Generator().manual_seed(1)) * 44 + 10
    people = {
        "boxes": torch.tensor([[5.0, 5.0, 50.0, 50.0]] * 2),
        "scores": torch.tensor([0.9, 0.1]),
        "labels": torch.zeros(2, dtype=torch.int64),
        "keypoints": torch.stack([near, torch.full((16, 2), 60.0)]),
        "keypoint_scores": torch.ones(2, 16),
    }
    assert PeopleView().tile(Image.new("RGB", (64, 64)), people, {}, MPII_JOINTS).width == 384
    pixels = np.asarray(draw_skeletons(Image.new("RGB", (64, 64)), people, MPII_JOINTS, (64, 64)))
    assert pixels[:55, :55].any()
    assert not pixels[58:, 58:].any()  # a score of 0.1 is not drawn


def test_records_are_in_the_pixels_of_the_file() -> None:
    people = {
        "boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        "scores": torch.tensor([0.5]),
        "labels": torch.tensor([0]),
        "keypoints": torch.tensor([[[1.0, 2.0]]]),
        "keypoint_scores": torch.tensor([[0.25]]),
    }
    (person,) = PeopleView().record(people, None, (2.0, 4.0))["detections"]
    assert (person["class"], person["box"]) == ("person", [2.0, 8.0, 6.0, 16.0])
    assert person["keypoints"] == [{"joint": "class 0", "x": 2.5, "y": 9.5, "score": 0.25}]
