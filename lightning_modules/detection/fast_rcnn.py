"""Fast R-CNN: Girshick, "Fast R-CNN", ICCV 2015.

The convolutions run once over the whole picture. Of the map that comes out, each proposal's part is pooled to the same
few cells, from which fully connected layers say what it shows and how to move it. Classes and boxes are learnt at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool

from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.detection.backbones import (
    Backbone,
    Trunk,
    fill_up,
    load_backbone,
    make_head,
    make_trunk,
    maps_of,
)
from lightning_modules.detection.boxes import corners, offsets, overlaps, pad, sample, suppress
from lightning_modules.detection.external_proposals import external_proposals, given_proposals
from lightning_modules.detection.metrics import APMethod, detection_metrics

Pooling = Literal["pool", "align"]

# --- network ------------------------------------------------------------------------------------------------------


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
            float32 (B,n,1+C) and float32 (B,n,1+C,4), see `offsets`.
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


class FastRCNNNetwork(nn.Module):
    """Figure 1's network: normalised images float (B,3,H,W) and boxes float (B,n,4) to what `RegionNetwork` says."""

    def __init__(self, trunk: Trunk, roi: RegionNetwork) -> None:
        super().__init__()
        self.trunk, self.roi = trunk.layers, roi

    def forward(self, x: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return self.roi(maps_of(self.trunk(x)), boxes)


# --- target encoding ----------------------------------------------------------------------------------------------

# The offsets are divided by these. The paper measures mean and deviation of the training set's, class by class;
# py-faster-rcnn fixes them.
DEVIATIONS = (0.1, 0.1, 0.2, 0.2)


class Regions(NamedTuple):
    """n regions of each of B images and what is to be said of them, those with an object first.

    Attributes:
        boxes: float32 (B,n,4) xyxy in pixels.
        taken: bool (B,n): False fills up where there are too few; it is not learnt from.
        label: int64 (B,n), the paper's u: 0 for background, else 1 + the object's.
        offset: float32 (B,n,4), the paper's v, see `offsets`; of the background without meaning.
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
    """Regions to learn from (section 2.3): of each image up to ``share`` of ``count`` that have an IoU of .5 or more
    with an object; the others are background, with an IoU below. The objects' own boxes are proposals too.

    Args:
        proposals: float (B,P,4) xyxy in pixels, no gradient.
        there: bool (B,P), where there is one.
        target: boxes float (M,4) xyxy in pixels and labels int64 (M,) of each image.
        count: n; less if there are fewer.
        share: 0..1.
        background: least IoU of background; the paper's .1 picks harder ones. Of an image without objects it is 0.
    """
    objects, labels = pad(target)
    known = (objects[..., 2:] > objects[..., :2]).all(2)
    boxes, there = torch.cat([proposals, objects], 1), torch.cat([there, known], 1)
    best, chosen = overlaps(objects, boxes).max(1)
    least = torch.where(known.any(1, keepdim=True), background, 0.0)
    drawn = sample(there & (best >= 0.5), there & (best < 0.5) & (best >= least), count, share)
    index = drawn.which[..., None].expand(-1, -1, 4)
    boxes, chosen = boxes.gather(1, index), chosen.gather(1, drawn.which)
    label = torch.where(drawn.positive, labels.gather(1, chosen) + 1, 0)
    truth = objects.gather(1, chosen[..., None].expand(-1, -1, 4))
    return Regions(boxes, drawn.taken, label, offsets(truth, boxes, DEVIATIONS), chosen)


# --- loss ---------------------------------------------------------------------------------------------------------


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


# --- decoding -----------------------------------------------------------------------------------------------------


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
    moved = corners(offset[:, :, 1:], boxes[:, :, None], DEVIATIONS)
    moved = torch.minimum(moved.clamp_min(0), size.repeat(1, 2)[:, None, None])
    scores = logits.softmax(2)[..., 1:]
    image, region, label = ((scores > score_threshold) & there[..., None]).nonzero(as_tuple=True)
    found, found_scores = moved[image, region, label], scores[image, region, label]
    return suppress(found, found_scores, label, image, len(boxes), nms_threshold, keep=100)


# --- module -------------------------------------------------------------------------------------------------------


class FastRCNN(VisionModule):
    """Fast R-CNN. Batch: see detection in the batch contract; images may differ in size. Predictions: see `decode`.

    The proposals come with the batch (``--data.proposals``); where they do not, as in the prediction of a folder,
    Selective Search computes them, about a second a picture. Metrics: ``map`` and what else `VOCMeanAP` gives, and
    COCO's (`COCOMeanAP`). As in the authors' code, biases learn at twice the rate and do not decay.

    Args:
        backbone, width, batch_norm, frozen, stride: see `make_trunk`. VGG16 for 20 classes has 134,690,729 parameters.
        num_classes: C, without the background; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        weights: None to train from scratch; DEFAULT or a name of torchvision's weights for the backbone; or a file: of
            these, or a checkpoint of ours.
        box_weight: lambda, see `fast_rcnn_loss`.
        regions: regions of each image that are learnt from; the paper has two images a batch and 64 of each.
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
        self.save_arguments(inspect.currentframe())
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
        proposals, there = given_proposals(batch)
        regions = draw_regions(proposals, there, batch["target"], self.regions, background=self.background)
        pixels, _ = fill_up(batch["image"], self.preprocess)
        logits, offset = self.network(pixels, regions.boxes)
        return fast_rcnn_loss(logits, offset, regions, self.box_weight)

    def predict(
        self, images: Tensor | list[Tensor], proposals: Sequence[Tensor] | None = None
    ) -> list[dict[str, Tensor]]:
        boxes, there = external_proposals(images, proposals)
        pixels, size = fill_up(images, self.preprocess)
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
