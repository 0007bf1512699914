"""Style prediction: arbitrary style transfer with a predicted style embedding.

Ghiasi, Lee, Kudlur, Dumoulin and Shlens, "Exploring the structure of a real-time, arbitrary neural artistic stylization
network", BMVC 2017. One network predicts a 100-dimensional embedding of a style image; the style-transfer network
derives scales and shifts of its conditional instance normalization from it. Embeddings can be interpolated. Constants
are those of the authors' code (magenta).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_modules.base import OptimizerFactory
from lightning_modules.components.features import RANDOM
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.unsaved import Constant
from lightning_modules.style.base import PerceptualStyleTransfer
from lightning_modules.style.losses import gram_matrix
from lightning_modules.style.stylization import (
    content_and_style,
    normalize_interpolation_weights,
    pad_replicate,
    read_styles,
    require_fraction,
    stylized_prediction,
    to_uint8,
)

MIN_STYLE_SIDE = 75  # pixels, the smallest input of Inception-v3
EMBEDDING_SIZE = 100

# --- networks ---------------------------------------------------------------------------------------------------------


class StylePredictor(nn.Module):
    """Map style images, float (B, 3, H, W) in -1..1, to embeddings (B, 100).

    It is Inception-v3 up to Mixed_6e (8,965,856 parameters), global average pooling and a linear layer (76,900).

    Args:
        weights: weights of Inception-v3, see `find_weights`; None trains from scratch.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        network = torchvision.models.inception_v3(
            weights=None, aux_logits=False, init_weights=False, transform_input=False
        )
        if weights is not None:
            advice = "train the predictor from scratch: --model.predictor_weights null"
            path = find_weights("inception_v3", weights, advice)
            load_weights(network, path, "inception_v3", "fc", "AuxLogits")
        layers: list[nn.Module] = []
        for name, layer in network.named_children():
            layers.append(layer)
            if name == "Mixed_6e":
                break
        self.inception = nn.Sequential(*layers)
        self.embed = nn.Conv2d(768, EMBEDDING_SIZE, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.inception(x).mean((2, 3), keepdim=True)).flatten(1)


class ConditionalNorm(nn.Module):
    """Convolution with reflection padding, then conditional instance normalization.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: side of the convolution's kernel.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, padding_mode="reflect")
        self.beta, self.gamma = nn.Linear(EMBEDDING_SIZE, out_channels), nn.Linear(EMBEDDING_SIZE, out_channels)
        # Start close to unconditional normalization for every style.
        for layer, bias in ((self.beta, 0.0), (self.gamma, 1.0)):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = F.instance_norm(self.convolution(x))
        return x * self.gamma(embedding)[..., None, None] + self.beta(embedding)[..., None, None]


class StyleTransferNetwork(nn.Module):
    """Map content images, float (B, 3, H, W), and style embeddings (B, 100) to stylized images in 0..1.

    The 13 conditional normalizations have 2,758 scales and shifts, computed with 278,558 parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for in_channels, out_channels, kernel, stride in ((3, 32, 9, 1), (32, 64, 3, 2), (64, 128, 3, 2)):
            padding = kernel // 2
            layers += [
                nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False, padding_mode="reflect"),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]
        self.contract = nn.Sequential(*layers)
        self.residual = nn.ModuleList(ConditionalNorm(128, 128) for _ in range(10))
        self.expand = nn.ModuleList([ConditionalNorm(128, 64), ConditionalNorm(64, 32), ConditionalNorm(32, 3, 9)])

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = self.contract(pad_replicate(x, 4))
        for i in range(0, 10, 2):
            x = x + self.residual[i + 1](F.relu(self.residual[i](x, embedding)), embedding)
        for layer in self.expand[:2]:
            x = F.relu(layer(F.interpolate(x, scale_factor=2.0, mode="nearest"), embedding))
        return self.expand[2](x, embedding).sigmoid()[..., :height, :width]


# --- module -----------------------------------------------------------------------------------------------------------


