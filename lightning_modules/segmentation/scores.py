"""From scores of pixels to a loss, and to a map of classes at an image's own size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VOID = 255
CROP_ADVICE = "--data.crop_size, or --data.batch_size 1 for whole images"  # for `require_equal_size` in training


def cross_entropy(scores: Tensor, mask: Tensor, summed: bool = False) -> Tensor:
    """The cross entropy of all pixels that are not void, their mean; 0, with a gradient of 0, where there are none.

    Args:
        scores: float (B,C,h,w), logits.
        mask: int64 (B,h,w), 255 = void.
        summed: their sum instead, as FCN's authors have it.
    """
    total = F.cross_entropy(scores.float(), mask, ignore_index=VOID, reduction="sum")
    return total if summed else total / (mask != VOID).sum().clamp_min(1)


def of_each(network: Callable[[Tensor], Tensor], images: Tensor | list[Tensor]) -> list[Tensor]:
    """Scores (C,h,w) of each image: of a tensor (B,3,H,W) at once, of a list of (3,H,W), which may differ, one by one.

    Args:
        network: images (B,3,H,W) to scores (B,C,h,w).
        images: uint8, as in the batch contract.
    """
    return list(network(images)) if isinstance(images, Tensor) else [network(image[None])[0] for image in images]


def sizes_of(batch: dict[str, Any]) -> list[tuple[int, int]] | None:
    """(height, width) of the images as they are on disk, where a batch knows; else None."""
    masks = batch.get("original_mask")
    return None if masks is None else [(mask.shape[0], mask.shape[1]) for mask in masks]


def to_maps(scores: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
    """The most probable class of each pixel: int64 (h,w) an image.

    Scores are resized, not classes: between two classes lies the one or the other, not a third.

    Args:
        scores: float (C,h,w) of each image, or all of them (B,C,h,w).
        sizes: (height, width) to give each map; None for the scores' own.
    """
    resized = list(scores) if sizes is None else [resize(s, size) for s, size in zip(scores, sizes, strict=True)]
    return [s.argmax(0) for s in resized]


def resize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores float (C,h,w) at (height, width), bilinear, pixels as squares: float32 (C,height,width)."""
    scores = scores.float()
    if scores.shape[1:] == torch.Size(size):
        return scores
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
