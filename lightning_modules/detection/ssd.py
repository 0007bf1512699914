"""SSD: Liu, Anguelov, Erhan, Szegedy, Reed, Fu and Berg, "SSD: Single Shot MultiBox Detector", ECCV 2016.

One network yields feature maps of decreasing size. Every cell of a map has a few prior boxes of given sizes and aspect
ratios; for each of them a 3x3 convolution predicts box deltas and class logits. There are no proposals and no second
stage. Notation of the shapes:

    B images, P priors, M objects per image, C classes without background
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.boxes import (
    batched_box_iou,
    decode_boxes,
    encode_boxes,
    non_maximum_suppression,
    pad_targets,
)
from lightning_modules.components.image_batches import require_square
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.unsaved import Constant
from lightning_modules.components.vgg import conv_relu, dilated_vgg16, load_dilated_vgg16
from lightning_modules.detection.base import Detector
from lightning_modules.detection.ssd_matching import match_objects_batched

# --- network ------------------------------------------------------------------------------------------------------


class SSDVariant(NamedTuple):
    """Layers and priors of a variant, from the authors' ssd_pascal.py and its 512 form.

    Attributes:
        image_size: side of the images in pixels.
        extras: the two layers behind VGG-16 for each further feature map: channels of the 1x1 convolution; channels,
            kernel size, stride and padding of the next one.
        cells: side of each feature map.
        steps: pixels between the centers of two cells of each feature map.
        prior_sizes: side of the smaller square prior of each feature map in pixels, and one more: the larger square's
            side is the geometric mean of two neighbors.
        aspect_ratios: width / height of the other priors of each feature map; each also stands upright.
    """

    image_size: int
    extras: tuple[tuple[int, int, int, int, int], ...]
    cells: tuple[int, ...]
    steps: tuple[int, ...]
    prior_sizes: tuple[float, ...]
    aspect_ratios: tuple[tuple[float, ...], ...]

    @property
    def priors_per_cell(self) -> list[int]:
        """Number of priors of a cell of each feature map."""
        return [2 + 2 * len(ratios) for ratios in self.aspect_ratios]


# SSD512's sizes are those of the authors' settings; their layer truncates them to integers (prior_box_layer.cpp).
VARIANTS: dict[str, SSDVariant] = {
    "ssd300": SSDVariant(
        300,
        ((256, 512, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 3, 1, 0), (128, 256, 3, 1, 0)),
        (38, 19, 10, 5, 3, 1),
        (8, 16, 32, 64, 100, 300),
        (30, 60, 111, 162, 213, 264, 315),
        ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    ),
    "ssd512": SSDVariant(
        512,
        ((256, 512, 3, 2, 1), *((128, 256, 3, 2, 1),) * 3, (128, 256, 4, 1, 1)),
        (64, 32, 16, 8, 4, 2, 1),
        (8, 16, 32, 64, 128, 256, 512),
        (35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8, 537.6),
        ((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    ),
}


class L2Norm(nn.Module):
    """Normalize the channels of each cell to length 1 and multiply them by learned scales (section 3.1).

    The activations of conv4_3 are larger than those of the other feature maps (Liu, Rabinovich and Berg 2016,
    "ParseNet").

    Args:
        channels: number of channels.
        scale: initial value of the scales.
    """

    def __init__(self, channels: int, scale: float = 20.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Map float (B, D, H, W) to float32 (B, D, H, W)."""
        return F.normalize(x.float(), dim=1) * self.scale[:, None, None]


