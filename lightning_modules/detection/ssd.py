"""SSD: Liu, Anguelov, Erhan, Szegedy, Reed, Fu and Berg, "SSD: Single Shot MultiBox Detector", ECCV 2016.

Maps of falling size are taken from one network. Every cell of each has a few prior boxes of given sizes and aspects,
for each of which a 3x3 convolution says how to move it and what is in it. No proposals, no second look.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.ops import box_convert

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.average_precision import APMethod
from lightning_modules.components.boxes import (
    batched_box_iou,
    decode_boxes,
    encode_boxes,
    non_maximum_suppression,
    pad_targets,
)
from lightning_modules.components.image_batches import require_size
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.vgg import conv_relu, dilated_vgg16, load_dilated_vgg16
from lightning_modules.detection.metrics import detection_metrics

# --- network ------------------------------------------------------------------------------------------------------


class Map(NamedTuple):
    """One of the maps that boxes are predicted from, as in the authors' ssd_pascal.py and its 512 variant.

    Attributes:
        cells: its side.
        step: pixels from one cell's center to the next.
        size: side in pixels of the smaller square prior.
        next_size: of the next map; the larger square's side is the geometric mean of both.
        aspects: of the other priors, each of which also stands upright.
    """

    cells: int
    step: int
    size: float
    next_size: float
    aspects: tuple[float, ...]

    @property
    def priors(self) -> int:
        """Prior boxes of a cell."""
        return 2 + 2 * len(self.aspects)


# The authors' layer cuts SSD512's sizes to whole pixels (an int in prior_box_layer.cpp); these are their settings.
MAPS: dict[int, tuple[Map, ...]] = {
    300: (
        Map(38, 8, 30, 60, (2,)),
        Map(19, 16, 60, 111, (2, 3)),
        Map(10, 32, 111, 162, (2, 3)),
        Map(5, 64, 162, 213, (2, 3)),
        Map(3, 100, 213, 264, (2,)),
        Map(1, 300, 264, 315, (2,)),
    ),
    512: (
        Map(64, 8, 35.84, 76.8, (2,)),
        Map(32, 16, 76.8, 153.6, (2, 3)),
        Map(16, 32, 153.6, 230.4, (2, 3)),
        Map(8, 64, 230.4, 307.2, (2, 3)),
        Map(4, 128, 307.2, 384.0, (2, 3)),
        Map(2, 256, 384.0, 460.8, (2,)),
        Map(1, 512, 460.8, 537.6, (2,)),
    ),
}
# The layers behind VGG16, two a map: channels of the 1x1, channels, kernel, stride and padding of the other.
EXTRAS: dict[int, tuple[tuple[int, int, int, int, int], ...]] = {
    300: ((256, 512, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 3, 1, 0), (128, 256, 3, 1, 0)),
    512: ((256, 512, 3, 2, 1), *((128, 256, 3, 2, 1),) * 3, (128, 256, 4, 1, 1)),
}


class L2Norm(nn.Module):
    """Gives the channels of each place a length of 1, times a learned scale for each channel (section 3.1).

    conv4_3 is larger than the other maps (Liu, Rabinovich and Berg 2016, "ParseNet").
    """

    def __init__(self, channels: int, scale: float = 20.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """float (B,C,H,W) to float32 (B,C,H,W)."""
        return F.normalize(x.float(), dim=1) * self.scale[:, None, None]


class SSDNetwork(nn.Module):
    """Figure 2's network: images to 4 offsets and C+1 logits for each prior.

    Args:
        size: side of the images in pixels.
        num_classes: C.
        width: multiplies the channels of all layers but the predictors'.
        batch_norm: after each convolution but the predictors and the last, whose one cell has no statistics in a batch
            of one image.
    """

    def __init__(
        self, size: Literal[300, 512] = 300, num_classes: int = 20, width: float = 1.0, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.depth = 1 + num_classes
        self.features, self.conv4_3 = dilated_vgg16(width, batch_norm)
        channels = [max(1, round(c * width)) for c in (512, 1024, *(extra[1] for extra in EXTRAS[size]))]
        self.norm = L2Norm(channels[0])
        self.extras = nn.ModuleList()
        for i, (squeezed, _, kernel, stride, padding) in enumerate(EXTRAS[size], start=1):
            middle, out = max(1, round(squeezed * width)), channels[i + 1]
            normed = batch_norm and i < len(EXTRAS[size])
            layers = conv_relu(middle, out, kernel, normed, stride, padding)
            self.extras.append(nn.Sequential(*conv_relu(channels[i], middle, 1, batch_norm), *layers))
        maps = list(zip(channels, MAPS[size], strict=True))
        self.location = nn.ModuleList(nn.Conv2d(c, 4 * m.priors, 3, padding=1) for c, m in maps)
        self.confidence = nn.ModuleList(nn.Conv2d(c, self.depth * m.priors, 3, padding=1) for c, m in maps)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d):
                # Caffe's "xavier" is by the fan in; VGG from scratch wants He's.
                trunk = name.startswith("features.")
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu" if trunk else "linear")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized images float (B,3,S,S) to location (B,P,4) and confidence (B,P,1+C), background first."""
        maps = []
        for i, layer in enumerate(self.features):
            if i == self.conv4_3:
                maps.append(self.norm(x))
            x = layer(x)
        maps.append(x)
        for extra in self.extras:
            maps.append(extra(maps[-1]))

        def joined(predictors: nn.ModuleList, numbers: int) -> Tensor:
            outputs = [predictor(m) for predictor, m in zip(predictors, maps, strict=True)]
            return torch.cat([o.permute(0, 2, 3, 1).reshape(len(x), -1, numbers) for o in outputs], dim=1)

        return joined(self.location, 4), joined(self.confidence, self.depth)


