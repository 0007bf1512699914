"""Base class of the semantic segmentation systems: loss, class maps at the original size, and metrics.

Semantic segmentation assigns a class to every pixel. Shapes: N images of H x W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_modules.base import VisionModule
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.segmentation.metrics import VOID, segmentation_metrics

CROP_ADVICE = "--data.crop_size, or --data.batch_size 1 for uncropped images"


def cross_entropy(logits: Tensor, mask: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Compute the cross entropy over all pixels that are not void.

    Args:
        logits: float (N, C, H, W), or (N, C) for single pixels.
        mask: class ids, int64 (N, H, W) or (N,); 255 is void.
        reduction: ``mean`` or ``sum`` over the pixels.

    Returns:
        Scalar, float32. It is 0 with a gradient of 0 if all pixels are void.
    """
    total = F.cross_entropy(logits.float(), mask, ignore_index=VOID, reduction="sum")
    return total if reduction == "sum" else total / (mask != VOID).sum().clamp_min(1)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits bilinearly, without aligned corners.

    Args:
        logits: float (C, h, w).
        size: (height, width) of the result.

    Returns:
        Logits, float32 (C, height, width).
    """
    logits = logits.float()
    if logits.shape[1:] == torch.Size(size):
        return logits
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]


def resize_aligned(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly with aligned corners, as Caffe's Interp layer: (N, C, h, w) to (N, C, height, width)."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=True)


def upsample_aligned(logits: Tensor, size: Sequence[int], multiple: int = 32) -> Tensor:
    """Upsample the logits of an image that was padded to ``k * multiple + 1`` pixels (`pad_to_multiple`, offset 1).

    The first and last cells of every feature map lie on the first and last pixels of the padded image.

    Args:
        logits: float (N, C, h, w).
        size: (height, width) of the image before padding.
        multiple: step between valid sides.

    Returns:
        Logits, float (N, C, height, width).
    """
    height, width = size
    padded = (height + (1 - height) % multiple, width + (1 - width) % multiple)
    return resize_aligned(logits, padded)[:, :, :height, :width]


def class_maps(logits: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
    """Return the most probable class of every pixel.

    Logits are resized instead of class ids, because interpolating between ids 0 and 2 would yield class 1.

    Args:
        logits: float (C, h, w) per image.
        sizes: (height, width) of each map; None keeps the size of the logits.

    Returns:
        One map of class ids per image, int64 (height, width).
    """
    if sizes is not None:
        logits = [resize_logits(one, size) for one, size in zip(logits, sizes, strict=True)]
    return [one.argmax(0) for one in logits]


def original_sizes(batch: dict[str, Any]) -> list[tuple[int, int]] | None:
    """Return (height, width) of the images on disk, or None if the batch has no ``original_mask``."""
    masks = batch.get("original_mask")
    return None if masks is None else [(mask.shape[0], mask.shape[1]) for mask in masks]


class SemanticSegmenter(VisionModule):
    """Base class of the semantic segmentation systems.

    A subclass sets ``network`` and overrides what differs from one network with a mean cross entropy: `losses`,
    `pixel_logits`, `segment` or `parameter_groups`.

    Batch: see segmentation in the batch contract (``datamodules/base.py``); training images have one size. ``predict``
    returns one map of class ids per image, int64 (H, W). Metrics: see `SegmentationMetrics`; evaluation resizes the
    logits to the original size of the ground truth.

    Args:
        num_classes: number of classes, background included; ``train.py`` takes it from the data.
        class_names: one name per class; ``train.py`` takes them from the data.
        **kwargs: see `VisionModule`.
    """

    monitor = ("val/miou", "max")

    network: nn.Module

    def __init__(self, num_classes: int = 21, class_names: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.class_names = num_classes, class_names

    def training_images(self, batch: dict[str, Any]) -> Tensor:
        """Return the normalized images of a training batch, float (N, 3, H, W); they must have one size."""
        return self.preprocess(require_equal_size(batch["image"], CROP_ADVICE))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"cross_entropy": cross_entropy(self.pixel_logits(self.training_images(batch)), batch["mask"])}

    def pixel_logits(self, pixels: Tensor) -> Tensor:
        """Compute logits of all pixels: normalized images float (N, 3, H, W) to float32 (N, C, H, W)."""
        return self.network(pixels)

    def logits(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """Compute the logits of each image.

        Args:
            images: uint8 (N, 3, H, W), which is one batch, or a list of (3, H, W), whose images are processed one by
                one because their sizes may differ.

        Returns:
            Logits, float32 (C, H, W) per image.
        """
        if isinstance(images, Tensor):
            return list(self.pixel_logits(self.preprocess(images)))
        return [self.pixel_logits(self.preprocess(image[None]))[0] for image in images]

    def segment(self, images: Tensor | list[Tensor], sizes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
        """Predict class maps.

        Args:
            images: uint8 (N, 3, H, W), or a list of (3, H, W).
            sizes: (height, width) of each map; None for the sizes of the images.

        Returns:
            One map of class ids per image, int64 (height, width).
        """
        return class_maps(self.logits(images), sizes)

    def predict(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        return self.segment(images)

    def predict_batch(self, batch: dict[str, Any]) -> list[Tensor]:
        return self.segment(batch["image"], original_sizes(batch))

    def build_metrics(self) -> MetricCollection:
        return segmentation_metrics(self.num_classes)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["original_mask"])
