"""OverFeat: Sermanet, Eigen, Zhang, Mathieu, Fergus and LeCun, "OverFeat: Integrated Recognition, Localization and
Detection using Convolutional Networks", ICLR 2014 (arXiv 1312.6229).

A classifier slides over the image at several scales, as a convolution, and finely, since its last pooling is done at
every offset. In each window that shows an object a regressor says where the object's edges are, and the many boxes
that windows agree upon are merged rather than suppressed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.average_precision import APMethod
from lightning_modules.components.boxes import non_maximum_suppression, rank_in_group
from lightning_modules.components.image_batches import stack_images
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.detection.metrics import detection_metrics
from lightning_modules.detection.sliding_window import window_loss
from lightning_modules.detection.windows import scores_above, crop_windows, sample_windows, window_grid, resize_to_window_grid

# --- network ------------------------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """Layers of a network.

    Attributes:
        window: side of its input in pixels.
        features: up to the fifth layer, (kernel, channels, stride, padding) of convolutions, or the size of a pooling.
        pool: of the last pooling, after the features; it does not overlap, as none does.
        hidden: units of the two hidden layers that are fully connected.
    """

    window: int
    features: tuple[tuple[int, int, int, int] | int, ...]
    pool: int
    hidden: tuple[int, int]


Variant = Literal["fast", "accurate", "small"]
# Tables 1 and 3, with the padding of the authors' released networks. "small" is ours, for small data and objects: the
# first and last layers, nothing padded.
ARCHITECTURES: dict[str, Architecture] = {
    "fast": Architecture(
        231,
        ((11, 96, 4, 0), 2, (5, 256, 1, 0), 2, (3, 512, 1, 1), (3, 1024, 1, 1), (3, 1024, 1, 1)),
        2,
        (3072, 4096),
    ),
    "accurate": Architecture(
        221,
        ((7, 96, 2, 0), 3, (7, 256, 1, 0), 2, (3, 512, 1, 1), (3, 512, 1, 1), (3, 1024, 1, 1), (3, 1024, 1, 1)),
        3,
        (4096, 4096),
    ),
    "small": Architecture(63, ((5, 96, 2, 0), 2, (3, 256, 1, 0), (3, 512, 1, 0), (3, 512, 1, 0)), 3, (1024, 1024)),
}


class OverFeatNetwork(nn.Module):
    """Features, pooling and classifier, in which fully connected layers are convolutions.

    Args:
        variant: ``fast`` (231 pixels, 145,920,872 parameters at 1000 classes) and ``accurate`` (221, 144,656,488) are
            the paper's; ``small`` sees 63 pixels.
        num_classes: number of outputs.
        width: multiplies the channels and hidden units.
        batch_norm: after each convolution of the features, in place of its bias. The paper has none.
        boxes: of the regressor, see `BoxRegressor`; 0 for a classifier alone.
    """

    def __init__(
        self,
        variant: Variant = "accurate",
        num_classes: int = 1000,
        width: float = 1.0,
        batch_norm: bool = False,
        boxes: int = 0,
    ) -> None:
        super().__init__()
        architecture = ARCHITECTURES[variant]
        self.window, self.pool = architecture.window, architecture.pool
        modules: list[nn.Module] = []
        channels, side, self.stride = 3, self.window, 1
        for layer in architecture.features:
            if isinstance(layer, int):
                modules.append(nn.MaxPool2d(layer))
                kernel, stride, padding = layer, layer, 0
            else:
                kernel, out, stride, padding = layer
                out = max(1, round(out * width))
                modules.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=not batch_norm))
                modules += [nn.BatchNorm2d(out)] if batch_norm else []
                modules.append(nn.ReLU(inplace=True))
                channels = out
            side = (side + 2 * padding - kernel) // stride + 1
            self.stride *= stride
        self.features = nn.Sequential(*modules)
        self.channels, self.kernel = channels, side // self.pool
        sixth, seventh = (max(1, round(units * width)) for units in architecture.hidden)
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, sixth, self.kernel),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(sixth, seventh, 1),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(seventh, num_classes, 1),
        )
        initialize(self)
        nn.init.normal_(self.classifier[-1].weight, std=0.01)  # type: ignore[arg-type]
        self.regressor = BoxRegressor(channels, self.kernel, boxes, width) if boxes else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalized windows float (N,3,window,window) to logits (N,num_classes)."""
        return self.classifier(self.pooled(x)).flatten(1)

    def pooled(self, x: Tensor) -> Tensor:
        """The pooled fifth layer, from which both the classifier and the regressor see: (N,channels,kernel,kernel)."""
        return F.max_pool2d(self.features(x), self.pool)

    def edges(self, features: Tensor, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """The regressor's boxes at some windows, float (K,boxes,4): what it says at every offset, where it is wanted.

        Args:
            features: the fifth layer before pooling, float (N,channels,h,w).
            image, row, column: int64 (K,), the window whose fifth layer begins there.
        """
        assert self.regressor is not None
        reach = torch.arange(self.kernel, device=features.device) * self.pool
        rows, columns = (row[:, None] + reach)[:, :, None], (column[:, None] + reach)[:, None]
        pooled = F.max_pool2d(features, self.pool, stride=1)[image[:, None, None], :, rows, columns]
        return self.regressor(pooled.permute(0, 3, 1, 2)).flatten(1).unflatten(1, (-1, 4))


class BoxRegressor(nn.Sequential):
    """Section 4.1: the pooled fifth layer to the four edges of a box, relative to the window, a box a class or one.

    At first it says (0, 0, 1, 1), the window itself.

    Args:
        channels, kernel: of the pooled fifth layer of a window.
        boxes: how many.
        width: multiplies the hidden units.
    """

    def __init__(self, channels: int, kernel: int, boxes: int, width: float = 1.0) -> None:
        first, second = (max(1, round(units * width)) for units in (4096, 1024))
        super().__init__(
            nn.Conv2d(channels, first, kernel),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(second, 4 * boxes, 1),
        )
        initialize(self)
        last = self[-1]
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(boxes))  # type: ignore[union-attr]


