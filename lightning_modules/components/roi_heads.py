"""RoI heads of the R-CNN family: Girshick, "Fast R-CNN", ICCV 2015.

B images, P proposals and M objects per image, n regions of interest (RoIs) per image, C classes without background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool

from lightning_modules.components.backbones import Backbone, make_head
from lightning_modules.components.boxes import (
    batched_box_iou,
    decode_boxes,
    encode_boxes,
    non_maximum_suppression,
    pad_targets,
    sample_balanced,
)

RoIPooling = Literal["pool", "align"]
# py-faster-rcnn's constants. The paper normalizes the deltas by the statistics of the training set, class by class.
ROI_BOX_STD = (0.1, 0.1, 0.2, 0.2)

# --- network ----------------------------------------------------------------------------------------------------------


class RoIHeads(nn.Module):
    """RoI pooling, fully connected layers or a ResNet's conv5, and linear layers for classes and box deltas.

    Args:
        backbone: see `make_trunk`.
        in_channels: channels of the feature maps, C'.
        strides: stride of each feature map in pixels.
        num_classes: C.
        width_multiplier: see `make_trunk`.
        freeze_backbone: see `make_trunk`.
        pooling: ``pool`` is the paper's maximum over whole cells, ``align`` interpolates (He et al. 2017). Feature
            pyramids always use ``align``, each RoI on the map of its size (Lin et al. 2017, equation 1).
    """

    # Limits memory in evaluation, where an image has up to 2,000 proposals.
    rois_per_chunk = 500

    def __init__(
        self,
        backbone: Backbone,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        width_multiplier: float,
        freeze_backbone: bool,
        pooling: RoIPooling,
    ) -> None:
        super().__init__()
        self.strides, self.pooling = tuple(strides), pooling
        self.head, features, self.pool_size = make_head(backbone, in_channels, width_multiplier, freeze_backbone)
        self.classifier = nn.Linear(features, 1 + num_classes)
        self.regressor = nn.Linear(features, 4 * (1 + num_classes))
        for layer, std in ((self.classifier, 0.01), (self.regressor, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Classify RoIs and regress their boxes for every class, background first.

        Args:
            maps: feature maps, float32 (B, C', h, w), one per stride.
            boxes: RoIs, float32 (B, n, 4), xyxy in pixels.

        Returns:
            Logits, float32 (B, n, 1 + C), and deltas, float32 (B, n, 1 + C, 4), see `encode_boxes`.
        """
        chunks = [boxes] if self.training else boxes.split(self.rois_per_chunk, dim=1)
        features = torch.cat([self.head(self.pool(maps, chunk)).unflatten(0, chunk.shape[:2]) for chunk in chunks], 1)
        return self.classifier(features).float(), self.regressor(features).float().unflatten(2, (-1, 4))

    def pool(self, maps: list[Tensor], boxes: Tensor, pool_size: int | None = None) -> Tensor:
        """Pool each RoI to one size.

        Args:
            maps: see `forward`.
            boxes: see `forward`.
            pool_size: side of the result in cells; None for that of the head.

        Returns:
            Features, float32 (B * n, C', pool_size, pool_size).
        """
        pool_size = pool_size or self.pool_size
        if len(maps) > 1:
            # The coarsest of the five maps is for proposals only.
            align = MultiScaleRoIAlign([str(i) for i in range(4)], pool_size, sampling_ratio=2)
            height, width = (cells * self.strides[0] for cells in maps[0].shape[-2:])
            return align({str(i): m for i, m in enumerate(maps)}, list(boxes), [(height, width)] * len(boxes))
        if self.pooling == "align":
            return roi_align(maps[0], list(boxes), pool_size, 1 / self.strides[0], sampling_ratio=2, aligned=True)
        # roi_pool includes the cell of the lower right corner: give it the last pixel.
        inclusive = torch.cat([boxes[..., :2], boxes[..., 2:] - 1], 2)
        return roi_pool(maps[0], list(inclusive), pool_size, 1 / self.strides[0])


# --- target encoding --------------------------------------------------------------------------------------------------


class SampledRoIs(NamedTuple):
    """RoIs sampled for training, positives first, and their targets.

    Attributes:
        boxes: float32 (B, n, 4), xyxy in pixels.
        valid: bool (B, n), False for padding.
        labels: the paper's u, int64 (B, n): 0 for background, else 1 + the object's label.
        deltas: the paper's v, float32 (B, n, 4), see `encode_boxes`; undefined for background.
        object_indices: index of the matched object in its image, int64 (B, n); undefined for background.
    """

    boxes: Tensor
    valid: Tensor
    labels: Tensor
    deltas: Tensor
    object_indices: Tensor


