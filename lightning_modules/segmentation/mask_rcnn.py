"""Mask R-CNN: He, Gkioxari, Dollar and Girshick, "Mask R-CNN", ICCV 2017.

Faster R-CNN (`faster_rcnn.py`) with a third branch: a few convolutions that draw the mask of the object in a region,
one for each class. Which class it is the other branch decides: masks do not compete.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.average_precision import APMethod
from lightning_modules.components.backbones import Backbone, Trunk, make_trunk, maps_of
from lightning_modules.components.boxes import pad_targets, sample_balanced
from lightning_modules.components.image_batches import pad_images, resize_images
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.roi_heads import RegionNetwork, decode, draw_regions, fast_rcnn_loss
from lightning_modules.components.rpn import Normalizer, RegionProposalNetwork, propose, rpn_loss
from lightning_modules.components.torchvision_rcnn import load_rcnn
from lightning_modules.detection import rpn
from lightning_modules.segmentation.metrics import instance_metrics

CELLS = 28  # a mask's side

# --- network ------------------------------------------------------------------------------------------------------


class MaskRCNNNetwork(nn.Module):
    """Faster R-CNN's network, and beside ``roi`` the branch of figure 4, right: four convolutions of 3x3, one that
    doubles the side, and one of 1x1 with a channel a class, the background's first.

    With ``resnet50_fpn`` and 90 classes it is torchvision's, tensor by tensor: 44,401,393 parameters if ``frozen``,
    else 44,454,513. On a ResNet's conv4 the paper's masks share conv5 with the classes; here the branch is the same for
    all trunks.

    Args:
        backbone, width, frozen: see `make_trunk`; ``width`` multiplies the branch's 256 channels too.
        trunk: what computes the maps.
        proposer: what proposes regions on them.
        num_classes: C.
    """

    def __init__(
        self,
        backbone: Backbone,
        trunk: Trunk,
        proposer: RegionProposalNetwork,
        num_classes: int,
        width: float,
        frozen: bool,
    ) -> None:
        super().__init__()
        self.trunk, self.rpn = trunk.layers, proposer
        self.roi = RegionNetwork(backbone, trunk, num_classes, width, frozen, "align")
        channels = max(1, round(256 * width))
        head = MaskRCNNHeads(trunk.channels, [channels] * 4, dilation=1)
        predictor = MaskRCNNPredictor(channels, channels, 1 + num_classes)
        self.mask = nn.Sequential(OrderedDict[str, nn.Module](head=head, predictor=predictor))

    def masks(self, maps: list[Tensor], boxes: Tensor) -> Tensor:
        """Logits of the masks in the boxes, of each class: float32 (B,n,1+C,28,28) for (B,n,4) xyxy in pixels."""
        return self.mask(self.roi.pool(maps, boxes, CELLS // 2)).unflatten(0, boxes.shape[:2]).float()


# --- target encoding ----------------------------------------------------------------------------------------------


def crop_masks(target: Sequence[dict[str, Tensor]], boxes: Tensor, chosen: Tensor) -> Tensor:
    """The part of an object's mask that lies in a box: a cell is the object's if half of it is. Bool (B,n,28,28).

    Args:
        target: ``masks`` uint8 (M,H,W) of 0 and 1 of each of B images.
        boxes: float32 (B,n,4) xyxy in pixels.
        chosen: int64 (B,n), whose mask. Where there is no such object the result has no meaning.
    """
    masks = [entry["masks"] for entry in target]
    height, width = (max(m.shape[axis] for m in masks) for axis in (1, 2))
    filled = [F.pad(m, (0, width - m.shape[2], 0, height - m.shape[1])) for m in masks]
    # One more than there are, so that a batch without objects is nothing special.
    together = torch.cat([*filled, filled[0].new_zeros(1, height, width)])
    counts = torch.tensor([0, *(len(m) for m in masks)])
    first = counts.cumsum(0)[:-1, None].to(boxes.device, non_blocking=True)
    number = (first + chosen).clamp_max(len(together) - 1)
    rois = torch.cat([number[..., None].to(boxes), boxes], 2).flatten(0, 1)
    crops = roi_align(together[:, None].float(), rois, CELLS, aligned=True)
    return (crops >= 0.5).view(*chosen.shape, CELLS, CELLS)


# --- loss ---------------------------------------------------------------------------------------------------------


def own_channel(logits: Tensor, label: Tensor) -> Tensor:
    """The masks of one class each: float (B,n,28,28) for (B,n,1+C,28,28) and int64 (B,n)."""
    return logits.gather(2, label[..., None, None, None].expand(-1, -1, 1, *logits.shape[3:]))[:, :, 0]


def mask_loss(logits: Tensor, crops: Tensor, label: Tensor) -> Tensor:
    """L_mask (section 3): the mean binary cross-entropy of a mask's cells, and of all regions with an object.

    Only the mask of the true class is looked at, so that classes do not compete.

    Args:
        logits: float (B,n,1+C,28,28).
        crops: bool (B,n,28,28), see `crop_masks`.
        label: int64 (B,n): 0 for background, which has no mask, else 1 + the object's.
    """
    own = own_channel(logits.float(), label)
    entropy = F.binary_cross_entropy_with_logits(own, crops.float(), reduction="none").mean((2, 3))
    positive = label > 0
    return torch.where(positive, entropy, 0).sum() / positive.sum().clamp_min(1)


# --- decoding -----------------------------------------------------------------------------------------------------

PIXELS = 1 << 22  # so many are pasted at once, or one mask


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks in the pixels of the image: bool (K,height,width), true where the probability is 0.5 or more.

    Between the middles of cells it is interpolated, beyond them in the box it is that of the next cell. Interpolation
    is a product with a matrix on either side; a hundred masks take a byte a pixel each and little more.

    Args:
        masks: float (K,28,28), probabilities.
        boxes: float (K,4) xyxy in pixels.
        height, width: of the image.
    """
    pasted = torch.empty(len(masks), height, width, dtype=torch.bool, device=masks.device)
    step = max(1, PIXELS // (height * width))
    # Half precision would move the edges.
    with torch.autocast(masks.device.type, enabled=False):
        for i in range(0, len(masks), step):
            part, (left, top, right, bottom) = masks[i : i + step].float(), boxes[i : i + step].float().unbind(1)
            rows, columns = _interpolation(top, bottom, height), _interpolation(left, right, width)
            pasted[i : i + step] = rows @ part @ columns.mT >= 0.5
    return pasted


def _interpolation(start: Tensor, end: Tensor, side: int) -> Tensor:
    """What each cell has of each pixel along one axis: float32 (K,side,28), 0 outside of the box."""
    middle = torch.arange(side, device=start.device) + 0.5
    part = (middle - start[:, None]) / (end - start)[:, None].clamp_min(1e-6)
    place = (part * CELLS - 0.5).clamp(0, CELLS - 1)
    weight = (1 - (place[..., None] - torch.arange(CELLS, device=start.device)).abs()).clamp_min(0)
    return torch.where(((part >= 0) & (part <= 1))[..., None], weight, 0)


# --- pretrained weights -------------------------------------------------------------------------------------------


# --- module -------------------------------------------------------------------------------------------------------


class MaskRCNN(VisionModule):
    """Mask R-CNN. Batch: see instances in the batch contract; images may differ in size.

    Predictions: for each image, best first, ``boxes`` float32 (K,4) xyxy in pixels, ``scores`` float32 (K,), ``labels``
    int64 (K,) and ``masks`` bool (K,H,W). Masks are of the final boxes and of the class that was found.

    Metrics: ``apr_50``, ``apr_70`` and what else `instance_metrics` gives. As in the authors' code, biases learn at
    twice the rate and do not decay.

    Args:
        backbone, width, batch_norm, frozen, stride: see `make_trunk`; ``frozen`` with weights.
        num_classes: C, without the background; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        weights: None to train from scratch; COCO_V1 for torchvision's Mask R-CNN (``resnet50_fpn``, ``width`` 1), of
            which all is taken but what depends on the number of classes; DEFAULT or a name of torchvision's weights for
            the backbone; or a file: of these, or a checkpoint of ours.
        anchor_sizes, anchor_ratios: see `RegionProposalNetwork`.
        normalizer, rpn_box_weight: see `rpn_loss`.
        crossing: learn from anchors that reach beyond the image too.
        train_proposals, test_proposals: boxes of each image, before the suppression and after it (`propose`).
        least: the least side of a proposal in pixels.
        regions: regions of each image that are learned from, a quarter of them with an object at most.
        score_threshold, nms_threshold: what is kept of the predictions.
        eval_size: what images are resized to in evaluation and prediction, (shorter side, longest at most): the
            ``image_size`` of the data, which does not resize then. Predictions are in the pixels of the image given.
        ap: how average precision is computed, see `VOCMeanAP`.
        coco: measure COCO's average precision of masks too.
        optimizer: see `VisionModule`; the paper's, for 16 images a step.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/apr_50", "max")

    def __init__(
        self,
        backbone: Backbone = "resnet50_fpn",
        num_classes: int = 20,
        class_names: list[str] | None = None,
        width: float = 1.0,
        batch_norm: bool = False,
        frozen: bool = False,
        stride: Literal[8, 16] = 16,
        weights: str | None = None,
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        anchor_ratios: Sequence[float] = (0.5, 1, 2),
        normalizer: Normalizer = "authors",
        rpn_box_weight: float = 10.0,
        crossing: bool = True,
        train_proposals: tuple[int, int] = (2000, 2000),
        test_proposals: tuple[int, int] = (1000, 1000),
        least: float = 0.001,
        regions: int = 512,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        eval_size: tuple[int, int] | None = None,
        ap: APMethod = "11point",
        coco: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if eval_size is not None and not 1 <= eval_size[0] <= eval_size[1]:
            raise UserError(f"eval_size: expected (shorter side, longest at most) in pixels, found {eval_size}")
        self.num_classes, self.class_names = num_classes, class_names
        self.normalizer: Normalizer = normalizer
        self.rpn_box_weight, self.crossing = rpn_box_weight, crossing
        self.train_proposals, self.test_proposals, self.least = train_proposals, test_proposals, least
        self.regions = regions
        self.score_threshold, self.nms_threshold, self.eval_size = score_threshold, nms_threshold, eval_size
        self.ap, self.coco = ap, coco
        trunk = make_trunk(backbone, width, batch_norm, frozen, stride)
        proposer = RegionProposalNetwork(trunk, anchor_sizes, anchor_ratios)
        self.network = MaskRCNNNetwork(backbone, trunk, proposer, num_classes, width, frozen)
        if weights is not None:
            load_rcnn(self.network, "maskrcnn", backbone, batch_norm, weights)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        target = batch["target"]
        if "masks" not in target[0]:
            raise UserError("target: expected the masks of the objects, found boxes alone: take --data VOCInstance")
        pixels, size = pad_images(batch["image"], self.preprocess)
        maps = maps_of(self.network.trunk(pixels))
        output = self.network.rpn(maps)
        targets = rpn.encode(target, output.anchors, size, self.crossing)
        drawn = sample_balanced(targets.positive, targets.negative, 256, 0.5)
        terms = rpn_loss(output, targets, drawn, self.normalizer, self.rpn_box_weight)
        found = propose(output, size, *self.train_proposals, least=self.least)
        share = 0.25
        regions = draw_regions(found.boxes, found.there, target, self.regions, share)
        logits, offset = self.network.roi(maps, regions.boxes)
        # No more than these can have an object; how many do is known only to the device.
        boxes, label, chosen = (
            x[:, : round(share * self.regions)] for x in (regions.boxes, regions.label, regions.object)
        )
        masks = mask_loss(self.network.masks(maps, boxes), crop_masks(target, boxes, chosen), label)
        return {**terms, **fast_rcnn_loss(logits, offset, regions), "mask": masks}

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        pixels, size = pad_images(resize_images(images, self.eval_size), self.preprocess)
        maps = maps_of(self.network.trunk(pixels))
        found = propose(self.network.rpn(maps), size, *self.test_proposals, least=self.least)
        logits, offset = self.network.roi(maps, found.boxes)
        detections = decode(logits, offset, found.boxes, found.there, size, self.score_threshold, self.nms_threshold)
        boxes, labels = pad_targets(detections)
        masks = own_channel(self.network.masks(maps, boxes), labels + 1).sigmoid()
        for image, entry, mask, resized in zip(images, detections, masks, size, strict=True):
            height, width = image.shape[-2:]
            entry["boxes"] = entry["boxes"] * (resized.new_tensor([width, height]) / resized).repeat(2)
            entry["masks"] = paste(mask[: len(entry["boxes"])], entry["boxes"], height, width)
        return detections

    def build_metrics(self) -> MetricCollection:
        return instance_metrics(self.num_classes, self.ap, self.coco)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)
