"""RoI heads of the R-CNN family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool

from lightning_modules.components.backbones import Backbone, Trunk, make_head
from lightning_modules.components.boxes import (
    batched_box_iou,
    decode_boxes,
    encode_boxes,
    non_maximum_suppression,
    pad_targets,
    sample_balanced,
)

Pooling = Literal["pool", "align"]


class RegionNetwork(nn.Module):
    """What looks at regions: pooling, fully connected layers (or a ResNet's conv5), and two layers side by side.

    Args:
        backbone, width, frozen: see `make_head`.
        trunk: what computes the maps.
        num_classes: C.
        pooling: ``pool`` is the paper's, the maximum of whole cells of the map; ``align`` interpolates (He et al.
            2017). A pyramid is always aligned, each region on the map of its size (Lin et al. 2017, equation 1).
    """

    # In evaluation, where two thousand proposals an image would not fit into memory.
    at_once = 500

    def __init__(
        self, backbone: Backbone, trunk: Trunk, num_classes: int, width: float, frozen: bool, pooling: Pooling
    ) -> None:
        super().__init__()
        self.strides, self.pooling, self.num_classes = trunk.strides, pooling, num_classes
        self.head, features, self.side = make_head(backbone, trunk.channels, width, frozen)
        self.classifier = nn.Linear(features, 1 + num_classes)
        self.regressor = nn.Linear(features, 4 * (1 + num_classes))
        for layer, deviation in ((self.classifier, 0.01), (self.regressor, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Of each region 1+C logits and for each class, background first, four offsets.

        Args:
            maps: float32 (B,C,h,w), one a stride.
            boxes: float32 (B,n,4) xyxy in pixels.

        Returns:
            float32 (B,n,1+C) and float32 (B,n,1+C,4), see `encode_boxes`.
        """
        parts = [boxes] if self.training else boxes.split(self.at_once, dim=1)
        features = torch.cat([self.head(self.pool(maps, b)).unflatten(0, b.shape[:2]) for b in parts], 1)
        return self.classifier(features).float(), self.regressor(features).float().unflatten(2, (-1, 4))

    def pool(self, maps: list[Tensor], boxes: Tensor, side: int | None = None) -> Tensor:
        """The regions, each pooled to the same size: float32 (B*n,C,side,side); None is the head's side."""
        side = side or self.side
        if len(maps) > 1:
            # Of the pyramid's five maps the coarsest is for proposals only.
            aligned = MultiScaleRoIAlign([str(i) for i in range(4)], side, sampling_ratio=2)
            height, width = (cells * self.strides[0] for cells in maps[0].shape[-2:])
            return aligned({str(i): m for i, m in enumerate(maps)}, list(boxes), [(height, width)] * len(boxes))
        number = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None]
        number = number.expand(-1, boxes.shape[1], 1)
        if self.pooling == "align":
            rois = torch.cat([number, boxes], 2).flatten(0, 1)
            return roi_align(maps[0], rois, side, 1 / self.strides[0], sampling_ratio=2, aligned=True)
        # The layer's boxes end with their last pixel.
        rois = torch.cat([number, boxes[..., :2], boxes[..., 2:] - 1], 2).flatten(0, 1)
        return roi_pool(maps[0], rois, side, 1 / self.strides[0])


# The offsets are divided by these. The paper measures mean and deviation of the training set's, class by class;
# py-faster-rcnn fixes them.
DEVIATIONS = (0.1, 0.1, 0.2, 0.2)


class Regions(NamedTuple):
    """n regions of each of B images and what is to be said of them, those with an object first.

    Attributes:
        boxes: float32 (B,n,4) xyxy in pixels.
        taken: bool (B,n): False fills up where there are too few; it is not learned from.
        label: int64 (B,n), the paper's u: 0 for background, else 1 + the object's.
        offset: float32 (B,n,4), the paper's v, see `encode_boxes`; of the background without meaning.
        object: int64 (B,n), which of the image's objects it is; of the background without meaning.
    """

    boxes: Tensor
    taken: Tensor
    label: Tensor
    offset: Tensor
    object: Tensor


