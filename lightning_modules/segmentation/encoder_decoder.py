"""A small encoder and decoder, to compare ways of upsampling: the lecture's network that makes maps smaller and larger
again (after Noh et al. 2015 and Badrinarayanan et al. 2017, "SegNet").
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.upsampling import Upsample, Upsampling
from lightning_modules.components.vgg import conv_relu
from lightning_modules.segmentation.metrics import segmentation_metrics
from lightning_modules.segmentation.scores import CROP_ADVICE, cross_entropy, of_each, sizes_of, to_maps

# --- network --------------------------------------------------------------------------------------------------------


class EncoderDecoderNetwork(nn.Module):
    """Blocks of two convolutions, each followed by max pooling; then the same backwards, with upsampling.

    Nothing goes from the encoder to the decoder beside the smallest map, but for the switches of max unpooling, so that
    what differs between two of these networks is the upsampling alone.

    Args:
        num_classes: C.
        upsampling: see `Upsampling`.
        channels: of the encoder's blocks.
    """

    def __init__(
        self, num_classes: int, upsampling: Upsampling = "max_unpooling", channels: tuple[int, ...] = (32, 64, 128, 256)
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.ups = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for into, out in zip((3, *channels), channels, strict=False):
            double = [*conv_relu(into, out, 3, True, padding=1), *conv_relu(out, out, 3, True, padding=1)]
            self.encoder.append(nn.Sequential(*double))
            back = max(into, channels[0])
            double = [*conv_relu(out, out, 3, True, padding=1), *conv_relu(out, back, 3, True, padding=1)]
            self.ups.insert(0, Upsample(upsampling, out))
            self.decoder.insert(0, nn.Sequential(*double))
        self.score = nn.Conv2d(channels[0], num_classes, 1)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images float (B,3,H,W) to logits float32 (B,C,H,W)."""
        passed = []
        for block in self.encoder:
            x = block(x)
            size = (x.shape[2], x.shape[3])
            x, switches = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
            passed.append((switches, size))
        for up, block in zip(self.ups, self.decoder, strict=True):
            x = block(up(x, *passed.pop()))
        return self.score(x).float()


# --- module ---------------------------------------------------------------------------------------------------------


class EncoderDecoder(VisionModule):
    """The small encoder and decoder. Batch: see segmentation in the batch contract, images of one size to train on.

    Predictions: a map of class ids int64 (h,w) an image. Metrics: see `SegmentationMetrics`; images are scored at
    their own size, to which the scores are resized.

    Args:
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        upsampling, channels: see `EncoderDecoderNetwork`.
        optimizer: see `VisionModule`.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/miou", "max")

    def __init__(
        self,
        num_classes: int = 21,
        class_names: list[str] | None = None,
        upsampling: Upsampling = "max_unpooling",
        channels: tuple[int, ...] = (32, 64, 128, 256),
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.05),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if not channels or min(channels) < 1:
            raise UserError(f"channels: expected numbers of 1 or more, found {list(channels)}")
        self.num_classes, self.class_names = num_classes, class_names
        self.network = EncoderDecoderNetwork(num_classes, upsampling, tuple(channels))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "cross_entropy": cross_entropy(
                self.network(self.preprocess(require_equal_size(batch["image"], CROP_ADVICE))), batch["mask"]
            )
        }

    def scores(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """Logits float32 (C,h,w) of each image, uint8 (B,3,h,w) or a list of (3,h,w)."""
        return of_each(lambda x: self.network(self.preprocess(x)), images)

    def predict(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        return to_maps(self.scores(images))

    def predict_batch(self, batch: dict[str, Any]) -> list[Tensor]:
        return to_maps(self.scores(batch["image"]), sizes_of(batch))

    def build_metrics(self) -> MetricCollection:
        return segmentation_metrics(self.num_classes)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["original_mask"])