class SSDNetwork(nn.Module):
    """The network of figure 2.

    Args:
        variant: layers and priors.
        num_classes: number of classes without background, C.
        width_multiplier: scales the channels of all layers but the predictors.
        batch_norm: batch normalization after each convolution but the predictors and the last one, whose single cell
            has no batch statistics if the batch has one image.
    """

    def __init__(
        self, variant: SSDVariant, num_classes: int = 20, width_multiplier: float = 1.0, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.num_logits = 1 + num_classes
        self.features, self.conv4_3 = dilated_vgg16(width_multiplier, batch_norm)
        widths = (512, 1024, *(extra[1] for extra in variant.extras))
        channels = [max(1, round(width * width_multiplier)) for width in widths]
        self.norm = L2Norm(channels[0])
        self.extras = nn.ModuleList()
        for i, (squeezed, _, kernel_size, stride, padding) in enumerate(variant.extras, start=1):
            middle, out = max(1, round(squeezed * width_multiplier)), channels[i + 1]
            has_norm = batch_norm and i < len(variant.extras)
            layers = conv_relu(middle, out, kernel_size, has_norm, stride, padding)
            self.extras.append(nn.Sequential(*conv_relu(channels[i], middle, 1, batch_norm), *layers))
        maps = list(zip(channels, variant.priors_per_cell, strict=True))
        self.location = nn.ModuleList(nn.Conv2d(c, 4 * priors, 3, padding=1) for c, priors in maps)
        self.confidence = nn.ModuleList(nn.Conv2d(c, self.num_logits * priors, 3, padding=1) for c, priors in maps)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d):
                # Caffe's "xavier" scales by the fan-in alone; VGG-16 from scratch needs He's initialization.
                is_backbone = name.startswith("features.")
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu" if is_backbone else "linear")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map normalized images, float (B, 3, S, S), to deltas (B, P, 4) and logits (B, P, 1 + C), background first."""
        maps = []
        for i, layer in enumerate(self.features):
            if i == self.conv4_3:
                maps.append(self.norm(x))
            x = layer(x)
        maps.append(x)
        for extra in self.extras:
            maps.append(extra(maps[-1]))

        def predict(predictors: nn.ModuleList, outputs_per_prior: int) -> Tensor:
            outputs = [predictor(m) for predictor, m in zip(predictors, maps, strict=True)]
            return torch.cat([o.permute(0, 2, 3, 1).reshape(len(x), -1, outputs_per_prior) for o in outputs], dim=1)

        return predict(self.location, 4), predict(self.confidence, self.num_logits)


# --- priors -------------------------------------------------------------------------------------------------------


def make_priors(variant: SSDVariant) -> Tensor:
    """Return the prior boxes in order of feature map, row, column and prior.

    The priors of a cell are the small and the large square, then each aspect ratio, lying and standing. Priors may
    exceed the image, as in the authors' code.

    Args:
        variant: sizes, aspect ratios and feature maps.

    Returns:
        float32 (P, 4), cxcywh in pixels; P is 8732 for SSD300 and 24564 for SSD512.
    """
    priors = []
    sizes = zip(variant.prior_sizes[:-1], variant.prior_sizes[1:], strict=True)
    for cells, step, (size, next_size), ratios in zip(
        variant.cells, variant.steps, sizes, variant.aspect_ratios, strict=True
    ):
        large = math.sqrt(size * next_size)
        roots = [math.sqrt(ratio) for ratio in ratios]
        sides = [(size, size), (large, large)]
        sides += [side for r in roots for side in ((size * r, size / r), (size / r, size * r))]
        center = (torch.arange(cells) + 0.5) * step
        y, x = torch.meshgrid(center, center, indexing="ij")
        shape = (cells, cells, len(sides), 2)
        centers = torch.stack([x, y], dim=-1)[:, :, None].expand(shape)
        priors.append(torch.cat([centers, torch.tensor(sides).expand(shape)], dim=-1).view(-1, 4))
    return torch.cat(priors)


# --- target encoding ----------------------------------------------------------------------------------------------

BOX_STD = (0.1, 0.1, 0.2, 0.2)  # the authors' "variances"


class Targets(NamedTuple):
    """Training targets of the priors.

    Attributes:
        positive: whether the prior has an object, bool (B, P).
        labels: 0 for background, else 1 + the object's label, int64 (B, P).
        deltas: box deltas of positive priors, float32 (B, P, 4), see `encode_boxes`; arbitrary for the others.
    """

    positive: Tensor
    labels: Tensor
    deltas: Tensor


def encode(target: list[dict[str, Tensor]], priors: Tensor, match_threshold: float = 0.5) -> Targets:
    """Match priors to objects (section 2.2).

    Each object is matched to its best prior; then every other prior to the object with the highest IoU, if that is at
    least ``match_threshold``.

    Args:
        target: one dict per image with ``boxes`` float (M, 4), xyxy in pixels, and ``labels`` int64 (M,).
        priors: see `make_priors`.
        match_threshold: smallest IoU of the second step.
    """
    boxes, labels = pad_targets(target)
    priors = box_convert(priors, "cxcywh", "xyxy")
    iou = batched_box_iou(boxes, priors)
    best, matched = iou.max(1)
    owner = match_objects_batched(iou)  # the fast form of `match_objects`
    is_owned = owner < labels.shape[1]
    matched = torch.where(is_owned, owner, matched)
    positive = is_owned | (best >= match_threshold)
    prior_labels = torch.where(positive, labels.gather(1, matched) + 1, 0)
    matched_boxes = boxes.gather(1, matched[..., None].expand(-1, -1, 4))
    return Targets(positive, prior_labels, encode_boxes(matched_boxes, priors, BOX_STD))


