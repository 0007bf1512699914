"""Style prediction: Ghiasi, Lee, Kudlur, Dumoulin and Shlens, "Exploring the structure of a real-time, arbitrary neural
artistic stylization network", BMVC 2017.

One network looks at a painting and says in a hundred numbers what its style is; another paints, its instance
normalizations scaled and shifted by what follows from these numbers. Styles become places between which one can walk.
Constants are those of the authors' code (magenta).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.features import FeatureBackbone, Features
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.style.losses import feature_distance, gram, gram_distance, relative_to, total_variation
from lightning_modules.style.painting import (
    check_weights,
    enlarged,
    painting_metrics,
    read_style,
    score_paintings,
    shares_of,
    to_pixels,
)

SIDE = 75  # pixels that Inception-v3 needs
EMBEDDING = 100

# --- networks ---------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """Paintings float (B,3,H,W), normalized to -1..1, to their styles (B,100): Inception-v3 up to Mixed_6e, the mean.

    8,965,856 parameters of Inception and 76,900 of the layer that makes the numbers.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        whole = torchvision.models.inception_v3(
            weights=None, aux_logits=False, init_weights=False, transform_input=False
        )
        if weights is not None:
            instead = "train the predictor from scratch: --model.predictor_weights null"
            path = find_weights("inception_v3", weights, instead)
            load_weights(whole, path, "inception_v3", "fc", "AuxLogits")
        layers: list[nn.Module] = []
        for name, layer in whole.named_children():
            layers.append(layer)
            if name == "Mixed_6e":
                break
        self.inception = nn.Sequential(*layers)
        self.embed = nn.Conv2d(768, EMBEDDING, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.inception(x).mean((2, 3), keepdim=True)).flatten(1)


class ConditionalNorm(nn.Module):
    """A convolution with reflected borders; instance normalization with a scale and a shift that are given.

    Args:
        channels, out: in and out.
        kernel: its side.
    """

    def __init__(self, channels: int, out: int, kernel: int = 3) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2, padding_mode="reflect")
        self.beta, self.gamma = nn.Linear(EMBEDDING, out), nn.Linear(EMBEDDING, out)
        # At first every style is the plain normalization, nearly.
        for layer, bias in ((self.beta, 0.0), (self.gamma, 1.0)):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = F.instance_norm(self.convolution(x))
        return x * self.gamma(style)[..., None, None] + self.beta(style)[..., None, None]


