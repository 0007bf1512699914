"""What detectors do alike: images of one size, the objects of a batch as one tensor, suppression of weaker boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms


def checked(images: Tensor | list[Tensor], fits: Callable[[int, int], bool], expected: str, advice: int) -> Tensor:
    """The images of a batch, for networks that want one size.

    Args:
        images: uint8 (B,3,H,W), or a list where sizes differ.
        fits: whether (H, W) is right.
        expected: says in words what is.
        advice: a size of the data that is.

    Raises:
        ValueError: the images differ in size, or do not fit.
    """
    if isinstance(images, Tensor) and fits(images.shape[-2], images.shape[-1]):
        return images
    found = "images of different sizes" if isinstance(images, list) else f"{images.shape[-1]}x{images.shape[-2]}"
    raise ValueError(f"image: expected {expected}, found {found}: set --data.image_size {advice}")


def image_of(entries: Sequence[dict[str, Any]], device: torch.device) -> Tensor:
    """Which image each box belongs to: int64 (K,), for the dicts of a batch's images with ``boxes`` (N,4), in order."""
    # The sizes of tensors are known without asking the device.
    counts = torch.tensor([len(entry["boxes"]) for entry in entries])
    return torch.repeat_interleave(torch.arange(len(entries)), counts).to(device, non_blocking=True)


def join(target: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The objects of all images of a batch: boxes float32 (K,4), labels int64 (K,), image int64 (K,).

    Args:
        target: one dict an image: ``boxes`` float (M,4), ``labels`` int64 (M,); at least one image.
    """
    boxes = torch.cat([entry["boxes"] for entry in target]).float()
    return boxes, torch.cat([entry["labels"] for entry in target]), image_of(target, boxes.device)


def suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image: Tensor,
    images: int,
    nms_threshold: float,
    top: int | None = None,
    keep: int | None = None,
) -> list[dict[str, Tensor]]:
    """Non-maximum suppression by class: a box goes that overlaps a better one of its class and image by more.

    Args:
        boxes: float (N,4) xyxy, candidates of all images.
        scores: float (N,).
        labels: int64 (N,), 0 or more.
        image: int64 (N,), 0..images-1.
        images: how many there are.
        nms_threshold: IoU.
        top: candidates of each image and class that take part, the best; None for all.
        keep: what is left of each image at most, the best; None for all.

    Returns:
        For each image ``boxes`` float32 (K,4), ``scores`` float32 (K,) and ``labels`` int64 (K,), best first.
    """
    boxes, scores = boxes.float(), scores.float()
    # By image and then class, so that no two share a number.
    group = labels * images + image
    if top is not None:
        best = torch.argsort(scores, descending=True, stable=True)
        best = best[place_in_group(group[best]) < top]
        boxes, scores, labels, image, group = (x[best] for x in (boxes, scores, labels, image, group))
    kept = batched_nms(boxes, scores, group, nms_threshold)
    if keep is not None:
        kept = kept[place_in_group(image[kept]) < keep]
    kept = kept[torch.argsort(image[kept], stable=True)]
    counts = torch.bincount(image[kept], minlength=images).tolist()
    parts = zip(*(x[kept].split(counts) for x in (boxes, scores, labels)), strict=True)
    return [{"boxes": b, "scores": s, "labels": c} for b, s, c in parts]


def place_in_group(group: Tensor) -> Tensor:
    """How many of the same group stand before each: int64 (N,) for int64 (N,)."""
    order = torch.argsort(group, stable=True)
    ordered = group[order]
    place = torch.arange(len(group), device=group.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(place).scatter_(0, order, place)