# --- priors -------------------------------------------------------------------------------------------------------


def make_priors(size: Literal[300, 512]) -> Tensor:
    """The prior boxes, center and size in pixels: float32 (P,4), 8732 for SSD300 and 24564 for SSD512.

    By map, row, column; of a cell first the small and the large square, then each aspect lying and standing. Boxes
    reach beyond the image, as the authors' do.
    """
    priors = []
    for m in MAPS[size]:
        large = math.sqrt(m.size * m.next_size)
        roots = [math.sqrt(aspect) for aspect in m.aspects]
        sides = [(m.size, m.size), (large, large)]
        sides += [side for r in roots for side in ((m.size * r, m.size / r), (m.size / r, m.size * r))]
        center = (torch.arange(m.cells) + 0.5) * m.step
        y, x = torch.meshgrid(center, center, indexing="ij")
        shape = (m.cells, m.cells, m.priors, 2)
        centers = torch.stack([x, y], dim=-1)[:, :, None].expand(shape)
        priors.append(torch.cat([centers, torch.tensor(sides).expand(shape)], dim=-1).view(-1, 4))
    return torch.cat(priors)


# --- target encoding ----------------------------------------------------------------------------------------------

VARIANCES = (0.1, 0.1, 0.2, 0.2)
# An object may lose this many priors to others before it goes without one of its own.
ROUNDS = 8


class Targets(NamedTuple):
    """What each of the P priors is to say.

    Attributes:
        positive: bool (B,P), has an object.
        label: int64 (B,P), 0 for background, else 1 + the object's.
        offset: float32 (B,P,4), see `encode_boxes`, over the variances; of the others without meaning.
    """

    positive: Tensor
    label: Tensor
    offset: Tensor


def encode(target: list[dict[str, Tensor]], priors: Tensor, least: float = 0.5) -> Targets:
    """Gives each object the prior that it overlaps most (`own_priors`), and every other prior the object that it
    overlaps most, if by ``least`` or more (section 2.2).

    Args:
        target: boxes float (M,4) xyxy in pixels and labels int64 (M,) of each image.
        priors: see `make_priors`.
        least: IoU.
    """
    boxes, labels = pad_targets(target)
    priors = box_convert(priors, "cxcywh", "xyxy")
    overlap = batched_box_iou(boxes, priors)
    best, chosen = overlap.max(1)
    owner = own_priors(overlap)
    owned = owner < labels.shape[1]
    chosen = torch.where(owned, owner, chosen)
    positive = owned | (best >= least)
    label = torch.where(positive, labels.gather(1, chosen) + 1, 0)
    truth = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    return Targets(positive, label, encode_boxes(truth, priors, VARIANCES))


