"""AdaIN: Huang and Belongie, "Arbitrary Style Transfer in Real-Time with Adaptive Instance Normalization", ICCV 2017.

AdaIN replaces mean and standard deviation of each channel of the content features by those of the style features. A
decoder maps the result to an image, for any style in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, ScheduleFactory, VisionModule
from lightning_modules.components.features import Features
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.unsaved import Constant
from lightning_modules.style.losses import divide_by_mean_square, feature_distance, moments, moments_distance
from lightning_modules.style.stylization import (
    content_and_style,
    normalize_interpolation_weights,
    pad_replicate,
    read_style_image,
    read_styles,
    require_fraction,
    require_non_negative,
    stylization_metrics,
    stylized_prediction,
    to_uint8,
    update_stylization_metrics,
)

LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1")
STRIDE = 8  # of the deepest layer, in pixels
STYLE_WEIGHTS = {"sum": 0.01, "mean": 10.0}  # default style weight of each reduction

# --- network ----------------------------------------------------------------------------------------------------------


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Give content features the channel means and standard deviations of style features (equation 8).

    Args:
        content: float (B, C, h, w).
        style: float (B, C, h', w'); its size may differ.

    Returns:
        float32 (B, C, h, w).
    """
    (mean, std), (style_mean, style_std) = moments(content), moments(style)
    return (content.float() - mean) / std * style_std + style_mean