class StylePrediction(PerceptualStyleTransfer):
    """Style prediction: arbitrary style transfer in one pass from a predicted style embedding.

    Batch: ``image`` and ``style``, uint8 (B, 3, H, W). Prediction: ``stylized`` uint8 (B, 3, H, W), and ``random`` bool
    (B,), whether the loss network has random weights.

    Loss and metrics: see `PerceptualStyleTransfer`; ``tv`` is half the total variation per pixel value, and the loss
    network has average pooling. The default loss weights are the authors', for VGG-16 with Caffe's weights.

    Args:
        content_layer: layer of the content loss.
        style_weight: weight of the style loss.
        tv_weight: weight of half the total variation per pixel value, for pixels in 0..1.
        alpha: weight of the style embedding in prediction; the content image's own embedding has the weight 1 - alpha.
        styles: paths of the style images of prediction.
        style_interpolation_weights: one weight per style, for a mean of their embeddings; None: equal weights.
        style_size: maximum of the longer side of ``styles`` in pixels; None does not resize.
        predictor_weights: weights of Inception-v3, see `find_weights`; None trains from scratch.
        optimizer: see `VisionModule`; the default is the authors'.
        kwargs: further options of `PerceptualStyleTransfer`, except mean and std.

    Raises:
        UserError: an option is out of range.
    """

    pooling = "average"
    tv_factor = 0.5

    def __init__(
        self,
        content_layer: str = "relu3_3",
        style_weight: float = 5e-4,
        tv_weight: float = 1e4,
        alpha: float = 1.0,
        styles: Sequence[str] | None = None,
        style_interpolation_weights: Sequence[float] | None = None,
        style_size: int | None = 256,
        predictor_weights: str | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.Adam(params, lr=1e-5),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            content_layer=content_layer,
            style_weight=style_weight,
            tv_weight=tv_weight,
            optimizer=optimizer,
            # Not options: both networks take pixels in 0..1.
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            **kwargs,
        )
        require_fraction(alpha=alpha)
        self.alpha, self.styles, self.style_size = alpha, list(styles or ()), style_size
        self.interpolation_weights = normalize_interpolation_weights(style_interpolation_weights, len(self.styles))
        self.predictor, self.transformer = StylePredictor(predictor_weights), StyleTransferNetwork()
        self.embedding: Constant | None = None

    def style_targets(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        _, style = content_and_style(batch)
        assert self.features is not None
        features = self.features(style)
        return {name: gram_matrix(features[name]) for name in self.style_layers}

    def stylize_batch(self, batch: dict[str, Any]) -> Tensor:
        content, style = content_and_style(batch)
        return self.stylize(content, self.embed(style))

    def embed(self, styles: Tensor) -> Tensor:
        """Predict embeddings (B, 100) of style images, float (B, 3, H, W) in 0..1; small images are upsampled."""
        if min(styles.shape[-2:]) < MIN_STYLE_SIDE:
            size = [max(MIN_STYLE_SIDE, side) for side in styles.shape[-2:]]
            styles = F.interpolate(styles, size, mode="bilinear")
        return self.predictor((2 * styles - 1).contiguous(memory_format=self.memory_format))

    def stylize(self, images: Tensor, embeddings: Tensor) -> Tensor:
        """Stylize images, float (B, 3, H, W) in 0..1, with embeddings (B, 100); returns float32 in 0..1."""
        return self.transformer(images.contiguous(memory_format=self.memory_format), embeddings).float()

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Stylize images with the option ``styles``."""
        if self.embedding is None:
            styles = [style.to(self.device) for style in read_styles(self.styles, self.style_size)]
            embeddings = [w * self.embed(style) for w, style in zip(self.interpolation_weights, styles, strict=True)]
            self.embedding = Constant(torch.stack(embeddings).sum(0))
        return self._stylize(require_equal_size(images), self.embedding())

    def predict_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Stylize images with the styles of the batch, or else with the option ``styles``."""
        if "style" not in batch:
            return self.predict(batch["image"])
        return self._stylize(batch["image"], self.embed(batch["style"].float() / 255))

    def _stylize(self, images: Tensor, embedding: Tensor) -> dict[str, Tensor]:
        """Stylize uint8 (B, 3, H, W) with embeddings (B or 1, 100)."""
        content = images.float() / 255
        embedding = embedding.expand(len(content), -1)
        if self.alpha < 1:
            embedding = self.alpha * embedding + (1 - self.alpha) * self.embed(content)
        return stylized_prediction(to_uint8(self.stylize(content, embedding)), self.weights == RANDOM)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the predictor's initial weights; keep the loss network's, which are not in the checkpoint."""
        checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})["predictor_weights"] = None
