"""ResNet whose last stages use dilation in place of strides, so that feature maps stay large.

- He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
- Chen, Papandreou, Kokkinos, Murphy and Yuille, "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets,
  Atrous Convolution, and Fully Connected CRFs", PAMI 2018, section 3.1.
- Chen, Papandreou, Schroff and Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017, sections
  3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from torch import Tensor, nn

from errors import UserError
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.pretrained import find_weights, load_weights

ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
#: Residual blocks of the four stages.
BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


class Conv1x1(nn.Conv2d):
    """1x1 convolution without bias, which subsamples before it convolves."""

    def __init__(self, in_channels: int, out_channels: int, subsampling: int = 1) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)
        self.subsampling = subsampling

    def forward(self, x: Tensor) -> Tensor:
        # Do not use the convolution's stride: with 8 channels in NHWC memory its gradient overruns memory on AVX-512
        # processors (torch 2.15).
        return super().forward(x[:, :, :: self.subsampling, :: self.subsampling] if self.subsampling > 1 else x)


class ResidualBlock(nn.Module):
    """Residual block (He et al. 2016, figures 2 and 5): relu(shortcut(x) + F(x)).

    F consists of two 3x3 convolutions, or, as a bottleneck, of 1x1, 3x3 and 1x1 convolutions.

    Args:
        in_channels: channels of x.
        channels: channels of the 3x3 convolutions. A bottleneck has four times as many output channels.
        bottleneck: whether the block is a bottleneck.
        stride: stride of the block.
        dilation: dilation of the 3x3 convolutions.
        stride_first: give the stride of a bottleneck to its first convolution, as in the authors' Caffe model, instead
            of the 3x3 convolution, as in torchvision.
    """

    def __init__(
        self, in_channels: int, channels: int, bottleneck: bool, stride: int, dilation: int, stride_first: bool
    ) -> None:
        super().__init__()
        out_channels = 4 * channels if bottleneck else channels

        def conv3x3(in_channels: int, stride: int = 1) -> nn.Conv2d:
            return nn.Conv2d(in_channels, channels, 3, stride, dilation, dilation, bias=False)

        self.conv1 = Conv1x1(in_channels, channels) if bottleneck else conv3x3(in_channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels)
        self.bn2 = nn.BatchNorm2d(channels)
        if bottleneck:
            self.conv3 = Conv1x1(channels, out_channels)
            self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.bottleneck, self.stride = bottleneck, stride
        self.place_stride(stride_first)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(Conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def place_stride(self, stride_first: bool) -> None:
        """Give the stride of a bottleneck to its first convolution, or to the 3x3 convolution."""
        if isinstance(self.conv1, Conv1x1):
            self.conv1.subsampling, second = (self.stride, 1) if stride_first else (1, self.stride)
            self.conv2.stride = (second, second)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            x = self.bn3(self.conv3(self.relu(x)))
        return self.relu(x + shortcut)


class DilatedResNet(nn.Sequential):
    """ResNet without its classifier: float (N, 3, H, W) to (N, out_channels, H / stride, W / stride).

    Layers have torchvision's names. Each stage that loses its stride multiplies the dilation of all later convolutions:
    at output stride 16 the last stage has dilation 2; at 8 the last two have 2 and 4. This includes the first block of
    a stage, which has half the dilation in torchvision.

    Args:
        backbone: name of the ResNet.
        width_multiplier: scales all channels.
        output_stride: stride of the feature map in pixels.
        multi_grid: factors of the dilation, one for each block of the last stage; None for 1.
        stride_first: see `ResidualBlock`; torchvision's weights fit either way.
    """

    def __init__(
        self,
        backbone: ResNetName = "resnet101",
        width_multiplier: float = 1.0,
        output_stride: Literal[8, 16] = 16,
        multi_grid: Sequence[int] | None = None,
        stride_first: bool = False,
    ) -> None:
        super().__init__()
        if backbone not in BLOCKS:
            raise UserError(f"backbone: expected one of {', '.join(BLOCKS)}, found {backbone}")
        if output_stride not in (8, 16):
            raise UserError(f"output_stride: expected 8 or 16, found {output_stride}")
        num_blocks, bottleneck = BLOCKS[backbone], backbone not in ("resnet18", "resnet34")
        grid = tuple(multi_grid) if multi_grid is not None else (1,) * num_blocks[3]
        if len(grid) != num_blocks[3] or min(grid) < 1:
            raise UserError(
                f"multi_grid: expected a factor of 1 or more for each of the last {num_blocks[3]} blocks of "
                f"{backbone}, found {list(grid)}"
            )
        self.out_channels = max(1, round(64 * width_multiplier))
        self.add_module("conv1", nn.Conv2d(3, self.out_channels, 7, 2, 3, bias=False))
        self.add_module("bn1", nn.BatchNorm2d(self.out_channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("maxpool", nn.MaxPool2d(3, 2, 1))
        strides, dilations = ((1, 2, 2, 1), (1, 1, 1, 2)) if output_stride == 16 else ((1, 2, 1, 1), (1, 1, 2, 4))
        for stage in range(4):
            channels = max(1, round(64 * width_multiplier * 2**stage))
            blocks = []
            for i in range(num_blocks[stage]):
                stride = strides[stage] if i == 0 else 1
                dilation = dilations[stage] * (grid[i] if stage == 3 else 1)
                blocks.append(ResidualBlock(self.out_channels, channels, bottleneck, stride, dilation, stride_first))
                self.out_channels = 4 * channels if bottleneck else channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        he_normal(self, "fan_out")

    def place_strides(self, stride_first: bool) -> None:
        """Call `ResidualBlock.place_stride` of all blocks."""
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                block.place_stride(stride_first)


def load_resnet_weights(network: nn.Module, backbone: ResNetName, weights: str, *others: str) -> None:
    """Load ImageNet weights, or one of our checkpoints, into a network whose ``features`` are a `DilatedResNet`.

    Args:
        network: the network to load into.
        backbone: name of the ResNet.
        weights: see `find_weights`.
        *others: modules beside ``features`` that keep their values if the file does not contain them.
    """

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        is_ours = any(key.startswith("features.") for key in state)
        return state if is_ours else {f"features.{key}": value for key, value in state.items()}

    load_weights(network, find_weights(backbone, weights), backbone, "features.fc", *others, convert=convert)


class BatchNormNetwork(nn.Module):
    """Base class of networks whose batch normalization can be frozen.

    Args:
        freeze_batch_norm: normalize with the running statistics in training too, and do not train scale and shift.
    """

    def __init__(self, freeze_batch_norm: bool) -> None:
        super().__init__()
        self.freeze_batch_norm = freeze_batch_norm

    def set_batch_norm_momentum(self, momentum: float) -> None:
        """Set the weight of a new batch in the running statistics (PyTorch's convention) of all layers."""
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = momentum

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze_batch_norm:
            for layer in self.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval().requires_grad_(False)
        return self
