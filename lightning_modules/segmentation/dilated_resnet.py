"""ResNet as DeepLab takes it: from some stage on dilation in place of strides, so that maps stay large.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016; Chen, Papandreou, Kokkinos, Murphy
and Yuille, "DeepLab", PAMI 2018, section 3.1; Chen, Papandreou, Schroff and Adam, "Rethinking Atrous Convolution for
Semantic Image Segmentation", 2017, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from errors import UserError
from lightning_modules.components.pretrained import find_weights, load_weights

ResNet = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


class Pointwise(nn.Conv2d):
    """A 1x1 convolution without a bias, of every ``step``-th pixel."""

    def __init__(self, into: int, out: int, step: int = 1) -> None:
        super().__init__(into, out, 1, bias=False)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        # Not by the convolution's own stride: with 8 channels in NHWC memory its gradient overruns memory on AVX-512
        # processors (torch 2.15).
        return super().forward(x[:, :, :: self.step, :: self.step] if self.step > 1 else x)


class Block(nn.Module):
    """Figures 2 and 5 of He et al.: relu(shortcut(x) + F(x)), F of two 3x3 convolutions or of 1x1, 3x3 and 1x1.

    Args:
        into: channels of x.
        channels: of the 3x3 convolutions; with a bottleneck four times as many come out.
        bottleneck: F is of three convolutions.
        stride: of the block.
        dilation: of the 3x3 convolutions.
        early: the stride of a bottleneck is in its first convolution, as in the authors' Caffe, not in the 3x3.
    """

    def __init__(self, into: int, channels: int, bottleneck: bool, stride: int, dilation: int, early: bool) -> None:
        super().__init__()
        out = 4 * channels if bottleneck else channels
        first, second = (stride, 1) if early or not bottleneck else (1, stride)

        def conv3x3(into: int, stride: int) -> nn.Conv2d:
            return nn.Conv2d(into, channels, 3, stride, dilation, dilation, bias=False)

        self.conv1 = Pointwise(into, channels, first) if bottleneck else conv3x3(into, first)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, second)
        self.bn2 = nn.BatchNorm2d(channels)
        if bottleneck:
            self.conv3 = Pointwise(channels, out)
            self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.bottleneck = bottleneck
        changes = stride != 1 or into != out
        self.downsample = nn.Sequential(Pointwise(into, out, stride), nn.BatchNorm2d(out)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            x = self.bn3(self.conv3(self.relu(x)))
        return self.relu(x + shortcut)


class DilatedResNet(nn.Sequential):
    """The layers up to the last block, float (B,3,H,W) to (B,C,H/stride,W/stride), named as torchvision's.

    What follows a stage that has lost its stride is dilated by as much: at stride 16 the last stage by 2, at stride 8
    the last but one by 2 and the last by 4, their first blocks too (torchvision's have half as much).

    Args:
        backbone: the depth.
        width: multiplies all channels.
        stride: pixels from one cell of the map to the next.
        multi_grid: further factors of the dilation of the last stage's blocks, one for each.
        early: see `Block`; torchvision's weights fit either way.
    """

    def __init__(
        self,
        backbone: ResNet = "resnet101",
        width: float = 1.0,
        stride: Literal[8, 16] = 16,
        multi_grid: Sequence[int] | None = None,
        early: bool = False,
    ) -> None:
        super().__init__()
        if backbone not in DEPTHS:
            raise UserError(f"backbone: expected one of {', '.join(DEPTHS)}, found {backbone}")
        if stride not in (8, 16):
            raise UserError(f"output_stride: expected 8 or 16, found {stride}")
        depths, bottleneck = DEPTHS[backbone], backbone not in ("resnet18", "resnet34")
        grid = tuple(multi_grid) if multi_grid is not None else (1,) * depths[3]
        if len(grid) != depths[3] or min(grid) < 1:
            raise UserError(
                f"multi_grid: expected a factor of 1 or more for each of the last {depths[3]} blocks of {backbone}, "
                f"found {list(grid)}"
            )
        self.channels = max(1, round(64 * width))
        self.add_module("conv1", nn.Conv2d(3, self.channels, 7, 2, 3, bias=False))
        self.add_module("bn1", nn.BatchNorm2d(self.channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("maxpool", nn.MaxPool2d(3, 2, 1))
        strides, dilations = ((1, 2, 2, 1), (1, 1, 1, 2)) if stride == 16 else ((1, 2, 1, 1), (1, 1, 2, 4))
        for stage, (depth, step, dilation) in enumerate(zip(depths, strides, dilations, strict=True)):
            channels = max(1, round(64 * width * 2**stage))
            blocks = []
            for i in range(depth):
                rate = dilation * (grid[i] if stage == 3 else 1)
                block = Block(self.channels, channels, bottleneck, step if i == 0 else 1, rate, early)
                self.channels = 4 * channels if bottleneck else channels
                blocks.append(block)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def load_resnet(network: nn.Module, backbone: ResNet, weights: str, *others: str) -> None:
    """Loads ImageNet's weights, or a checkpoint of ours, into a network whose ``features`` are a `DilatedResNet`.

    Args:
        network: what is loaded into.
        backbone: the depth.
        weights: see `find_weights`.
        others: modules of the network beside the features, which keep what they have where the file has nothing.
    """

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        ours = any(key.startswith("features.") for key in state)
        return state if ours else {f"features.{key}": value for key, value in state.items()}

    load_weights(network, find_weights(backbone, weights), backbone, "features.fc", *others, convert=convert)


def freeze_batch_norm(network: nn.Module) -> None:
    """Batch normalization takes the statistics that it has, not the batch's, and does not learn.

    ``train()`` undoes the former: to be called after it.
    """
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval().requires_grad_(False)
