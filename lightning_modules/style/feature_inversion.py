"""Feature inversion: Mahendran and Vedaldi, "Understanding Deep Image Representations by Inverting Them", CVPR 2015.

An image is optimized until its activations in a layer match those of a given image, which shows what the layer
preserves. Constants are those of the authors' code (deep-goggle), whose images are pixels in 0..255 minus their mean.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from errors import UserError
from lightning_modules.base import IMAGENET_MEAN, OptimizerFactory
from lightning_modules.components.features import FeatureBackbone
from lightning_modules.components.unsaved import Constant
from lightning_modules.style.base import OptimizedImage
from lightning_modules.style.losses import alpha_norm, total_variation
from lightning_modules.style.stylization import require_non_negative

# The authors' x0_sigma, 27098.1, is the mean norm of images of 227x227 pixels minus their mean; this is it per value.
SIGMA = 27098.1 / (3 * 227 * 227) ** 0.5


class FeatureInversion(OptimizedImage):
    """Feature inversion: optimize an image whose activations in one layer match those of a given image.

    Batch and prediction: see `OptimizedImage`. Loss: ``feature``, |F - F0|^2 / |F0|^2; ``tv``, tv_weight / 2 TV^beta /
    s^2; ``alpha``, alpha_weight / 2 sum |x|^6 / s^2. s^2 is the mean squared norm of images of this size. The loss is
    multiplied by (s / 255)^2, which makes the authors' learning rates valid for pixels in 0..1. Metrics: the terms and
    ``val/psnr`` in dB.

    Args:
        layer: layer to invert, see `Features`.
        tv_weight: weight of the total variation. The authors use 1 in the first six layers of AlexNet (to pool2), 10 to
            relu4, and 100 after it.
        beta: exponent of the total variation.
        alpha_weight: weight of the alpha norm, which keeps pixels in their range.
        backbone: feature extractor, see `Features`.
        pooling: ``average`` replaces max pooling.
        rescale_filters: rescale filters to a mean activation of 1, see `Features.rescale_filters`.
        clamp_pixels: clamp the pixels to 0..1 after each step.
        optimizer: the authors use a learning rate of 0.004, divided by 10 after 100 and after 300 steps.
        kwargs: further options of `OptimizedImage`.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        layer: str = "pool5",
        tv_weight: float = 100.0,
        beta: float = 2.0,
        alpha_weight: float = 8e-10,
        backbone: FeatureBackbone = "alexnet",
        pooling: Literal["max", "average"] = "max",
        rescale_filters: bool = False,
        clamp_pixels: bool = False,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.004, momentum=0.9),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            [layer],
            backbone=backbone,
            pooling=pooling,
            rescale_filters=rescale_filters,
            clamp_pixels=clamp_pixels,
            optimizer=optimizer,
            **kwargs,
        )
        require_non_negative(tv_weight=tv_weight, alpha_weight=alpha_weight)
        if beta <= 0:
            raise UserError(f"beta: expected more than 0, found {beta}")
        self.layer, self.tv_weight, self.beta, self.alpha_weight = layer, tv_weight, beta, alpha_weight
        self.mean_color = Constant(torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))

    def make_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.features is not None
        return {self.layer: self.features(batch["image"])[self.layer].float()}

    def image_losses(self, image: Tensor) -> dict[str, Tensor]:
        assert self.features is not None
        target = self._targets[self.layer]
        features = self.features(image)[self.layer].float()
        x = 255 * (image - self.mean_color.value)
        # (s / 255)^2; in "tv" and "alpha" s^2 cancels.
        scale, regularizer_scale = SIGMA**2 * image.numel() / 255**2, 1 / 255**2
        return {
            "feature": scale * (features - target).square().sum() / target.square().sum().clamp(min=1e-12),
            "tv": regularizer_scale * self.tv_weight / 2 * total_variation(x, self.beta).sum(),
            "alpha": regularizer_scale * self.alpha_weight / 2 * alpha_norm(x).sum(),
        }

    def image_metrics(self, image: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        error = (image - batch["image"].to(image.device).float() / 255).square().mean()
        return {"psnr": -10 * torch.log10(error.clamp(min=1e-10))}
