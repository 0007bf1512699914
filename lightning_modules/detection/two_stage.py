"""Two-stage detection: the options and computations that the systems of the R-CNN family share.

`RPN` is the first stage alone, `FastRCNN` the second one, `FasterRCNN` both. A stage adds its part to the network and
its options to the constructor: ``**kwargs`` go to the next class in the method resolution order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.backbones import Backbone, Trunk, feature_maps, make_trunk
from lightning_modules.components.boxes import sample_balanced
from lightning_modules.components.image_batches import pad_images
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.roi_heads import (
    RoIHeads,
    RoIPooling,
    SampledRoIs,
    decode_detections,
    fast_rcnn_loss,
    sample_rois,
)
from lightning_modules.components.rpn import (
    Proposals,
    RegionProposalNetwork,
    RPNLossNormalization,
    RPNOutput,
    decode_proposals,
    encode_rpn_targets,
    rpn_loss,
)
from lightning_modules.components.torchvision_rcnn import load_rcnn
from lightning_modules.detection.base import Detector


class RegionNetwork(nn.Module):
    """A trunk and the parts that the stages add to it.

    The parts have the same names in all systems, so that each system can load the weights of the others.
    """

    rpn: RegionProposalNetwork
    roi: RoIHeads

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk, self.channels, self.strides = trunk

    def feature_maps(self, pixels: Tensor) -> list[Tensor]:
        """Compute the feature maps, float32 (B, C, h, w), of normalized images (B, 3, H, W)."""
        return feature_maps(self.trunk(pixels))


class RegionModule(VisionModule, ABC):
    """Base class of the R-CNN family: the backbone. Images of a batch may differ in size.

    Training pads the images of a batch to one size, as the authors' code does. Inference runs image by image: padding
    changes the features near the border of smaller images, and predictions would depend on the batch.

    As in the authors' code, biases have twice the learning rate and no weight decay.

    Args:
        backbone: ``vgg16``, a ResNet (conv5 is part of the RoI heads), or a ResNet with a feature pyramid (``_fpn``).
        width_multiplier: scales all channels; in a ResNet those of the 3x3 convolutions only.
        batch_norm: add batch normalization to each convolution of VGG-16, for training from scratch; refused for a
            ResNet, which always has it.
        freeze_backbone: freeze the first two blocks of the backbone with their batch normalization, and all batch
            normalization of a ResNet, as the authors do with pretrained weights.
        stride: stride of VGG-16's feature map; 8 removes its fourth pooling, for small objects.
        optimizer: makes the optimizer from parameter groups. Default: the authors'.
        **kwargs: see `VisionModule`.
    """

    def __init__(
        self,
        backbone: Backbone = "vgg16",
        width_multiplier: float = 1.0,
        batch_norm: bool = False,
        freeze_backbone: bool = False,
        stride: Literal[8, 16] = 16,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.backbone: Backbone = backbone
        self.width_multiplier, self.batch_norm, self.freeze_backbone = width_multiplier, batch_norm, freeze_backbone
        self.network = RegionNetwork(make_trunk(backbone, width_multiplier, batch_norm, freeze_backbone, stride))

    def load_pretrained(self, weights: str | None, branch: Literal["mask", "keypoint"] | None = None) -> None:
        """Load pretrained weights, if there are any, see `load_rcnn`; the network must be complete."""
        if weights is not None:
            load_rcnn(self.network, self.backbone, self.batch_norm, weights, branch)

    def extract_features(self, images: Tensor | list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Compute feature maps, float32 (B, C, h, w), and image sizes (width, height) in pixels, float32 (B, 2)."""
        pixels, sizes = pad_images(images, self.preprocess)
        return self.network.feature_maps(pixels), sizes

    @abstractmethod
    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]: ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)


