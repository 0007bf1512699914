"""Neural style: Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks", CVPR 2016.

An image is optimized to match the activations of a content image in a deep layer and the Gram matrices of a style image
in several layers. Loss weights and initial image are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from lightning_modules.style.base import Init, OptimizedImage
from lightning_modules.style.losses import feature_distance, gram_distance, gram_matrix, total_variation
from lightning_modules.style.stylization import require_non_negative

CONTENT_LAYERS = ("relu4_2",)
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")


class NeuralStyle(OptimizedImage):
    """Neural style transfer: optimize an image for the content of one image and the style of another.

    Batch, prediction and metrics: see `OptimizedImage`. Loss: ``content``, the mean squared difference of activations;
    ``style``, the mean squared difference of Gram matrices times 1000 / C^2, summed over layers (C channels); ``tv``.

    Args:
        content_layers: layers of the content loss; earlier layers preserve more detail.
        style_layers: layers of the style loss.
        content_weight: weight of the content loss.
        style_weight: weight of the style loss.
        tv_weight: weight of the total variation per pixel value, for pixels in 0..1; 0 in the paper.
        init: initial image: the content image in the authors' code, noise in the paper.
        kwargs: further options of `OptimizedImage`.

    Raises:
        UserError: an option is out of range, or the data have no style image.
    """

    def __init__(
        self,
        content_layers: Sequence[str] = CONTENT_LAYERS,
        style_layers: Sequence[str] = STYLE_LAYERS,
        content_weight: float = 1.0,
        style_weight: float = 1.0,
        tv_weight: float = 0.0,
        init: Init = "content",
        **kwargs: Any,
    ) -> None:
        super().__init__(list(dict.fromkeys([*content_layers, *style_layers])), init=init, **kwargs)
        require_non_negative(content_weight=content_weight, style_weight=style_weight, tv_weight=tv_weight)
        self.content_layers, self.style_layers = list(content_layers), list(style_layers)
        self.content_weight, self.style_weight, self.tv_weight = content_weight, style_weight, tv_weight

    def make_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "style" not in batch:
            raise UserError("style: expected a style image, found none; set --data.style IMAGE")
        assert self.features is not None
        content, style = self.features(batch["image"]), self.features(batch["style"])
        return {
            **{f"content {name}": content[name].float() for name in self.content_layers},
            **{f"style {name}": gram_matrix(style[name]) for name in self.style_layers},
        }

    def image_losses(self, image: Tensor) -> dict[str, Tensor]:
        assert self.features is not None
        features = self.features(image)
        content = [feature_distance(features[name], self._targets[f"content {name}"]) for name in self.content_layers]
        style = []
        for name in self.style_layers:
            distance = gram_distance(gram_matrix(features[name]), self._targets[f"style {name}"])
            style.append(1000 / features[name].shape[1] ** 2 * distance)
        terms = {
            "content": self.content_weight * torch.cat(content).sum(),
            "style": self.style_weight * torch.cat(style).sum(),
        }
        if self.tv_weight:
            terms["tv"] = self.tv_weight * total_variation(image).sum() / image.numel()
        return terms