def initialize(network: nn.Module) -> None:
    """He's initialization, under which deep networks begin to learn sooner than under the paper's normals of 0.01."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def at_every_offset(features: Tensor, pool: int, kernel: int, head: nn.Module) -> Tensor:
    """Figure 3: the fifth layer is pooled once an offset, the head runs over each, the results are interleaved.

    Pooling by 3 alone would put windows three times as far apart as the fifth layer's places are.

    Args:
        features: the fifth layer before pooling, float (N,C,h,w).
        pool: of the pooling that follows.
        kernel: side of what the head sees of the pooled map.
        head: fully convolutional, (N,C,a,b) to (N,D,a-kernel+1,b-kernel+1).

    Returns:
        (N,D,h-pool*kernel+1,w-pool*kernel+1); place (y, x) is the window whose fifth layer begins at (y, x).
    """
    rows, columns = (side - pool * kernel + 1 for side in features.shape[-2:])
    parts = {}
    for y, x in itertools.product(range(min(pool, rows)), range(min(pool, columns))):
        parts[y, x] = head(F.max_pool2d(features[:, :, y:, x:], pool))
    result = parts[0, 0].new_empty(*parts[0, 0].shape[:2], rows, columns)
    for (y, x), part in parts.items():
        result[:, :, y::pool, x::pool] = part
    return result


# --- loss ---------------------------------------------------------------------------------------------------------


def box_loss(boxes: Tensor, label: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """L2: the squared distance of the four edges, the mean over those windows that show an object; 0 without any.

    Args:
        boxes: the regressor's, float (K,1,4), or (K,C,4) with one a class.
        label: int64 (K,), 0..C-1 where there is an object, else C or less than 0.
        target: float (K,4), see `Windows`.
        num_classes: C.
    """
    shown = (label >= 0) & (label < num_classes)
    index = label.clamp(0, boxes.shape[1] - 1)[:, None, None].expand(-1, 1, 4)
    errors = (boxes.gather(1, index)[:, 0].float() - target).square().sum(1)
    return torch.where(shown, errors, 0).sum() / shown.sum().clamp_min(1)


# --- decoding -----------------------------------------------------------------------------------------------------


def match_score(a: Tensor, b: Tensor) -> Tensor:
    """How far boxes are from being the same, float (...) for xyxy (...,4) of two kinds: 0 where they are.

    Section 4.3 adds the distance of the centers and the area of the intersection, and does not say in which units, nor
    that the second must fall as the area grows. Here both are without a unit: the distance is divided by the mean of
    the boxes' diagonals, and the part of the union that is not shared is added.
    """
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    distance = ((a[..., :2] + a[..., 2:]) / 2 - (b[..., :2] + b[..., 2:]) / 2).norm(dim=-1)
    diagonal = (size_a.norm(dim=-1) + size_b.norm(dim=-1)) / 2
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    union = size_a.prod(-1) + size_b.prod(-1) - shared
    return distance / diagonal.clamp_min(1e-6) + 1 - shared / union.clamp_min(1e-6)


def merge_boxes(boxes: Tensor, scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Section 4.3's greedy merging, in G groups at once, none of whose boxes merge with another's.

    The two boxes with the least `match_score` become one, whose edges are the mean of theirs and whose score is their
    sum; again and again, until the least is above the threshold.

    Args:
        boxes: float (G,N,4) xyxy.
        scores: float (G,N), above 0, or 0 where there is no box.
        threshold: t.

    Returns:
        The same, in which the scores of boxes that are gone are 0.
    """
    groups, count = scores.shape
    boxes, scores = boxes.clone(), scores.clone()
    group = torch.arange(groups, device=boxes.device)
    absent = scores == 0
    pairs = match_score(boxes[:, :, None], boxes[:, None])
    alone = torch.eye(count, dtype=torch.bool, device=boxes.device)
    pairs = pairs.masked_fill(absent[:, :, None] | absent[:, None] | alone, torch.inf)
    while groups and count > 1:
        least, place = pairs.flatten(1).min(1)
        merges = least <= threshold
        if not merges.any():
            break
        a, b = place // count, place % count
        boxes[group, a] = torch.where(merges[:, None], (boxes[group, a] + boxes[group, b]) / 2, boxes[group, a])
        scores[group, a] += torch.where(merges, scores[group, b], 0)
        scores[group, b] = torch.where(merges, 0, scores[group, b])
        again = match_score(boxes[group, a, None], boxes).masked_fill((scores == 0) | alone[a], torch.inf)
        pairs[group, a] = torch.where(merges[:, None], again, pairs[group, a])
        pairs[group, :, a] = pairs[group, a]
        pairs[group, b] = pairs[group, b].masked_fill(merges[:, None], torch.inf)
        pairs[group, :, b] = pairs[group, b]
    return boxes, scores


