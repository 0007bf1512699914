"""Fast style transfer: Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time Style Transfer", ECCV 2016.

A feed-forward network is trained for one style. The architecture follows the authors' supplement, with instance
normalization (Ulyanov et al. 2016) and resize convolutions, which avoid checkerboard artifacts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.features import RANDOM, FeatureBackbone, Features
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.unsaved import Constant, FrozenNetwork
from lightning_modules.style.losses import (
    divide_by_mean_square,
    feature_distance,
    gram_matrix,
    gram_style_loss,
    total_variation,
)
from lightning_modules.style.stylization import (
    pad_replicate,
    read_style_image,
    require_non_negative,
    stylization_metrics,
    stylized_prediction,
    to_uint8,
    update_stylization_metrics,
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


class FastStyle(VisionModule):
    """Fast style transfer: a network that applies one style to any image in one pass.

    Batch: ``image`` uint8 (B, 3, H, W), content images. Prediction: ``stylized`` uint8 (B, 3, H, W) and ``random`` bool
    (B,), whether the loss network has random weights.

    Loss: ``content``; ``style``, the squared Frobenius norm of Gram matrices divided by C H W (equation 4), which is
    `gram_distance`; ``tv``. Metrics: the terms, ``val/loss``, and ``val/style_ratio``, the style loss relative to that
    of the content images. The loss network is used in training and evaluation only and is not in checkpoints.

    Args:
        style: path of the style image.
        style_size: maximum of its longer side in pixels, which sets the scale of the strokes; None does not resize.
        content_layer: layer of the content loss: relu2_2 in the paper, relu3_3 in the authors' released models.
        style_layers: layers of the style loss.
        content_weight: weight of the content loss, as in the authors' code; other features need other weights.
        style_weight: weight of the style loss, as in the authors' code.
        tv_weight: weight of the total variation per pixel value, for pixels in 0..1.
        normalize_distances: divide the distance of each layer by the mean square of its target, so that the weights do
            not depend on the scale of the features; recommended for random ones.
        width_multiplier: multiplier of all channel counts of the network.
        backbone: loss network, see `Features`.
        weights: weights of the loss network, see `Features`.
        optimizer: see `VisionModule`; the default is the paper's.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.

    Raises:
        UserError: an option is out of range.
    """

    monitor = ("val/loss", "min")

    def __init__(
        self,
        style: str | None = None,
        style_size: int | None = 256,
        content_layer: str = "relu2_2",
        style_layers: Sequence[str] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3"),
        content_weight: float = 1.0,
        style_weight: float = 5.0,
        tv_weight: float = 0.0,
        normalize_distances: bool = False,
        width_multiplier: float = 1.0,
        backbone: FeatureBackbone = "vgg16",
        weights: str = "DEFAULT",
        optimizer: OptimizerFactory = lambda params: torch.optim.Adam(params, lr=1e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        require_non_negative(content_weight=content_weight, style_weight=style_weight, tv_weight=tv_weight)
        self.style, self.style_size = style, style_size
        self.content_layer, self.style_layers = content_layer, list(style_layers)
        self.content_weight, self.style_weight, self.tv_weight = content_weight, style_weight, tv_weight
        self.normalize_distances, self.backbone, self.weights = normalize_distances, backbone, weights
        self.network = TransformNetwork(width_multiplier)
        self.features: FrozenNetwork | None = None
        self.style_grams = nn.ModuleDict()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "predict" or self.features is not None:
            return
        if self.style is None:
            raise UserError("style: expected the path of a style image, found none; set --model.style IMAGE")
        style = read_style_image(self.style, self.style_size)
        layers = list(dict.fromkeys([self.content_layer, *self.style_layers]))
        features = Features(layers, self.backbone, self.weights).to(memory_format=self.memory_format)  # type: ignore[call-overload]
        with torch.no_grad():
            activations = features(style)
            for name in self.style_layers:
                self.style_grams[name] = Constant(gram_matrix(activations[name])).to(self.device)
        self.features = FrozenNetwork(features).to(self.device)

    # --- loss ---------------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = require_equal_size(batch["image"])
        terms = self.image_losses(self.stylize(images), images.float() / 255)
        return {name: term.mean() for name, term in terms.items()}

    def stylize(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, H, W) to stylized images, float32 (B, 3, H, W) in about 0..1."""
        stylized = self.network(self.preprocess(images)).float()
        return (stylized * self.pixel_std.value + self.pixel_mean.value) / 255

    def image_losses(self, stylized: Tensor, content: Tensor) -> dict[str, Tensor]:
        """Return the loss terms of each image.

        Args:
            stylized: stylized images, float (B, 3, H, W) in 0..1.
            content: content images, float (B, 3, H, W) in 0..1.

        Returns:
            float32 (B,) by name.
        """
        assert self.features is not None
        activations = self.features(stylized)
        with torch.no_grad():
            target = self.features(content)[self.content_layer]
        distance = feature_distance(activations[self.content_layer], target)
        if self.normalize_distances:
            distance = divide_by_mean_square(distance, target)
        terms = {
            "content": self.content_weight * distance,
            "style": self.style_weight * self.style_loss(activations),
        }
        if self.tv_weight:
            terms["tv"] = self.tv_weight * total_variation(stylized) / stylized[0].numel()
        return terms

    def style_loss(self, activations: dict[str, Tensor]) -> Tensor:
        """Return the unweighted style loss of each image, float32 (B,), from its activations by layer."""
        targets = {name: self.style_grams[name]() for name in self.style_layers}
        return gram_style_loss(activations, targets, self.normalize_distances)

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        return stylized_prediction(to_uint8(self.stylize(require_equal_size(images))), self.weights == RANDOM)

    def build_metrics(self) -> MetricCollection:
        return stylization_metrics("content", "style", *(["tv"] if self.tv_weight else []))

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        assert self.features is not None
        content = require_equal_size(batch["image"]).float() / 255
        terms = self.image_losses(predictions["stylized"].float() / 255, content)
        content_style_loss = self.style_weight * self.style_loss(self.features(content))
        update_stylization_metrics(metrics, terms, content_style_loss)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the name of the loss network's weights, which are not in the checkpoint."""
