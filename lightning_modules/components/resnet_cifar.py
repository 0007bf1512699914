"""The residual networks for CIFAR-10: He, Zhang, Ren and Sun, "Deep Residual Learning", CVPR 2016, section 4.2.

6n+2 layers for 32x32 images: a 3x3 convolution, then 6n of them in three stages of n blocks on maps of 32, 16 and 8
pixels with 16, 32 and 64 channels, then global average pooling and one fully connected layer. All shortcuts are option
A: where the shape changes they subsample and pad with zero channels, and so have no parameters; a plain network of the
same depth has exactly as many.

Test error on CIFAR-10 in the paper's table 6: ResNet-20 8.75, 32 7.51, 44 7.17, 56 6.97, 110 6.43 per cent.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError


def shortcut_a(x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A: every ``stride``-th pixel of (N,C,H,W), and zero channels up to ``channels``."""
    if stride == 1 and x.shape[1] == channels:
        return x
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, channels - x.shape[1]))


class BasicBlock(nn.Module):
    """Figure 2: relu(x + F(x)), F of two 3x3 convolutions, each with batch normalization before the activation."""

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
    """A ResNet of 6n+2 layers.

    Args:
        depth: 20, 32, 44, 56, 110 or any other 6n+2.
        num_classes: outputs of the last layer.
        width: channels of the first stage; 16 in the paper. Less makes a small network for tests and demonstrations.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"depth: expected 6n+2 (20, 32, 44, 56, 110), found {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stage1 = self._stage(width, width, blocks, stride=1)
        self.stage2 = self._stage(width, 2 * width, blocks, stride=2)
        self.stage3 = self._stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)
        # He et al. 2015, equation 10: N(0, 2 / fan-in) keeps the variance of what a ReLU halves.
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Images float (N,3,H,W), 32x32 in the paper, to logits (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))
