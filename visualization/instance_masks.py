"""View of instance segmentation: detections with ``masks``, bool or uint8 (K, H, W)."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from datamodules.transforms import VOID
from visualization.base import Size
from visualization.detections import KEYS, SCORE_THRESHOLD, DetectionView
from visualization.drawing import class_color


class InstanceMaskView(DetectionView):
    """The boxes over masks, one color per object."""

    def matches(self, prediction: Any) -> bool:
        return isinstance(prediction, dict) and prediction.keys() >= KEYS | {"masks"}

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        drawn = prediction["scores"] >= SCORE_THRESHOLD
        return super().draw(overlay_masks(image, prediction["masks"][drawn]), prediction, ground_truth, names, size)

    def mask(self, prediction: dict[str, Tensor]) -> Tensor:
        """Return 0 for background and k for the k-th best object, uint8 (H, W).

        Objects with a score below 0.3 are skipped; a pixel of several objects belongs to the best one.
        """
        masks = prediction["masks"]
        ids = torch.zeros(masks.shape[1:], dtype=torch.uint8)
        for i in reversed(range(min(len(masks), VOID - 1))):
            if prediction["scores"][i] >= SCORE_THRESHOLD:
                ids[masks[i].bool()] = i + 1
        return ids

    def reduce(self, prediction: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep only the objects that are drawn: 100 masks of a large image take 100 MB."""
        drawn = prediction["scores"] >= SCORE_THRESHOLD
        return {key: prediction[key][drawn] for key in ("boxes", "scores", "labels", "masks")}


def overlay_masks(image: Image.Image, masks: Tensor) -> Image.Image:
    """Blend masks, bool or uint8 (K, H, W), over the image, one color each, the first one on top."""
    canvas = image
    for i in reversed(range(len(masks))):
        mask = Image.fromarray(masks[i].to(torch.uint8).mul(255).cpu().numpy())
        colored = Image.blend(image, Image.new("RGB", image.size, class_color(i)), 0.5)
        canvas = Image.composite(colored, canvas, mask.resize(image.size, Image.Resampling.NEAREST))
    return canvas
