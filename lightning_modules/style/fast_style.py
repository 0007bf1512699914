"""Fast style transfer: Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time Style Transfer", ECCV 2016.

A feed-forward network is trained for one style. The architecture follows the authors' supplement, with instance
normalization (Ulyanov et al. 2016) and resize convolutions, which avoid checkerboard artifacts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.features import RANDOM
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.unsaved import Constant
from lightning_modules.style.base import PerceptualStyleTransfer
from lightning_modules.style.losses import gram_matrix
from lightning_modules.style.stylization import (
    MIN_SIDE,
    pad_replicate,
    read_style_image,
    stylized_prediction,
    to_uint8,
)

# --- network ----------------------------------------------------------------------------------------------------------


def conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Build a convolution with reflection padding, instance normalization and ReLU."""
    layers = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, padding_mode="reflect"),
        nn.InstanceNorm2d(out_channels, affine=True),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class InstanceNormResidual(nn.Module):
    """Residual block with two convolutions and no ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv_norm(channels, channels, 3), conv_norm(channels, channels, 3, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class TransformNetwork(nn.Module):
    """Image transformation network: normalized float (B, 3, H, W) to the same shape; 1,679,235 parameters.

    Args:
        width_multiplier: multiplier of all channel counts.
    """

    def __init__(self, width_multiplier: float = 1.0) -> None:
        super().__init__()
        a, b, c = (max(1, round(width_multiplier * channels)) for channels in (32, 64, 128))
        self.layers = nn.Sequential(
            conv_norm(3, a, 9),
            conv_norm(a, b, 3, stride=2),
            conv_norm(b, c, 3, stride=2),
            *(InstanceNormResidual(c) for _ in range(5)),
            nn.Upsample(scale_factor=2, mode="nearest"),
            conv_norm(c, b, 3),
            nn.Upsample(scale_factor=2, mode="nearest"),
            conv_norm(b, a, 3),
            nn.Conv2d(a, 3, 9, padding=4, padding_mode="reflect"),
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return self.layers(pad_replicate(x, 4))[..., :height, :width]


# --- module -----------------------------------------------------------------------------------------------------------


class FastStyle(PerceptualStyleTransfer):
    """Fast style transfer: a network that applies one style to any image in one pass.

    Batch: ``image`` uint8 (B, 3, H, W), content images. Prediction: ``stylized`` uint8 (B, 3, H, W) and ``random`` bool
    (B,), whether the loss network has random weights.

    Loss and metrics: see `PerceptualStyleTransfer`. The paper's style loss, the squared Frobenius norm of Gram matrices
    divided by C H W (equation 4), is `gram_distance`.

    Args:
        style: path of the style image.
        style_size: maximum of its longer side in pixels, which sets the scale of the strokes; None does not resize.
        width_multiplier: multiplier of all channel counts of the network.
        optimizer: see `VisionModule`; the default is the paper's.
        kwargs: further options of `PerceptualStyleTransfer`.
    """

    def __init__(
        self,
        style: str | None = None,
        style_size: int | None = 256,
        width_multiplier: float = 1.0,
        optimizer: OptimizerFactory = lambda params: torch.optim.Adam(params, lr=1e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.style, self.style_size = style, style_size
        self.network = TransformNetwork(width_multiplier)
        self.style_grams = nn.ModuleDict()

    def setup(self, stage: str) -> None:
        if stage == "predict" or self.features is not None:
            super().setup(stage)
            return
        if self.style is None:
            raise UserError("style: expected the path of a style image, found none; set --model.style IMAGE")
        style = read_style_image(self.style, self.style_size, MIN_SIDE)
        super().setup(stage)
        assert self.features is not None
        with torch.no_grad():
            features = self.features(style.to(self.device))
        for name in self.style_layers:
            self.style_grams[name] = Constant(gram_matrix(features[name]))

    def style_targets(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {name: self.style_grams[name]() for name in self.style_layers}

    def stylize_batch(self, batch: dict[str, Any]) -> Tensor:
        return self.stylize(require_equal_size(batch["image"]))

    def stylize(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, H, W) to stylized images, float32 (B, 3, H, W) in about 0..1."""
        stylized = self.network(self.preprocess(images)).float()
        return (stylized * self.pixel_std.value + self.pixel_mean.value) / 255

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        return stylized_prediction(to_uint8(self.stylize(require_equal_size(images))), self.weights == RANDOM)
