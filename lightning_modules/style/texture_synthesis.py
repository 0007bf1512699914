"""Texture synthesis: Gatys, Ecker and Bethge, "Texture Synthesis Using Convolutional Neural Networks", NeurIPS 2015.

A noise image is optimized until its Gram matrices match those of an image. Gram matrices are independent of position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.style.base import OptimizedImage
from lightning_modules.style.losses import gram_matrix, texture_energy

LAYERS = ("conv1_1", "pool1", "pool2", "pool3", "pool4")


class TextureSynthesis(OptimizedImage):
    """Texture synthesis: optimize an image until its Gram matrices match those of a texture.

    Batch, prediction and metrics: see `OptimizedImage`. Loss: the energy of each layer (`texture_energy`), under the
    layer's name. Pixels are clamped to the range of the texture per channel.

    Args:
        layers: layers of the Gram matrices; deeper layers reproduce larger structures.
        normalize_distances: divide each energy by that of Gram matrices of zeros, sum G'^2 / (4 C^2), so that all
            layers have equal weights; recommended for random features.
        kwargs: further options of `OptimizedImage`.
    """

    def __init__(self, layers: Sequence[str] = LAYERS, normalize_distances: bool = False, **kwargs: Any) -> None:
        super().__init__(layers, **kwargs)
        self.normalize_distances = normalize_distances

    def pixel_range(self, content: Tensor) -> tuple[Tensor, Tensor]:
        return content.amin((0, 2, 3), keepdim=True), content.amax((0, 2, 3), keepdim=True)

    def make_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.features is not None
        return {name: gram_matrix(features) for name, features in self.features(batch["image"]).items()}

    def image_losses(self, image: Tensor) -> dict[str, Tensor]:
        assert self.features is not None
        terms = {}
        for name, features in self.features(image).items():
            target = self._targets[name]
            energy = texture_energy(gram_matrix(features), target)
            if self.normalize_distances:
                energy = energy / texture_energy(torch.zeros_like(target), target).clamp(min=1e-12)
            terms[name] = energy.sum()
        return terms
