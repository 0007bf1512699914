"""The region proposal network: Ren, He, Girshick and Sun, "Faster R-CNN: Towards Real-Time Object Detection with
Region Proposal Networks", NIPS 2015, section 3.1.

A small network slides over the map that a detector computes anyhow. At each place it says of k anchors, boxes of given
sizes and aspects, whether there is an object, and how to move the anchor onto it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.backbones import Backbone, Trunk, load_backbone, make_trunk, maps_of
from lightning_modules.components.boxes import sample_balanced
from lightning_modules.components.image_batches import pad_images
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.rpn import Normalizer, RegionProposalNetwork, RPNOutput, encode, propose, rpn_loss
from lightning_modules.detection.metrics import ProposalRecall

# --- network ------------------------------------------------------------------------------------------------------


# --- target encoding ----------------------------------------------------------------------------------------------


# --- loss ---------------------------------------------------------------------------------------------------------


# --- decoding -----------------------------------------------------------------------------------------------------


# --- module -------------------------------------------------------------------------------------------------------


class RPNNetwork(nn.Module):
    """A trunk and the network on it; the same names as in Faster R-CNN, so that each loads the other's weights."""

    def __init__(self, trunk: Trunk, sizes: Sequence[float], ratios: Sequence[float]) -> None:
        super().__init__()
        self.trunk = trunk.layers
        self.rpn = RegionProposalNetwork(trunk, sizes, ratios)

    def forward(self, x: Tensor) -> RPNOutput:
        """Normalized images float (B,3,H,W) to what is said of all anchors."""
        return self.rpn(maps_of(self.trunk(x)))


class RPN(VisionModule):
    """The region proposal network alone. Batch: see detection in the batch contract; images may differ in size.

    Predictions: for each image ``boxes`` float32 (K,4) xyxy in pixels, ``scores`` float32 (K,), the objectness, and
    ``labels`` int64 (K,), all 0, best first. Metrics: the recall of the first 50, 300 and 1,000 (`ProposalRecall`).

    Args:
        backbone, width, batch_norm, frozen, stride: see `make_trunk`.
        weights: None to train from scratch; DEFAULT or a name of torchvision's weights for the backbone; or a file: of
            these, or a checkpoint of ours.
        anchor_sizes: see `RegionProposalNetwork`; for a pyramid one a map, the authors' are 32, 64, 128, 256, 512.
        anchor_ratios: heights / widths.
        normalizer: see `rpn_loss`.
        box_weight: lambda, see `rpn_loss`.
        crossing: learn from anchors that reach beyond the image too.
        before, after: see `propose`.
        least: the least side of a proposal in pixels.
        optimizer: see `VisionModule`; the authors'. Biases learn at twice the rate and do not decay.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/recall_300", "max")
    class_names = ["object"]

    def __init__(
        self,
        backbone: Backbone = "vgg16",
        width: float = 1.0,
        batch_norm: bool = False,
        frozen: bool = False,
        stride: Literal[8, 16] = 16,
        weights: str | None = None,
        anchor_sizes: Sequence[float] = (128, 256, 512),
        anchor_ratios: Sequence[float] = (0.5, 1, 2),
        normalizer: Normalizer = "paper",
        box_weight: float = 10.0,
        crossing: bool = False,
        before: int = 6000,
        after: int = 1000,
        least: float = 16.0,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.normalizer: Normalizer = normalizer
        self.box_weight, self.crossing = box_weight, crossing
        self.before, self.after, self.least = before, after, least
        trunk = make_trunk(backbone, width, batch_norm, frozen, stride)
        self.network = RPNNetwork(trunk, anchor_sizes, anchor_ratios)
        if weights is not None:
            load_backbone(self.network, backbone, batch_norm, weights)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pixels, size = pad_images(batch["image"], self.preprocess)
        output = self.network(pixels)
        targets = encode(batch["target"], output.anchors, size, self.crossing)
        drawn = sample_balanced(targets.positive, targets.negative, 256, 0.5)
        return rpn_loss(output, targets, drawn, self.normalizer, self.box_weight)

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        pixels, size = pad_images(images, self.preprocess)
        found = propose(self.network(pixels), size, self.before, self.after, least=self.least)
        return [
            {
                "boxes": boxes[there],
                "scores": scores[there],
                "labels": torch.zeros_like(scores[there], dtype=torch.int64),
            }
            for boxes, scores, there in zip(*found, found.there, strict=True)
        ]

    def build_metrics(self) -> MetricCollection:
        return MetricCollection([ProposalRecall()])

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)