def own_priors(overlap: Tensor) -> Tensor:
    """Which object has each prior for its own: int64 (B,P), M where none has, for overlaps float (B,M,P).

    The authors take the pair that overlaps most, then the one that does so among the objects and priors that are left,
    until no object is (bbox_util.cpp, MatchBBox). The same comes of proposals: every object asks for its best prior,
    a prior has the one that overlaps it more (of equal objects the first), and who is refused asks for its next best
    (of equal priors any, where the authors take the first). After ``ROUNDS`` rounds the ``ROUNDS`` first pairs of every
    image are theirs for certain, and so are all others but where more objects than that crowd for the same priors.
    """
    objects, priors = overlap.shape[1:]
    value, prior = overlap.topk(min(ROUNDS, priors), dim=2)
    number = torch.arange(objects, device=overlap.device)
    held = overlap.new_zeros(len(overlap), priors)
    owner = torch.full_like(held, objects, dtype=torch.int64)
    nobody = owner
    for _ in range(min(ROUNDS, objects)):
        rival, first = (x.gather(1, prior.flatten(1)).view_as(prior) for x in (held, owner))
        free = (value > rival) | ((value == rival) & (number[:, None] <= first))
        # Those whose box overlaps nothing, and those who were refused everywhere, ask for nothing.
        asks = torch.where(free & (value > 1e-6), value, 0)
        # The values fall: the first that is left is the best.
        bid, place = asks.max(2)
        wanted = prior.gather(2, place[..., None])[..., 0]
        held = torch.zeros_like(held).scatter_reduce(1, wanted, bid, "amax")
        wins = (bid > 0) & (bid == held.gather(1, wanted))
        owner = nobody.scatter_reduce(1, wanted, torch.where(wins, number, objects), "amin")
    return owner


# --- loss ---------------------------------------------------------------------------------------------------------


def multibox_loss(
    location: Tensor, confidence: Tensor, targets: Targets, negatives: float = 3.0, empty_negatives: int = 0
) -> dict[str, Tensor]:
    """Equation 1, over the N positive priors of all images of the batch; 0 where there is none:

    - ``location``: 1/N * sum over the positives of the smooth L1 of the four offsets.
    - ``confidence``: 1/N * sum over the positives and the hardest negatives of the cross entropy.

    The hardest are the priors without an object whose cross entropy is highest, in each image up to ``negatives`` times
    its positives (section 2.2).

    Args:
        location: float (B,P,4).
        confidence: float (B,P,1+C), logits.
        targets: see `encode`.
        negatives: negatives a positive.
        empty_negatives: those of an image without positives. The authors' code takes none, so that it learns nothing
            from such an image.
    """
    positive = targets.positive
    count = positive.sum(1)
    total = count.sum().clamp_min(1)
    error = F.smooth_l1_loss(location.float(), targets.offset, reduction="none").sum(-1)
    entropy = F.cross_entropy(confidence.float().flatten(0, 1), targets.label.flatten(), reduction="none")
    entropy = entropy.view_as(error)
    hardest = torch.where(positive, 0, entropy).sort(dim=1, descending=True).values
    taken = torch.where(count > 0, negatives * count, empty_negatives)
    hard = torch.arange(hardest.shape[1], device=hardest.device) < taken[:, None]
    return {
        "location": torch.where(positive, error, 0).sum() / total,
        "confidence": (torch.where(positive, entropy, 0).sum() + torch.where(hard, hardest, 0).sum()) / total,
    }


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(
    location: Tensor,
    confidence: Tensor,
    priors: Tensor,
    size: int,
    score_threshold: float = 0.01,
    nms_threshold: float = 0.45,
) -> list[dict[str, Tensor]]:
    """What the network found: for each image ``boxes`` float (K,4) xyxy in pixels, ``scores``, ``labels``, best first.

    A box has the score of its softmax for every class. Of those above the threshold the best 400 of each class take
    part in the suppression, and the best 200 of the image are left.

    Args:
        location: float (B,P,4).
        confidence: float (B,P,1+C), logits.
        priors: see `make_priors`.
        size: side of the images in pixels.
        score_threshold, nms_threshold: the authors' for VOC.
    """
    boxes = decode_boxes(location.float(), box_convert(priors, "cxcywh", "xyxy"), VARIANCES).clamp(0, size)
    scores = confidence.float().softmax(-1)[..., 1:]
    image, prior, label = (scores > score_threshold).nonzero(as_tuple=True)
    found, found_scores = boxes[image, prior], scores[image, prior, label]
    return non_maximum_suppression(found, found_scores, label, image, len(boxes), nms_threshold, top_k=400, keep_top_k=200)


