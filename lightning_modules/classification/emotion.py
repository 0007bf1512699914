"""Emotion recognition with mini-Xception: Arriaga, Valdenegro-Toro and Plöger, "Real-time Convolutional Neural Networks
for Emotion and Gender Classification", 2017.

The authors' code (oarriaga/face_classification) supplies the details that the paper omits. Photographs are processed in
five steps: face detection, alignment, normalization, network, argmax (`faces.py` has the first three).
"""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.classification.base import Classifier
from lightning_modules.classification.faces import (
    EYE_CENTERS,
    align_face,
    detect_faces,
    equalize,
    find_eyes,
    standardize,
)
from lightning_modules.classification.metrics import ClassificationMetrics

Normalization = Literal["scale", "equalize", "standardize"]

INPUT_SIZE = 64  # pixels

# --- network ------------------------------------------------------------------------------------------------------


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Build batch normalization with Keras's constants; its momentum of 0.99 is 0.01 in PyTorch's convention."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def separable_conv(in_channels: int, channels: int) -> nn.Sequential:
    """Build a depthwise 3x3 and a pointwise 1x1 convolution, without biases."""
    depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(in_channels, channels, 1, bias=False))


def max_pool_same(x: Tensor) -> Tensor:
    """Apply 3x3 max pooling with stride 2 and Keras's padding "same": (N, C, H, W) to (N, C, ceil(H/2), ceil(W/2)).

    An odd side is padded at both ends, an even side only at the bottom or right.
    """
    height, width = x.shape[-2:]
    padding = (width % 2, 1, height % 2, 1)
    return F.max_pool2d(F.pad(x, padding, value=-torch.inf), 3, stride=2)


class XceptionModule(nn.Module):
    """Two separable convolutions with pooling, plus a 1x1 convolution of stride 2; no activation after the sum.

    It maps (N, in_channels, H, W) to (N, channels, ceil(H/2), ceil(W/2)).

    Args:
        in_channels: input channels.
        channels: output channels.
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
        # Keras's "same" padding selects even rows and columns. Slicing replaces the convolution's stride: its gradient
        # with 8 channels in NHWC memory overruns memory on AVX-512 processors (torch 2.15).
        return max_pool_same(self.body(x)) + self.residual(x[:, :, ::2, ::2])


class MiniXception(nn.Module):
    """mini_XCEPTION; 56,951 parameters for 7 classes (58,423 as Keras counts, with batch statistics).

    Args:
        num_classes: outputs of the last layer.
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
        """Map normalized faces, float (N, 1, 64, 64), to logits (N, C)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.classifier(self.modules_1_to_4(x)).mean((2, 3))

    def squared_weights(self) -> Tensor:
        """Return the sum of squares of the first two convolutions' weights, the authors' L2 penalty.

        The authors' code also passes ``kernel_regularizer`` to the separable convolutions. Keras's SeparableConv2D
        ignores it: its options are ``depthwise_regularizer`` and ``pointwise_regularizer``.
        """
        return self.conv1.weight.square().sum() + self.conv2.weight.square().sum()


# --- metrics ------------------------------------------------------------------------------------------------------


class RegularizedMetrics(ClassificationMetrics):
    """`ClassificationMetrics` whose ``loss`` includes the L2 penalty, as Keras's ``val_loss`` does.

    The authors' learning-rate schedule, early stopping and checkpoints monitor ``val_loss``.

    Args:
        num_classes: number of classes, C.
    """

    penalty: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        # Equal on all ranks, except on one without a batch, where it is 0.
        self.add_state("penalty", torch.zeros(()), dist_reduce_fx="max")

    def update(self, probabilities: Tensor, labels: Tensor, penalty: Tensor) -> None:  # type: ignore[override]
        """Add a batch; ``penalty`` is the weighted L2 term, float32 scalar, which is constant during an evaluation."""
        super().update(probabilities, labels)
        self.penalty = penalty

    def compute(self) -> dict[str, Tensor]:
        """Return the results of `ClassificationMetrics`, with the penalty added to ``loss``."""
        results = super().compute()
        return {**results, "loss": results["loss"] + self.penalty}


# --- module -------------------------------------------------------------------------------------------------------


class EmotionClassifier(Classifier):
    """mini-Xception on gray faces, and on the faces of photographs.

    Batch: ``image`` uint8 (B, 1, H, W), ``label`` int64 (B,). Metrics: those of `RegularizedMetrics`.

    Args:
        num_classes: number of classes, C.
        normalization: normalization of illumination, in training and prediction: ``scale`` to -1..1 (the authors'),
            ``equalize`` the histogram and scale, or ``standardize`` each face.
        l2: weight of the squared weights in the loss, see `MiniXception.squared_weights`; ``val/loss`` includes it.
        **kwargs: see `Classifier`.
    """

    # The authors' schedule, early stopping and checkpoints monitor the loss, L2 penalty included.
    monitor = ("val/loss", "min")

    def __init__(
        self, num_classes: int = 7, normalization: Normalization = "scale", l2: float = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(num_classes=num_classes, mean=(0.5,), std=(0.5,), **kwargs)
        if l2 < 0:
            raise UserError(f"l2: expected 0 or more, found {l2}")
        self.normalization, self.l2 = normalization, l2
        self.network = MiniXception(num_classes)

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalize gray faces, uint8 (B, 1, H, W), to float32 (B, 1, 64, 64), on the device."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
            raise TypeError(f"images: expected gray faces uint8 (B,1,H,W), found {images.dtype} {tuple(images.shape)}")
        if self.normalization == "equalize":
            images = equalize(images)
        faces = standardize(images) if self.normalization == "standardize" else super().preprocess(images)
        return F.interpolate(faces, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return ``cross_entropy`` and the weighted ``l2``."""
        terms = {"cross_entropy": self.cross_entropy(self.network(self.preprocess(batch["image"])), batch["label"])}
        if self.l2:
            terms["l2"] = self.l2 * self.network.squared_weights()
        return terms

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"classification": RegularizedMetrics(self.num_classes)})

    def update_metrics(self, metrics: MetricCollection, predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
        metrics.update(predictions["probabilities"], batch["label"], self.l2 * self.network.squared_weights().float())

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Predict emotions of gray faces or of all faces of photographs.

        Args:
            images: gray faces, uint8 (B, 1, H, W), or photographs, uint8 (B, 3, H, W) or a list of (3, H, W).

        Returns:
            For gray faces ``probabilities`` float32 (B, C). For photographs one dict each, with N faces from left to
            right: ``boxes`` float32 (N, 4), xyxy in pixels; ``probabilities`` float32 (N, C); ``aligned`` bool (N,),
            whether both eyes were found; ``eyes`` float32 (N, 2, 2), (x, y) in pixels, assumed if not found.
        """
        if isinstance(images, Tensor) and images.shape[1] == 1:
            return {"probabilities": self.network(self.preprocess(images)).float().softmax(1)}
        return [self._predict_photograph(image) for image in images]

    def _predict_photograph(self, image: Tensor) -> dict[str, Tensor]:
        gray = cv2.cvtColor(image.permute(1, 2, 0).contiguous().cpu().numpy(), cv2.COLOR_RGB2GRAY)
        boxes = detect_faces(gray)
        found = [find_eyes(gray, box) for box in boxes]
        # If no eyes are found they are assumed at their average positions, which crops the box as it is.
        eyes = [
            box[:2] + EYE_CENTERS * (box[2:] - box[:2]) if pair is None else pair
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
