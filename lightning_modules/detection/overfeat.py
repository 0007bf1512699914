"""OverFeat: a convolutional classifier and box regressor at every position of a multi-scale pyramid.

Sermanet, Eigen, Zhang, Mathieu, Fergus and LeCun, "OverFeat: Integrated Recognition, Localization and Detection using
Convolutional Networks", ICLR 2014.

The classifier slides over the image at several scales as a convolution; its last pooling is applied at every offset, so
that windows are dense. For every window that shows an object, a regressor predicts the object's box. The boxes are
merged rather than suppressed.

The paper's networks pad their 3x3 layers. The logits of a dense map therefore differ from those of a single window,
which is how training sees it: zeros surround the window, but the image surrounds it in the map. In the fifth layer of
a window, 7x7 of 15x15 cells are equal (``accurate``), or 6x6 of 12x12 (``fast``). ``small`` has no padding: its dense
maps equal single windows.

Notation of the shapes:

    N windows or images, K selected windows, C classes
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.boxes import constant_like, non_maximum_suppression, rank_in_group
from lightning_modules.components.image_batches import stack_images
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.detection.base import Detector
from lightning_modules.detection.sliding_window import window_loss
from lightning_modules.detection.windows import (
    crop_windows,
    resize_to_window_grid,
    sample_windows,
    scores_above,
    window_grid,
)

# --- network ------------------------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """Layers of a variant.

    Attributes:
        window_size: side of the input in pixels.
        features: layers up to the fifth: (kernel size, channels, stride, padding) of a convolution, or the size of a
            pooling.
        pool_size: size and stride of the last pooling, after the features.
        hidden_units: units of the two hidden fully connected layers.
    """

    window_size: int
    features: tuple[tuple[int, int, int, int] | int, ...]
    pool_size: int
    hidden_units: tuple[int, int]


Variant = Literal["fast", "accurate", "small"]
# Tables 1 and 3, with the padding of the authors' released networks. "small" is ours, for small datasets and objects:
# the first and last layers, without padding.
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
    """Features, pooling and a classifier whose fully connected layers are convolutions.

    Weights are drawn from He's distribution: the paper's normal distribution of std 0.01 learns more slowly.

    Args:
        variant: ``fast`` (231 px, 145,920,872 parameters with 1000 classes) and ``accurate`` (221 px, 144,656,488) are
            the paper's; ``small`` has windows of 63 px.
        num_outputs: outputs of the classifier.
        width_multiplier: scales the channels and hidden units.
        batch_norm: batch normalization after each convolution of the features, in place of its bias; not in the paper.
        num_boxes: boxes of the regressor, see `BoxRegressor`; 0 for a classifier alone.
    """

    def __init__(
        self,
        variant: Variant = "accurate",
        num_outputs: int = 1000,
        width_multiplier: float = 1.0,
        batch_norm: bool = False,
        num_boxes: int = 0,
    ) -> None:
        super().__init__()
        architecture = ARCHITECTURES[variant]
        self.window_size, self.pool_size = architecture.window_size, architecture.pool_size
        modules: list[nn.Module] = []
        channels, side, self.stride = 3, self.window_size, 1
        for layer in architecture.features:
            if isinstance(layer, int):
                modules.append(nn.MaxPool2d(layer))
                kernel_size, stride, padding = layer, layer, 0
            else:
                kernel_size, out, stride, padding = layer
                out = max(1, round(out * width_multiplier))
                modules.append(nn.Conv2d(channels, out, kernel_size, stride, padding, bias=not batch_norm))
                modules += [nn.BatchNorm2d(out)] if batch_norm else []
                modules.append(nn.ReLU(inplace=True))
                channels = out
            side = (side + 2 * padding - kernel_size) // stride + 1
            self.stride *= stride
        self.features = nn.Sequential(*modules)
        self.kernel_size = side // self.pool_size
        sixth, seventh = (max(1, round(units * width_multiplier)) for units in architecture.hidden_units)
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, sixth, self.kernel_size),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(sixth, seventh, 1),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(seventh, num_outputs, 1),
        )
        he_normal(self)
        nn.init.normal_(self.classifier[-1].weight, std=0.01)  # type: ignore[arg-type]
        self.regressor = BoxRegressor(channels, self.kernel_size, num_boxes, width_multiplier) if num_boxes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized windows, float (N, 3, window_size, window_size), to logits (N, num_outputs)."""
        return self.classifier(self.pooled(x)).flatten(1)

    def pooled(self, x: Tensor) -> Tensor:
        """Compute the pooled fifth layer, the input of classifier and regressor: (N, channels, kernel, kernel)."""
        return F.max_pool2d(self.features(x), self.pool_size)

    def regress_boxes(self, features: Tensor, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Run the regressor on selected windows, with pooling at every offset: float (K, num_boxes, 4).

        Args:
            features: the fifth layer before pooling, float (N, channels, h, w).
            image: image index of each window, int64 (K,).
            row: first row of the window in the fifth layer, int64 (K,).
            column: first column of the window in the fifth layer, int64 (K,).
        """
        assert self.regressor is not None
        reach = torch.arange(self.kernel_size, device=features.device) * self.pool_size
        rows, columns = (row[:, None] + reach)[:, :, None], (column[:, None] + reach)[:, None]
        pooled = F.max_pool2d(features, self.pool_size, stride=1)[image[:, None, None], :, rows, columns]
        return self.regressor(pooled.permute(0, 3, 1, 2)).flatten(1).unflatten(1, (-1, 4))


class BoxRegressor(nn.Sequential):
    """Map the pooled fifth layer to boxes relative to the window (section 4.1): one per class, or a single one.

    Before training, it predicts (0, 0, 1, 1), the window itself.

    Args:
        in_channels: channels of the pooled fifth layer.
        kernel_size: side of the pooled fifth layer of a window.
        num_boxes: number of boxes.
        width_multiplier: scales the hidden units.
    """

    def __init__(self, in_channels: int, kernel_size: int, num_boxes: int, width_multiplier: float = 1.0) -> None:
        first, second = (max(1, round(units * width_multiplier)) for units in (4096, 1024))
        super().__init__(
            nn.Conv2d(in_channels, first, kernel_size),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(second, 4 * num_boxes, 1),
        )
        he_normal(self)
        last = self[-1]
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(num_boxes))  # type: ignore[union-attr]


def apply_at_every_offset(features: Tensor, pool_size: int, kernel_size: int, head: nn.Module) -> Tensor:
    """Pool the fifth layer once per offset, run the head on each result, and interleave them (figure 3).

    A single pooling would place windows ``pool_size`` times as far apart as the cells of the fifth layer.

    Args:
        features: the fifth layer before pooling, float (N, D, h, w).
        pool_size: size and stride of the pooling.
        kernel_size: side of the pooled map that the head reduces to one cell.
        head: fully convolutional, (N, D, a, b) to (N, E, a - kernel_size + 1, b - kernel_size + 1).

    Returns:
        (N, E, rows, columns) with ``rows = h - pool_size * kernel_size + 1``. Cell (y, x) belongs to the window whose
        fifth layer begins at (y, x).
    """
    rows, columns = (side - pool_size * kernel_size + 1 for side in features.shape[-2:])
    parts = {}
    for y, x in itertools.product(range(min(pool_size, rows)), range(min(pool_size, columns))):
        parts[y, x] = head(F.max_pool2d(features[:, :, y:, x:], pool_size))
    result = parts[0, 0].new_empty(*parts[0, 0].shape[:2], rows, columns)
    for (y, x), part in parts.items():
        result[:, :, y::pool_size, x::pool_size] = part
    return result


# --- loss ---------------------------------------------------------------------------------------------------------


def box_loss(boxes: Tensor, labels: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Compute the squared distance of the four edges, averaged over the windows that show an object; 0 without any.

    Args:
        boxes: predictions of the regressor, float (K, C, 4), or (K, 1, 4) if one box serves all classes.
        labels: int64 (K,); 0..C-1 if there is an object, any other value if not.
        targets: boxes relative to the window, float (K, 4), see `Windows`.
        num_classes: number of classes, C.
    """
    is_object = (labels >= 0) & (labels < num_classes)
    index = labels.clamp(0, boxes.shape[1] - 1)[:, None, None].expand(-1, 1, 4)
    errors = (boxes.gather(1, index)[:, 0].float() - targets).square().sum(1)
    return torch.where(is_object, errors, 0).sum() / is_object.sum().clamp_min(1)


# --- decoding -----------------------------------------------------------------------------------------------------


def match_score(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute how different boxes are: 0 for equal ones.

    Section 4.3 adds the distance of the centers and the area of the intersection. It gives no units, and the second
    term must fall as the area grows. Here both terms have no unit: the distance is divided by the boxes' mean diagonal,
    and one minus the IoU is added.

    Args:
        boxes: float (..., 4), xyxy.
        others: float (..., 4), xyxy.

    Returns:
        float (...).
    """
    size, other_size = boxes[..., 2:] - boxes[..., :2], others[..., 2:] - others[..., :2]
    distance = ((boxes[..., :2] + boxes[..., 2:]) / 2 - (others[..., :2] + others[..., 2:]) / 2).norm(dim=-1)
    diagonal = (size.norm(dim=-1) + other_size.norm(dim=-1)) / 2
    overlap = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    intersection = overlap.clamp_min(0).prod(-1)
    union = size.prod(-1) + other_size.prod(-1) - intersection
    return distance / diagonal.clamp_min(1e-6) + 1 - intersection / union.clamp_min(1e-6)


def merge_boxes(boxes: Tensor, scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Merge the boxes of one class and image greedily (section 4.3).

    Replace the two boxes with the smallest `match_score` by one box with their mean edges and the sum of their scores,
    until the smallest match score is above the threshold.

    Args:
        boxes: float (M, 4), xyxy.
        scores: float (M,).
        threshold: largest match score of merged boxes, t in the paper.

    Returns:
        The remaining boxes, float (L, 4), and their scores, float (L,).
    """
    boxes, scores = boxes.clone(), scores.clone()
    remaining = torch.ones_like(scores, dtype=torch.bool)
    pairs = match_score(boxes[:, None], boxes).fill_diagonal_(torch.inf)
    while remaining.sum() > 1:
        a, b = divmod(int(pairs.argmin()), len(boxes))
        if pairs[a, b] > threshold:
            break
        boxes[a] = (boxes[a] + boxes[b]) / 2
        scores[a] += scores[b]
        remaining[b] = False
        pairs[b] = pairs[:, b] = torch.inf
        pairs[a] = pairs[:, a] = match_score(boxes[a], boxes).where(remaining, torch.inf)
        pairs[a, a] = torch.inf
    return boxes[remaining], scores[remaining]


def merge_detections(
    boxes: Tensor, scores: Tensor, labels: Tensor, image: Tensor, num_images: int, threshold: float, top_k: int
) -> list[dict[str, Tensor]]:
    """Merge the boxes of each image and class, on the CPU, because every merge depends on the one before.

    Args:
        boxes: candidates of all images, float (K, 4), xyxy.
        scores: float (K,).
        labels: int64 (K,).
        image: image index of each candidate, int64 (K,).
        num_images: number of images.
        threshold: see `merge_boxes`.
        top_k: candidates of each image and class that are merged, best first.

    Returns:
        See `non_maximum_suppression`.
    """
    device = boxes.device
    best = torch.argsort(scores, descending=True, stable=True)
    boxes, scores, group = (x[best].cpu() for x in (boxes, scores, labels * num_images + image))
    merged = [(boxes[:0], scores[:0], group[:0])]
    for key in group.unique():
        index = (group == key).nonzero()[:top_k, 0]
        group_boxes, group_scores = merge_boxes(boxes[index], scores[index], threshold)
        merged.append((group_boxes, group_scores, key.expand(len(group_scores))))
    boxes, scores, group = (torch.cat(part).to(device) for part in zip(*merged, strict=True))
    # No IoU exceeds 1: this only sorts the boxes.
    return non_maximum_suppression(boxes, scores, group // num_images, group % num_images, num_images, nms_threshold=1)


# --- module -------------------------------------------------------------------------------------------------------


class OverFeat(Detector):
    """OverFeat as a detector (Sermanet et al. 2014); images may differ in size.

    A score is the sum of the class's probabilities over the merged windows (section 4.3); it may exceed 1. Training
    samples new windows from each image, at all scales, see `sample_windows`: up to half of them show an object, on
    which the regressor is trained too; background is the classifier's last class.

    Args:
        variant: ``fast`` or ``accurate`` (the paper's), or ``small`` (windows of 63 px).
        width_multiplier: scales the channels and hidden units of network and regressor.
        batch_norm: batch normalization after each convolution; not in the paper, needed to train from scratch.
        class_specific: one box per class, as in the paper; else a single box.
        train: what is trained. The paper trains the ``classifier`` first (boxes are then the windows), then the
            ``regressor`` on frozen features, with ``weights`` of the first run. ``both`` trains them jointly.
        weights: None to train from scratch, or a checkpoint of an `OverFeat`; its classes may differ.
        scales: lengths of the image's shorter side in pixels; default: the paper's six.
        windows_per_image: training windows per image.
        score_threshold: windows in which the class has a lower probability are dropped.
        merge_threshold: largest match score of merged boxes, t in the paper.
        top_k: boxes of each image and class that are merged, best first.
        optimizer: see `VisionModule`. Default: the paper's, at a fifth of its learning rate, because weights of He's
            initialization are larger.
        **kwargs: see `Detector`.
    """

    def __init__(
        self,
        variant: Variant = "accurate",
        width_multiplier: float = 1.0,
        batch_norm: bool = False,
        class_specific: bool = True,
        train: Literal["classifier", "regressor", "both"] = "both",
        weights: str | None = None,
        scales: Sequence[int] = (245, 281, 317, 389, 425, 461),
        windows_per_image: int = 16,
        score_threshold: float = 0.2,
        merge_threshold: float = 0.7,
        top_k: int = 300,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.6, weight_decay=1e-5),
        **kwargs: Any,
    ) -> None:
        # Boxes are merged, not suppressed; given here, the threshold is not an option of the command line.
        super().__init__(score_threshold=score_threshold, nms_threshold=1.0, optimizer=optimizer, **kwargs)
        self.scales, self.windows_per_image = list(scales), windows_per_image
        self.merge_threshold, self.top_k = merge_threshold, top_k
        self.network = OverFeatNetwork(
            variant, self.num_classes + 1, width_multiplier, batch_norm, self.num_classes if class_specific else 1
        )
        min_scale = self.network.window_size
        if not scales or min(scales) < min_scale:
            raise UserError(f"scales: expected at least {min_scale} pixels, the window's side, found {list(scales)}")
        if weights is not None:
            path = find_weights("overfeat", weights)
            load_weights(self.network, path, f"OverFeat {variant}", "classifier.6", "regressor.4")
        self.trained_part = train
        self.frozen_parts = {"classifier": ["regressor"], "regressor": ["features", "classifier"], "both": []}[train]
        for name in self.frozen_parts:
            self.network.get_submodule(name).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> OverFeat:
        """Set the training mode; frozen parts stay in eval mode, so that their batch statistics do not change."""
        super().train(mode)
        for name in self.frozen_parts:
            self.network.get_submodule(name).eval()
        return self

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, sizes = stack_images(batch["image"])
        shorter = sizes.amin(1, keepdim=True)
        window_size = self.network.window_size
        windows = sample_windows(
            batch["target"],
            sizes,
            self.num_classes,
            self.windows_per_image,
            positive_fraction=0.5,
            side_range=(shorter * window_size / max(self.scales), shorter * window_size / min(self.scales)),
            aspect_ratios=(1.0,),
        )
        labels = windows.labels.flatten()
        pooled = self.network.pooled(crop_windows(self.preprocess(images), windows.boxes, window_size))
        terms = {}
        if self.trained_part != "regressor":
            terms["cross_entropy"] = window_loss(self.network.classifier(pooled).flatten(1), labels)
        if self.trained_part != "classifier":
            assert self.network.regressor is not None
            boxes = self.network.regressor(pooled).flatten(1).unflatten(1, (-1, 4))
            terms["box"] = box_loss(boxes, labels, windows.box_targets.flatten(0, 1), self.num_classes)
        return terms

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Any]]:
        if not isinstance(images, Tensor):
            return [detections for image in images for detections in self.predict(image[None])]
        network = self.network
        height, width = images.shape[-2:]
        pixels = self.preprocess(images)
        limit = constant_like([width, height, width, height], pixels)
        candidates = []
        for scale in self.scales:
            factor = scale / min(height, width)
            resized = resize_to_window_grid(
                pixels, height * factor, width * factor, network.window_size, network.stride
            )
            features = network.features(resized)
            logits = apply_at_every_offset(features, network.pool_size, network.kernel_size, network.classifier)
            scores, where = scores_above(logits.float().softmax(1)[:, :-1], self.score_threshold)
            best = torch.argsort(scores, descending=True, stable=True)
            image, label, row, column = (index[best] for index in where)
            kept = rank_in_group(label * len(images) + image) < self.top_k
            scores, image, label, row, column = (x[kept] for x in (scores[best], image, label, row, column))
            boxes = network.regress_boxes(features, image, row, column)
            boxes = boxes.gather(1, label.clamp_max(boxes.shape[1] - 1)[:, None, None].expand(-1, 1, 4))[:, 0]
            window = window_grid(resized, height, width, network.window_size, network.stride)[row, column]
            corner, extent = window[:, :2].repeat(1, 2), (window[:, 2:] - window[:, :2]).repeat(1, 2)
            boxes = torch.minimum((corner + boxes.float() * extent).clamp_min(0), limit)
            candidates.append((boxes, scores, label, image))
        boxes, scores, label, image = (torch.cat(part) for part in zip(*candidates, strict=True))
        return merge_detections(boxes, scores, label, image, len(images), self.merge_threshold, self.top_k)
