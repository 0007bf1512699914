"""The sliding-window detector: a classifier of crops applied at all positions and scales of the image.

The lecture's first detector, in the manner of Dalal and Triggs, "Histograms of Oriented Gradients for Human Detection",
CVPR 2005, and Sermanet et al., "OverFeat", ICLR 2014. A window with a high IoU with an object has its class, a window
with a low one is background; non-maximum suppression removes duplicate detections.

`classify_each_window` is the plain loop over crops. `WindowNetwork.dense` computes the same logits in one pass: the
fully connected layers become convolutions, and neighboring windows share their features. ``python -m
benchmarks.sliding_window`` measures the ratio loop / one pass: 27 on one core.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.boxes import non_maximum_suppression
from lightning_modules.components.image_batches import stack_images
from lightning_modules.detection.base import Detector
from lightning_modules.detection.windows import (
    IGNORE_LABEL,
    crop_windows,
    resize_to_window_grid,
    sample_windows,
    scores_above,
    window_grid,
)

# --- network ------------------------------------------------------------------------------------------------------

# (kernel size, channels) of the convolutions; each is followed by batch normalization, ReLU and max pooling by 2. No
# layer is padded: with padding, the features at the edge of a window would depend on whether the image ends there.
LAYERS = ((5, 32), (3, 64), (3, 128))
STRIDE = 2 ** len(LAYERS)


class WindowNetwork(nn.Module):
    """Three convolutions and two fully connected layers; the last of the C + 1 classes is background.

    Args:
        num_classes: number of classes without background, C.
        window_size: side of the input in pixels; a multiple of 8, at least 24.
        width_multiplier: scales the channels and hidden units.
        hidden_units: units of the first fully connected layer.
    """

    def __init__(
        self, num_classes: int, window_size: int = 64, width_multiplier: float = 1.0, hidden_units: int = 256
    ) -> None:
        super().__init__()
        if window_size < 24 or window_size % STRIDE:
            raise UserError(f"window_size: expected a multiple of {STRIDE} pixels, at least 24, found {window_size}")
        layers: list[nn.Module] = []
        in_channels, self.side = 3, window_size
        for kernel_size, channels in LAYERS:
            out_channels = max(1, round(channels * width_multiplier))
            layers += [nn.Conv2d(in_channels, out_channels, kernel_size, bias=False), nn.BatchNorm2d(out_channels)]
            layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            in_channels, self.side = out_channels, (self.side - kernel_size + 1) // 2
        self.features = nn.Sequential(*layers)
        hidden_units = max(1, round(hidden_units * width_multiplier))
        self.fc1 = nn.Linear(in_channels * self.side**2, hidden_units)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(hidden_units, num_classes + 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized windows, float (N, 3, window_size, window_size), to logits (N, C + 1)."""
        x = F.relu(self.fc1(self.features(x).flatten(1)))
        return self.fc2(self.dropout(x))

    def dense(self, x: Tensor) -> Tensor:
        """Map normalized images, float (N, 3, H, W), to logits (N, C + 1, rows, columns) of windows every `STRIDE`.

        A fully connected layer on a map of side x side is a convolution with a kernel of that size.
        """
        kernel = self.fc1.weight.unflatten(1, (-1, self.side, self.side))
        x = F.relu(F.conv2d(self.features(x), kernel, self.fc1.bias))
        return F.conv2d(self.dropout(x), self.fc2.weight[:, :, None, None], self.fc2.bias)


def classify_each_window(network: nn.Module, image: Tensor, window_size: int, stride: int) -> Tensor:
    """Crop and classify one window after the other.

    Args:
        network: maps windows (1, 3, window_size, window_size) to logits (1, D).
        image: normalized image, float (3, H, W).
        window_size: side of a window in pixels.
        stride: distance of two windows in pixels.

    Returns:
        Logits, float (D, rows, columns).
    """
    rows = []
    for top in range(0, image.shape[1] - window_size + 1, stride):
        row = []
        for left in range(0, image.shape[2] - window_size + 1, stride):
            crop = image[:, top : top + window_size, left : left + window_size]
            row.append(network(crop[None])[0])
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