# --- module -------------------------------------------------------------------------------------------------------


class SSD(VisionModule):
    """SSD300 and SSD512. Batch: see detection in the batch contract, images of one size. Predictions: see `decode`.

    Metrics: ``map`` and what else `VOCMeanAP` gives, and COCO's (`COCOMeanAP`).

    As in the authors' code, biases learn at twice the rate and do not decay.

    Args:
        size: side of the images in pixels; --data.image_size must say the same.
        num_classes: C, without the background; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        width: multiplies the channels of all layers but the predictors'.
        batch_norm: after the convolutions, see `SSDNetwork`; the paper has none, and training from scratch wants it.
        weights: None to train from scratch; IMAGENET1K_FEATURES for the authors' VGG16, which takes pixels on a scale
            of 0..255 (``mean: [0.48235, 0.45882, 0.40784]`` and ``std: [0.0039216, 0.0039216, 0.0039216]``); DEFAULT for
            torchvision's own; or a file: either of these, the authors' with fc6 and fc7 (vgg16_reducedfc.pth), or one
            of our checkpoints.
        empty_negatives: how many priors of an image without objects learn that they are background, the hardest; with 0
            such an image teaches nothing, as with the authors (`multibox_loss`).
        score_threshold, nms_threshold: what is kept of the predictions.
        ap: how average precision is computed, see `VOCMeanAP`.
        coco: measure COCO's average precision too.
        optimizer: see `VisionModule`; the paper's.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/map", "max")

    def __init__(
        self,
        size: Literal[300, 512] = 300,
        num_classes: int = 20,
        class_names: list[str] | None = None,
        width: float = 1.0,
        batch_norm: bool = False,
        weights: str | None = None,
        empty_negatives: int = 3,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.45,
        ap: APMethod = "area",
        coco: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if size not in MAPS:
            raise UserError(f"size: expected 300 or 512, found {size}")
        self.size, self.num_classes, self.class_names = size, num_classes, class_names
        self.empty_negatives = empty_negatives
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.ap, self.coco = ap, coco
        # A constant, no buffer: see VisionModule.
        self._priors = make_priors(size)
        self.network = SSDNetwork(size, num_classes, width, batch_norm)
        if weights is not None:
            load_dilated_vgg16(self.network, weights, "norm", "extras", "location", "confidence")

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        location, confidence = self.network(self.preprocess(self._checked(batch["image"])))
        targets = encode(batch["target"], self._priors_on(location.device))
        return multibox_loss(location, confidence, targets, empty_negatives=self.empty_negatives)

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        location, confidence = self.network(self.preprocess(self._checked(images)))
        priors = self._priors_on(location.device)
        return decode(location, confidence, priors, self.size, self.score_threshold, self.nms_threshold)

    def build_metrics(self) -> MetricCollection:
        return detection_metrics(self.num_classes, self.ap, self.coco)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)

    def _priors_on(self, device: torch.device) -> Tensor:
        if self._priors.device != device:
            self._priors = self._priors.to(device)
        return self._priors

    def _checked(self, images: Tensor | list[Tensor]) -> Tensor:
        side = self.size
        return require_size(images, lambda height, width: height == width == side, f"{side}x{side} pixels", side)