def merge(
    boxes: Tensor, scores: Tensor, labels: Tensor, image: Tensor, images: int, threshold: float, top: int
) -> list[dict[str, Tensor]]:
    """`merge_boxes` of each image and class; takes and gives what `non_maximum_suppression` does.

    Args:
        boxes, scores, labels, image, images: see `non_maximum_suppression`.
        threshold: see `merge_boxes`.
        top: candidates of each image and class that take part, the best.
    """
    best = torch.argsort(scores, descending=True, stable=True)
    boxes, scores, labels, image = (x[best] for x in (boxes, scores, labels, image))
    numbers, group = torch.unique(labels * images + image, return_inverse=True)
    rank = rank_in_group(group)
    row, column = group[rank < top], rank[rank < top]
    table = boxes.new_zeros(len(numbers), top, 4).index_put((row, column), boxes[rank < top])
    filled = scores.new_zeros(len(numbers), top).index_put((row, column), scores[rank < top])
    table, filled = merge_boxes(table, filled, threshold)
    row, column = (filled > 0).nonzero(as_tuple=True)
    # No overlap is above 1: this only puts them in order.
    return non_maximum_suppression(
        table[row, column], filled[row, column], numbers[row] // images, numbers[row] % images, images, nms_threshold=1
    )


# --- module -------------------------------------------------------------------------------------------------------


