"""Darknet-19, the classifier that YOLOv2 grows from, and the authors' files of weights.

Redmon and Farhadi, "YOLO9000: Better, Faster, Stronger", CVPR 2017, section 3 and table 6.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from errors import UserError

# Table 6: (kernel, channels); M is max pooling by 2.
DARKNET19: tuple[tuple[int, int] | str, ...] = (
    (3, 32), "M", (3, 64), "M", (3, 128), (1, 64), (3, 128), "M", (3, 256), (1, 128), (3, 256), "M",
    (3, 512), (1, 256), (3, 512), (1, 256), (3, 512), "M",
    (3, 1024), (1, 512), (3, 1024), (1, 512), (3, 1024),
)  # fmt: skip


def convolution(into: int, out: int, kernel: int, momentum: float) -> nn.Sequential:
    """Convolution, batch normalization, leaky ReLU."""
    # The authors divide by sqrt(var) + 0.000001 (darknet, blas.c).
    norm = nn.BatchNorm2d(out, eps=1e-6, momentum=momentum)
    return nn.Sequential(
        nn.Conv2d(into, out, kernel, padding=kernel // 2, bias=False), norm, nn.LeakyReLU(0.1, inplace=True)
    )


class Darknet19(nn.Module):
    """The classifier that the detector grows from: normalized images float (N,3,H,W) to logits (N,C).

    Args:
        num_classes: C.
        width: multiplies the channels of all layers but the last.
        momentum: of the batch statistics; the authors' is 0.01.
    """

    def __init__(self, num_classes: int = 1000, width: float = 1.0, momentum: float = 0.01) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for layer in DARKNET19:
            if isinstance(layer, str):
                layers.append(nn.MaxPool2d(2))
                continue
            into, channels = channels, max(1, round(layer[1] * width))
            layers.append(convolution(into, channels, layer[0], momentum))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).mean((2, 3))


def initialize(network: nn.Module) -> None:
    """Normal weights of variance 2 / inputs, zero biases (darknet, make_convolutional_layer)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def load_darknet_weights(network: nn.Module, path: str | Path) -> int:
    """Loads a file of the authors' ``.weights`` into the convolutions of a network, in their order.

    The file may end after any convolution, as darknet19_448.conv.23 does after the trunk's last: the rest stays as it
    is. Prints one line on what was loaded.

    Args:
        network: `YOLOv2Network` or `Darknet19`, on the CPU; without batch normalization is what has a bias.
        path: the file: major, minor and revision (int32), images seen (int64 from version 0.2, int32 before), then
            float32 of each convolution: bias, and with batch normalization scale, mean and variance, then weights.

    Returns:
        How many convolutions were loaded.

    Raises:
        ValueError: the file is no such file, is truncated, or is another network's; the network is unchanged.
    """
    data = Path(path).read_bytes()
    modules = list(network.modules())
    # Batch normalization stands right behind its convolution.
    layers = [(m, after) for m, after in zip(modules, [*modules[1:], None], strict=True) if isinstance(m, nn.Conv2d)]
    major, minor = struct.unpack("<ii", data[:8]) if len(data) >= 16 else (0, 0)
    header = 20 if 10 * major + minor >= 2 and major < 1000 and minor < 1000 else 16
    if len(data) <= header or (len(data) - header) % 4:
        raise UserError(
            f"weights: {path} is no whole darknet file: expected a header of {header} bytes and float32 numbers, "
            f"found {len(data)} bytes: fetch it again"
        )
    numbers = torch.from_numpy(np.frombuffer(data, "<f4", offset=header).astype(np.float32))
    state: list[tuple[Tensor, Tensor]] = []
    start = loaded = 0
    for conv, norm in layers:
        parts = [conv.weight] if conv.bias is None else [conv.bias, conv.weight]
        if conv.bias is None:
            assert isinstance(norm, nn.BatchNorm2d)
            parts = [norm.bias, norm.weight, norm.running_mean, norm.running_var, *parts]  # type: ignore[list-item]
        if start == len(numbers):
            break
        end = start + sum(part.numel() for part in parts)
        if end > len(numbers):
            raise UserError(
                f"weights: {path} ends within convolution {loaded + 1} of {len(layers)} ({len(numbers)} numbers, "
                f"expected {end}): it is truncated or another network's"
            )
        pieces = numbers[start:end].split([part.numel() for part in parts])
        if not numbers[start:end].isfinite().all() or (len(parts) > 2 and (pieces[3] < 0).any()):
            raise UserError(
                f"weights: {path} has numbers in convolution {loaded + 1} that are no weights "
                "(not finite, or a variance below 0): it is damaged or another network's"
            )
        state += [(part, piece.view_as(part)) for part, piece in zip(parts, pieces, strict=True)]
        start, loaded = end, loaded + 1
    if start < len(numbers):
        raise UserError(
            f"weights: {path} has {len(numbers) - start} numbers more than the network's {start}: "
            "it is another network's, or for another number of classes or anchors"
        )
    with torch.no_grad():
        for part, piece in state:
            part.copy_(piece)
    rest = f"; the last {len(layers) - loaded} are newly initialized" if loaded < len(layers) else ""
    rank_zero_only(print)(f"weights: {path} loaded into {loaded} of {len(layers)} convolutions{rest}", flush=True)
    return loaded