class ProposalStage(RegionModule):
    """First stage: a region proposal network (Ren et al. 2015, section 3.1).

    Args:
        anchor_sizes: square roots of the anchor areas in pixels. A feature pyramid has one per map; the authors' are
            32, 64, 128, 256, 512.
        anchor_ratios: aspect ratios of the anchors, height / width.
        allow_border_anchors: train on anchors that cross the image border; the paper ignores them.
        rpn_batch_size_per_image: anchors sampled per image.
        rpn_positive_fraction: largest fraction of positives among the sampled anchors.
        rpn_fg_iou_threshold: smallest IoU of positive anchors with an object.
        rpn_bg_iou_threshold: IoU with all objects below which anchors are negative.
        rpn_loss_normalization: ``paper`` or ``authors`` (their code), see `rpn_loss`.
        rpn_box_loss_weight: weight of the box loss, the paper's lambda; used with ``paper`` only.
        rpn_pre_nms_top_n_test: anchors of each feature map that enter non-maximum suppression in inference.
        rpn_post_nms_top_n_test: proposals per image in inference.
        rpn_nms_threshold: largest IoU of two proposals.
        rpn_min_size: smallest width and height of a proposal in pixels of the image on disk, as in py-faster-rcnn; in
            pixels of the given image if the batch has no ``original_size``.
        **kwargs: see `RegionModule`.
    """

    def __init__(
        self,
        anchor_sizes: Sequence[float] = (128, 256, 512),
        anchor_ratios: Sequence[float] = (0.5, 1, 2),
        allow_border_anchors: bool = False,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        rpn_fg_iou_threshold: float = 0.7,
        rpn_bg_iou_threshold: float = 0.3,
        rpn_loss_normalization: RPNLossNormalization = "paper",
        rpn_box_loss_weight: float = 10.0,
        rpn_pre_nms_top_n_test: int = 6000,
        rpn_post_nms_top_n_test: int = 300,
        rpn_nms_threshold: float = 0.7,
        rpn_min_size: float = 16.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.allow_border_anchors = allow_border_anchors
        self.rpn_batch_size_per_image, self.rpn_positive_fraction = rpn_batch_size_per_image, rpn_positive_fraction
        self.rpn_fg_iou_threshold, self.rpn_bg_iou_threshold = rpn_fg_iou_threshold, rpn_bg_iou_threshold
        self.rpn_loss_normalization: RPNLossNormalization = rpn_loss_normalization
        self.rpn_box_loss_weight = rpn_box_loss_weight
        self.rpn_pre_nms_top_n_test, self.rpn_post_nms_top_n_test = rpn_pre_nms_top_n_test, rpn_post_nms_top_n_test
        self.rpn_nms_threshold, self.rpn_min_size = rpn_nms_threshold, rpn_min_size
        self.network.rpn = RegionProposalNetwork(
            self.network.channels, self.network.strides, anchor_sizes, anchor_ratios
        )

    def rpn_losses(self, output: RPNOutput, sizes: Tensor, target: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Sample anchors and compute ``rpn_class`` and ``rpn_box``."""
        targets = encode_rpn_targets(
            target,
            output.anchors,
            sizes,
            self.rpn_fg_iou_threshold,
            self.rpn_bg_iou_threshold,
            self.allow_border_anchors,
        )
        sample = sample_balanced(
            targets.positive, targets.negative, self.rpn_batch_size_per_image, self.rpn_positive_fraction
        )
        return rpn_loss(output, targets, sample, self.rpn_loss_normalization, self.rpn_box_loss_weight)

    def propose(
        self,
        output: RPNOutput,
        sizes: Tensor,
        pre_nms_top_n: int,
        post_nms_top_n: int,
        original_size: Tensor | None = None,
    ) -> Proposals:
        """Decode proposals, see `decode_proposals`.

        Args:
            output: predictions.
            sizes: (width, height) of the images in pixels, float (B, 2).
            pre_nms_top_n: see `decode_proposals`.
            post_nms_top_n: see `decode_proposals`.
            original_size: (height, width) of the images on disk, int64 (B, 2); None if they are not resized.
        """
        min_size: float | Tensor = self.rpn_min_size
        if original_size is not None:
            # The factor of the resize; the areas do not depend on the orientation.
            min_size = min_size * (sizes.prod(1, keepdim=True) / original_size.prod(1, keepdim=True)).sqrt()
        return decode_proposals(output, sizes, pre_nms_top_n, post_nms_top_n, self.rpn_nms_threshold, min_size)

    def predict(self, images: Tensor | list[Tensor], original_size: Tensor | None = None) -> list[dict[str, Tensor]]:
        """See `VisionModule`; ``original_size`` as for `propose`."""
        sizes = [None] * len(images) if original_size is None else original_size[:, None]
        return [self.predict_image(image[None], size) for image, size in zip(images, sizes, strict=True)]

    @abstractmethod
    def predict_image(self, image: Tensor, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Return the predictions for one image, uint8 (1, 3, H, W), see `predict`."""

    def predict_batch(self, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        return self.predict(batch["image"], batch.get("original_size"))


class RoIOutput(NamedTuple):
    """Predictions of the second stage.

    Attributes:
        maps: feature maps, float32 (B, C', h, w), one per stride.
        sizes: (width, height) of the images in pixels, float32 (B, 2).
        boxes: RoIs, float32 (B, n, 4), xyxy in pixels.
        valid: bool (B, n), False for padding.
        logits: float32 (B, n, 1 + C).
        deltas: float32 (B, n, 1 + C, 4), see `encode_boxes`.
        sample: the RoIs with their targets; None in inference.
    """

    maps: list[Tensor]
    sizes: Tensor
    boxes: Tensor
    valid: Tensor
    logits: Tensor
    deltas: Tensor
    sample: SampledRoIs | None


class RoIStage(RegionModule, Detector):
    """Second stage: RoI heads, which classify proposals and regress their boxes (Girshick 2015).

    Args:
        rois_per_image: RoIs sampled per image for training.
        roi_positive_fraction: largest fraction of positives among the sampled RoIs.
        roi_fg_iou_threshold: smallest IoU of positive RoIs with an object; the IoU of background is lower.
        bg_iou_min: smallest IoU of background RoIs with an object; 0.1 selects hard negatives.
        roi_pooling: ``pool`` is the paper's RoI pooling, ``align`` interpolates (He et al. 2017). Feature pyramids
            always use ``align``.
        box_loss_weight: weight of the box loss, the paper's lambda.
        detections_per_image: largest number of detections per image.
        **kwargs: see `RegionModule` and `Detector`.
    """

    def __init__(
        self,
        rois_per_image: int = 64,
        roi_positive_fraction: float = 0.25,
        roi_fg_iou_threshold: float = 0.5,
        bg_iou_min: float = 0.1,
        roi_pooling: RoIPooling = "pool",
        box_loss_weight: float = 1.0,
        nms_threshold: float = 0.3,
        detections_per_image: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(nms_threshold=nms_threshold, **kwargs)
        self.rois_per_image, self.roi_positive_fraction = rois_per_image, roi_positive_fraction
        self.roi_fg_iou_threshold, self.bg_iou_min = roi_fg_iou_threshold, bg_iou_min
        self.box_loss_weight, self.detections_per_image = box_loss_weight, detections_per_image
        self.network.roi = RoIHeads(
            self.backbone,
            self.network.channels,
            self.network.strides,
            self.num_classes,
            self.width_multiplier,
            self.freeze_backbone,
            roi_pooling,
        )

    def run_roi_heads(
        self,
        maps: list[Tensor],
        sizes: Tensor,
        boxes: Tensor,
        valid: Tensor,
        target: Sequence[dict[str, Tensor]] | None = None,
    ) -> RoIOutput:
        """Run the RoI heads on all proposals or, if there are targets, on a sample of them.

        Args:
            maps: feature maps, float32 (B, C', h, w), one per stride.
            sizes: (width, height) of the images in pixels, float32 (B, 2).
            boxes: proposals, float32 (B, P, 4), xyxy in pixels.
            valid: bool (B, P), False for padding.
            target: one dict per image with ``boxes`` and ``labels``, for training.
        """
        sample = None
        if target is not None:
            sample = sample_rois(
                boxes,
                valid,
                target,
                self.rois_per_image,
                self.roi_positive_fraction,
                self.roi_fg_iou_threshold,
                self.bg_iou_min,
            )
            boxes, valid = sample.boxes, sample.valid
        logits, deltas = self.network.roi(maps, boxes)
        return RoIOutput(maps, sizes, boxes, valid, logits, deltas, sample)

    def roi_losses(self, output: RoIOutput) -> dict[str, Tensor]:
        """Compute ``class`` and ``box``, see `fast_rcnn_loss`."""
        assert output.sample is not None
        return fast_rcnn_loss(output.logits, output.deltas, output.sample, self.box_loss_weight)

    def decode(self, output: RoIOutput) -> list[dict[str, Tensor]]:
        """Decode detections, see `decode_detections`."""
        return decode_detections(
            output.logits,
            output.deltas,
            output.boxes,
            output.valid,
            output.sizes,
            self.score_threshold,
            self.nms_threshold,
            self.detections_per_image,
        )