class OverFeat(VisionModule):
    """OverFeat as a detector. Batch: see detection in the batch contract, images of one size or of several.

    Predictions: for each image ``boxes`` float32 (K,4) xyxy in pixels, ``scores`` float32 (K,) and ``labels`` int64
    (K,), best first. A score is the sum of the class's probabilities in the windows whose boxes were merged, as in
    section 4.3: it may be above 1.

    Trained on windows drawn anew from each image (see `sample_windows`), at all scales: up to half of them show an
    object (an IoU of 0.5 or more), on which the regressor is trained, others are background (less than 0.3), which is the
    classifier's last class. Metrics: ``map`` and what else `VOCMeanAP` gives, and COCO's (`COCOMeanAP`).

    Args:
        variant: see `OverFeatNetwork`.
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        width: multiplies the network's and the regressor's channels.
        batch_norm: after each convolution, which the paper does not have and training from scratch wants.
        class_specific: the regressor has a box for each class, as in the paper; else one.
        train: the paper trains the ``classifier`` first (without it, boxes are the windows), then the ``regressor`` on
            its frozen features: then ``weights`` is the first run's checkpoint. ``both`` is one run.
        weights: None to train from scratch, or a checkpoint of an `OverFeat`; its last layers may have other classes.
        scales: to which the image's shorter side is resized; the window is always the network's. The paper's six.
        crops: windows an image to train on.
        score_threshold: the least probability of a class with which a window's box takes part.
        merge_threshold: t, the `match_score` up to which boxes are merged.
        top: boxes of each image and class that take part, the most probable.
        ap: how average precision is computed, see `VOCMeanAP`.
        coco: measure COCO's average precision too.
        optimizer: see `VisionModule`; the paper's, at a fifth of its rate, since He's initialization begins larger.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/map", "max")

    def __init__(
        self,
        variant: Variant = "accurate",
        num_classes: int = 20,
        class_names: list[str] | None = None,
        width: float = 1.0,
        batch_norm: bool = False,
        class_specific: bool = True,
        train: Literal["classifier", "regressor", "both"] = "both",
        weights: str | None = None,
        scales: Sequence[int] = (245, 281, 317, 389, 425, 461),
        crops: int = 16,
        score_threshold: float = 0.2,
        merge_threshold: float = 0.7,
        top: int = 300,
        ap: APMethod = "area",
        coco: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.6, weight_decay=1e-5),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.num_classes, self.class_names = num_classes, class_names
        self.scales, self.crops = list(scales), crops
        self.score_threshold, self.merge_threshold, self.top = score_threshold, merge_threshold, top
        self.ap, self.coco = ap, coco
        self.network = OverFeatNetwork(
            variant, num_classes + 1, width, batch_norm, boxes=num_classes if class_specific else 1
        )
        least = self.network.window
        if not scales or min(scales) < least:
            raise UserError(f"scales: expected {least} pixels or more, the window, found {list(scales)}")
        if weights is not None:
            path = find_weights("overfeat", weights)
            load_weights(self.network, path, f"OverFeat {variant}", "classifier.6", "regressor.4")
        self.stage = train
        frozen = {"classifier": ["regressor"], "regressor": ["features", "classifier"], "both": []}[train]
        for name in frozen:
            self.network.get_submodule(name).requires_grad_(False).eval()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, size = stack_images(batch["image"])
        shorter = size.amin(1, keepdim=True)
        window = self.network.window
        sides = shorter * window / max(self.scales), shorter * window / min(self.scales)
        windows = sample_windows(batch["target"], size, self.num_classes, self.crops, 0.5, sides, (1.0,))
        label = windows.label.flatten()
        pooled = self.network.pooled(crop_windows(self.preprocess(images), windows.boxes, window))
        terms = {}
        if self.stage != "regressor":
            terms["cross_entropy"] = window_loss(self.network.classifier(pooled).flatten(1), label)
        if self.stage != "classifier":
            assert self.network.regressor is not None
            boxes = self.network.regressor(pooled).flatten(1).unflatten(1, (-1, 4))
            terms["box"] = box_loss(boxes, label, windows.target.flatten(0, 1), self.num_classes)
        return terms

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Any]]:
        if not isinstance(images, Tensor):
            return [found for image in images for found in self.predict(image[None])]
        network = self.network
        height, width = images.shape[-2:]
        pixels = self.preprocess(images)
        limit = pixels.new_tensor([width, height, width, height])
        parts = []
        for scale in self.scales:
            factor = scale / min(height, width)
            resized = resize_to_window_grid(pixels, height * factor, width * factor, network.window, network.stride)
            features = network.features(resized)
            logits = at_every_offset(features, network.pool, network.kernel, network.classifier)
            scores, where = scores_above(logits.float().softmax(1)[:, :-1], self.score_threshold)
            best = torch.argsort(scores, descending=True, stable=True)
            image, label, row, column = (index[best] for index in where)
            first = rank_in_group(label * len(images) + image) < self.top
            scores, image, label, row, column = (x[first] for x in (scores[best], image, label, row, column))
            edges = network.edges(features, image, row, column)
            edges = edges.gather(1, label.clamp_max(edges.shape[1] - 1)[:, None, None].expand(-1, 1, 4))[:, 0]
            window = window_grid(resized, height, width, network.window, network.stride)[row, column]
            corner, extent = window[:, :2].repeat(1, 2), (window[:, 2:] - window[:, :2]).repeat(1, 2)
            boxes = torch.minimum((corner + edges.float() * extent).clamp_min(0), limit)
            parts.append((boxes, scores, label, image))
        boxes, scores, label, image = (torch.cat(part) for part in zip(*parts, strict=True))
        return merge(boxes, scores, label, image, len(images), self.merge_threshold, self.top)

    def build_metrics(self) -> MetricCollection:
        return detection_metrics(self.num_classes, self.ap, self.coco)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])
