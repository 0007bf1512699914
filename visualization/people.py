"""View of detected people: detections with ``keypoints`` float (N, K, 2) and ``keypoint_scores`` float (N, K)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visualization.base import Scale, Size
from visualization.detections import KEYS, SCORE_THRESHOLD, DetectionView
from visualization.poses import draw_skeleton, joint_records

PEOPLE = ["person"]


class PeopleView(DetectionView):
    """The boxes over the skeletons of all people with a score of at least 0.3; ``names`` are those of the joints."""

    def matches(self, prediction: Any) -> bool:
        return isinstance(prediction, dict) and prediction.keys() >= KEYS | {"keypoints"}

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        return super().draw(draw_skeletons(image, prediction, names, size), prediction, ground_truth, PEOPLE, size)

    def record(self, prediction: Any, names: Any, scale: Scale) -> dict[str, Any]:
        """Return the record of a detector; each person has ``keypoints`` too, in the pixels of the file."""
        record = super().record(prediction, PEOPLE, scale)
        points = (prediction["keypoints"].double() + 0.5) * torch.tensor(scale, dtype=torch.float64) - 0.5
        for person, keypoints, scores in zip(record["detections"], points, prediction["keypoint_scores"], strict=True):
            person["keypoints"] = joint_records(keypoints, scores, names)
        return record


def draw_skeletons(
    image: Image.Image,
    prediction: dict[str, Tensor],
    joint_names: Sequence[str] | None,
    size: Size | None = None,
) -> Image.Image:
    """Draw the skeletons of all people with a score of at least 0.3 on a copy of the image."""
    canvas = image.copy()
    for keypoints, score in zip(prediction["keypoints"], prediction["scores"].tolist(), strict=True):
        if score >= SCORE_THRESHOLD:
            draw_skeleton(canvas, keypoints, torch.ones(len(keypoints), dtype=torch.bool), joint_names, size)
    return canvas
