"""The sliding window: a classifier of crops is run over all positions and scales of the image.

The lecture's first detector, as in Dalal and Triggs 2005 (histograms of gradients) and Sermanet et al. 2014: windows
that overlap an object well are its class, others are background; of detections that overlap each other the best stays.
First the naive loop; then the fully connected layers become convolutions, and one pass over the image gives what the
loop gave, since neighboring windows share their features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.average_precision import APMethod
from lightning_modules.components.boxes import suppress
from lightning_modules.components.image_batches import stack_images
from lightning_modules.detection.metrics import detection_metrics
from lightning_modules.detection.windows import NEITHER, above, cut, draw_windows, places, resize_to_fit

# --- network ------------------------------------------------------------------------------------------------------

# (kernel, channels) of the convolutions; after each batch normalization, ReLU and max pooling by 2. None is padded:
# what a padded layer says of a window's edge depends on whether the image ends there.
LAYERS = ((5, 32), (3, 64), (3, 128))
STRIDE = 2 ** len(LAYERS)


class WindowNetwork(nn.Module):
    """Three convolutions and two fully connected layers: a window to C+1 logits, the last of which is background.

    Args:
        num_classes: C.
        window: its side in pixels, 24 and multiples of 8 above it.
        width: multiplies the channels and hidden units.
        hidden: units of the first fully connected layer.
    """

    def __init__(self, num_classes: int, window: int = 64, width: float = 1.0, hidden: int = 256) -> None:
        super().__init__()
        if window < 24 or window % STRIDE:
            raise UserError(f"window: expected 24 or more, a multiple of {STRIDE} pixels, found {window}")
        modules: list[nn.Module] = []
        channels, self.side = 3, window
        for kernel, out in LAYERS:
            out = max(1, round(out * width))
            modules += [nn.Conv2d(channels, out, kernel, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            modules.append(nn.MaxPool2d(2))
            channels, self.side = out, (self.side - kernel + 1) // 2
        self.features = nn.Sequential(*modules)
        hidden = max(1, round(hidden * width))
        self.fc1 = nn.Linear(channels * self.side**2, hidden)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(hidden, num_classes + 1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized windows float (N,3,window,window) to logits (N,C+1)."""
        x = F.relu(self.fc1(self.features(x).flatten(1)))
        return self.fc2(self.dropout(x))

    def dense(self, x: Tensor) -> Tensor:
        """Normalized images float (N,3,H,W) to logits (N,C+1,rows,columns), one window every `STRIDE` pixels.

        The same weights: a fully connected layer upon a map of side x side is a convolution with that kernel.
        """
        kernel = self.fc1.weight.unflatten(1, (-1, self.side, self.side))
        x = F.relu(F.conv2d(self.features(x), kernel, self.fc1.bias))
        return F.conv2d(self.dropout(x), self.fc2.weight[:, :, None, None], self.fc2.bias)


def classify_each_window(network: nn.Module, image: Tensor, window: int, stride: int) -> Tensor:
    """The naive loop: every window is cut out and classified, one after the other.

    Args:
        network: windows (1,3,window,window) to logits (1,D).
        image: normalized float (3,H,W).
        window, stride: in pixels.

    Returns:
        (D,rows,columns).
    """
    rows = []
    for top in range(0, image.shape[1] - window + 1, stride):
        row = []
        for left in range(0, image.shape[2] - window + 1, stride):
            crop = image[:, top : top + window, left : left + window]
            row.append(network(crop[None])[0])
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


# --- loss ---------------------------------------------------------------------------------------------------------


def window_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of windows, logits float (K,C+1) and label int64 (K,), the mean of those that are not `NEITHER`."""
    total = F.cross_entropy(logits.float(), label, ignore_index=NEITHER, reduction="sum")
    return total / (label != NEITHER).sum().clamp_min(1)


# --- module -------------------------------------------------------------------------------------------------------


class SlidingWindow(VisionModule):
    """The sliding window. Batch: see detection in the batch contract, images of one size or of several.

    Predictions: for each image ``boxes`` float32 (K,4) xyxy in pixels, ``scores`` float32 (K,), the probability of the
    class in that window, and ``labels`` int64 (K,), best first. Boxes have the sizes and aspects of the windows.

    Trained on windows drawn anew from each image (see `draw_windows`): half are objects, at most, at an IoU of 0.5 or
    more; background has less than 0.3. Metrics: ``map`` and what else `VOCMeanAP` gives, and COCO's (`COCOMeanAP`).

    Args:
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        window: side in pixels of what the network sees, a multiple of 8.
        width: multiplies the network's channels.
        hidden: units of the first fully connected layer.
        sizes: the pyramid: sides of windows in the image's pixels, the root of their area. The image is resized
            until such a window has the network's size.
        aspects: the windows' width / height; each makes a pyramid of its own, for which the image is warped.
        crops: windows an image to train on.
        score_threshold, nms_threshold: what is kept of the predictions.
        keep: detections an image, the best; before suppression three times as many of each class.
        ap: how average precision is computed, see `VOCMeanAP`.
        coco: measure COCO's average precision too.
        optimizer: see `VisionModule`.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/map", "max")

    def __init__(
        self,
        num_classes: int = 20,
        class_names: list[str] | None = None,
        window: int = 64,
        width: float = 1.0,
        hidden: int = 256,
        sizes: Sequence[float] = (64, 90, 128, 181, 256),
        aspects: Sequence[float] = (0.5, 1.0, 2.0),
        crops: int = 32,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.3,
        keep: int = 200,
        ap: APMethod = "area",
        coco: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        for name, values in (("sizes", sizes), ("aspects", aspects)):
            if not values or min(values) <= 0:
                raise UserError(f"{name}: expected numbers above 0, found {list(values)}")
        self.num_classes, self.class_names = num_classes, class_names
        self.window, self.sizes, self.aspects, self.crops = window, list(sizes), list(aspects), crops
        self.score_threshold, self.nms_threshold, self.keep = score_threshold, nms_threshold, keep
        self.ap, self.coco = ap, coco
        self.network = WindowNetwork(num_classes, window, width, hidden)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, size = stack_images(batch["image"])
        sides = size.new_full((len(size), 1), min(self.sizes)), size.new_full((len(size), 1), max(self.sizes))
        windows = draw_windows(batch["target"], size, self.num_classes, self.crops, 0.5, sides, self.aspects)
        logits = self.network(cut(self.preprocess(images), windows.boxes, self.window))
        return {"cross_entropy": window_loss(logits, windows.label.flatten())}

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Any]]:
        if not isinstance(images, Tensor):
            return [found for image in images for found in self.predict(image[None])]
        height, width = images.shape[-2:]
        pixels = self.preprocess(images)
        parts = []
        for side, aspect in itertools.product(self.sizes, self.aspects):
            tall, wide = side / aspect**0.5, side * aspect**0.5
            shape = height * self.window / tall, width * self.window / wide
            resized = resize_to_fit(pixels, *shape, self.window, STRIDE)
            probabilities = self.network.dense(resized).float().softmax(1)[:, :-1]
            scores, (image, label, row, column) = above(probabilities, self.score_threshold)
            parts.append((places(resized, height, width, self.window, STRIDE)[row, column], scores, label, image))
        boxes, scores, label, image = (torch.cat(part) for part in zip(*parts, strict=True))
        return suppress(boxes, scores, label, image, len(images), self.nms_threshold, 3 * self.keep, self.keep)

    def build_metrics(self) -> MetricCollection:
        return detection_metrics(self.num_classes, self.ap, self.coco)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])
