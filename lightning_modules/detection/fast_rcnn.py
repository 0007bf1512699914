"""Fast R-CNN: Girshick, "Fast R-CNN", ICCV 2015.

The convolutions run once over the whole image. Of the map that comes out, each proposal's part is pooled to the same
few cells, from which fully connected layers say what it shows and how to move it. Classes and boxes are learned at once.
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
from lightning_modules.components.external_proposals import inference_proposals, training_proposals
from lightning_modules.components.image_batches import pad_images
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.roi_heads import Pooling, RegionNetwork, decode, draw_regions, fast_rcnn_loss
from lightning_modules.detection.metrics import detection_metrics

# --- network ------------------------------------------------------------------------------------------------------


class FastRCNNNetwork(nn.Module):
    """Figure 1's network: normalized images float (B,3,H,W) and boxes float (B,n,4) to what `RegionNetwork` says."""

    def __init__(self, trunk: Trunk, roi: RegionNetwork) -> None:
        super().__init__()
        self.trunk, self.roi = trunk.layers, roi

    def forward(self, x: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return self.roi(maps_of(self.trunk(x)), boxes)


# --- target encoding ----------------------------------------------------------------------------------------------


# --- loss ---------------------------------------------------------------------------------------------------------


# --- decoding -----------------------------------------------------------------------------------------------------


# --- module -------------------------------------------------------------------------------------------------------


class FastRCNN(VisionModule):
    """Fast R-CNN. Batch: see detection in the batch contract; images may differ in size. Predictions: see `decode`.

    The proposals come with the batch (``--data.proposals``); where they do not, as in the prediction of a folder,
    Selective Search computes them, about a second an image. Metrics: ``map`` and what else `VOCMeanAP` gives, and
    COCO's (`COCOMeanAP`). As in the authors' code, biases learn at twice the rate and do not decay.

    Args:
        backbone, width, batch_norm, frozen, stride: see `make_trunk`. VGG16 for 20 classes has 134,690,729 parameters.
        num_classes: C, without the background; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        weights: None to train from scratch; DEFAULT or a name of torchvision's weights for the backbone; or a file: of
            these, or a checkpoint of ours.
        box_weight: lambda, see `fast_rcnn_loss`.
        regions: regions of each image that are learned from; the paper has two images a batch and 64 of each.
        background: see `draw_regions`.
        pooling: see `RegionNetwork`.
        score_threshold, nms_threshold: what is kept of the predictions.
        ap: how average precision is computed, see `VOCMeanAP`.
        coco: measure COCO's average precision too.
        optimizer: see `VisionModule`; the paper's.
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
        box_weight: float = 1.0,
        regions: int = 64,
        background: float = 0.1,
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
        self.box_weight, self.regions, self.background = box_weight, regions, background
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.ap, self.coco = ap, coco
        trunk = make_trunk(backbone, width, batch_norm, frozen, stride)
        roi = RegionNetwork(backbone, trunk, num_classes, width, frozen, pooling)
        self.network = FastRCNNNetwork(trunk, roi)
        if weights is not None:
            load_backbone(self.network, backbone, batch_norm, weights)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        proposals, there = training_proposals(batch)
        regions = draw_regions(proposals, there, batch["target"], self.regions, background=self.background)
        pixels, _ = pad_images(batch["image"], self.preprocess)
        logits, offset = self.network(pixels, regions.boxes)
        return fast_rcnn_loss(logits, offset, regions, self.box_weight)

    def predict(
        self, images: Tensor | list[Tensor], proposals: Sequence[Tensor] | None = None
    ) -> list[dict[str, Tensor]]:
        boxes, there = inference_proposals(images, proposals)
        pixels, size = pad_images(images, self.preprocess)
        logits, offset = self.network(pixels, boxes)
        return decode(logits, offset, boxes, there, size, self.score_threshold, self.nms_threshold)

    def predict_batch(self, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        return self.predict(batch["image"], batch.get("proposals"))

    def build_metrics(self) -> MetricCollection:
        return detection_metrics(self.num_classes, self.ap, self.coco)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)
