"""Features inverted by a network: stacked autoencoders (SAE) and stacked what-where autoencoders (SWWAE).

Dosovitskiy and Brox, "Inverting Visual Representations with Convolutional Networks", CVPR 2016; Zhang, Lee and Lee,
"Augmenting Supervised Neural Networks with Unsupervised Objectives for Large-scale Image Classification", ICML 2016.

A decoder, the encoder's mirror image, learns to make pixels of activations in one pass. Without switches each unpooling
puts values into the upper left corner; with them where the encoder's maxima were. Switches carry places past the layer
that is inverted: what they add says little about the layer, and much about where things are.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.features import Features
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.upsampling import bed_of_nails, max_unpooling
from lightning_modules.style.losses import feature_distance, relative_to
from lightning_modules.style.painting import check_weights

CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)
Layer = Literal["pool1", "pool2", "pool3", "pool4", "pool5", "fc6", "fc7", "fc8"]

# --- network ----------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """The encoder's mirror image: its blocks from the last to the first, each unpooled and convolved as often.

    Args:
        network: the encoder.
        blocks: how many it has.
        slope: of the leaky ReLU below 0.
    """

    def __init__(self, network: Literal["vgg16", "vgg19"], blocks: int, slope: float = 0.3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for block in reversed(range(blocks)):
            channels, out = CHANNELS[block], CHANNELS[block - 1] if block else 3
            layers: list[nn.Module] = []
            for _ in range(CONVOLUTIONS[network][block] - 1):
                layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(slope, inplace=True)]
            layers.append(nn.Conv2d(channels, out, 3, padding=1))
            if block:
                layers.append(nn.LeakyReLU(slope, inplace=True))
            self.blocks.append(nn.Sequential(*layers))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=slope)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, switches: list[Tensor] | None, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """What each block gives, the last one an image float (B,3,H,W).

        Args:
            x: maps of the last pooling, float (B,C,h,w).
            switches: of each pooling from the first on, int64; None: a fixed place.
            sizes: (height, width) of what each of them was given.
        """
        found = []
        for i, block in enumerate(self.blocks):
            level = len(self.blocks) - 1 - i
            if switches is None:
                x = bed_of_nails(x)
                height, width = sizes[level]
                # A last row or column that the pooling left out is made of nothing.
                x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
            else:
                x = max_unpooling(x, switches[level], sizes[level])
            x = block(x)
            found.append(x)
        return found


# --- module -----------------------------------------------------------------------------------------------------------


class InversionNetwork(VisionModule):
    """A decoder of one layer's activations. Batch: ``image`` uint8 (B,3,H,W).

    Prediction: ``stylized`` uint8 (B,3,H,W), the images made of their activations, and ``random`` bool (B,), whether
    the encoder's weights are random. Loss: ``image``, the mean squared error of the normalized pixels; with
    ``intermediate`` also ``features``, each level's distance from the encoder's pooled maps, in parts of their mean
    square (SWWAE's "all").
    Metrics: ``val/psnr`` in dB, of all pixels together.

    With and without switches the network has the same parameters.

    Args:
        layer: what is inverted. A fully connected one is brought to the last pooling's shape by one linear layer.
        switches: see the module; True is SWWAE, False SAE.
        intermediate: weight of the levels between.
        network, weights: of the encoder, see `Features`.
        image_size: side of the images, which a fully connected layer must know.
        optimizer: see `VisionModule`.
        kwargs: schedule and channels_last of `VisionModule`.

    Raises:
        ValueError: an argument is out of its range.
    """

    monitor = ("val/psnr", "max")

    def __init__(
        self,
        layer: Layer = "pool3",
        switches: bool = True,
        intermediate: float = 0.0,
        network: Literal["vgg16", "vgg19"] = "vgg16",
        weights: str = "DEFAULT",
        image_size: int = 224,
        optimizer: OptimizerFactory = lambda params: torch.optim.Adam(params, lr=1e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if network not in CONVOLUTIONS:
            raise UserError(f"network: expected vgg16 or vgg19, found {network}")
        check_weights(intermediate=intermediate)
        if layer not in ("pool1", "pool2", "pool3", "pool4", "pool5", "fc6", "fc7", "fc8"):
            raise UserError(f"layer: expected pool1 to pool5, fc6, fc7 or fc8, found {layer}")
        self.layer, self.switches, self.intermediate = layer, switches, intermediate
        self.feature_network, self.weights, self.image_size = network, weights, image_size
        blocks = int(layer[4:]) if layer.startswith("pool") else 5
        self.last_relus = [f"relu{b + 1}_{CONVOLUTIONS[network][b]}" for b in range(blocks)]
        self.side = image_size // 32
        self.linear: nn.Linear | None = None
        if layer.startswith("fc"):
            if self.side < 1:
                raise UserError(f"image_size: expected 32 or more for {layer}, found {image_size}")
            self.linear = nn.Linear(1000 if layer == "fc8" else 4096, CHANNELS[-1] * self.side**2)
        self.decoder = Decoder(network, blocks)
        # In a list, since a submodule would be saved.
        self._features: list[Features] = []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not self._features:
            layers = [*self.last_relus, self.layer]
            features = Features(layers, self.feature_network, self.weights)  # type: ignore[arg-type]
            self._features = [features.to(memory_format=self.memory_format)]  # type: ignore[call-overload]

    @property
    def features(self) -> Features:
        return self._features[0].to(self.device)

    def decode(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What the decoder's blocks give, normalized pixels last, and the encoder's pooled maps from the first on."""
        with torch.no_grad():
            found = self.features(images.float() / 255)
            pooled, switches, sizes = [], [], []
            for name in self.last_relus:
                values, places = F.max_pool2d(found[name], 2, return_indices=True)
                pooled.append(values)
                switches.append(places)
                sizes.append((found[name].shape[2], found[name].shape[3]))
        x = found[self.layer]
        if self.linear is not None:
            if pooled[-1].shape[2:] != (self.side, self.side):
                raise UserError(
                    f"image_size: expected images of {self.image_size} pixels for {self.layer}, found "
                    f"{images.shape[-1]}x{images.shape[-2]}"
                )
            x = F.relu(self.linear(x)).unflatten(1, (-1, self.side, self.side))
        return self.decoder(x, switches if self.switches else None, sizes), pooled

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        levels, pooled = self.decode(batch["image"])
        terms = {"image": feature_distance(levels[-1], self.preprocess(batch["image"])).mean()}
        if self.intermediate and len(levels) > 1:
            # What comes out of a block stands where the encoder's pooling before it stood.
            pairs = zip(levels[:-1], reversed(pooled[:-1]), strict=True)
            distances = [relative_to(feature_distance(a, b), b) for a, b in pairs]
            terms["features"] = self.intermediate * torch.stack(distances).sum(0).mean()
        return terms

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        images = require_equal_size(images)
        levels, _ = self.decode(images)
        self.preprocess(images[:1])  # brings the mean to the device
        pixels = (
            (levels[-1].float() * self.pixel_std.value + self.pixel_mean.value).clamp(0, 255).round().to(torch.uint8)
        )
        return {"stylized": pixels, "random": torch.full((len(pixels),), self.weights == "random")}

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"psnr": PSNR()})

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions["stylized"], batch["image"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the name of the weights: they are not in the checkpoint."""


class PSNR(MeanMetric):
    """Peak signal-to-noise ratio of uint8 images in dB: of the mean squared error over all pixels of all ranks."""

    def update(self, found: Tensor, true: Tensor) -> None:  # type: ignore[override]
        """Adds images, uint8 (B,3,H,W) each."""
        super().update((found.float() - true.float()).square().flatten(1).mean(1))

    def compute(self) -> Tensor:
        return 10 * torch.log10(255**2 / super().compute().clamp(min=1e-5))
