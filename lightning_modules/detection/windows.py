"""Windows of an image: drawn at random to train a classifier of crops on, and at every place to detect with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import roi_align

from lightning_modules.components.boxes import paired_iou

NEITHER = -100  # label of a window that is too far off for an object and too near for background

# --- training -----------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """n windows of each of B images and what is to be said of them.

    Attributes:
        boxes: float32 (B,n,4) xyxy in pixels, within the image.
        label: int64 (B,n): the class of the object that the window overlaps most, with an IoU of 0.5 or more; C, for
            background, where no object is overlapped by 0.3; `NEITHER`.
        target: float32 (B,n,4), that object's box relative to the window: (0, 0, 1, 1) is the window itself. Without
            meaning where there is no object.
    """

    boxes: Tensor
    label: Tensor
    target: Tensor


def draw_windows(
    target: Sequence[dict[str, Tensor]],
    size: Tensor,
    num_classes: int,
    count: int,
    positive: float,
    sides: tuple[Tensor, Tensor],
    aspects: Sequence[float],
) -> Windows:
    """Draws windows from torch's default generator, which is seeded at each training step.

    Eight candidates a window are drawn, half of them near objects and half anywhere; of those that have an IoU of 0.5
    with an object, a share of ``positive`` is taken, or as many as there are, and of the others background.

    Args:
        target: boxes float (M,4) xyxy in pixels and labels int64 (M,) of each of B images.
        size: float (B,2), width and height of the images in pixels.
        num_classes: C.
        count: n, windows an image.
        positive: 0..1, see above.
        sides: the least and the greatest side of a window in pixels, float (B,1) each: the root of its area.
        aspects: width / height that windows may have.
    """
    device, images, half = size.device, len(target), 4 * count
    # One more than there are, without area, so that an image without objects is nothing special.
    objects = F.pad(pad_sequence([t["boxes"].float() for t in target], batch_first=True), (0, 0, 0, 1))
    labels = F.pad(pad_sequence([t["labels"] for t in target], batch_first=True), (0, 1))
    known = torch.tensor([[len(t["boxes"])] for t in target]).to(device, non_blocking=True)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(images, half, *shape, device=device) * (high - low) + low

    picked = torch.minimum((uniform(0, 1) * known).long(), (known - 1).clamp_min(0))
    of = objects.gather(1, picked[..., None].expand(-1, -1, 4))
    low, high = sides
    near = ((of[..., 2:] - of[..., :2]).prod(2).sqrt() * uniform(-0.5, 0.5).exp()).clamp(low, high)
    near_center = (of[..., :2] + of[..., 2:]) / 2 + uniform(-0.5, 0.5, 2) * near[..., None]
    anywhere = low * (high / low) ** uniform(0, 1)
    anywhere_center = uniform(0, 1, 2) * size[:, None]
    near = torch.where(known > 0, near, anywhere)
    near_center = torch.where(known[..., None] > 0, near_center, uniform(0, 1, 2) * size[:, None])
    side, center = torch.cat([near, anywhere], 1), torch.cat([near_center, anywhere_center], 1)
    root = size.new_tensor(aspects).sqrt()[torch.randint(len(aspects), side.shape, device=device)]
    extent = torch.minimum(torch.stack([side * root, side / root], 2), size[:, None])
    corner = torch.minimum((center - extent / 2).clamp_min(0), size[:, None] - extent)
    boxes = torch.cat([corner, corner + extent], 2)

    pairs = torch.broadcast_tensors(boxes[:, :, None], objects[:, None])
    overlap = paired_iou(*(x.reshape(-1, 4) for x in pairs)).view(images, 2 * half, -1)
    best, which = overlap.max(2)
    is_object, is_background = best >= 0.5, best < 0.3
    wanted = is_object & (is_object.cumsum(1) <= round(positive * count))
    order = torch.rand(best.shape, device=device) + torch.where(wanted, 2, torch.where(is_background, 1, 0))
    chosen = order.topk(count, dim=1).indices
    label = torch.where(is_object, labels.gather(1, which), torch.where(is_background, num_classes, NEITHER))
    boxes, of = (x.gather(1, i[..., None].expand(-1, -1, 4)) for x, i in ((boxes, chosen), (objects, which)))
    of = of.gather(1, chosen[..., None].expand(-1, -1, 4))
    corner, extent = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    return Windows(boxes, label.gather(1, chosen), (of - corner.repeat(1, 1, 2)) / extent.repeat(1, 1, 2))


def cut(images: Tensor, boxes: Tensor, side: int) -> Tensor:
    """The windows as images of their own: float (B*n,3,side,side) of float (B,3,H,W) and boxes (B,n,4) in pixels."""
    number = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
    rois = torch.cat([number[:, None, None].expand(-1, boxes.shape[1], 1), boxes], 2)
    return roi_align(images.contiguous(), rois.flatten(0, 1), side, aligned=True)


# --- detection ----------------------------------------------------------------------------------------------------


def resize_to_fit(images: Tensor, height: float, width: float, window: int, stride: int) -> Tensor:
    """Images resized to about the given size: such that windows at multiples of the stride fill them to the edge."""
    sides = [window + stride * max(0, round((side - window) / stride)) for side in (height, width)]
    return F.interpolate(images, sides, mode="bilinear", antialias=True)


def places(resized: Tensor, height: int, width: int, window: int, stride: int) -> Tensor:
    """Windows at multiples of the stride of resized images, in the pixels of the images as they were.

    Args:
        resized: (B,3,h,w), see `resize_to_fit`.
        height, width: of the images as they were.

    Returns:
        float32 (rows,columns,4) xyxy.
    """
    sides = zip(resized.shape[-2:], (height, width), strict=True)
    (top, tall), (left, wide) = (
        (torch.arange(0, now - window + 1, stride, device=resized.device) * (was / now), window * was / now)
        for now, was in sides
    )
    y, x = torch.meshgrid(top, left, indexing="ij")
    return torch.stack([x, y, x + wide, y + tall], 2)


def above(scores: Tensor, threshold: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Scores (B,C,rows,columns) above the threshold: float (K,), and where: (image, class, row, column), int64 (K,)."""
    where: Any = (scores > threshold).nonzero(as_tuple=True)
    return scores[where], where
