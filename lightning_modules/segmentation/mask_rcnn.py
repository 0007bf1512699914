"""Mask R-CNN: He, Gkioxari, Dollar and Girshick, "Mask R-CNN", ICCV 2017.

Faster R-CNN with a third branch, a small fully convolutional network that segments the object of an RoI. It predicts
one mask per class; the class is decided by the RoI heads, so that masks do not compete.

B images, n RoIs and M objects per image, K detections of an image, C classes, masks of S x S cells (28).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from errors import UserError
from lightning_modules.components.average_precision import APMethod
from lightning_modules.components.boxes import constant_like
from lightning_modules.components.roi_heads import SampledRoIs

# The one import between case studies: in the paper as in the code, Mask R-CNN is Faster R-CNN with one more branch.
from lightning_modules.detection.faster_rcnn import BranchedRCNN
from lightning_modules.segmentation.metrics import instance_metrics

MASK_SIZE = 28

# --- network ------------------------------------------------------------------------------------------------------


class MaskBranch(nn.Sequential):
    """The branch of figure 4, right: pooled features (N, in_channels, 14, 14) to logits (N, 1 + C, 28, 28).

    Four 3x3 convolutions, a transposed convolution that doubles the size, and a 1x1 convolution with one channel per
    class, background first. On conv4 of a ResNet the paper's branch shares conv5 with the RoI heads; this branch is the
    same for all backbones.

    Args:
        in_channels: channels of the feature maps.
        num_classes: C.
        width_multiplier: scales the 256 channels.
    """

    def __init__(self, in_channels: int, num_classes: int, width_multiplier: float) -> None:
        channels = max(1, round(256 * width_multiplier))
        head = MaskRCNNHeads(in_channels, [channels] * 4, dilation=1)
        predictor = MaskRCNNPredictor(channels, channels, 1 + num_classes)
        super().__init__(OrderedDict[str, nn.Module](head=head, predictor=predictor))


# --- target encoding ----------------------------------------------------------------------------------------------


def crop_masks(target: Sequence[dict[str, Tensor]], boxes: Tensor, object_indices: Tensor) -> Tensor:
    """Crop the masks of objects to RoIs; a cell is foreground if at least half of it is.

    Args:
        target: one dict per image with ``masks`` uint8 (M, H, W), 0 and 1.
        boxes: RoIs, float32 (B, n, 4), xyxy in pixels.
        object_indices: index of each RoI's object in its image, int64 (B, n). The result is undefined if there is no
            such object.

    Returns:
        Masks, bool (B, n, 28, 28).
    """
    masks = [entry["masks"] for entry in target]
    height, width = (max(m.shape[axis] for m in masks) for axis in (1, 2))
    padded = [F.pad(m, (0, width - m.shape[2], 0, height - m.shape[1])) for m in masks]
    # One extra mask avoids a special case for batches without objects.
    stacked = torch.cat([*padded, padded[0].new_zeros(1, height, width)])
    counts = torch.tensor([0, *(len(m) for m in masks)])
    first = counts.cumsum(0)[:-1, None].to(boxes.device, non_blocking=True)
    index = (first + object_indices).clamp_max(len(stacked) - 1)
    rois = torch.cat([index[..., None].to(boxes), boxes], 2).flatten(0, 1)
    crops = roi_align(stacked[:, None].float(), rois, MASK_SIZE, aligned=True)
    return (crops >= 0.5).view(*object_indices.shape, MASK_SIZE, MASK_SIZE)


# --- loss ---------------------------------------------------------------------------------------------------------


def select_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Select the mask of one class for each RoI: float (..., S, S) for float (..., 1 + C, S, S) and int64 (...)."""
    return logits.take_along_dim(labels[..., None, None, None], dim=-3).squeeze(-3)


