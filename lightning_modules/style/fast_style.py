"""Fast style: Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time Style Transfer", ECCV 2016.

What neural style finds in hundreds of steps a network learns to do in one pass, for one style. As in the authors'
supplement; with instance normalization (Ulyanov et al. 2016) and resize convolutions, which leave no checkerboard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.features import FeatureBackbone, Features
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.style.losses import feature_distance, gram, gram_distance, relative_to, total_variation
from lightning_modules.style.painting import (
    check_weights,
    enlarged,
    painting_metrics,
    read_style,
    score_paintings,
    to_pixels,
)

# --- network ----------------------------------------------------------------------------------------------------------


def block(channels: int, out: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution with reflected borders, instance normalization, ReLU."""
    layers = [
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, padding_mode="reflect"),
        nn.InstanceNorm2d(out, affine=True),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class Residual(nn.Module):
    """Two convolutions, what comes in added; no ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(block(channels, channels, 3), block(channels, channels, 3, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class TransformNetwork(nn.Module):
    """Normalized images float (B,3,H,W) to as large ones; of width 1 it has 1,679,235 parameters.

    Args:
        width: multiplies all channels.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        a, b, c = (max(1, round(width * channels)) for channels in (32, 64, 128))
        self.layers = nn.Sequential(
            block(3, a, 9),
            block(a, b, 3, stride=2),
            block(b, c, 3, stride=2),
            *(Residual(c) for _ in range(5)),
            nn.Upsample(scale_factor=2, mode="nearest"),
            block(c, b, 3),
            nn.Upsample(scale_factor=2, mode="nearest"),
            block(b, a, 3),
            nn.Conv2d(a, 3, 9, padding=4, padding_mode="reflect"),
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return self.layers(enlarged(x, 4))[..., :height, :width]


# --- module -----------------------------------------------------------------------------------------------------------


class FastStyle(VisionModule):
    """A network that paints any image in one style. Batch: ``image`` uint8 (B,3,H,W), contents alone.

    Prediction: ``stylized`` uint8 (B,3,H,W), as large as the images, and ``random`` bool (B,), whether random features
    taught it. Loss: ``content``, ``style`` and ``tv``, with the Gram matrices' squared Frobenius norm, each divided by
    C H W (equation 4), which is `gram_distance`. Metrics: ``val/style``, ``val/content``, ``val/loss``; and
    ``val/style_ratio``, the style's distance in parts of what the images have as they are.

    The features are needed to train and to measure, not to predict, and are no part of a checkpoint.

    Args:
        style: path of the image whose style it is.
        style_size: pixels of its longer side at most: its strokes come out as large as they are in these pixels.
        content_layer: relu2_2 in the paper, relu3_3 in their code's models.
        style_layers: VGG-16's.
        content_weight, style_weight: of the paper's code; other weights and other features want other ones.
        tv_weight: of the total variation a pixel, on 0..1.
        relative: divide each layer's distance by the mean square of what it is compared with, so that weights mean the
            same for features of any scale; for random ones above all.
        width: see `TransformNetwork`.
        network, weights: see `Features`.
        optimizer: see `VisionModule`; the paper's.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.

    Raises:
        ValueError: there is no such style, or an argument is out of its range.
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
        relative: bool = False,
        width: float = 1.0,
        network: FeatureBackbone = "vgg16",
        weights: str = "DEFAULT",
        optimizer: OptimizerFactory = lambda params: torch.optim.Adam(params, lr=1e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        check_weights(content_weight=content_weight, style_weight=style_weight, tv_weight=tv_weight)
        self.style, self.style_size = style, style_size
        self.content_layer, self.style_layers = content_layer, list(style_layers)
        self.content_weight, self.style_weight, self.tv_weight = content_weight, style_weight, tv_weight
        self.relative, self.feature_network, self.weights = relative, network, weights
        self.network = TransformNetwork(width)
        # In a list, since a submodule would be saved.
        self._features: list[Features] = []
        self._grams: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "predict" or self._features:
            return
        if self.style is None:
            raise UserError("style: expected the image whose style is learned: --model.style PICTURE")
        layers = list(dict.fromkeys([self.content_layer, *self.style_layers]))
        picture = read_style(self.style, self.style_size)
        features = Features(layers, self.feature_network, self.weights).to(memory_format=self.memory_format)  # type: ignore[call-overload]
        with torch.no_grad():
            found = features(picture)
            self._grams = {name: gram(found[name]) for name in self.style_layers}
        self._features = [features]

    @property
    def features(self) -> Features:
        return self._features[0].to(self.device)

    # --- loss ---------------------------------------------------------------------------------------------------------

    def paint(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) to painted ones, float32 (B,3,H,W), about 0..1."""
        painted = self.network(self.preprocess(images)).float()
        return (painted * self.pixel_std.value + self.pixel_mean.value) / 255

    def distances(self, painted: Tensor, content: Tensor) -> dict[str, Tensor]:
        """Named terms of each image: float32 (B,). Both float (B,3,H,W) in 0..1."""
        found = self.features(painted)
        with torch.no_grad():
            true = self.features(content)[self.content_layer]
        content_term = feature_distance(found[self.content_layer], true)
        if self.relative:
            content_term = relative_to(content_term, true)
        terms = {"content": self.content_weight * content_term, "style": self.style_weight * self.style_distance(found)}
        if self.tv_weight:
            terms["tv"] = self.tv_weight * total_variation(painted) / painted[0].numel()
        return terms

    def style_distance(self, found: dict[str, Tensor]) -> Tensor:
        """The sum of all layers' Gram distances from the style: float32 (B,)."""
        total = []
        for name in self.style_layers:
            target = self._grams[name] = self._grams[name].to(found[name].device)
            distance = gram_distance(gram(found[name]), target)
            total.append(relative_to(distance, target) if self.relative else distance)
        return torch.stack(total).sum(0)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = require_equal_size(batch["image"])
        terms = self.distances(self.paint(images), images.float() / 255)
        return {name: term.mean() for name, term in terms.items()}

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        pixels = to_pixels(self.paint(require_equal_size(images)))
        return {"stylized": pixels, "random": torch.full((len(pixels),), self.weights == "random")}

    def build_metrics(self) -> MetricCollection:
        return painting_metrics("content", "style", *(["tv"] if self.tv_weight else []))

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        content = require_equal_size(batch["image"]).float() / 255
        terms = self.distances(predictions["stylized"].float() / 255, content)
        unchanged = self.style_weight * self.style_distance(self.features(content))
        score_paintings(metrics, terms, unchanged)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the name of the weights: they are not in the checkpoint."""
