"""Boxes: batching of targets, IoU, regression deltas, balanced sampling and non-maximum suppression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import nms


def concatenate_targets(target: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate the K objects of a batch.

    Args:
        target: one dict per image with ``boxes`` float (M, 4) and ``labels`` int64 (M,); at least one image.

    Returns:
        Boxes float32 (K, 4), labels int64 (K,), and the image index of each object, int64 (K,).
    """
    boxes = torch.cat([entry["boxes"] for entry in target]).float()
    # Counting on the CPU avoids a device synchronization.
    counts = torch.tensor([len(entry["boxes"]) for entry in target])
    image = torch.repeat_interleave(torch.arange(len(target)), counts).to(boxes.device, non_blocking=True)
    return boxes, torch.cat([entry["labels"] for entry in target]), image


def pad_targets(entries: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Pad the boxes and labels of a batch to the largest number of boxes in an image, at least 1.

    Padding boxes are zero: they have no area and an IoU of 0 with every box.

    Args:
        entries: one dict per image with ``boxes`` float (N, 4) and ``labels`` int64 (N,); at least one image.

    Returns:
        Boxes float32 (B, M, 4) and labels int64 (B, M).
    """
    boxes = pad_sequence([entry["boxes"] for entry in entries], batch_first=True).float()
    labels = pad_sequence([entry["labels"] for entry in entries], batch_first=True)
    return (boxes, labels) if labels.shape[1] else (F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1)))


def batched_box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the IoU of all pairs of boxes of each image.

    Three times as fast on a CPU as torchvision's ``box_iou``, whose pairs of coordinates are slow.

    Args:
        boxes: float (B, M, 4), xyxy.
        others: float (B, P, 4), xyxy, or (P, 4) for all images.

    Returns:
        IoU, float (B, M, P); 0 for two boxes without area.
    """
    left, top, right, bottom = boxes[..., None].unbind(2)
    o_left, o_top, o_right, o_bottom = others.mT.contiguous().unsqueeze(-3).unbind(-2)
    intersection = (torch.minimum(right, o_right) - torch.maximum(left, o_left)).clamp_min_(0)
    intersection *= (torch.minimum(bottom, o_bottom) - torch.maximum(top, o_top)).clamp_min_(0)
    union = (right - left) * (bottom - top) + (o_right - o_left) * (o_bottom - o_top)
    return intersection.div_(union.sub_(intersection).clamp_min_(1e-9))


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU of the boxes of two tensors, element by element.

    Uses double precision: boxes with integer coordinates often overlap by exactly the threshold.

    Args:
        a: float (..., 4), xyxy.
        b: float (..., 4), xyxy; the shapes broadcast.

    Returns:
        IoU, float64 (...); 0 for two boxes without area.
    """
    a, b = a.double(), b.double()
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = sides.clamp_min(0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def constant_like(values: Sequence[float], tensor: Tensor) -> Tensor:
    """Return values as a tensor of the same dtype and device; unlike ``new_tensor``, do not wait for the device."""
    return torch.tensor(values, dtype=tensor.dtype).to(tensor.device, non_blocking=True)


def encode_boxes(boxes: Tensor, anchors: Tensor, std: Sequence[float]) -> Tensor:
    """Encode boxes as regression deltas relative to anchors (Girshick et al. 2014, appendix C).

    Args:
        boxes: float (..., 4), xyxy in pixels.
        anchors: reference boxes, float (..., 4), xyxy in pixels; the shapes broadcast.
        std: standard deviation of (dx, dy, dw, dh); the deltas are divided by it.

    Returns:
        Deltas (dx, dy, dw, dh), float (..., 4).
    """
    (center, size), (center_a, size_a) = (
        ((b[..., :2] + b[..., 2:]) / 2, (b[..., 2:] - b[..., :2]).clamp_min(1e-6)) for b in (boxes, anchors)
    )
    return torch.cat([(center - center_a) / size_a, (size / size_a).log()], dim=-1) / constant_like(std, boxes)


def decode_boxes(deltas: Tensor, anchors: Tensor, std: Sequence[float]) -> Tensor:
    """Apply regression deltas to anchors; the inverse of `encode_boxes`.

    Args:
        deltas: (dx, dy, dw, dh), float (..., 4). The scale exp(dw) is limited to 1000 / 16, as in detectron.
        anchors: reference boxes, float (..., 4), xyxy in pixels; the shapes broadcast.
        std: standard deviation of the deltas, as in `encode_boxes`.

    Returns:
        Boxes, float (..., 4), xyxy in pixels.
    """
    deltas = deltas * constant_like(std, deltas)
    size = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp_max(math.log(1000 / 16)).exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


class Sample(NamedTuple):
    """A sample of n candidates in each of B images, positives first.

    Attributes:
        indices: int64 (B, n), indices of the candidates.
        valid: bool (B, n), False for padding in images with fewer than n candidates.
        positive: bool (B, n), valid and positive.
    """

    indices: Tensor
    valid: Tensor
    positive: Tensor


def sample_balanced(positive: Tensor, negative: Tensor, size: int, positive_fraction: float) -> Sample:
    """Sample candidates of each image at random; fill up with negatives.

    Args:
        positive: bool (B, P), the positive candidates.
        negative: bool (B, P), the negative candidates, disjoint from the positives.
        size: number of candidates per image, n; all P if they are fewer.
        positive_fraction: largest fraction of positives in ``size``, 0..1.
    """
    priority = torch.rand(positive.shape, device=positive.device)
    max_positives = min(round(positive_fraction * size), positive.shape[1])
    chosen = torch.where(positive, priority, -1).topk(max_positives, dim=1).indices
    positive = torch.zeros_like(positive).scatter(1, chosen, True) & positive
    order = priority + torch.where(positive, 2, torch.where(negative, 1, 0))
    indices = order.topk(min(size, positive.shape[1]), dim=1).indices
    positive, negative = positive.gather(1, indices), negative.gather(1, indices)
    return Sample(indices, positive | negative, positive)


def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image: Tensor,
    num_images: int,
    nms_threshold: float,
    top_k: int | None = None,
    keep_top_k: int | None = None,
) -> list[dict[str, Tensor]]:
    """Suppress every box that overlaps a better box of its class and image by more than the threshold.

    Args:
        boxes: candidates of all images, float (N, 4), xyxy.
        scores: float (N,).
        labels: int64 (N,), at least 0.
        image: image index of each candidate, int64 (N,), 0..num_images-1.
        num_images: number of images, B.
        nms_threshold: largest IoU of two kept boxes.
        top_k: candidates per image and class that enter the suppression, best first; None for all.
        keep_top_k: boxes kept per image, best first; None for all.

    Returns:
        One dict per image with ``boxes`` float32 (K, 4), ``scores`` float32 (K,) and ``labels`` int64 (K,), best first.
    """
    boxes, scores = boxes.float(), scores.float()
    group = labels * num_images + image
    if top_k is not None:
        best = torch.argsort(scores, descending=True, stable=True)
        best = best[rank_in_group(group[best]) < top_k]
        boxes, scores, labels, image, group = (x[best] for x in (boxes, scores, labels, image, group))
    kept = grouped_nms(boxes, scores, group, nms_threshold)
    if keep_top_k is not None:
        kept = kept[rank_in_group(image[kept]) < keep_top_k]
    kept = kept[torch.argsort(image[kept], stable=True)]
    counts = torch.bincount(image[kept], minlength=num_images).tolist()
    parts = zip(*(x[kept].split(counts) for x in (boxes, scores, labels)), strict=True)
    return [{"boxes": b, "scores": s, "labels": c} for b, s, c in parts]


def grouped_nms(boxes: Tensor, scores: Tensor, group: Tensor, nms_threshold: float) -> Tensor:
    """Suppress every box that overlaps a better box of its group by more than the threshold.

    The result equals one suppression per group in float64. Torchvision's ``batched_nms`` shifts the groups apart in
    float32, which rounds the coordinates of the later groups by up to a pixel.

    Args:
        boxes: float (N, 4), xyxy.
        scores: float (N,).
        group: group of each box, int64 (N,).
        nms_threshold: largest IoU of two kept boxes of a group.

    Returns:
        Indices of the kept boxes, int64 (K,), best first; boxes of equal score in their order.
    """
    if not len(boxes):
        return group
    # A call costs some microseconds, and more with the square of its boxes. 200 boxes are fastest on a CPU; 25,000 is
    # torchvision's limit for GPUs.
    limit = 200 if boxes.device.type == "cpu" else 25_000
    order = torch.argsort(group, stable=True)
    ordered = group[order]
    # A call has all groups that start among the same ``limit`` boxes.
    call = torch.searchsorted(ordered, ordered) // limit
    sizes = [len(boxes)] if len(boxes) <= limit else torch.bincount(call).tolist()
    # The shift starts at 0 in each call: float64 then holds it and the coordinates to 1e-8 pixels.
    rank = F.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))
    rank = rank - rank[torch.searchsorted(call, call)]
    left, top, right, bottom = boxes[order].double().unbind(1)
    shift = rank * (right.amax() - left.amin() + 1)
    shifted = torch.stack([left + shift, top, right + shift, bottom], dim=1)
    calls = zip(order.split(sizes), shifted.split(sizes), scores[order].double().split(sizes), strict=True)
    kept = torch.cat([indices[nms(b, s, nms_threshold)] for indices, b, s in calls]).sort().values
    return kept[torch.argsort(scores[kept], descending=True, stable=True)]


def rank_in_group(group: Tensor) -> Tensor:
    """Count the earlier elements of the same group for each element: int64 (N,) for int64 (N,)."""
    order = torch.argsort(group, stable=True)
    ordered = group[order]
    rank = torch.arange(len(group), device=group.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter_(0, order, rank)