# --- loss ---------------------------------------------------------------------------------------------------------


def window_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross entropy of the windows whose label is not `IGNORE_LABEL`.

    Args:
        logits: float (K, C + 1).
        labels: int64 (K,).
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_LABEL, reduction="sum")
    return total / (labels != IGNORE_LABEL).sum().clamp_min(1)


# --- module -------------------------------------------------------------------------------------------------------


class SlidingWindow(Detector):
    """Sliding-window detector; images may differ in size.

    Trained on windows sampled anew from each image, up to half of which show an object, see `sample_windows`. A
    detection has the box of its window; its score is the probability of its class.

    Args:
        window_size: side of the network's input in pixels; a multiple of 8.
        width_multiplier: scales the channels and hidden units of the network.
        hidden_units: units of the first fully connected layer.
        window_sizes: sides (square root of the area) of the windows in pixels of the image. The image is resized once
            for each, so that such a window has the size of the network's input.
        aspect_ratios: width / height of the windows. The image is resized anisotropically for each.
        windows_per_image: training windows per image.
        score_threshold: detections with a lower score are dropped.
        nms_threshold: IoU above which non-maximum suppression drops the weaker of two boxes of one class.
        detections_per_image: largest number of detections per image. Three times as many candidates of each class
            enter non-maximum suppression.
        optimizer: see `VisionModule`.
        **kwargs: see `Detector`.
    """

    def __init__(
        self,
        window_size: int = 64,
        width_multiplier: float = 1.0,
        hidden_units: int = 256,
        window_sizes: Sequence[float] = (64, 90, 128, 181, 256),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        windows_per_image: int = 32,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.3,
        detections_per_image: int = 200,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(score_threshold=score_threshold, nms_threshold=nms_threshold, optimizer=optimizer, **kwargs)
        for name, values in (("window_sizes", window_sizes), ("aspect_ratios", aspect_ratios)):
            if not values or min(values) <= 0:
                raise UserError(f"{name}: expected numbers above 0, found {list(values)}")
        self.window_size, self.window_sizes, self.aspect_ratios = window_size, list(window_sizes), list(aspect_ratios)
        self.windows_per_image, self.detections_per_image = windows_per_image, detections_per_image
        self.network = WindowNetwork(self.num_classes, window_size, width_multiplier, hidden_units)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, image_sizes = stack_images(batch["image"])
        min_side, max_side = (
            image_sizes.new_full((len(images), 1), side) for side in (min(self.window_sizes), max(self.window_sizes))
        )
        windows = sample_windows(
            batch["target"],
            image_sizes,
            self.num_classes,
            self.windows_per_image,
            positive_fraction=0.5,
            side_range=(min_side, max_side),
            aspect_ratios=self.aspect_ratios,
        )
        logits = self.network(crop_windows(self.preprocess(images), windows.boxes, self.window_size))
        return {"cross_entropy": window_loss(logits, windows.labels.flatten())}

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Any]]:
        if not isinstance(images, Tensor):
            return [detections for image in images for detections in self.predict(image[None])]
        height, width = images.shape[-2:]
        pixels = self.preprocess(images)
        candidates = []
        for side, aspect_ratio in itertools.product(self.window_sizes, self.aspect_ratios):
            window_height, window_width = side / aspect_ratio**0.5, side * aspect_ratio**0.5
            resized_shape = height * self.window_size / window_height, width * self.window_size / window_width
            resized = resize_to_window_grid(pixels, *resized_shape, self.window_size, STRIDE)
            probabilities = self.network.dense(resized).float().softmax(1)[:, :-1]
            scores, (image, label, row, column) = scores_above(probabilities, self.score_threshold)
            boxes = window_grid(resized, height, width, self.window_size, STRIDE)[row, column]
            candidates.append((boxes, scores, label, image))
        boxes, scores, label, image = (torch.cat(part) for part in zip(*candidates, strict=True))
        top = 3 * self.detections_per_image
        return non_maximum_suppression(
            boxes,
            scores,
            label,
            image,
            len(images),
            self.nms_threshold,
            top_k=top,
            keep_top_k=self.detections_per_image,
        )
