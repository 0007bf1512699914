"""Feature inversion by a network: stacked autoencoders (SAE) and stacked what-where autoencoders (SWWAE).

Dosovitskiy and Brox, "Inverting Visual Representations with Convolutional Networks", CVPR 2016; Zhang, Lee and Lee,
"Augmenting Supervised Neural Networks with Unsupervised Objectives for Large-scale Image Classification", ICML 2016.

A decoder that mirrors the encoder reconstructs the image from activations in one pass. Unpooling puts each value into
the upper left corner (SAE), or at the position of the encoder's maximum, the pooling switch (SWWAE). Switches pass
positions around the inverted layer: the gain in quality does not come from the layer's activations.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.features import RANDOM, Features
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.unsaved import FrozenNetwork
from lightning_modules.components.upsampling import bed_of_nails, max_unpooling
from lightning_modules.style.losses import divide_by_mean_square, feature_distance
from lightning_modules.style.stylization import require_non_negative, stylized_prediction

CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}  # per block
CHANNELS = (64, 128, 256, 512, 512)  # per block
Layer = Literal["pool1", "pool2", "pool3", "pool4", "pool5", "fc6", "fc7", "fc8"]

# --- network ----------------------------------------------------------------------------------------------------------


class InversionDecoder(nn.Module):
    """Mirror of VGG: the blocks in reverse order, each with unpooling and as many convolutions as the encoder's.

    Args:
        backbone: the encoder.
        blocks: number of blocks.
        negative_slope: slope of the leaky ReLU for negative inputs.
    """

    def __init__(self, backbone: Literal["vgg16", "vgg19"], blocks: int, negative_slope: float = 0.3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for block in reversed(range(blocks)):
            channels, out_channels = CHANNELS[block], CHANNELS[block - 1] if block else 3
            layers: list[nn.Module] = []
            for _ in range(CONVOLUTIONS[backbone][block] - 1):
                layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(negative_slope, inplace=True)]
            layers.append(nn.Conv2d(channels, out_channels, 3, padding=1))
            if block:
                layers.append(nn.LeakyReLU(negative_slope, inplace=True))
            self.blocks.append(nn.Sequential(*layers))
        he_normal(self, negative_slope=negative_slope)

    def forward(self, x: Tensor, switches: list[Tensor] | None, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Decode the last pooled feature map.

        Args:
            x: output of the last pooling, float (B, C, h, w).
            switches: pooling switches of the encoder's blocks in forward order, int64; None: upper left corners.
            sizes: (height, width) of each pooling's input in forward order.

        Returns:
            The output of each block; the last one is the normalized image, float (B, 3, H, W).
        """
        outputs = []
        for i, block in enumerate(self.blocks):
            level = len(self.blocks) - 1 - i
            if switches is None:
                x = bed_of_nails(x)
                height, width = sizes[level]
                # Pooling drops the last row or column of an odd size; here it is 0.
                x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
            else:
                x = max_unpooling(x, switches[level], sizes[level])
            x = block(x)
            outputs.append(x)
        return outputs


# --- module -----------------------------------------------------------------------------------------------------------


