"""Emotions of faces: mini-Xception, and the lecture's way from a photograph to a label.

Network and recipe: Arriaga, Valdenegro-Toro and Plöger, "Real-time Convolutional Neural Networks for Emotion and Gender
Classification", 2017, with the code published beside it (oarriaga/face_classification), from which the details are that
the paper leaves open. A photograph goes through detection -> alignment -> normalization -> network -> argmax.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import VisionModule
from lightning_modules.classification.image_classifier import check_labels, cross_entropy, training_set_weights
from lightning_modules.classification.metrics import ClassificationMetrics

Normalization = Literal["scale", "equalize", "standardize"]

INPUT_SIDE = 64  # pixels that the network sees
FACE_SIDE = 48  # pixels of FER2013's faces; a photograph's are cut to the same, so that both are enlarged alike

# --- network ------------------------------------------------------------------------------------------------------


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """With Keras's constants: epsilon 1e-3, and momentum 0.99, which is 0.01 in PyTorch's way of counting."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def separable_conv(in_channels: int, channels: int) -> nn.Sequential:
    """A 3x3 filter in each channel, then a mixture of the channels; neither has a bias. Height and width stay."""
    depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(in_channels, channels, 1, bias=False))


def max_pool_same(x: Tensor) -> Tensor:
    """3x3 max pooling with stride 2 and Keras's padding "same": (N,C,H,W) to (N,C,ceil(H/2),ceil(W/2)).

    An odd side is padded at both ends, an even one below and to the right only. Padding never wins the maximum.
    """
    height, width = x.shape[-2:]
    padding = (width % 2, 1, height % 2, 1)
    return F.max_pool2d(F.pad(x, padding, value=-torch.inf), 3, stride=2)


class XceptionModule(nn.Module):
    """SepConv - BN - ReLU - SepConv - BN - pooling, plus a 1x1 convolution of stride 2 with BN beside it.

    A 1x1 convolution of stride 2 with Keras's padding "same" sees the even rows and columns. There is no activation
    after the sum.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), batch_norm(channels))
        self.body = nn.Sequential(
            separable_conv(in_channels, channels),
            batch_norm(channels),
            nn.ReLU(),
            separable_conv(channels, channels),
            batch_norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N,in_channels,H,W) to (N,channels,ceil(H/2),ceil(W/2))."""
        # Not by the convolution's own stride: with 8 channels in NHWC memory its gradient overruns memory on AVX-512
        # processors (torch 2.15).
        return max_pool_same(self.body(x)) + self.residual(x[:, :, ::2, ::2])


class MiniXception(nn.Module):
    """The reference's mini_XCEPTION: 56,951 parameters for 7 classes, with batch statistics 58,423 as Keras counts.

    Args:
        num_classes: outputs.
    """

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, bias=False)
        self.bn1 = batch_norm(8)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
        self.bn2 = batch_norm(8)
        self.modules_1_to_4 = nn.Sequential(
            XceptionModule(8, 16), XceptionModule(16, 32), XceptionModule(32, 64), XceptionModule(64, 128)
        )
        self.classifier = nn.Conv2d(128, num_classes, 3, padding=1)
        # Keras's default: Glorot and Bengio 2010, equation 16.
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized faces float (N,1,64,64) to logits (N,C)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.classifier(self.modules_1_to_4(x)).mean((2, 3))

    def squared_weights(self) -> Tensor:
        """The sum of squares that the reference's L2 weighs: that of the first two convolutions' kernels, a scalar.

        The reference asks for it in the separable convolutions too, by ``kernel_regularizer``. Keras's SeparableConv2D
        has a ``depthwise_regularizer`` and a ``pointwise_regularizer`` and never looks at that one.
        """
        return self.conv1.weight.square().sum() + self.conv2.weight.square().sum()


# --- from a photograph to faces -----------------------------------------------------------------------------------

# Where the eyes lie in FER2013's faces, as parts of their side: (x, y) of the one on the left in the image, then of
# the other. Measured on 488 faces with OpenCV's two eye cascades: medians (0.309 to 0.316, 0.394 to 0.399) and (0.673 to
# 0.683, 0.389 to 0.395), made symmetric. In the boxes of its frontal face cascade they are within 0.015 of these places.
EYES = np.array([[0.315, 0.393], [0.685, 0.393]])

