"""Region proposal network: Ren, He, Girshick and Sun, "Faster R-CNN", NIPS 2015, section 3.1.

B images, A anchors per image (of all feature maps), n sampled anchors or proposals per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from errors import UserError
from lightning_modules.components.anchors import make_anchors
from lightning_modules.components.boxes import (
    Sample,
    batched_box_iou,
    decode_boxes,
    encode_boxes,
    grouped_nms,
    pad_targets,
    rank_in_group,
)

RPNLossNormalization = Literal["paper", "authors"]
RPN_BOX_STD = (1.0, 1.0, 1.0, 1.0)

# --- network ----------------------------------------------------------------------------------------------------------


class RPNOutput(NamedTuple):
    """Predictions for the anchors of all feature maps.

    Attributes:
        objectness: logits, float32 (B, A).
        deltas: see `encode_boxes`, float32 (B, A, 4).
        anchors: float32 (A, 4), xyxy in pixels; they may cross the image border.
        anchors_per_map: number of anchors of each feature map.
        num_cells: number of cells of all feature maps.
    """

    objectness: Tensor
    deltas: Tensor
    anchors: Tensor
    anchors_per_map: list[int]
    num_cells: int


class RegionProposalNetwork(nn.Module):
    """A 3x3 convolution and two 1x1 convolutions, for objectness and deltas, shared by all feature maps.

    The authors predict two logits per anchor with a softmax, which is equivalent to one logit with a sigmoid.

    Args:
        in_channels: channels of the feature maps.
        strides: stride of each feature map in pixels.
        sizes: square roots of the anchor areas in pixels; one per feature map if there are several.
        ratios: aspect ratios of the anchors, height / width.
    """

    def __init__(
        self, in_channels: int, strides: Sequence[int], sizes: Sequence[float], ratios: Sequence[float]
    ) -> None:
        super().__init__()
        num_maps = len(strides)
        if not sizes or not ratios or min(*sizes, *ratios) <= 0 or (num_maps > 1 and len(sizes) != num_maps):
            expected = f"{num_maps} positive numbers, one per feature map" if num_maps > 1 else "positive numbers"
            raise UserError(f"anchor_sizes: expected {expected}, found {list(sizes)} with anchor_ratios {list(ratios)}")
        self.strides, self.ratios = tuple(strides), tuple(ratios)
        self.sizes = tuple((size,) for size in sizes) if num_maps > 1 else (tuple(sizes),)
        # Torchvision initializes it as the authors do, with a standard deviation of 0.01.
        self.head = RPNHead(in_channels, len(self.sizes[0]) * len(ratios))

    def forward(self, maps: list[Tensor]) -> RPNOutput:
        """Predict objectness and deltas for feature maps (B, C, h, w), one per stride."""
        logits, deltas = self.head(maps)
        anchors = [
            make_anchors(sizes, self.ratios, stride, m.shape[-2:], m.device)
            for sizes, stride, m in zip(self.sizes, self.strides, maps, strict=True)
        ]
        batch = len(logits[0])
        return RPNOutput(
            torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1) for level in logits], 1).float(),
            torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in deltas], 1).float(),
            torch.cat(anchors),
            [len(level) for level in anchors],
            sum(m.shape[-2] * m.shape[-1] for m in maps),
        )


# --- target encoding --------------------------------------------------------------------------------------------------


class RPNTargets(NamedTuple):
    """Targets of all anchors. Anchors that are neither positive nor negative are ignored.

    Attributes:
        positive: bool (B, A).
        negative: bool (B, A).
        deltas: see `encode_boxes`, float32 (B, A, 4); undefined for anchors that are not positive.
    """

    positive: Tensor
    negative: Tensor
    deltas: Tensor


def encode_rpn_targets(
    target: Sequence[dict[str, Tensor]],
    anchors: Tensor,
    sizes: Tensor,
    fg_iou_threshold: float = 0.7,
    bg_iou_threshold: float = 0.3,
    allow_border_anchors: bool = False,
) -> RPNTargets:
    """Label anchors as positive, negative or ignored (section 3.1.2).

    An anchor is positive if its IoU with an object is at least ``fg_iou_threshold``, or the highest of all anchors. It
    is negative if its IoU with all objects is below ``bg_iou_threshold``.

    Args:
        target: one dict per image with ``boxes`` float (M, 4), xyxy in pixels, and ``labels`` int64 (M,).
        anchors: float (A, 4), xyxy in pixels.
        sizes: (width, height) of the images in pixels, float (B, 2).
        fg_iou_threshold: smallest IoU of positive anchors.
        bg_iou_threshold: IoU below which anchors are negative.
        allow_border_anchors: use anchors that cross the image border; the paper ignores them.
    """
    gt_boxes, _ = pad_targets(target)
    iou = batched_box_iou(gt_boxes, anchors)
    used = torch.ones_like(iou[:, 0], dtype=torch.bool)
    if not allow_border_anchors:
        used = ((anchors[:, :2] >= 0) & (anchors[:, 2:] <= sizes[:, None])).all(2)
        iou = torch.where(used[:, None], iou, 0)
    best_iou, best_object = iou.max(1)
    highest = iou.amax(2, keepdim=True)
    positive = (best_iou >= fg_iou_threshold) | ((iou == highest) & (highest > 0)).any(1)
    matched = gt_boxes.gather(1, best_object[..., None].expand(-1, -1, 4))
    negative = used & ~positive & (best_iou < bg_iou_threshold)
    return RPNTargets(positive, negative, encode_boxes(matched, anchors, RPN_BOX_STD))


# --- loss -------------------------------------------------------------------------------------------------------------


def rpn_loss(
    output: RPNOutput,
    targets: RPNTargets,
    sample: Sample,
    normalization: RPNLossNormalization = "paper",
    box_weight: float = 10.0,
) -> dict[str, Tensor]:
    """Compute equation 1, averaged over the images:

        1 / N_cls * sum L_cls(p, p*) + lambda / N_reg * sum p* L_reg(t, t*)

    L_cls is the log loss of the sampled anchors, L_reg the smooth L1 loss of the positive ones.

    - ``paper``: N_cls is the number of sampled anchors per image (256), N_reg the number of cells (about 2,400).
    - ``authors``: both are the number of valid samples in the batch (py-faster-rcnn has one image per batch). Lambda is
      1, and smooth L1 changes from quadratic to linear at 1/9 (sigma 3).

    Args:
        output: predictions.
        targets: targets of all anchors.
        sample: the sampled anchors.
        normalization: ``paper`` or ``authors``.
        box_weight: lambda, for ``paper`` only.

    Returns:
        ``rpn_class`` and ``rpn_box``, scalars.
    """
    logits = output.objectness.gather(1, sample.indices)
    indices = sample.indices[..., None].expand(-1, -1, 4)
    smooth_l1 = F.smooth_l1_loss(
        output.deltas.gather(1, indices),
        targets.deltas.gather(1, indices),
        reduction="none",
        beta=1.0 if normalization == "paper" else 1 / 9,
    ).sum(2)
    entropy = F.binary_cross_entropy_with_logits(logits, sample.positive.float(), reduction="none")
    class_loss = torch.where(sample.valid, entropy, 0).sum()
    box_loss = torch.where(sample.positive, smooth_l1, 0).sum()
    if normalization == "authors":
        num_valid = sample.valid.sum().clamp_min(1)
        return {"rpn_class": class_loss / num_valid, "rpn_box": box_loss / num_valid}
    num_images = len(logits)
    return {
        "rpn_class": class_loss / sample.indices.numel(),
        "rpn_box": box_weight * box_loss / (num_images * output.num_cells),
    }


# --- decoding ---------------------------------------------------------------------------------------------------------


class Proposals(NamedTuple):
    """Proposals of each image, best first, padded to n.

    Attributes:
        boxes: float32 (B, n, 4), xyxy in pixels, clipped to the image; padding is 0.
        scores: objectness, float32 (B, n), 0..1; padding is -1.
    """

    boxes: Tensor
    scores: Tensor

    @property
    def valid(self) -> Tensor:
        """Bool (B, n), False for padding."""
        return self.scores >= 0


def decode_proposals(
    output: RPNOutput,
    sizes: Tensor,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_threshold: float = 0.7,
    min_size: float | Tensor = 16.0,
) -> Proposals:
    """Decode anchors, clip them to the image, and suppress duplicates of the best of each feature map. No gradients.

    Small boxes are dropped before the best are selected (py-faster-rcnn, lib/rpn/proposal_layer.py). Only the
    suppression waits for the device; the rest does not depend on the number of proposals.

    Args:
        output: predictions.
        sizes: (width, height) of the images in pixels, float (B, 2).
        pre_nms_top_n: anchors of each feature map that enter the suppression, best first.
        post_nms_top_n: proposals kept per image, best first, n.
        nms_threshold: largest IoU of two proposals of one feature map (maps are separate, as in Lin et al. 2017).
        min_size: smallest width and height of a proposal in pixels; one for all images, or float (B, 1).
    """
    objectness, deltas = output.objectness.detach(), output.deltas.detach()
    num_images = len(objectness)
    boxes = decode_boxes(deltas, output.anchors, RPN_BOX_STD)
    boxes = torch.minimum(boxes.clamp_min(0), sizes.repeat(1, 2)[:, None])
    # Small boxes become padding: sorted last and without area. So do the nan of a diverged run, because RoI pooling
    # would crash on them.
    keep = ((boxes[..., 2:] - boxes[..., :2]).amin(2) >= min_size) & objectness.isfinite()
    scores, boxes = torch.where(keep, objectness.sigmoid(), -1), torch.where(keep[..., None], boxes, 0)
    # The logits decide, because scores near 1 are equal in float32.
    logits = objectness.masked_fill(~keep, -torch.inf)
    best, start = [], 0
    for count in output.anchors_per_map:
        best.append(logits[:, start : start + count].topk(min(pre_nms_top_n, count), dim=1).indices + start)
        start += count
    indices = torch.cat(best, 1)
    level = torch.cat([torch.full_like(b, i) for i, b in enumerate(best)], 1)
    scores, boxes = scores.gather(1, indices), boxes.gather(1, indices[..., None].expand(-1, -1, 4))
    image = torch.arange(num_images, device=boxes.device)[:, None].expand_as(scores)
    kept = grouped_nms(boxes.flatten(0, 1), scores.flatten(), (level * num_images + image).flatten(), nms_threshold)
    row = image.flatten()[kept]
    # Proposals beyond post_nms_top_n go to one extra column, which is cut off.
    position = row, rank_in_group(row).clamp_max(post_nms_top_n)
    padded_boxes = boxes.new_zeros(num_images, post_nms_top_n + 1, 4)
    padded_scores = scores.new_full((num_images, post_nms_top_n + 1), -1)
    padded_boxes = padded_boxes.index_put(position, boxes.flatten(0, 1)[kept])
    padded_scores = padded_scores.index_put(position, scores.flatten()[kept])
    return Proposals(padded_boxes[:, :post_nms_top_n], padded_scores[:, :post_nms_top_n])
