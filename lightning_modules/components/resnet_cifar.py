"""ResNets for CIFAR-10: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

6n+2 layers for 32x32 images: a 3x3 convolution, three stages of n blocks on 32x32, 16x16 and 8x8 feature maps with 16,
32 and 64 channels, global average pooling and a fully connected layer. Shortcuts are option A and have no parameters.

Test error on CIFAR-10 (table 6): ResNet-20 8.75%, -32 7.51%, -44 7.17%, -56 6.97%, -110 6.43%.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from lightning_modules.components.initialization import he_normal


def shortcut_a(x: Tensor, channels: int, stride: int) -> Tensor:
    """Subsample (N, C, H, W) by ``stride`` and append zero channels up to ``channels`` (option A)."""
    if stride == 1 and x.shape[1] == channels:
        return x
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, channels - x.shape[1]))


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, each with batch normalization (figure 2).

    Args:
        in_channels: input channels.
        channels: output channels.
        stride: stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + shortcut_a(x, self.channels, self.stride))


class ResNetCifar(nn.Module):
    """ResNet of 6n+2 layers.

    Args:
        depth: number of layers, 6n+2: 20, 32, 44, 56, 110.
        num_classes: outputs of the last layer.
        base_channels: channels of the first stage; 16 in the paper.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, base_channels: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"depth: expected 6n+2 (20, 32, 44, 56, 110), found {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, base_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.stage1 = self._stage(base_channels, base_channels, blocks, stride=1)
        self.stage2 = self._stage(base_channels, 2 * base_channels, blocks, stride=2)
        self.stage3 = self._stage(2 * base_channels, 4 * base_channels, blocks, stride=2)
        self.fc = nn.Linear(4 * base_channels, num_classes)
        he_normal(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images, float (N, 3, H, W), 32x32 in the paper, to logits (N, C)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))