FACE_CASCADE, EYE_CASCADE = "haarcascade_frontalface_default.xml", "haarcascade_eye.xml"
DETECTION_SIDE = 1280  # pixels, the longest side on which faces are looked for
SMALLEST_FACE = 1 / 20  # of the photograph's shorter side; below, what is found is texture more often than a face
LEAST_PIXELS = 30  # of a face's side; the cascade was trained on 24
COVERED = 0.25  # of a find's area
EYE_SEARCH_SIDE = 200  # pixels to which a face is scaled for its eyes
EYE_DISTANCE = 0.15  # of the face's side, how far an eye may lie from its usual place; an eyebrow's end lies beyond
STEEPEST = 25  # degrees between the line of the eyes and the horizontal


@lru_cache
def load_cascade(name: str) -> cv2.CascadeClassifier:
    """One of the Haar cascades (Viola and Jones 2001) that OpenCV's wheel brings along.

    Raises:
        RuntimeError: this OpenCV has none: version 5 dropped them.
    """
    folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
    path = os.path.join(folder, name)
    if not hasattr(cv2, "CascadeClassifier") or not os.path.isfile(path):
        raise UserError(
            f"OpenCV {cv2.__version__} brings no {name}, with which faces are found in photographs: "
            "pip install 'opencv-python-headless<5'"
        )
    return cv2.CascadeClassifier(path)


