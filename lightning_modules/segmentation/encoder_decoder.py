"""A small encoder-decoder network for comparing upsampling methods.

- Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015.
- Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
  Segmentation", PAMI 2017.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.upsampling import UpsamplingLayer, UpsamplingMethod
from lightning_modules.components.vgg import conv_relu
from lightning_modules.segmentation.base import SemanticSegmenter

# --- network --------------------------------------------------------------------------------------------------------


class EncoderDecoderNetwork(nn.Module):
    """Encoder of convolution blocks and max pooling, and a decoder with the blocks in reverse order and upsampling.

    There are no skip connections, only the switches of max unpooling, so that two of these networks differ in the
    upsampling alone.

    Args:
        num_classes: number of classes, C.
        upsampling: upsampling method of the decoder.
        channels: channels of the encoder's blocks.
    """

    def __init__(
        self,
        num_classes: int,
        upsampling: UpsamplingMethod = "max_unpooling",
        channels: tuple[int, ...] = (32, 64, 128, 256),
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.ups = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for before, after in zip((3, *channels), channels, strict=False):
            self.encoder.append(self._make_block(before, after, after))
            self.decoder.insert(0, self._make_block(after, after, max(before, channels[0])))
            self.ups.insert(0, UpsamplingLayer(upsampling, after))
        self.score = nn.Conv2d(channels[0], num_classes, 1)
        # Not `he_normal`, which would also set the biases to 0.
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    @staticmethod
    def _make_block(in_channels: int, hidden: int, out_channels: int) -> nn.Sequential:
        first = conv_relu(in_channels, hidden, 3, batch_norm=True, padding=1)
        return nn.Sequential(*first, *conv_relu(hidden, out_channels, 3, batch_norm=True, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images float (N, 3, H, W) to logits float32 (N, C, H, W)."""
        pooled = []
        for block in self.encoder:
            x = block(x)
            size = (x.shape[2], x.shape[3])
            x, switches = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
            pooled.append((switches, size))
        for up, block in zip(self.ups, self.decoder, strict=True):
            x = block(up(x, *pooled.pop()))
        return self.score(x).float()


# --- module ---------------------------------------------------------------------------------------------------------


class EncoderDecoder(SemanticSegmenter):
    """A small encoder-decoder network. See `SemanticSegmenter` for batch, predictions and metrics.

    Args:
        upsampling: upsampling method of the decoder.
        channels: channels of the encoder's blocks.
        optimizer: makes the optimizer from parameter groups.
        **kwargs: see `SemanticSegmenter`.
    """

    def __init__(
        self,
        upsampling: UpsamplingMethod = "max_unpooling",
        channels: tuple[int, ...] = (32, 64, 128, 256),
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.05),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if not channels or min(channels) < 1:
            raise UserError(f"channels: expected numbers of 1 or more, found {list(channels)}")
        self.network = EncoderDecoderNetwork(self.num_classes, upsampling, tuple(channels))
