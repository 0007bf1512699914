"""AdaIN: Huang and Belongie, "Arbitrary Style Transfer in Real-Time with Adaptive Instance Normalization", ICCV 2017.

Mean and deviation of each of an image's feature maps are exchanged for another image's, and a decoder makes pixels
of that: any style in one pass, none of which it has seen before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.features import Features
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.style.losses import feature_distance, moments, moments_distance, relative_to
from lightning_modules.style.painting import (
    check_weights,
    enlarged,
    painting_metrics,
    read_style,
    score_paintings,
    shares_of,
    to_pixels,
)

LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1")
MULTIPLE = 8  # of pixels a side: the deepest map has an eighth of them

# --- network ----------------------------------------------------------------------------------------------------------


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Equation 8: the content's maps with the mean and the deviation of the style's, float32.

    Args:
        content, style: float (B,C,h,w), of any two sizes.
    """
    (mean, deviation), (new_mean, new_deviation) = moments(content), moments(style)
    return (content.float() - mean) / deviation * new_deviation + new_mean


class Decoder(nn.Sequential):
    """VGG-19 up to relu4_1 backwards: float (B,512,h,w) to (B,3,8h,8w); 3,505,219 parameters.

    Nearest neighbors in place of pooling, borders reflected, no normalization, no ReLU at the end.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        # Where the channels of a block end, the map is doubled.
        for channels, out, doubled in (
            (512, 256, True), (256, 256, False), (256, 256, False), (256, 256, False), (256, 128, True),
            (128, 128, False), (128, 64, True), (64, 64, False),
        ):  # fmt: skip
            layers += [nn.Conv2d(channels, out, 3, padding=1, padding_mode="reflect"), nn.ReLU(inplace=True)]
            layers += [nn.Upsample(scale_factor=2, mode="nearest")] if doubled else []
        super().__init__(*layers, nn.Conv2d(64, 3, 3, padding=1, padding_mode="reflect"))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                # At first everything is gray, about which pixels are.
                nn.init.constant_(layer.bias, 0.5 if layer.out_channels == 3 else 0.0)


# --- module -----------------------------------------------------------------------------------------------------------


class AdaIN(VisionModule):
    """A decoder of features that have changed their style. Batch: ``image``, ``style`` uint8 (B,3,H,W).

    Prediction: ``stylized`` uint8 (B,3,H,W), as large as the images, and ``random`` bool (B,), whether the encoder's
    weights are random. Loss: ``content``, the distance of the result's features from those that were decoded (not from
    the image's), and ``style``, of the means and deviations in four layers. Metrics: ``val/content``, ``val/style``,
    ``val/loss``, and ``val/style_ratio``, the style's distance in parts of what the images have as they are.

    The encoder, VGG-19 up to relu4_1 with reflected borders, does not learn; its 3,505,728 parameters (the authors' 12
    more are what normalizes the pixels) are in the checkpoint, which predicts without any other file.

    Args:
        convention: ``authors`` sums the style's distance over channels and weighs it by 0.01; ``mean``, as in common
            ports, takes the mean and weighs it by 10.
        style_weight: in place of the convention's.
        relative: divide distances by the mean square of what they are compared with; for features of any scale.
        alpha: strength of the style in prediction, 0 to 1.
        styles: paths of images to predict with.
        mix: one number a style, which mixes them; None: equal parts.
        mask: path of a gray image: of two styles the first where it is white, the second where it is black.
        style_size: pixels of the styles' longer sides at most, in prediction.
        network: of the encoder; vgg19_bn is one whose weights were trained with batch normalization, of our own.
        weights: of the encoder, see `Features`.
        optimizer: see `VisionModule`; the paper's, whose rate falls as 1 / (1 + 5e-5 t): `InverseTime`.
        kwargs: schedule and channels_last of `VisionModule`.

    Raises:
        ValueError: an argument is out of its range, or there is no such image.
    """

    monitor = ("val/loss", "min")

    def __init__(
        self,
        convention: Literal["authors", "mean"] = "authors",
        style_weight: float | None = None,
        relative: bool = False,
        alpha: float = 1.0,
        styles: Sequence[str] | None = None,
        mix: Sequence[float] | None = None,
        mask: str | None = None,
        style_size: int | None = 512,
        network: Literal["vgg19", "vgg19_bn"] = "vgg19",
        weights: str | None = "DEFAULT",
        optimizer: OptimizerFactory = lambda params: torch.optim.Adam(params, lr=1e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha: expected 0 to 1, found {alpha}")
        check_weights(style_weight=style_weight or 0)
        if mask is not None and len(styles or ()) != 2:
            raise UserError(f"mask: expected two styles, found {len(styles or ())}")
        self.convention, self.relative, self.alpha = convention, relative, alpha
        self.style_weight = style_weight if style_weight is not None else {"authors": 0.01, "mean": 10.0}[convention]
        self.styles, self.mask, self.style_size = list(styles or ()), mask, style_size
        self.shares = shares_of(self.styles, mix)
        # A checkpoint brings its own encoder: whether it is a random one it says as well.
        self.encoder = Features(LAYERS, network, weights or "random", padding="reflect")
        self.decoder = Decoder()
        self._style_maps: list[Tensor] = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.decoder.parameters())}]

    # --- loss ---------------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if "style" not in batch:
            raise UserError("AdaIN: expected images of style, found none: --data.with_style true")
        with torch.no_grad():
            content = self.encoder(batch["image"].float() / 255)[LAYERS[-1]]
            style = self.encoder(batch["style"].float() / 255)
        target = adain(content, style[LAYERS[-1]])
        found = self.encoder(self.decode(target))
        return {name: term.mean() for name, term in self.distances(found, target, style).items()}

    def decode(self, features: Tensor) -> Tensor:
        """Features (B,512,h,w) to images float (B,3,8h,8w), about 0..1."""
        return self.decoder(features.contiguous(memory_format=self.memory_format)).float()

    def distances(self, found: dict[str, Tensor], target: Tensor, style: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named terms of each image: float32 (B,).

        Args:
            found, style: features of the result and of the style.
            target: what was decoded, (B,512,h,w).
        """
        content = feature_distance(found[LAYERS[-1]], target)
        if self.relative:
            content = relative_to(content, target)
        return {"content": content, "style": self.style_weight * self.style_distance(found, style)}

    def style_distance(self, found: dict[str, Tensor], style: dict[str, Tensor]) -> Tensor:
        """Of means and deviations, summed over the layers: float32 (B,)."""
        total = []
        for name in LAYERS:
            distance = moments_distance(found[name], style[name])
            if self.relative:
                distance = relative_to(distance, style[name])
            total.append(distance * (style[name].shape[1] if self.convention == "authors" else 1))
        return torch.stack(total).sum(0)

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Painted with ``styles``."""
        if not self.styles:
            raise UserError("styles: expected images of style: --model.styles '[painting.jpg]'")
        if not self._style_maps:
            for path in self.styles:
                picture = enlarged(read_style(path, self.style_size).to(self.device), MULTIPLE)
                self._style_maps.append(self.encoder(picture)[LAYERS[-1]])
        return self._paint(require_equal_size(images), self._style_maps, self.shares)

    def predict_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if "style" not in batch:
            return self.predict(batch["image"])
        maps = self.encoder(enlarged(batch["style"].float() / 255, MULTIPLE))[LAYERS[-1]]
        return self._paint(batch["image"], [maps], [1.0])

    def _paint(self, images: Tensor, styles: Sequence[Tensor], parts: Sequence[float]) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        content = self.encoder(enlarged(images.float() / 255, MULTIPLE))[LAYERS[-1]].float()
        painted = [adain(content, style.expand(len(content), -1, -1, -1)) for style in styles]
        if self.mask is not None and len(styles) == 2:
            size = content.shape[2:]
            part = F.interpolate(read_style(self.mask, None)[:, :1], size, mode="bilinear", antialias=True)
            shares = [part.to(content.device), 1 - part.to(content.device)]
        else:
            shares = [content.new_tensor(part) for part in parts]
        mixed = torch.stack([share * maps for share, maps in zip(shares, painted, strict=True)]).sum(0)
        pixels = to_pixels(self.decode(self.alpha * mixed + (1 - self.alpha) * content)[..., :height, :width])
        return {"stylized": pixels, "random": torch.full((len(pixels),), self.encoder.random)}

    def build_metrics(self) -> MetricCollection:
        return painting_metrics("content", "style")

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        if "style" not in batch:
            raise UserError("AdaIN: expected images of style, found none: --data.with_style true")
        content, style = (self.encoder(batch[key].float() / 255) for key in ("image", "style"))
        found = self.encoder(predictions["stylized"].float() / 255)
        terms = self.distances(found, adain(content[LAYERS[-1]], style[LAYERS[-1]]), style)
        unchanged = self.style_weight * self.style_distance(content, style)
        score_paintings(metrics, terms, unchanged)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["adain"] = {"random": self.encoder.random, "normalization": self.encoder.normalization}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.encoder.random, self.encoder.normalization = (checkpoint["adain"][k] for k in ("random", "normalization"))
