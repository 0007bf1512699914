"""What detectors do alike: images of one size, the objects of a batch as one tensor, suppression of weaker boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import batched_nms


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


def pad(entries: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The boxes of a batch's images as one tensor, filled up: boxes float32 (B,M,4), labels int64 (B,M), M at least 1.

    What fills the shorter lists has no area, and overlaps nothing.

    Args:
        entries: one dict an image: ``boxes`` float (N,4), ``labels`` int64 (N,); at least one image.
    """
    boxes = pad_sequence([entry["boxes"] for entry in entries], batch_first=True).float()
    labels = pad_sequence([entry["labels"] for entry in entries], batch_first=True)
    return (boxes, labels) if labels.shape[1] else (F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1)))


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each box with each other one of its image: float (B,M,P) for xyxy (B,M,4) and (B,P,4), or (P,4) for all.

    On a CPU in a third of the time of torchvision's box_iou, whose pairs of coordinates are slow.
    """
    left, top, right, bottom = boxes[..., None].unbind(2)
    o_left, o_top, o_right, o_bottom = others.mT.contiguous().unsqueeze(-3).unbind(-2)
    shared = (torch.minimum(right, o_right) - torch.maximum(left, o_left)).clamp_min_(0)
    shared *= (torch.minimum(bottom, o_bottom) - torch.maximum(top, o_top)).clamp_min_(0)
    union = (right - left) * (bottom - top) + (o_right - o_left) * (o_bottom - o_top)
    # Of two without area, 0.
    return shared.div_(union.sub_(shared).clamp_min_(1e-9))


def offsets(boxes: Tensor, anchors: Tensor, deviations: Sequence[float]) -> Tensor:
    """Boxes as seen from others: how far the center moves, in sides, and the logarithm by which each side grows.

    Girshick et al. 2014, appendix C. The inverse is `corners`.

    Args:
        boxes, anchors: float (...,4) xyxy, of shapes that broadcast.
        deviations: the four are divided by these, so that all are about 1.

    Returns:
        float (...,4): x, y, width, height.
    """
    (center, size), (center_a, size_a) = (
        ((b[..., :2] + b[..., 2:]) / 2, (b[..., 2:] - b[..., :2]).clamp_min(1e-6)) for b in (boxes, anchors)
    )
    return torch.cat([(center - center_a) / size_a, (size / size_a).log()], dim=-1) / boxes.new_tensor(deviations)


def corners(offset: Tensor, anchors: Tensor, deviations: Sequence[float]) -> Tensor:
    """The inverse of `offsets`: float (...,4) xyxy. No box is more than 1000 / 16 times as large as its anchor."""
    offset = offset * offset.new_tensor(deviations)
    size = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., :2] + anchors[..., 2:]) / 2 + offset[..., :2] * size
    half = size * offset[..., 2:].clamp_max(math.log(1000 / 16)).exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


class Sample(NamedTuple):
    """n candidates of each of B images that were drawn to learn from, positives first.

    Attributes:
        which: int64 (B,n).
        taken: bool (B,n): False fills up where there are too few; it is not learned from.
        positive: bool (B,n), taken as a positive.
    """

    which: Tensor
    taken: Tensor
    positive: Tensor


def sample(positive: Tensor, negative: Tensor, count: int, share: float) -> Sample:
    """Draws candidates from torch's default generator, which is seeded at each training step.

    Of each image up to ``share`` of ``count`` are positives, and negatives make it full.

    Args:
        positive, negative: bool (B,P), never both.
        count: n, or all P if they are fewer.
        share: 0..1.
    """
    draw = torch.rand(positive.shape, device=positive.device)
    most = min(round(share * count), positive.shape[1])
    drawn = torch.where(positive, draw, -1).topk(most, dim=1).indices
    positive = torch.zeros_like(positive).scatter(1, drawn, True) & positive
    order = draw + torch.where(positive, 2, torch.where(negative, 1, 0))
    index = order.topk(min(count, positive.shape[1]), dim=1).indices
    positive, negative = positive.gather(1, index), negative.gather(1, index)
    return Sample(index, positive | negative, positive)


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


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of box i of one with box i of the other, float (N,4) xyxy: float64 (N,).

    In double precision, since boxes of whole pixels often overlap by exactly the threshold. 0 where both have no area.
    """
    a, b = a.double(), b.double()
    sides = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    intersection = sides.clamp_min(0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - intersection
    return torch.where(union > 0, intersection / union, 0.0)