def match_objects(iou: Tensor) -> Tensor:
    """Assign each object a prior of its own: the authors' algorithm (bbox_util.cpp: MatchBBox).

    Take the pair with the highest IoU, then the best pair of the remaining objects and priors, until every object that
    overlaps a prior has one. Training uses `match_objects_batched`, the fast form.

    Args:
        iou: float (B, M, P).

    Returns:
        Index of the object of each prior, int64 (B, P); M if it has none.
    """
    images, objects, priors = iou.shape
    remaining, image = iou.clone(), torch.arange(images, device=iou.device)
    owner = torch.full((images, priors), objects, device=iou.device)
    for _ in range(objects):
        best, pair = remaining.flatten(1).max(1)
        matched, prior = pair // priors, pair % priors
        owner[image, prior] = torch.where(best > 1e-6, matched, owner[image, prior])
        remaining[image, matched], remaining[image, :, prior] = -1, -1
    return owner


# --- loss ---------------------------------------------------------------------------------------------------------


def multibox_loss(
    deltas: Tensor, logits: Tensor, targets: Targets, negatives_per_positive: float = 3.0, empty_negatives: int = 0
) -> dict[str, Tensor]:
    """Compute equation 1, normalized by the number N of positive priors of the batch; 0 if there are none.

    - ``location``: smooth L1 loss of the deltas, summed over the positives, times 1/N.
    - ``confidence``: cross entropy, summed over the positives and the hardest negatives, times 1/N.

    Hard negatives are the priors without an object that have the highest cross entropy, in each image up to
    ``negatives_per_positive`` times its positives (section 2.2).

    Args:
        deltas: float (B, P, 4).
        logits: float (B, P, 1 + C).
        targets: see `encode`.
        negatives_per_positive: hard negatives per positive.
        empty_negatives: hard negatives of an image without positives; 0 in the authors' code, which then learns nothing
            from such an image.
    """
    positive = targets.positive
    num_positives = positive.sum(1)
    total = num_positives.sum().clamp_min(1)
    error = F.smooth_l1_loss(deltas.float(), targets.deltas, reduction="none").sum(-1)
    entropy = F.cross_entropy(logits.float().flatten(0, 1), targets.labels.flatten(), reduction="none")
    entropy = entropy.view_as(error)
    hardest = torch.where(positive, 0, entropy).sort(dim=1, descending=True).values
    num_negatives = torch.where(num_positives > 0, negatives_per_positive * num_positives, empty_negatives)
    is_hard = torch.arange(hardest.shape[1], device=hardest.device) < num_negatives[:, None]
    return {
        "location": torch.where(positive, error, 0).sum() / total,
        "confidence": (torch.where(positive, entropy, 0).sum() + torch.where(is_hard, hardest, 0).sum()) / total,
    }


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(
    deltas: Tensor,
    logits: Tensor,
    priors: Tensor,
    image_size: int,
    score_threshold: float = 0.01,
    nms_threshold: float = 0.45,
    top_k: int = 400,
    keep_top_k: int = 200,
) -> list[dict[str, Tensor]]:
    """Decode detections; every prior has a score for each class. Defaults: the authors' for VOC.

    Args:
        deltas: float (B, P, 4).
        logits: float (B, P, 1 + C).
        priors: see `make_priors`.
        image_size: side of the images in pixels.
        score_threshold: detections with a lower probability are dropped.
        nms_threshold: IoU above which the weaker of two boxes of one class is dropped.
        top_k: candidates per image and class that enter non-maximum suppression.
        keep_top_k: detections per image.

    Returns:
        One dict per image with ``boxes`` float (K, 4), xyxy in pixels, ``scores`` and ``labels``, best first.
    """
    boxes = decode_boxes(deltas.float(), box_convert(priors, "cxcywh", "xyxy"), BOX_STD).clamp(0, image_size)
    scores = logits.float().softmax(-1)[..., 1:]
    image, prior, label = (scores > score_threshold).nonzero(as_tuple=True)
    candidates, candidate_scores = boxes[image, prior], scores[image, prior, label]
    return non_maximum_suppression(
        candidates, candidate_scores, label, image, len(boxes), nms_threshold, top_k=top_k, keep_top_k=keep_top_k
    )


