"""Faster R-CNN.

Ren, He, Girshick and Sun, "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NIPS 2015.

A region proposal network (`rpn.py`) and Fast R-CNN (`fast_rcnn.py`) share one trunk, so that proposals cost almost
nothing. Both are trained jointly, as in the authors' Python code. `BranchedRCNN` adds a third branch, for Mask R-CNN
and Keypoint R-CNN.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_modules.base import OptimizerFactory
from lightning_modules.components.backbones import Backbone
from lightning_modules.components.boxes import pad_targets
from lightning_modules.components.roi_heads import SampledRoIs
from lightning_modules.components.rpn import RPNLossNormalization
from lightning_modules.detection.two_stage import ProposalStage, RoIOutput, RoIStage


class FasterRCNN(RoIStage, ProposalStage):
    """Faster R-CNN (Ren et al. 2015).

    The paper's backbone is ``vgg16`` (137,073,622 parameters with 20 classes); He et al. 2016 use ``resnet101``
    (appendix A), Lin et al. 2017 a feature pyramid (``resnet50_fpn``). Gradients do not flow through the coordinates of
    proposals (the paper's approximate joint training). Unlike Fast R-CNN, the authors sample 128 RoIs of one image, and
    background with any IoU below the threshold. Batch, predictions and metrics: see `Detector`.

    Args:
        weights: None to train from scratch; a name of torchvision's weights of the backbone: IMAGENET1K_V1 (the
            references start from such), IMAGENET1K_V2 (ResNets only) or DEFAULT, the newest; or a file of such weights
            or one of our checkpoints, an `RPN`'s included.
        rpn_pre_nms_top_n_train: anchors of each feature map that enter non-maximum suppression in training.
        rpn_post_nms_top_n_train: proposals per image in training.
        **kwargs: see `ProposalStage` and `RoIStage`.
    """

    def __init__(
        self,
        weights: str | None = None,
        rpn_pre_nms_top_n_train: int = 12000,
        rpn_post_nms_top_n_train: int = 2000,
        rois_per_image: int = 128,
        bg_iou_min: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(rois_per_image=rois_per_image, bg_iou_min=bg_iou_min, **kwargs)
        self.rpn_pre_nms_top_n_train, self.rpn_post_nms_top_n_train = rpn_pre_nms_top_n_train, rpn_post_nms_top_n_train
        self.load_pretrained(weights)

    def forward(
        self,
        images: Tensor | list[Tensor],
        target: Sequence[dict[str, Tensor]] | None = None,
        original_size: Tensor | None = None,
    ) -> tuple[RoIOutput, dict[str, Tensor]]:
        """Run the pass: features, proposals, RoI heads.

        Args:
            images: uint8 (B, 3, H, W), or a list of (3, H, W).
            target: one dict per image with ``boxes`` and ``labels``, for training.
            original_size: see `propose`.

        Returns:
            The predictions of the RoI heads, on sampled RoIs if there are targets, and the losses of the region
            proposal network, empty without targets.
        """
        maps, sizes = self.extract_features(images)
        output = self.network.rpn(maps)
        if target is None:
            losses = {}
            top_n = self.rpn_pre_nms_top_n_test, self.rpn_post_nms_top_n_test
        else:
            losses = self.rpn_losses(output, sizes, target)
            top_n = self.rpn_pre_nms_top_n_train, self.rpn_post_nms_top_n_train
        proposals = self.propose(output, sizes, *top_n, original_size)
        return self.run_roi_heads(maps, sizes, proposals.boxes, proposals.valid, target), losses

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        output, rpn_losses = self(batch["image"], batch["target"], batch.get("original_size"))
        return {**rpn_losses, **self.roi_losses(output)}

    def predict_image(self, image: Tensor, original_size: Tensor | None = None) -> dict[str, Tensor]:
        output, _ = self(image, original_size=original_size)
        return self.decode(output)[0]


class BranchedRCNN(FasterRCNN):
    """Base class of Mask R-CNN and Keypoint R-CNN: Faster R-CNN with a third branch (He et al. 2017).

    The branch processes RoIs of 14x14 cells in parallel with the RoI heads. In training they are the positive RoIs, in
    inference the detections. A subclass adds the branch with `add_branch` and implements its loss and `predict_image`.
    The defaults are the paper's.

    Args:
        optimizer: makes the optimizer from parameter groups. Default: the paper's, for 16 images per step.
        **kwargs: see `FasterRCNN`.
    """

    branch: Literal["mask", "keypoint"]
    pool_size = 14

    def __init__(
        self,
        backbone: Backbone = "resnet50_fpn",
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        allow_border_anchors: bool = True,
        rpn_loss_normalization: RPNLossNormalization = "authors",
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_post_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_min_size: float = 0.001,
        rois_per_image: int = 512,
        nms_threshold: float = 0.5,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            backbone=backbone,
            anchor_sizes=anchor_sizes,
            allow_border_anchors=allow_border_anchors,
            rpn_loss_normalization=rpn_loss_normalization,
            rpn_pre_nms_top_n_train=rpn_pre_nms_top_n_train,
            rpn_post_nms_top_n_train=rpn_post_nms_top_n_train,
            rpn_pre_nms_top_n_test=rpn_pre_nms_top_n_test,
            rpn_post_nms_top_n_test=rpn_post_nms_top_n_test,
            rpn_min_size=rpn_min_size,
            rois_per_image=rois_per_image,
            nms_threshold=nms_threshold,
            optimizer=optimizer,
            roi_pooling="align",
            weights=None,  # loaded by `add_branch`, when the network is complete
            **kwargs,
        )

    def add_branch(self, network: nn.Module, weights: str | None) -> None:
        """Add the branch to the network and load pretrained weights.

        Args:
            network: maps pooled features (K, C', 14, 14) to logits (K, D, S, S) by its parts ``head`` and
                ``predictor``.
            weights: see `load_rcnn`.
        """
        self.network.add_module(self.branch, network)
        self.load_pretrained(weights, self.branch)

    def branch_logits(self, maps: list[Tensor], boxes: Tensor) -> Tensor:
        """Run the branch: float32 (B, n, D, S, S) for boxes float32 (B, n, 4), xyxy in pixels.

        The predictor runs in float32 under autocast, too: bf16 has 8 bits, and the best cells of a heatmap would tie.
        """
        head, predictor = (self.network.get_submodule(f"{self.branch}.{part}") for part in ("head", "predictor"))
        features = head(self.network.roi.pool(maps, boxes, self.pool_size))
        with torch.autocast(features.device.type, enabled=False):
            return predictor(features.float()).unflatten(0, boxes.shape[:2])

    @abstractmethod
    def branch_loss(self, logits: Tensor, rois: SampledRoIs, target: Sequence[dict[str, Tensor]]) -> Tensor:
        """Compute the loss of the branch, a scalar; only RoIs with an object contribute.

        Args:
            logits: float32 (B, n, D, S, S).
            rois: the RoIs, all positives and possibly some background.
            target: one dict per image.
        """

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        target = batch["target"]
        output, rpn_losses = self(batch["image"], target, batch.get("original_size"))
        # Positives come first. This is their largest number; the actual number is known to the device only.
        max_positives = round(self.roi_positive_fraction * self.rois_per_image)
        rois = SampledRoIs(*(x[:, :max_positives] for x in output.sample))
        loss = self.branch_loss(self.branch_logits(output.maps, rois.boxes), rois, target)
        return {**rpn_losses, **self.roi_losses(output), self.branch: loss}

    def detect(self, image: Tensor, original_size: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return the detections of one image, uint8 (1, 3, H, W), and the branch's logits, float32 (K, D, S, S)."""
        output, _ = self(image, original_size=original_size)
        (detections,) = self.decode(output)
        boxes, _ = pad_targets([detections])
        return detections, self.branch_logits(output.maps, boxes)[0, : len(detections["boxes"])]

    @abstractmethod
    def predict_image(self, image: Tensor, original_size: Tensor | None = None) -> dict[str, Tensor]: ...