class InversionNetwork(VisionModule):
    """SAE and SWWAE: a decoder that reconstructs images from the activations of one layer.

    Batch: ``image`` uint8 (B, 3, H, W). Prediction: ``stylized`` uint8 (B, 3, H, W), the reconstructed images, and
    ``random`` bool (B,), whether the encoder has random weights.

    Loss: ``image``, the mean squared error of the normalized pixels; ``features``, the distance of each intermediate
    block from the encoder's pooled feature map, relative to its mean square (SWWAE-all). Metrics: ``val/psnr`` in dB,
    over all pixels. The frozen encoder is not in checkpoints. Switches add no parameters.

    Args:
        layer: layer to invert; one linear layer maps a fully connected layer to the shape of the last pooling.
        switches: unpool with the encoder's switches (SWWAE); False: into the upper left corners (SAE).
        intermediate_weight: weight of the intermediate blocks.
        backbone: encoder, see `Features`.
        weights: weights of the encoder, see `Features`.
        image_size: side of the images in pixels; used for fully connected layers only.
        optimizer: see `VisionModule`.
        kwargs: see `VisionModule`; mean and std normalize the images that the decoder learns.

    Raises:
        UserError: an option is out of range.
    """

    monitor = ("val/psnr", "max")

    def __init__(
        self,
        layer: Layer = "pool3",
        switches: bool = True,
        intermediate_weight: float = 0.0,
        backbone: Literal["vgg16", "vgg19"] = "vgg16",
        weights: str = "DEFAULT",
        image_size: int = 224,
        optimizer: OptimizerFactory = lambda params: torch.optim.Adam(params, lr=1e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if backbone not in CONVOLUTIONS:
            raise UserError(f"backbone: expected vgg16 or vgg19, found {backbone}")
        require_non_negative(intermediate_weight=intermediate_weight)
        if layer not in get_args(Layer):
            raise UserError(f"layer: expected pool1 to pool5, fc6, fc7 or fc8, found {layer}")
        self.layer, self.switches, self.intermediate_weight = layer, switches, intermediate_weight
        self.backbone, self.weights, self.image_size = backbone, weights, image_size
        blocks = int(layer[4:]) if layer.startswith("pool") else 5
        self.pooled_layers = [f"relu{b + 1}_{CONVOLUTIONS[backbone][b]}" for b in range(blocks)]
        self.side = image_size // 32
        self.linear: nn.Linear | None = None
        if layer.startswith("fc"):
            if self.side < 1:
                raise UserError(f"image_size: expected 32 or more for {layer}, found {image_size}")
            self.linear = nn.Linear(1000 if layer == "fc8" else 4096, CHANNELS[-1] * self.side**2)
        self.decoder = InversionDecoder(backbone, blocks)
        self.features: FrozenNetwork | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.features is None:
            features = FrozenNetwork(Features([*self.pooled_layers, self.layer], self.backbone, self.weights))
            self.features = features.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def decode(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Encode and decode uint8 images (B, 3, H, W).

        Returns:
            The outputs of the decoder's blocks, the normalized images last, and the encoder's pooled feature maps in
            forward order.
        """
        assert self.features is not None
        with torch.no_grad():
            activations = self.features(images.float() / 255)
            pooled, switches, sizes = [], [], []
            for name in self.pooled_layers:
                values, indices = F.max_pool2d(activations[name], 2, return_indices=True)
                pooled.append(values)
                switches.append(indices)
                sizes.append((activations[name].shape[2], activations[name].shape[3]))
        x = activations[self.layer]
        if self.linear is not None:
            if pooled[-1].shape[2:] != (self.side, self.side):
                raise UserError(
                    f"image_size: expected images of {self.image_size} pixels for {self.layer}, found "
                    f"{images.shape[-1]}x{images.shape[-2]}; set --data.image_size {self.image_size}"
                )
            x = F.relu(self.linear(x)).unflatten(1, (-1, self.side, self.side))
        return self.decoder(x, switches if self.switches else None, sizes), pooled

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        outputs, pooled = self.decode(batch["image"])
        terms = {"image": feature_distance(outputs[-1], self.preprocess(batch["image"])).mean()}
        if self.intermediate_weight and len(outputs) > 1:
            # The output of a decoder block corresponds to the previous pooled feature map of the encoder.
            pairs = zip(outputs[:-1], reversed(pooled[:-1]), strict=True)
            distances = [divide_by_mean_square(feature_distance(output, target), target) for output, target in pairs]
            terms["features"] = self.intermediate_weight * torch.stack(distances).sum(0).mean()
        return terms

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        outputs, _ = self.decode(require_equal_size(images))
        pixels = outputs[-1].float() * self.pixel_std.value + self.pixel_mean.value
        return stylized_prediction(pixels.clamp(0, 255).round().to(torch.uint8), self.weights == RANDOM)

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"psnr": PSNR()})

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions["stylized"], batch["image"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the name of the encoder's weights, which are not in the checkpoint."""


class PSNR(MeanMetric):
    """Peak signal-to-noise ratio of uint8 images in dB, from the mean squared error over all pixels of all ranks."""

    def update(self, images: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        """Update with images and targets, uint8 (B, 3, H, W) each."""
        super().update((images.float() - targets.float()).square().flatten(1).mean(1))

    def compute(self) -> Tensor:
        return 10 * torch.log10(255**2 / super().compute().clamp(min=1e-5))
