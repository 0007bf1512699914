"""Faster R-CNN: Ren, He, Girshick and Sun, "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal
Networks", NIPS 2015.

Fast R-CNN (`fast_rcnn.py`) whose proposals come from a network on the same map (`rpn.py`): nothing is left that does
not learn, and the proposals cost next to nothing. Both are trained at once, as in the authors' Python code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.average_precision import APMethod
from lightning_modules.components.backbones import Backbone, Trunk, load_backbone, make_trunk, maps_of
from lightning_modules.components.boxes import sample_balanced
from lightning_modules.components.image_batches import pad_images
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.roi_heads import Pooling, RegionNetwork, decode, draw_regions, fast_rcnn_loss
from lightning_modules.components.rpn import Normalizer, RegionProposalNetwork, propose, rpn_loss
from lightning_modules.detection import rpn
from lightning_modules.detection.metrics import detection_metrics

# --- network ------------------------------------------------------------------------------------------------------


class FasterRCNNNetwork(nn.Module):
    """Figure 2's network: a trunk, whose maps both others look at. VGG16 for 20 classes: 137,073,622 parameters."""

    def __init__(self, trunk: Trunk, proposer: RegionProposalNetwork, roi: RegionNetwork) -> None:
        super().__init__()
        self.trunk, self.rpn, self.roi = trunk.layers, proposer, roi


# --- module -------------------------------------------------------------------------------------------------------


class FasterRCNN(VisionModule):
    """Faster R-CNN. Batch: see detection in the batch contract; images may differ in size. Predictions: see `decode`.

    Metrics: ``map`` and what else `VOCMeanAP` gives, and COCO's (`COCOMeanAP`).

    The paper's networks are ``vgg16`` and, in He et al. 2016, ``resnet101`` (appendix A; ``frozen`` with its weights);
    a feature pyramid (``resnet50_fpn``) is what is taken today. As in the authors' code, biases learn at twice the rate
    and do not decay. The gradient does not go through the proposals' coordinates (the paper's approximate joint
    training).

    Args:
        backbone, width, batch_norm, frozen, stride: see `make_trunk`.
        num_classes: C, without the background; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        weights: None to train from scratch; DEFAULT or a name of torchvision's weights for the backbone; or a file: of
            these, or a checkpoint of ours (an `RPN`'s too).
        anchor_sizes, anchor_ratios: see `RegionProposalNetwork`; for a pyramid the authors' are 32, 64, 128, 256, 512.
        normalizer: see `rpn_loss`.
        rpn_box_weight: the lambda of `rpn_loss`.
        box_weight: that of `fast_rcnn_loss`.
        crossing: learn from anchors that reach beyond the image too.
        train_proposals, test_proposals: boxes of each image, before the suppression and after it (`propose`).
        least: the least side of a proposal in pixels.
        regions: regions of each image that are learned from; the authors have one image a batch and 128.
        pooling: see `RegionNetwork`.
        score_threshold, nms_threshold: what is kept of the predictions.
        ap: how average precision is computed, see `VOCMeanAP`.
        coco: measure COCO's average precision too.
        optimizer: see `VisionModule`; the authors'.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/map", "max")

    def __init__(
        self,
        backbone: Backbone = "vgg16",
        num_classes: int = 20,
        class_names: list[str] | None = None,
        width: float = 1.0,
        batch_norm: bool = False,
        frozen: bool = False,
        stride: Literal[8, 16] = 16,
        weights: str | None = None,
        anchor_sizes: Sequence[float] = (128, 256, 512),
        anchor_ratios: Sequence[float] = (0.5, 1, 2),
        normalizer: Normalizer = "paper",
        rpn_box_weight: float = 10.0,
        box_weight: float = 1.0,
        crossing: bool = False,
        train_proposals: tuple[int, int] = (12000, 2000),
        test_proposals: tuple[int, int] = (6000, 300),
        least: float = 16.0,
        regions: int = 128,
        pooling: Pooling = "pool",
        score_threshold: float = 0.05,
        nms_threshold: float = 0.3,
        ap: APMethod = "area",
        coco: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.num_classes, self.class_names = num_classes, class_names
        self.normalizer: Normalizer = normalizer
        self.rpn_box_weight, self.box_weight, self.crossing = rpn_box_weight, box_weight, crossing
        self.train_proposals, self.test_proposals, self.least = train_proposals, test_proposals, least
        self.regions = regions
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.ap, self.coco = ap, coco
        trunk = make_trunk(backbone, width, batch_norm, frozen, stride)
        proposer = RegionProposalNetwork(trunk, anchor_sizes, anchor_ratios)
        self.network = FasterRCNNNetwork(
            trunk, proposer, RegionNetwork(backbone, trunk, num_classes, width, frozen, pooling)
        )
        if weights is not None:
            load_backbone(self.network, backbone, batch_norm, weights)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pixels, size = pad_images(batch["image"], self.preprocess)
        maps = maps_of(self.network.trunk(pixels))
        output = self.network.rpn(maps)
        targets = rpn.encode(batch["target"], output.anchors, size, self.crossing)
        drawn = sample_balanced(targets.positive, targets.negative, 256, 0.5)
        terms = rpn_loss(output, targets, drawn, self.normalizer, self.rpn_box_weight)
        found = propose(output, size, *self.train_proposals, least=self.least)
        regions = draw_regions(found.boxes, found.there, batch["target"], self.regions)
        logits, offset = self.network.roi(maps, regions.boxes)
        return {**terms, **fast_rcnn_loss(logits, offset, regions, self.box_weight)}

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        pixels, size = pad_images(images, self.preprocess)
        maps = maps_of(self.network.trunk(pixels))
        found = propose(self.network.rpn(maps), size, *self.test_proposals, least=self.least)
        logits, offset = self.network.roi(maps, found.boxes)
        return decode(logits, offset, found.boxes, found.there, size, self.score_threshold, self.nms_threshold)

    def build_metrics(self) -> MetricCollection:
        return detection_metrics(self.num_classes, self.ap, self.coco)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)