def draw_regions(
    proposals: Tensor,
    there: Tensor,
    target: Sequence[dict[str, Tensor]],
    count: int,
    share: float = 0.25,
    background: float = 0.0,
) -> Regions:
    """Regions to learn from (section 2.3): of each image up to ``share`` of ``count`` that have an IoU of 0.5 or more
    with an object; the others are background, with an IoU below. The objects' own boxes are proposals too.

    Args:
        proposals: float (B,P,4) xyxy in pixels, no gradient.
        there: bool (B,P), where there is one.
        target: boxes float (M,4) xyxy in pixels and labels int64 (M,) of each image.
        count: n; less if there are fewer.
        share: 0..1.
        background: least IoU of background; the paper's 0.1 picks harder ones. Of an image without objects it is 0.
    """
    objects, labels = pad_targets(target)
    known = (objects[..., 2:] > objects[..., :2]).all(2)
    boxes, there = torch.cat([proposals, objects], 1), torch.cat([there, known], 1)
    best, chosen = batched_box_iou(objects, boxes).max(1)
    least = torch.where(known.any(1, keepdim=True), background, 0.0)
    drawn = sample_balanced(there & (best >= 0.5), there & (best < 0.5) & (best >= least), count, share)
    index = drawn.indices[..., None].expand(-1, -1, 4)
    boxes, chosen = boxes.gather(1, index), chosen.gather(1, drawn.indices)
    label = torch.where(drawn.positive, labels.gather(1, chosen) + 1, 0)
    truth = objects.gather(1, chosen[..., None].expand(-1, -1, 4))
    return Regions(boxes, drawn.valid, label, encode_boxes(truth, boxes, DEVIATIONS), chosen)


def fast_rcnn_loss(logits: Tensor, offset: Tensor, regions: Regions, box_weight: float = 1.0) -> dict[str, Tensor]:
    """Equation 1, L_cls(p, u) + lambda [u >= 1] L_loc(t^u, v), the mean over all regions of the batch:

    - ``class``: the log loss of the true class.
    - ``box``: smooth L1 (equation 3) of the true class's four offsets, times lambda.

    Args:
        logits: float (B,n,1+C).
        offset: float (B,n,1+C,4).
        regions: see `draw_regions`.
        box_weight: lambda.
    """
    count = regions.taken.sum().clamp_min(1)
    entropy = F.cross_entropy(logits.flatten(0, 1), regions.label.flatten(), reduction="none").view_as(regions.label)
    own = offset.gather(2, regions.label[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    errors = F.smooth_l1_loss(own, regions.offset, reduction="none").sum(2)
    return {
        "class": torch.where(regions.taken, entropy, 0).sum() / count,
        "box": box_weight * torch.where(regions.taken & (regions.label > 0), errors, 0).sum() / count,
    }


def decode(
    logits: Tensor,
    offset: Tensor,
    boxes: Tensor,
    there: Tensor,
    size: Tensor,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.3,
) -> list[dict[str, Tensor]]:
    """What was found: for each image ``boxes`` float (K,4) xyxy in pixels, ``scores`` and ``labels``, best first.

    A proposal has a score for every class; at most 100 boxes an image are left.

    Args:
        logits: float (B,n,1+C).
        offset: float (B,n,1+C,4).
        boxes: float (B,n,4) xyxy in pixels, the proposals.
        there: bool (B,n), where there is one.
        size: float (B,2), width and height of the images in pixels.
        score_threshold, nms_threshold: the authors' for VOC.
    """
    moved = decode_boxes(offset[:, :, 1:], boxes[:, :, None], DEVIATIONS)
    moved = torch.minimum(moved.clamp_min(0), size.repeat(1, 2)[:, None, None])
    scores = logits.softmax(2)[..., 1:]
    image, region, label = ((scores > score_threshold) & there[..., None]).nonzero(as_tuple=True)
    found, found_scores = moved[image, region, label], scores[image, region, label]
    return non_maximum_suppression(found, found_scores, label, image, len(boxes), nms_threshold, keep_top_k=100)