class AdaINDecoder(nn.Sequential):
    """Mirror of VGG-19 up to relu4_1: float (B, 512, h, w) to (B, 3, 8h, 8w); 3,505,219 parameters.

    It has nearest-neighbor upsampling in place of pooling, reflection padding, no normalization and no last ReLU.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for in_channels, out_channels, upsample in (
            (512, 256, True), (256, 256, False), (256, 256, False), (256, 256, False), (256, 128, True),
            (128, 128, False), (128, 64, True), (64, 64, False),
        ):  # fmt: skip
            layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="reflect"), nn.ReLU(True)]
            layers += [nn.Upsample(scale_factor=2, mode="nearest")] if upsample else []
        last = nn.Conv2d(64, 3, 3, padding=1, padding_mode="reflect")
        super().__init__(*layers, last)
        he_normal(self)
        assert last.bias is not None
        nn.init.constant_(last.bias, 0.5)  # start with gray images


# --- module -----------------------------------------------------------------------------------------------------------


class AdaIN(VisionModule):
    """AdaIN: arbitrary style transfer in one pass by adaptive instance normalization.

    Batch: ``image`` and ``style``, uint8 (B, 3, H, W). Prediction: ``stylized`` uint8 (B, 3, H, W), and ``random`` bool
    (B,), whether the encoder has random weights.

    Loss: ``content``, the distance between the features of the stylized image and the output of AdaIN (not the content
    features); ``style``, the distance of means and standard deviations in four layers. Metrics: the terms, ``val/loss``
    and ``val/style_ratio``, the style loss relative to that of the content images.

    The frozen encoder, VGG-19 up to relu4_1 with reflection padding, is part of the checkpoint. It has 3,505,728
    parameters; the authors' has 12 more, which normalize the pixels.

    Args:
        style_loss_reduction: reduction of the style loss over channels: ``sum`` as in the authors' code, ``mean`` as in
            common ports.
        style_weight: weight of the style loss; None: 0.01 for ``sum``, 10 for ``mean``.
        normalize_distances: divide each distance by the mean square of its target, so that the weights do not depend on
            the scale of the features.
        alpha: degree of stylization in prediction: 0 reconstructs the content, 1 applies the full style.
        styles: paths of the style images of prediction.
        style_interpolation_weights: one weight per style, for a mixture of styles; None: equal weights.
        mask: path of a gray image for two styles: the first where it is white, the second where it is black.
        style_size: maximum of the longer side of ``styles`` in pixels; None does not resize.
        backbone: encoder; for vgg19_bn the batch normalization is fused into the convolutions.
        weights: weights of the encoder, see `Features`.
        optimizer: see `VisionModule`; the paper combines it with the schedule ``InverseTime(decay=5e-5)``.
        schedule: see `VisionModule`.
        channels_last: see `VisionModule`.

    Raises:
        UserError: an option is out of range.
    """

    monitor = ("val/loss", "min")

    def __init__(
        self,
        style_loss_reduction: Literal["sum", "mean"] = "sum",
        style_weight: float | None = None,
        normalize_distances: bool = False,
        alpha: float = 1.0,
        styles: Sequence[str] | None = None,
        style_interpolation_weights: Sequence[float] | None = None,
        mask: str | None = None,
        style_size: int | None = 512,
        backbone: Literal["vgg19", "vgg19_bn"] = "vgg19",
        weights: str | None = "DEFAULT",
        optimizer: OptimizerFactory = lambda params: torch.optim.Adam(params, lr=1e-4),
        schedule: ScheduleFactory | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, channels_last=channels_last)
        require_fraction(alpha=alpha)
        require_non_negative(style_weight=style_weight or 0)
        if mask is not None and len(styles or ()) != 2:
            raise UserError(f"mask: expected two styles, found {len(styles or ())}; set --model.styles '[A, B]'")
        self.style_loss_reduction = style_loss_reduction
        self.style_weight = STYLE_WEIGHTS[style_loss_reduction] if style_weight is None else style_weight
        self.normalize_distances, self.alpha = normalize_distances, alpha
        self.styles, self.mask, self.style_size = list(styles or ()), mask, style_size
        self.interpolation_weights = normalize_interpolation_weights(style_interpolation_weights, len(self.styles))
        # A checkpoint contains the encoder: its weights are dropped from the hyperparameters, and None loads none.
        self.encoder = Features(LAYERS, backbone, weights or "random", padding="reflect")
        self.decoder = AdaINDecoder()
        self.style_features = nn.ModuleList()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.decoder.parameters())}]

    # --- loss ---------------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        content_images, style_images = content_and_style(batch)
        with torch.no_grad():
            content = self.encoder(content_images)[LAYERS[-1]]
            style = self.encoder(style_images)
        target = adain(content, style[LAYERS[-1]])
        stylized = self.encoder(self.decode(target))
        return {name: term.mean() for name, term in self.image_losses(stylized, target, style).items()}

    def decode(self, features: Tensor) -> Tensor:
        """Decode features (B, 512, h, w) to images, float32 (B, 3, 8h, 8w) in about 0..1."""
        return self.decoder(features.contiguous(memory_format=self.memory_format)).float()

    def image_losses(self, stylized: dict[str, Tensor], target: Tensor, style: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss terms of each image.

        Args:
            stylized: features of the stylized images by layer.
            target: decoded features, (B, 512, h, w).
            style: features of the style images by layer.

        Returns:
            float32 (B,) by name.
        """
        content = feature_distance(stylized[LAYERS[-1]], target)
        if self.normalize_distances:
            content = divide_by_mean_square(content, target)
        return {"content": content, "style": self.style_weight * self.style_loss(stylized, style)}

    def style_loss(self, stylized: dict[str, Tensor], style: dict[str, Tensor]) -> Tensor:
        """Return the unweighted style loss of each image, float32 (B,), from features by layer."""
        distances = []
        for name in LAYERS:
            distance = moments_distance(stylized[name], style[name])
            if self.normalize_distances:
                distance = divide_by_mean_square(distance, style[name])
            distances.append(distance * (style[name].shape[1] if self.style_loss_reduction == "sum" else 1))
        return torch.stack(distances).sum(0)

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Stylize images with the option ``styles``."""
        if not len(self.style_features):
            styles = read_styles(self.styles, self.style_size)
            self.style_features.extend(Constant(self._encode(style.to(self.device))) for style in styles)
        features = [constant() for constant in self.style_features]
        return self._stylize(require_equal_size(images), features, self.interpolation_weights)

    def predict_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Stylize images with the styles of the batch, or else with the option ``styles``."""
        if "style" not in batch:
            return self.predict(batch["image"])
        return self._stylize(batch["image"], [self._encode(batch["style"].float() / 255)], [1.0])

    def _encode(self, images: Tensor) -> Tensor:
        return self.encoder(pad_replicate(images, STRIDE))[LAYERS[-1]]

    def _stylize(self, images: Tensor, styles: Sequence[Tensor], weights: Sequence[float]) -> dict[str, Tensor]:
        """Stylize uint8 (B, 3, H, W) with a weighted mean of style features, (B or 1, 512, h, w) each."""
        height, width = images.shape[-2:]
        content = self._encode(images.float() / 255).float()
        stylized = [adain(content, style.expand(len(content), -1, -1, -1)) for style in styles]
        if self.mask is not None and len(styles) == 2:
            mask = read_style_image(self.mask, None)[:, :1]
            mask = F.interpolate(mask, content.shape[2:], mode="bilinear", antialias=True).to(content.device)
            factors = [mask, 1 - mask]
        else:
            factors = [content.new_tensor(weight) for weight in weights]
        mixed = torch.stack([factor * maps for factor, maps in zip(factors, stylized, strict=True)]).sum(0)
        decoded = self.decode(self.alpha * mixed + (1 - self.alpha) * content)[..., :height, :width]
        return stylized_prediction(to_uint8(decoded), self.encoder.random)

    def build_metrics(self) -> MetricCollection:
        return stylization_metrics("content", "style")

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        content, style = (self.encoder(images) for images in content_and_style(batch))
        stylized = self.encoder(predictions["stylized"].float() / 255)
        terms = self.image_losses(stylized, adain(content[LAYERS[-1]], style[LAYERS[-1]]), style)
        update_stylization_metrics(metrics, terms, self.style_weight * self.style_loss(content, style))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["adain"] = {"random": self.encoder.random, "normalization": self.encoder.normalization}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.encoder.random, self.encoder.normalization = (checkpoint["adain"][k] for k in ("random", "normalization"))