class Transformer(nn.Module):
    """Images float (B,3,H,W) and styles (B,100) to painted images, 0..1.

    13 normalizations take 2,758 numbers, which 278,558 parameters make of a style.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out, kernel, stride in ((3, 32, 9, 1), (32, 64, 3, 2), (64, 128, 3, 2)):
            layers.append(nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False, padding_mode="reflect"))
            layers += [nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.contract = nn.Sequential(*layers)
        self.residual = nn.ModuleList(ConditionalNorm(128, 128) for _ in range(10))
        self.expand = nn.ModuleList([ConditionalNorm(128, 64), ConditionalNorm(64, 32), ConditionalNorm(32, 3, 9)])

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = self.contract(enlarged(x, 4))
        for i in range(0, 10, 2):
            x = x + self.residual[i + 1](F.relu(self.residual[i](x, style)), style)
        for layer in self.expand[:2]:
            x = F.relu(layer(F.interpolate(x, scale_factor=2.0, mode="nearest"), style))
        return self.expand[2](x, style).sigmoid()[..., :height, :width]


# --- module -----------------------------------------------------------------------------------------------------------


class StylePrediction(VisionModule):
    """A painter of any style and the network that predicts styles. Batch: ``image``, ``style`` uint8 (B,3,H,W).

    Prediction: ``stylized`` uint8 (B,3,H,W), as large as the images, and ``random`` bool (B,). Loss: ``content``,
    ``style``, the sum over layers of the Gram matrices' mean squared difference, and ``tv``, of pixels, half the mean
    square. Metrics: ``val/content``, ``val/style``, ``val/loss``, and ``val/style_ratio``, as `AdaIN`'s.

    Args:
        content_layer, style_layers: VGG-16's, whose pooling is average.
        content_weight, style_weight, tv_weight: the authors', for Caffe's weights of VGG-16.
        relative: divide distances by the mean square of what they are compared with; for features of any scale.
        alpha: w of w S(style) + (1 - w) S(content) in prediction: 0 paints an image in its own style.
        styles: paths of images to predict with.
        mix: one number a style: where between them; None: in the middle.
        style_size: pixels of the styles' longer sides at most, in prediction.
        predictor_weights: of Inception-v3, see `find_weights`; None: from scratch.
        network, weights: of the features, see `Features`; they are no part of a checkpoint.
        optimizer: see `VisionModule`; the authors'.
        kwargs: schedule and channels_last of `VisionModule`.

    Raises:
        ValueError: an argument is out of its range, or there is no such image.
    """

    monitor = ("val/loss", "min")

    def __init__(
        self,
        content_layer: str = "relu3_3",
        style_layers: Sequence[str] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3"),
        content_weight: float = 1.0,
        style_weight: float = 5e-4,
        tv_weight: float = 1e4,
        relative: bool = False,
        alpha: float = 1.0,
        styles: Sequence[str] | None = None,
        mix: Sequence[float] | None = None,
        style_size: int | None = 256,
        predictor_weights: str | None = None,
        network: FeatureBackbone = "vgg16",
        weights: str = "DEFAULT",
        optimizer: OptimizerFactory = lambda params: torch.optim.Adam(params, lr=1e-5),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha: expected 0 to 1, found {alpha}")
        check_weights(content_weight=content_weight, style_weight=style_weight, tv_weight=tv_weight)
        self.content_layer, self.style_layers = content_layer, list(style_layers)
        self.content_weight, self.style_weight, self.tv_weight = content_weight, style_weight, tv_weight
        self.relative, self.alpha, self.styles = relative, alpha, list(styles or ())
        self.shares = shares_of(self.styles, mix)
        self.style_size, self.feature_network, self.weights = style_size, network, weights
        self.predictor, self.transformer = Predictor(predictor_weights), Transformer()
        self._features: list[Features] = []  # in a list, since a submodule would be saved
        self._style: Tensor | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "predict" and not self._features:
            layers = list(dict.fromkeys([self.content_layer, *self.style_layers]))
            features = Features(layers, self.feature_network, self.weights, pooling="average")
            self._features = [features.to(memory_format=self.memory_format)]  # type: ignore[call-overload]

    @property
    def features(self) -> Features:
        return self._features[0].to(self.device)

    def embed(self, paintings: Tensor) -> Tensor:
        """Styles (B,100) of float images (B,3,H,W) in 0..1; those smaller than `SIDE` pixels are enlarged."""
        if min(paintings.shape[-2:]) < SIDE:
            size = [max(SIDE, side) for side in paintings.shape[-2:]]
            paintings = F.interpolate(paintings, size, mode="bilinear")
        return self.predictor((2 * paintings - 1).contiguous(memory_format=self.memory_format))

    def paint(self, images: Tensor, style: Tensor) -> Tensor:
        """float images (B,3,H,W) in 0..1 and styles (B,100) to painted ones, float32."""
        return self.transformer(images.contiguous(memory_format=self.memory_format), style).float()

    # --- loss ---------------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        content, style = self._pair(batch)
        with torch.no_grad():
            true, wanted = self.features(content)[self.content_layer], self.features(style)
        painted = self.paint(content, self.embed(style))
        return {name: term.mean() for name, term in self.distances(painted, true, wanted).items()}

    @staticmethod
    def _pair(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if "style" not in batch:
            raise UserError("StylePrediction: expected images of style, found none: --data.with_style true")
        return batch["image"].float() / 255, batch["style"].float() / 255

    def distances(self, painted: Tensor, true: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named terms of each image: float32 (B,).

        Args:
            painted: float (B,3,H,W) in 0..1.
            true: the content's features.
            wanted: the style's, of each layer.
        """
        found = self.features(painted)
        content = feature_distance(found[self.content_layer], true)
        if self.relative:
            content = relative_to(content, true)
        terms = {
            "content": self.content_weight * content,
            "style": self.style_weight * self.style_distance(found, wanted),
        }
        if self.tv_weight:
            terms["tv"] = self.tv_weight * total_variation(painted) / 2 / painted[0].numel()
        return terms

    def style_distance(self, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
        """Of Gram matrices, summed over the layers: float32 (B,)."""
        total = []
        for name in self.style_layers:
            target = gram(wanted[name])
            distance = gram_distance(gram(found[name]), target)
            total.append(relative_to(distance, target) if self.relative else distance)
        return torch.stack(total).sum(0)

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Painted with ``styles``."""
        if not self.styles:
            raise UserError("styles: expected images of style: --model.styles '[painting.jpg]'")
        if self._style is None:
            paintings = [read_style(path, self.style_size).to(self.device) for path in self.styles]
            parts = [share * self.embed(painting) for share, painting in zip(self.shares, paintings, strict=True)]
            self._style = torch.stack(parts).sum(0)
        return self._painted(require_equal_size(images), self._style)

    def predict_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if "style" not in batch:
            return self.predict(batch["image"])
        return self._painted(batch["image"], self.embed(self._pair(batch)[1]))

    def _painted(self, images: Tensor, style: Tensor) -> dict[str, Tensor]:
        content = images.float() / 255
        style = style.expand(len(content), -1)
        if self.alpha < 1:
            style = self.alpha * style + (1 - self.alpha) * self.embed(content)
        pixels = to_pixels(self.paint(content, style))
        return {"stylized": pixels, "random": torch.full((len(pixels),), self.weights == "random")}

    def build_metrics(self) -> MetricCollection:
        return painting_metrics("content", "style", *(["tv"] if self.tv_weight else []))

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        content, style = self._pair(batch)
        plain, wanted = self.features(content), self.features(style)
        terms = self.distances(predictions["stylized"].float() / 255, plain[self.content_layer], wanted)
        unchanged = self.style_weight * self.style_distance(plain, wanted)
        score_paintings(metrics, terms, unchanged)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the name of the features' weights, which are not in the checkpoint; the predictor's are."""
        checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})["predictor_weights"] = None