def mask_loss(logits: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    """Compute L_mask (section 3): binary cross entropy, averaged over the cells and the RoIs that have an object.

    Only the mask of the true class contributes, so that classes do not compete.

    Args:
        logits: float (B, n, 1 + C, S, S).
        masks: targets, bool (B, n, S, S), see `crop_masks`.
        labels: int64 (B, n): 0 for background, which has no mask, else 1 + the object's label.
    """
    class_logits = select_class(logits.float(), labels)
    entropy = F.binary_cross_entropy_with_logits(class_logits, masks.float(), reduction="none").mean((2, 3))
    positive = labels > 0
    return torch.where(positive, entropy, 0).sum() / positive.sum().clamp_min(1)


# --- decoding -----------------------------------------------------------------------------------------------------

PIXELS_PER_CHUNK = 1 << 22  # limits memory: masks are pasted in chunks of so many pixels, at least one mask


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Paste masks into an image, with a threshold of 0.5.

    Probabilities are interpolated bilinearly between the centers of cells and extended to the border of the box. The
    interpolation is a product with one matrix per axis, so that a mask needs little more than one byte per pixel.

    Args:
        masks: probabilities, float (K, 28, 28).
        boxes: float (K, 4), xyxy in pixels.
        height: height of the image.
        width: width of the image.

    Returns:
        Masks, bool (K, height, width).
    """
    pasted = torch.empty(len(masks), height, width, dtype=torch.bool, device=masks.device)
    step = max(1, PIXELS_PER_CHUNK // (height * width))
    # Half precision would shift the edges.
    with torch.autocast(masks.device.type, enabled=False):
        for i in range(0, len(masks), step):
            chunk, (left, top, right, bottom) = masks[i : i + step].float(), boxes[i : i + step].float().unbind(1)
            rows, columns = _interpolation(top, bottom, height), _interpolation(left, right, width)
            pasted[i : i + step] = rows @ chunk @ columns.mT >= 0.5
    return pasted


def _interpolation(start: Tensor, end: Tensor, side: int) -> Tensor:
    """Return the weights of the cells for the pixels along one axis: float32 (K, side, 28), 0 outside of the box."""
    center = torch.arange(side, device=start.device) + 0.5
    relative = (center - start[:, None]) / (end - start)[:, None].clamp_min(1e-6)
    cell = (relative * MASK_SIZE - 0.5).clamp(0, MASK_SIZE - 1)
    weight = (1 - (cell[..., None] - torch.arange(MASK_SIZE, device=start.device)).abs()).clamp_min(0)
    return torch.where(((relative >= 0) & (relative <= 1))[..., None], weight, 0)


# --- module -------------------------------------------------------------------------------------------------------


class MaskRCNN(BranchedRCNN):
    """Mask R-CNN (He et al. 2017). Batch: see instances in the batch contract (``datamodules/base.py``).

    With ``resnet50_fpn`` and 90 classes it is torchvision's network, tensor by tensor: 44,401,393 parameters with
    ``freeze_backbone``, else 44,454,513. ``predict`` returns the dicts of `Detector` with ``masks`` bool (K, H, W),
    those of the final boxes and predicted classes. Metrics: see `instance_metrics`.

    Args:
        weights: None to train from scratch; COCO_V1 for torchvision's Mask R-CNN (``resnet50_fpn``), without the layers
            for another number of classes; IMAGENET1K_V1, IMAGENET1K_V2 or DEFAULT, the newest, for the backbone's; or a
            file of such weights or one of our checkpoints.
        ap_method: how VOC's average precision is computed: ``area`` (VOC2010 and later) or ``11point`` (VOC2007).
        **kwargs: see `BranchedRCNN`.
    """

    monitor = ("val/apr_50", "max")
    branch = "mask"

    def __init__(self, weights: str | None = None, ap_method: APMethod = "11point", **kwargs: Any) -> None:
        super().__init__(ap_method=ap_method, **kwargs)
        self.add_branch(MaskBranch(self.network.channels, self.num_classes, self.width_multiplier), weights)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        require_masks(batch["target"])
        return super().losses(batch)

    def branch_loss(self, logits: Tensor, rois: SampledRoIs, target: Sequence[dict[str, Tensor]]) -> Tensor:
        return mask_loss(logits, crop_masks(target, rois.boxes, rois.object_indices), rois.labels)

    def predict_image(
        self, image: Tensor, original_size: Tensor | None = None, mask_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """See `predict`; masks have ``mask_size`` (height, width), None for that of the image."""
        detections, logits = self.detect(image, original_size)
        boxes, (height, width) = detections["boxes"], mask_size or image.shape[-2:]
        scale = constant_like([width / image.shape[-1], height / image.shape[-2]] * 2, boxes)
        masks = select_class(logits, detections["labels"] + 1).sigmoid()
        return {**detections, "masks": paste_masks(masks, boxes * scale, height, width)}

    def predict_batch(self, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        """See `VisionModule`. In evaluation, masks have the size of the image on disk, as in the metrics."""
        if "target" not in batch:
            return super().predict_batch(batch)
        predictions = []
        for i, (image, target) in enumerate(zip(batch["image"], original_targets(batch), strict=True)):
            original_size = batch["original_size"][i : i + 1] if "original_size" in batch else None
            height, width = target["masks"].shape[1:]
            predictions.append(self.predict_image(image[None], original_size, (height, width)))
        return predictions

    def build_metrics(self) -> MetricCollection:
        return instance_metrics(self.num_classes, self.ap_method, self.compute_coco_ap)


def original_targets(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the objects in pixels of the images on disk: ``original_target``, or ``target`` if there is none.

    Raises:
        UserError: the objects have no masks.
    """
    targets = batch.get("original_target", batch["target"])
    require_masks(targets)
    return targets


def require_masks(targets: Sequence[dict[str, Tensor]]) -> None:
    """Raise UserError if the objects have no masks."""
    if "masks" not in targets[0]:
        raise UserError("target: expected objects with masks, found boxes only; use --data VOCInstance")
