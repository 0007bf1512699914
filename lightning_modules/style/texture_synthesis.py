"""Texture synthesis: Gatys, Ecker and Bethge, "Texture Synthesis Using Convolutional Neural Networks", NeurIPS 2015.

Noise is changed until its Gram matrices are those of an image: what the image is made of, and not where.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.base import OptimizerFactory, ScheduleFactory
from lightning_modules.components.features import FeatureBackbone
from lightning_modules.style.learned_image import LearnedImage, Start
from lightning_modules.style.losses import gram, texture_energy

LAYERS = ("conv1_1", "pool1", "pool2", "pool3", "pool4")


class TextureSynthesis(LearnedImage):
    """A texture like an image; see `LearnedImage`.

    Loss: each layer's energy (`texture_energy`), named as the layer.

    Args:
        layers: all up to one are a texture of its depth.
        relative: divide each energy by that of a black image, sum G'^2 / (4 N^2), so that all layers weigh the same;
            for features of any scale, random ones above all.
        network, weights, pooling, rescaled, start, bounded, optimizer: see `LearnedImage`. Pixels keep to the image's
            own least and greatest values.
        schedule, channels_last: see `VisionModule`.
    """

    def __init__(
        self,
        layers: Sequence[str] = LAYERS,
        relative: bool = False,
        network: FeatureBackbone = "vgg19",
        weights: str = "DEFAULT",
        pooling: Literal["max", "average"] = "average",
        rescaled: bool = True,
        start: Start = "noise",
        bounded: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.LBFGS(params, lr=1.0, max_iter=1, history_size=20),
        schedule: ScheduleFactory | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(
            layers, network, weights, pooling, rescaled, start, bounded, optimizer,
            schedule=schedule, channels_last=channels_last,
        )  # fmt: skip
        self.relative = relative

    def bounds(self, content: Tensor) -> tuple[Tensor, Tensor]:
        return content.amin((0, 2, 3), keepdim=True), content.amax((0, 2, 3), keepdim=True)

    def make_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: gram(values) for name, values in self.features(batch["image"]).items()}

    def distances(self, image: Tensor) -> dict[str, Tensor]:
        terms = {}
        for name, values in self.features(image).items():
            target = self._targets[name]
            energy = texture_energy(gram(values), target)
            if self.relative:
                energy = energy / texture_energy(torch.zeros_like(target), target).clamp(min=1e-12)
            terms[name] = energy.sum()
        return terms