def detect_faces(gray: np.ndarray) -> np.ndarray:
    """Upright frontal faces, from left to right: float64 (N,4), x1, y1, x2, y2 in pixels, squares.

    What lies by `COVERED` of its area in a larger find is left out: chins and collars are taken for faces.

    Args:
        gray: uint8 (H,W).

    Raises:
        RuntimeError: see `load_cascade`.
    """
    cascade = load_cascade(FACE_CASCADE)
    scale = min(1.0, DETECTION_SIDE / max(gray.shape))
    small = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else gray
    least = max(LEAST_PIXELS, round(SMALLEST_FACE * min(small.shape)))
    found = cascade.detectMultiScale(small, scaleFactor=1.1, minNeighbors=5, minSize=(least, least))
    boxes = np.array(found, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes[np.lexsort((boxes[:, 1], boxes[:, 0]))]
    sides = np.minimum(boxes[:, None, 2:], boxes[:, 2:]) - np.maximum(boxes[:, None, :2], boxes[:, :2])
    overlap, area = sides.clip(0).prod(2), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    inside = (overlap > COVERED * area[:, None]) & (area > area[:, None])
    return boxes[~inside.any(1)] / scale


def find_eyes(gray: np.ndarray, box: np.ndarray) -> np.ndarray | None:
    """The centers of a face's two eyes: float64 (2,2), x and y in pixels, the one on the left in the image first.

    Taken are the finds of the eye cascade in the upper half that lie nearest to where eyes usually lie (`EYES`). None
    where there is none within `EYE_DISTANCE` of either place, or where their line is steeper than `STEEPEST`.

    Args:
        gray: uint8 (H,W), the photograph.
        box: x1, y1, x2, y2 of the face in pixels.
    """
    cascade = load_cascade(EYE_CASCADE)
    x, y, side = round(box[0]), round(box[1]), box[2] - box[0]
    upper = gray[max(0, y) : y + round(0.6 * side), max(0, x) : x + round(side)]
    scale = EYE_SEARCH_SIDE / side
    face = cv2.resize(upper, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    found = np.array(cascade.detectMultiScale(face, scaleFactor=1.05, minNeighbors=3, minSize=(25, 25)), np.float64)
    if not len(found):
        return None
    centers = (found[:, :2] + found[:, 2:] / 2) / EYE_SEARCH_SIDE
    distances = np.linalg.norm(centers - EYES[:, None], axis=2)
    if (distances.min(1) > EYE_DISTANCE).any():
        return None
    left, right = centers[distances.argmin(1)]
    if abs(right[1] - left[1]) > np.tan(np.radians(STEEPEST)) * (right[0] - left[0]):
        return None
    return np.stack([left, right]) * side + (max(0, x), max(0, y))


def eyes_to_template(eyes: np.ndarray, side: int) -> np.ndarray:
    """The similarity (turn, scale, shift) that brings two eyes to `EYES` in a square of ``side`` pixels: (2,3).

    Two pairs of points determine it: with points as complex numbers it is z -> a z + b. Coordinates are continuous: a
    image's first pixel reaches from 0 to 1.

    Args:
        eyes: (2,2), x and y in pixels, the one on the left in the image first.
        side: in pixels.
    """
    (p, q), (u, v) = ((z[:, 0] + 1j * z[:, 1]) for z in (eyes, EYES * side))
    a = (v - u) / (q - p)
    b = u - a * p
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align_face(gray: np.ndarray, eyes: np.ndarray, side: int = FACE_SIDE) -> np.ndarray:
    """The face cut out of a photograph with its eyes at `EYES`: uint8 (side,side).

    Where the face is larger than that, it is warped at a multiple of ``side`` and then averaged, so that nothing
    aliases. Beyond the photograph its border is repeated.

    Args:
        gray: uint8 (H,W), the photograph.
        eyes: (2,2), x and y in pixels, the one on the left in the image first.
        side: in pixels.
    """
    shrink = np.linalg.norm(eyes[1] - eyes[0]) / np.linalg.norm((EYES[1] - EYES[0]) * side)
    factor = max(1, round(shrink))
    matrix = eyes_to_template(eyes, side * factor)
    # OpenCV counts from the centers of the pixels.
    matrix[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5
    size = (side * factor, side * factor)
    face = cv2.warpAffine(gray, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA) if factor > 1 else face


def equalize(faces: Tensor) -> Tensor:
    """Histogram equalization of each face by itself: uint8 (B,1,H,W) to the same, as OpenCV's equalizeHist.

    Gray value g becomes 255 (F(g) - F(g0)) / (HW - F(g0)), F counting the pixels up to a value and g0 being the darkest
    that occurs. A face of one value stays as it is.
    """
    flat = faces.flatten(1).long()
    counts = torch.zeros(len(flat), 256, device=faces.device).scatter_add_(1, flat, torch.ones_like(flat).float())
    cumulated = counts.cumsum(1)
    first = cumulated.gather(1, flat.amin(1, keepdim=True))
    rest = flat.shape[1] - first
    table = ((cumulated - first) * (255 / rest.clamp_min(1))).round().clamp(0, 255)
    return torch.where(rest > 0, table.gather(1, flat), flat).to(torch.uint8).view_as(faces)


def standardize(faces: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 in each face by itself: uint8 (B,1,H,W) to float32. One gray value gives 0."""
    faces = faces.float()
    centerd = faces - faces.mean((1, 2, 3), keepdim=True)
    return centerd / centerd.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1)


# --- module -------------------------------------------------------------------------------------------------------


class EmotionClassifier(VisionModule):
    """mini-Xception on gray faces, and on the faces of photographs.

    Reads ``image`` uint8 (B,1,H,W) and ``label`` int64 (B,). Predicts ``probabilities`` (B,C) of gray faces; of
    photographs, in color, a dict each (see `predict`). Measured as every classifier: see `ClassificationMetrics`.

    Args:
        num_classes: C, 1 or more.
        class_names: C names in label order.
        normalization: what brings the light of all faces to the same, in training and prediction alike: ``scale`` to
            -1..1 (the reference), ``equalize`` the histogram and then scale, ``standardize`` each face.
        l2: weight of the sum of squares in the loss; see `MiniXception.squared_weights`.
        class_weights: of the classes in the training loss, C numbers; ``balanced`` takes N / (C n_c) from the training
            set's n_c samples a class.
        kwargs: optimizer, schedule and channels_last of `VisionModule`.
    """

    # What the reference's schedule, early stopping and checkpoints look at.
    monitor = ("val/loss", "min")

    def __init__(
        self,
        num_classes: int = 7,
        class_names: list[str] | None = None,
        normalization: Normalization = "scale",
        l2: float = 0.01,
        class_weights: list[float] | Literal["balanced"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(mean=(0.5,), std=(0.5,), **kwargs)
        if num_classes < 1:
            raise UserError(f"num_classes: expected 1 or more, found {num_classes}: does the data have classes?")
        if l2 < 0:
            raise UserError(f"l2: expected 0 or more, found {l2}")
        for name, values in (("class_names", class_names), ("class_weights", class_weights)):
            if values not in (None, "balanced") and len(values) != num_classes:
                raise UserError(f"{name}: expected {num_classes}, one a class, found {len(values)}")
        self.num_classes, self.class_names = num_classes, class_names
        self.normalization, self.l2 = normalization, l2
        self.class_weights = class_weights
        # A constant, no buffer: see VisionModule.
        self._class_weights = torch.tensor(class_weights) if isinstance(class_weights, list) else None
        self.network = MiniXception(num_classes)

    def preprocess(self, images: Tensor) -> Tensor:
        """Gray faces uint8 (B,1,H,W) to normalized float32 (B,1,64,64), on the device."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
            raise TypeError(f"images: expected gray faces uint8 (B,1,H,W), found {images.dtype} {tuple(images.shape)}")
        if self.normalization == "equalize":
            images = equalize(images)
        faces = standardize(images) if self.normalization == "standardize" else super().preprocess(images)
        return F.interpolate(faces, (INPUT_SIDE, INPUT_SIDE), mode="bilinear", align_corners=False)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``cross_entropy``, and ``l2``, the weighted sum of squares."""
        logits = self.network(self.preprocess(batch["image"]))
        if self._class_weights is not None:
            self._class_weights = self._class_weights.to(logits.device)
        terms = {"cross_entropy": cross_entropy(logits, batch["label"], weights=self._class_weights)}
        if self.l2:
            terms["l2"] = self.l2 * self.network.squared_weights()
        return terms

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Emotions of gray faces, uint8 (B,1,H,W), or of photographs, uint8 (B,3,H,W) or a list of (3,H,W).

        Returns:
            Of faces ``probabilities`` float32 (B,C). Of photographs a list of dicts, each of N >= 0 faces from left to
            right: ``boxes`` float32 (N,4), xyxy pixels; ``probabilities`` float32 (N,C); ``aligned`` bool (N,), whether
            both eyes were found; ``eyes`` float32 (N,2,2), their x and y, or where they are taken to be.

        Raises:
            RuntimeError: see `load_cascade`.
        """
        if isinstance(images, Tensor) and images.shape[1] == 1:
            return {"probabilities": self.network(self.preprocess(images)).float().softmax(1)}
        return [self._photograph(image) for image in images]

    def _photograph(self, image: Tensor) -> dict[str, Tensor]:
        gray = cv2.cvtColor(image.permute(1, 2, 0).contiguous().cpu().numpy(), cv2.COLOR_RGB2GRAY)
        boxes = detect_faces(gray)
        found = [find_eyes(gray, box) for box in boxes]
        # Without eyes the box is cut as it is: they are taken to lie where they usually do.
        eyes = [
            box[:2] + EYES * (box[2:] - box[:2]) if pair is None else pair
            for box, pair in zip(boxes, found, strict=True)
        ]
        probabilities = torch.zeros(0, self.num_classes, device=image.device)
        if len(boxes):
            faces = np.stack([align_face(gray, pair) for pair in eyes])[:, None]
            logits = self.network(self.preprocess(torch.from_numpy(faces).to(image.device)))
            probabilities = logits.float().softmax(1)
        return {
            "boxes": torch.from_numpy(boxes).float(),
            "probabilities": probabilities,
            "aligned": torch.tensor([pair is not None for pair in found], dtype=torch.bool),
            "eyes": torch.from_numpy(np.array(eyes).reshape(-1, 2, 2)).float(),
        }

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"classification": ClassificationMetrics(self.num_classes)})

    def update_metrics(self, metrics: MetricCollection, predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
        metrics.update(predictions["probabilities"], batch["label"])

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.class_weights == "balanced":
            self._class_weights = training_set_weights(self.trainer, self.num_classes)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Checks the labels while they are still on the CPU."""
        check_labels(batch, self.num_classes)
        return batch