def sample_rois(
    proposals: Tensor,
    valid: Tensor,
    target: Sequence[dict[str, Tensor]],
    rois_per_image: int,
    positive_fraction: float = 0.25,
    fg_iou_threshold: float = 0.5,
    bg_iou_min: float = 0.0,
) -> SampledRoIs:
    """Sample RoIs for training (section 2.3). The ground-truth boxes are added to the proposals.

    Args:
        proposals: float (B, P, 4), xyxy in pixels, without gradients.
        valid: bool (B, P), False for padding.
        target: one dict per image with ``boxes`` float (M, 4), xyxy in pixels, and ``labels`` int64 (M,).
        rois_per_image: number of RoIs, n; fewer if there are not enough proposals.
        positive_fraction: largest fraction of positives, 0..1.
        fg_iou_threshold: smallest IoU of a positive RoI with an object; the IoU of background is lower.
        bg_iou_min: smallest IoU of background with an object; the paper's 0.1 selects hard negatives. It is 0 in images
            without objects.
    """
    gt_boxes, gt_labels = pad_targets(target)
    is_object = (gt_boxes[..., 2:] > gt_boxes[..., :2]).all(2)
    boxes, valid = torch.cat([proposals, gt_boxes], 1), torch.cat([valid, is_object], 1)
    best_iou, best_object = batched_box_iou(gt_boxes, boxes).max(1)
    bg_iou = torch.where(is_object.any(1, keepdim=True), bg_iou_min, 0.0)
    positive = valid & (best_iou >= fg_iou_threshold)
    negative = valid & (best_iou < fg_iou_threshold) & (best_iou >= bg_iou)
    sample = sample_balanced(positive, negative, rois_per_image, positive_fraction)
    boxes = boxes.gather(1, sample.indices[..., None].expand(-1, -1, 4))
    best_object = best_object.gather(1, sample.indices)
    labels = torch.where(sample.positive, gt_labels.gather(1, best_object) + 1, 0)
    matched = gt_boxes.gather(1, best_object[..., None].expand(-1, -1, 4))
    return SampledRoIs(boxes, sample.valid, labels, encode_boxes(matched, boxes, ROI_BOX_STD), best_object)


# --- loss -------------------------------------------------------------------------------------------------------------


def fast_rcnn_loss(logits: Tensor, deltas: Tensor, rois: SampledRoIs, box_weight: float = 1.0) -> dict[str, Tensor]:
    """Compute equation 1, L_cls(p, u) + lambda [u >= 1] L_loc(t^u, v), averaged over the RoIs of the batch.

    Args:
        logits: float (B, n, 1 + C).
        deltas: float (B, n, 1 + C, 4).
        rois: the RoIs and their targets.
        box_weight: lambda.

    Returns:
        ``class``, the log loss of the true class, and ``box``, lambda times the smooth L1 loss (equation 3) of the true
        class's deltas; scalars.
    """
    count = rois.valid.sum().clamp_min(1)
    entropy = F.cross_entropy(logits.flatten(0, 1), rois.labels.flatten(), reduction="none").view_as(rois.labels)
    class_deltas = deltas.gather(2, rois.labels[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    smooth_l1 = F.smooth_l1_loss(class_deltas, rois.deltas, reduction="none").sum(2)
    return {
        "class": torch.where(rois.valid, entropy, 0).sum() / count,
        "box": box_weight * torch.where(rois.valid & (rois.labels > 0), smooth_l1, 0).sum() / count,
    }


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode_detections(
    logits: Tensor,
    deltas: Tensor,
    boxes: Tensor,
    valid: Tensor,
    sizes: Tensor,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.3,
    detections_per_image: int = 100,
) -> list[dict[str, Tensor]]:
    """Decode detections; each RoI is a candidate for every class whose score is above the threshold.

    Args:
        logits: float (B, n, 1 + C).
        deltas: float (B, n, 1 + C, 4).
        boxes: RoIs, float (B, n, 4), xyxy in pixels.
        valid: bool (B, n), False for padding.
        sizes: (width, height) of the images in pixels, float (B, 2).
        score_threshold: detections have a higher score.
        nms_threshold: largest IoU of two detections of one class.
        detections_per_image: largest number of detections per image.

    Returns:
        One dict per image with ``boxes`` float (K, 4), xyxy in pixels, ``scores`` float (K,) and ``labels`` int64 (K,),
        best first.
    """
    decoded = decode_boxes(deltas[:, :, 1:], boxes[:, :, None], ROI_BOX_STD)
    decoded = torch.minimum(decoded.clamp_min(0), sizes.repeat(1, 2)[:, None, None])
    scores = logits.softmax(2)[..., 1:]
    image, roi, label = ((scores > score_threshold) & valid[..., None]).nonzero(as_tuple=True)
    return non_maximum_suppression(
        decoded[image, roi, label],
        scores[image, roi, label],
        label,
        image,
        len(boxes),
        nms_threshold,
        keep_top_k=detections_per_image,
    )
