"""Neural style: Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks", CVPR 2016.

An image is changed until its activations in a deep layer are those of one image, and its Gram matrices, layer by
layer, those of another. Weights and start are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from errors import UserError
from lightning_modules.base import OptimizerFactory, ScheduleFactory
from lightning_modules.components.features import FeatureBackbone
from lightning_modules.style.learned_image import LearnedImage, Start
from lightning_modules.style.losses import feature_distance, gram, gram_distance, total_variation
from lightning_modules.style.painting import check_weights

CONTENT = ("relu4_2",)
STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")


class NeuralStyle(LearnedImage):
    """An image painted in the style of another; see `LearnedImage`.

    Loss: ``content``, the mean squared difference of activations, and ``style``, the sum over layers of the Gram
    matrices' mean squared difference times 1000 / N^2, N being the layer's maps.

    Args:
        content_layers, style_layers: VGG's; more to the front the content keeps more detail.
        content_weight, style_weight: factors of both: their ratio is the lecture's row from content to style.
        tv_weight: of the total variation a pixel, on 0..1; 0 in the paper.
        network, weights, pooling, rescaled, start, bounded, optimizer: see `LearnedImage`. The authors' network is
            VGG-19 with filters rescaled and average pooling; they begin with the content, the paper with noise.
        schedule, channels_last: see `VisionModule`.

    Raises:
        ValueError: an argument is out of its range, or the data have no style.
    """

    def __init__(
        self,
        content_layers: Sequence[str] = CONTENT,
        style_layers: Sequence[str] = STYLE,
        content_weight: float = 1.0,
        style_weight: float = 1.0,
        tv_weight: float = 0.0,
        network: FeatureBackbone = "vgg19",
        weights: str = "DEFAULT",
        pooling: Literal["max", "average"] = "average",
        rescaled: bool = True,
        start: Start = "content",
        bounded: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.LBFGS(params, lr=1.0, max_iter=1, history_size=20),
        schedule: ScheduleFactory | None = None,
        channels_last: bool = True,
    ) -> None:
        layers = list(dict.fromkeys([*content_layers, *style_layers]))
        super().__init__(
            layers, network, weights, pooling, rescaled, start, bounded, optimizer,
            schedule=schedule, channels_last=channels_last,
        )  # fmt: skip
        check_weights(content_weight=content_weight, style_weight=style_weight, tv_weight=tv_weight)
        self.content_layers, self.style_layers = list(content_layers), list(style_layers)
        self.content_weight, self.style_weight, self.tv_weight = content_weight, style_weight, tv_weight

    def make_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "style" not in batch:
            raise UserError("NeuralStyle: expected an image of style, found none: --data.style PICTURE")
        content, style = self.features(batch["image"]), self.features(batch["style"])
        return {
            **{f"content {name}": content[name].float() for name in self.content_layers},
            **{f"style {name}": gram(style[name]) for name in self.style_layers},
        }

    def distances(self, image: Tensor) -> dict[str, Tensor]:
        found = self.features(image)
        content = [feature_distance(found[name], self._targets[f"content {name}"]) for name in self.content_layers]
        style = [
            1000 / found[name].shape[1] ** 2 * gram_distance(gram(found[name]), self._targets[f"style {name}"])
            for name in self.style_layers
        ]
        terms = {
            "content": self.content_weight * torch.cat(content).sum(),
            "style": self.style_weight * torch.cat(style).sum(),
        }
        if self.tv_weight:
            terms["tv"] = self.tv_weight * total_variation(image).sum() / image.numel()
        return terms
