"""Windows of an image: sampled to train a crop classifier, and on a regular grid to detect with it.

Glossary: B images, W windows per image, M objects per image, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from lightning_modules.components.boxes import constant_like, pad_targets, paired_iou

# Label of a window whose IoU is too low for an object and too high for background.
IGNORE_LABEL = -100

# --- training -----------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """Training windows of a batch.

    Attributes:
        boxes: float32 (B, W, 4), xyxy in pixels, within the image.
        labels: int64 (B, W). The class of the object with the highest IoU if it is 0.5 or more, C (background) if it is
            below 0.3, `IGNORE_LABEL` otherwise.
        box_targets: that object's box relative to the window, float32 (B, W, 4), xyxy; the window itself is
            (0, 0, 1, 1). Arbitrary for images without objects.
    """

    boxes: Tensor
    labels: Tensor
    box_targets: Tensor


def sample_windows(
    target: Sequence[dict[str, Tensor]],
    image_sizes: Tensor,
    num_classes: int,
    windows_per_image: int,
    positive_fraction: float,
    side_range: tuple[Tensor, Tensor],
    aspect_ratios: Sequence[float],
) -> Windows:
    """Sample windows for training.

    Draw eight candidates per window, half of them near an object and half anywhere. Keep up to ``positive_fraction``
    of the windows from those with an IoU of at least 0.5; fill the rest with background.

    Args:
        target: one dict per image: ``boxes`` float (M, 4), xyxy in pixels, ``labels`` int64 (M,).
        image_sizes: (width, height) of each image in pixels, float (B, 2).
        num_classes: number of classes, C.
        windows_per_image: number of windows, W.
        positive_fraction: largest fraction of windows that show an object, 0..1.
        side_range: smallest and largest side of a window (square root of its area) in pixels, float (B, 1) each.
        aspect_ratios: width / height of the windows.
    """
    device, images, half = image_sizes.device, len(target), 4 * windows_per_image
    gt_boxes, gt_labels = pad_targets(target)
    counts = torch.tensor([[len(t["boxes"])] for t in target]).to(device, non_blocking=True)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(images, half, *shape, device=device) * (high - low) + low

    # Candidates near a random object: its size within a factor of e^0.5, its center within half a side.
    picked = torch.minimum((uniform(0, 1) * counts).long(), (counts - 1).clamp_min(0))
    objects = gt_boxes.gather(1, picked[..., None].expand(-1, -1, 4))
    min_side, max_side = side_range
    near_side = ((objects[..., 2:] - objects[..., :2]).prod(2).sqrt() * uniform(-0.5, 0.5).exp()).clamp(*side_range)
    near_center = (objects[..., :2] + objects[..., 2:]) / 2 + uniform(-0.5, 0.5, 2) * near_side[..., None]
    # Candidates anywhere, of any side; all of them in images without objects.
    any_side = min_side * (max_side / min_side) ** uniform(0, 1)
    any_center = uniform(0, 1, 2) * image_sizes[:, None]
    near_side = torch.where(counts > 0, near_side, any_side)
    near_center = torch.where(counts[..., None] > 0, near_center, uniform(0, 1, 2) * image_sizes[:, None])
    side, center = torch.cat([near_side, any_side], 1), torch.cat([near_center, any_center], 1)
    roots = constant_like(aspect_ratios, image_sizes).sqrt()
    root = roots[torch.randint(len(aspect_ratios), side.shape, device=device)]
    extent = torch.minimum(torch.stack([side * root, side / root], 2), image_sizes[:, None])
    corner = torch.minimum((center - extent / 2).clamp_min(0), image_sizes[:, None] - extent)
    boxes = torch.cat([corner, corner + extent], 2)

    iou, matched = paired_iou(boxes[:, :, None], gt_boxes[:, None]).max(2)
    is_object, is_background = iou >= 0.5, iou < 0.3
    positive = is_object & (is_object.cumsum(1) <= round(positive_fraction * windows_per_image))
    # Take positives first, then background, then any other; in random order within each.
    priority = torch.rand(iou.shape, device=device) + torch.where(positive, 2, torch.where(is_background, 1, 0))
    chosen = priority.topk(windows_per_image, dim=1).indices
    background = torch.where(is_background, num_classes, IGNORE_LABEL)
    labels = torch.where(is_object, gt_labels.gather(1, matched), background).gather(1, chosen)
    boxes = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    objects = gt_boxes.gather(1, matched.gather(1, chosen)[..., None].expand(-1, -1, 4))
    corner, extent = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    return Windows(boxes, labels, (objects - corner.repeat(1, 1, 2)) / extent.repeat(1, 1, 2))


def crop_windows(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop and resize windows.

    Args:
        images: float (B, 3, H, W).
        boxes: float (B, W, 4), xyxy in pixels.
        size: side of the crops in pixels.

    Returns:
        Crops, float (B * W, 3, size, size).
    """
    return roi_align(images.contiguous(), list(boxes), size, aligned=True)


# --- detection ----------------------------------------------------------------------------------------------------


def resize_to_window_grid(images: Tensor, height: float, width: float, window_size: int, stride: int) -> Tensor:
    """Resize images to about (height, width), so that windows at multiples of the stride cover them to the edge."""
    sides = [window_size + stride * max(0, round((side - window_size) / stride)) for side in (height, width)]
    return F.interpolate(images, sides, mode="bilinear", antialias=True)


def window_grid(resized: Tensor, height: int, width: int, window_size: int, stride: int) -> Tensor:
    """Return the windows at multiples of the stride of resized images, in pixels of the original images.

    Args:
        resized: (B, 3, h, w), see `resize_to_window_grid`.
        height: height of the original images in pixels.
        width: width of the original images in pixels.
        window_size: side of a window in pixels of the resized images.
        stride: distance of two windows in pixels of the resized images.

    Returns:
        Boxes, float32 (rows, columns, 4), xyxy.
    """
    sides = zip(resized.shape[-2:], (height, width), strict=True)
    (top, box_height), (left, box_width) = (
        (torch.arange(0, new - window_size + 1, stride, device=resized.device) * (old / new), window_size * old / new)
        for new, old in sides
    )
    y, x = torch.meshgrid(top, left, indexing="ij")
    return torch.stack([x, y, x + box_width, y + box_height], 2)


def scores_above(scores: Tensor, threshold: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Select the scores (B, C, rows, columns) above a threshold.

    Returns:
        The K scores, float (K,), and their (image, class, row, column), int64 (K,) each.
    """
    index: Any = (scores > threshold).nonzero(as_tuple=True)
    return scores[index], index