# --- module -------------------------------------------------------------------------------------------------------


class SSD(Detector):
    """SSD300 and SSD512 (Liu et al. 2016).

    All images have the size of the variant. As in the authors' code, biases learn at twice the learning rate and do not
    decay.

    Args:
        variant: ``ssd300`` or ``ssd512``, for images of 300x300 or 512x512 pixels (``--data.image_size``).
        prior_sizes: side of the smaller square prior of each feature map in pixels, and one more; None for the paper's:
            30, 60, 111, 162, 213, 264, 315 for SSD300.
        aspect_ratios: width / height of the other priors of each feature map, each of which also stands upright; None
            for the paper's: 2 on the first and the last two maps, 2 and 3 on the others.
        width_multiplier: scales the channels of all layers but the predictors.
        batch_norm: batch normalization after the convolutions; not in the paper, needed to train from scratch.
        weights: None to train from scratch; IMAGENET1K_FEATURES for the authors' VGG-16, whose pixels are in 0..255
            (``mean: [0.48235, 0.45882, 0.40784]`` and ``std: [0.0039216, 0.0039216, 0.0039216]``); DEFAULT for
            torchvision's; or a file of such weights, of the authors' vgg16_reducedfc.pth, or one of our checkpoints.
        empty_negatives: hard negatives of an image without objects, see `multibox_loss`; 0 in the authors' code.
        score_threshold: detections with a lower score are dropped.
        nms_threshold: IoU above which non-maximum suppression drops the weaker of two boxes of one class.
        top_k: candidates per image and class that enter non-maximum suppression.
        keep_top_k: largest number of detections per image.
        optimizer: see `VisionModule`. Default: the paper's.
        **kwargs: see `Detector`.
    """

    def __init__(
        self,
        variant: Literal["ssd300", "ssd512"] = "ssd300",
        prior_sizes: Sequence[float] | None = None,
        aspect_ratios: Sequence[Sequence[float]] | None = None,
        width_multiplier: float = 1.0,
        batch_norm: bool = False,
        weights: str | None = None,
        empty_negatives: int = 3,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.45,
        top_k: int = 400,
        keep_top_k: int = 200,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(score_threshold=score_threshold, nms_threshold=nms_threshold, optimizer=optimizer, **kwargs)
        if variant not in VARIANTS:
            raise UserError(f"variant: expected {' or '.join(VARIANTS)}, found {variant}")
        config = VARIANTS[variant]
        if prior_sizes is not None:
            config = config._replace(prior_sizes=tuple(prior_sizes))
        if aspect_ratios is not None:
            config = config._replace(aspect_ratios=tuple(tuple(ratios) for ratios in aspect_ratios))
        maps = len(config.cells)
        for name, values, expected in (
            ("prior_sizes", config.prior_sizes, maps + 1),
            ("aspect_ratios", config.aspect_ratios, maps),
        ):
            if len(values) != expected:
                raise UserError(f"{name}: expected {expected} entries for {variant}, found {len(values)}")
        self.image_size, self.empty_negatives = config.image_size, empty_negatives
        self.top_k, self.keep_top_k = top_k, keep_top_k
        self.priors = Constant(make_priors(config))
        self.network = SSDNetwork(config, self.num_classes, width_multiplier, batch_norm)
        if weights is not None:
            load_dilated_vgg16(self.network, weights, "norm", "extras", "location", "confidence")

    def forward(self, images: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
        """Map uint8 images (B, 3, S, S) to deltas (B, P, 4) and logits (B, P, 1 + C)."""
        return self.network(self.preprocess(require_square(images, self.image_size)))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        deltas, logits = self(batch["image"])
        targets = encode(batch["target"], self.priors.value)
        return multibox_loss(deltas, logits, targets, empty_negatives=self.empty_negatives)

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        deltas, logits = self(images)
        return decode(
            deltas,
            logits,
            self.priors.value,
            self.image_size,
            self.score_threshold,
            self.nms_threshold,
            self.top_k,
            self.keep_top_k,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)
