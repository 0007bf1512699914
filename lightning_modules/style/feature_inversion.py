"""Feature inversion: Mahendran and Vedaldi, "Understanding Deep Image Representations by Inverting Them", CVPR 2015.

What a layer knows of an image is shown by an image that looks the same to it. Constants are those of the authors' code
(deep-goggle), where an image is its pixels on a scale of 0..255 without their mean.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from errors import UserError
from lightning_modules.base import IMAGENET_MEAN, OptimizerFactory, ScheduleFactory
from lightning_modules.components.features import FeatureBackbone
from lightning_modules.style.learned_image import LearnedImage, Start
from lightning_modules.style.losses import alpha_norm, total_variation
from lightning_modules.style.painting import check_weights

# The authors' x0sigma, 27098.1, is the norm of an image of 227x227 pixels without their mean: of a pixel's each value,
SIGMA = 27098.1 / (3 * 227 * 227) ** 0.5


class FeatureInversion(LearnedImage):
    """An image with an image's activations in one layer; see `LearnedImage`.

    Loss: ``feature``, |F - F0|^2 / |F0|^2; ``tv``, tv_weight / 2 TV^beta / s^2; ``alpha``, alpha_weight / 2 sum |x|^6
    / s^2, with s^2 what the squared norm of an image of this size is on average. All of it times (s / 255)^2, so that
    learning rates are the authors', whose own steps are as long.

    Metrics: ``val/psnr`` of the image against the image in dB, beside the terms.

    Args:
        layer: see `Features`.
        tv_weight: 1 in the authors' first six layers of AlexNet (to conv2's pooling), 10 to relu4, 100 after it.
        beta: of the total variation.
        alpha_weight: keeps pixels within their range.
        network, weights, pooling, rescaled, start, bounded, optimizer: see `LearnedImage`. The authors' is gradient
            descent with a momentum of 0.9 and a rate of 0.004, a tenth of it after 100 steps, a hundredth after 300.
        schedule, channels_last: see `VisionModule`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        layer: str = "pool5",
        tv_weight: float = 100.0,
        beta: float = 2.0,
        alpha_weight: float = 8e-10,
        network: FeatureBackbone = "alexnet",
        weights: str = "DEFAULT",
        pooling: Literal["max", "average"] = "max",
        rescaled: bool = False,
        start: Start = "noise",
        bounded: bool = False,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.004, momentum=0.9),
        schedule: ScheduleFactory | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(
            [layer], network, weights, pooling, rescaled, start, bounded, optimizer,
            schedule=schedule, channels_last=channels_last,
        )  # fmt: skip
        check_weights(tv_weight=tv_weight, alpha_weight=alpha_weight)
        if beta <= 0:
            raise UserError(f"beta: expected more than 0, found {beta}")
        self.layer, self.tv_weight, self.beta, self.alpha_weight = layer, tv_weight, beta, alpha_weight
        self._mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)

    def make_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.layer: self.features(batch["image"])[self.layer].float()}

    def distances(self, image: Tensor) -> dict[str, Tensor]:
        target = self._targets[self.layer]
        found = self.features(image)[self.layer].float()
        self._mean = self._mean.to(image.device)
        x = 255 * (image - self._mean)
        # s^2 / s^2 cancels in both of the latter.
        scale, pixel = SIGMA**2 * image.numel() / 255**2, 1 / 255**2
        return {
            "feature": scale * (found - target).square().sum() / target.square().sum().clamp(min=1e-12),
            "tv": pixel * self.tv_weight / 2 * total_variation(x, self.beta).sum(),
            "alpha": pixel * self.alpha_weight / 2 * alpha_norm(x).sum(),
        }

    def measures(self, image: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        error = (image - batch["image"].to(image.device).float() / 255).square().mean()
        return {"psnr": -10 * torch.log10(error.clamp(min=1e-10))}
