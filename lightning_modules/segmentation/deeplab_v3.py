"""DeepLabv3: atrous spatial pyramid pooling with image pooling on a dilated ResNet.

Chen, Papandreou, Schroff and Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.

Convolutions with several dilations and the mean over the image are computed side by side, batch normalized,
concatenated and projected. The paper uses no CRF.

N images of H x W pixels, h x w cells of the feature map, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.image_batches import pad_to_multiple
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.parameter_groups import weight_decay_groups
from lightning_modules.segmentation.base import upsample_aligned
from lightning_modules.segmentation.dilated_resnet import (
    BatchNormNetwork,
    DilatedResNet,
    ResNetName,
    load_resnet_weights,
)
from lightning_modules.segmentation.multi_scale import MultiScaleSegmenter

# --- network --------------------------------------------------------------------------------------------------------


def conv_bn_relu(in_channels: int, out_channels: int, dilation: int | None = None) -> nn.Sequential:
    """Build a convolution, 3x3 with the given dilation or 1x1 without one, batch normalization and ReLU."""
    kernel_size, padding = (1, 0) if dilation is None else (3, dilation)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation or 1, bias=False)
    he_normal(conv)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (section 3.3): float (N, in_channels, h, w) to (N, out_channels, h, w).

    Args:
        in_channels: channels of the input.
        out_channels: channels of each branch and of the output.
        atrous_rates: dilations of the 3x3 convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, atrous_rates: Sequence[int]) -> None:
        super().__init__()
        dilated = [conv_bn_relu(in_channels, out_channels, rate) for rate in (None, *atrous_rates)]
        self.branches = nn.ModuleList(dilated)
        self.pooling = conv_bn_relu(in_channels, out_channels)
        self.project = conv_bn_relu((len(atrous_rates) + 2) * out_channels, out_channels)
        # Not in the paper, but in the authors' code (tensorflow/models, deeplab/model.py).
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and self.pooling[1].training:
            # Image pooling leaves one value per channel, and batch normalization needs a variance.
            raise UserError(
                "batch_size: expected 2 or more training images, found 1; set --data.batch_size and "
                "--data.drop_last true, or --model.freeze_batch_norm true"
            )
        pooled = self.pooling(x.mean((2, 3), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])
        return self.dropout(self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1)))


class DeepLabV3Network(BatchNormNetwork):
    """DeepLabv3: normalized images float (N, 3, H, W) to logits float32 (N, C, H, W).

    It has 58,040,661 parameters with the defaults.

    The arguments are described in `DeepLabV3`.
    """

    def __init__(
        self,
        backbone: ResNetName = "resnet101",
        num_classes: int = 21,
        width_multiplier: float = 1.0,
        output_stride: Literal[8, 16] = 16,
        multi_grid: Sequence[int] = (1, 2, 4),
        atrous_rates: Sequence[int] = (6, 12, 18),
        freeze_batch_norm: bool = False,
        batch_norm_momentum: float = 3e-4,
    ) -> None:
        super().__init__(freeze_batch_norm)
        self.output_stride = output_stride
        self.features = DilatedResNet(backbone, width_multiplier, output_stride, multi_grid)
        channels = max(1, round(256 * width_multiplier))
        rates = [rate * 16 // output_stride for rate in atrous_rates]
        self.aspp = ASPP(self.features.out_channels, channels, rates)
        self.score = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.score.weight, std=0.01)
        assert self.score.bias is not None
        nn.init.zeros_(self.score.bias)
        self.set_batch_norm_momentum(batch_norm_momentum)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.score(self.aspp(self.features(pad_to_multiple(x, self.output_stride, offset=1))))
        return upsample_aligned(logits.float(), x.shape[2:], self.output_stride)


# --- module ---------------------------------------------------------------------------------------------------------


class DeepLabV3(MultiScaleSegmenter):
    """DeepLabv3 (Chen et al. 2017). See `SemanticSegmenter` for batch, predictions and metrics.

    The loss is computed on upsampled logits; the ground truth is not subsampled (section 4.1).

    Args:
        backbone: name of the ResNet.
        width_multiplier: scales the channels of all layers except the last.
        output_stride: stride of the feature map in pixels. The paper trains at 16, then at 8 with frozen batch
            normalization, and tests at 8.
        multi_grid: factors of the dilation, one for each block of the last stage.
        atrous_rates: dilations of the 3x3 convolutions at an output stride of 16; they are doubled at 8.
        freeze_batch_norm: normalize with the running statistics in training too, and do not train scale and shift.
        batch_norm_momentum: weight of a new batch in the running statistics, 0 to 1. The paper's decay of 0.9997 is
            3e-4. New layers then need about 10,000 steps until evaluation matches training; for shorter runs set 0.01
            to 0.1.
        decay_norms: apply the weight decay to batch normalization and biases, too. The authors' code decays only the
            weights of convolutions (tensorflow/models, deeplab/model.py: ``weights_regularizer``).
        weights: null to train from scratch; IMAGENET1K_V1, IMAGENET1K_V2 (ResNets only) or DEFAULT, the newest, for
            torchvision's weights of the backbone; or a file: such weights, or the checkpoint of the first stage.
        optimizer: makes the optimizer from parameter groups. The default has the paper's learning rate.
        **kwargs: see `MultiScaleSegmenter`.
    """

    def __init__(
        self,
        backbone: ResNetName = "resnet101",
        width_multiplier: float = 1.0,
        output_stride: Literal[8, 16] = 16,
        multi_grid: Sequence[int] = (1, 2, 4),
        atrous_rates: Sequence[int] = (6, 12, 18),
        freeze_batch_norm: bool = False,
        batch_norm_momentum: float = 3e-4,
        decay_norms: bool = False,
        weights: str | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=7e-3, momentum=0.9, weight_decay=1e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if not atrous_rates or min(atrous_rates) < 1:
            raise UserError(f"atrous_rates: expected one or more dilations of 1 or more, found {list(atrous_rates)}")
        if not 0 < batch_norm_momentum <= 1:
            raise UserError(f"batch_norm_momentum: expected more than 0, at most 1, found {batch_norm_momentum}")
        self.decay_norms = decay_norms
        self.network = DeepLabV3Network(
            backbone,
            self.num_classes,
            width_multiplier,
            output_stride,
            multi_grid,
            atrous_rates,
            freeze_batch_norm,
            batch_norm_momentum,
        )
        if weights is not None:
            load_resnet_weights(self.network, backbone, weights, "aspp", "score")

    def pixel_logits(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return super().parameter_groups() if self.decay_norms else weight_decay_groups(self.network)
