"""Region proposal network.

Ren, He, Girshick and Sun, "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NIPS 2015,
section 3.1.

A small network slides over the feature map of a detector. For k anchors at each position, boxes of fixed sizes and
aspect ratios, it predicts whether there is an object and how to regress the anchor to it. The network, its targets,
loss and decoding are in ``components/rpn.py``; its options are those of `ProposalStage`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_modules.detection.metrics import ProposalRecall
from lightning_modules.detection.two_stage import ProposalStage


class RPN(ProposalStage):
    """Region proposal network alone (Ren et al. 2015). Batch: see detection in the batch contract.

    ``predict`` returns one dict per image, best proposal first: ``boxes`` float32 (K, 4), xyxy in pixels, ``scores``
    float32 (K,), the objectness, and ``labels`` int64 (K,), all 0. Metrics: those of `ProposalRecall`.

    Args:
        weights: None to train from scratch; a name of torchvision's weights of the backbone: IMAGENET1K_V1 (the
            references start from such), IMAGENET1K_V2 (ResNets only) or DEFAULT, the newest; or a file of such weights
            or one of our checkpoints.
        **kwargs: see `ProposalStage`.
    """

    monitor = ("val/recall_300", "max")
    class_names = ["object"]

    def __init__(self, weights: str | None = None, rpn_post_nms_top_n_test: int = 1000, **kwargs: Any) -> None:
        super().__init__(rpn_post_nms_top_n_test=rpn_post_nms_top_n_test, **kwargs)
        self.load_pretrained(weights)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        maps, sizes = self.extract_features(batch["image"])
        return self.rpn_losses(self.network.rpn(maps), sizes, batch["target"])

    def predict_image(self, image: Tensor, original_size: Tensor | None = None) -> dict[str, Tensor]:
        maps, sizes = self.extract_features(image)
        top_n = self.rpn_pre_nms_top_n_test, self.rpn_post_nms_top_n_test
        proposals = self.propose(self.network.rpn(maps), sizes, *top_n, original_size)
        boxes, scores = (x[proposals.valid] for x in proposals)
        return {"boxes": boxes, "scores": scores, "labels": torch.zeros_like(scores).long()}

    def build_metrics(self) -> MetricCollection:
        return MetricCollection([ProposalRecall()])

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])
