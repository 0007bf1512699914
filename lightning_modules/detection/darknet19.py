"""Darknet-19, the classifier that YOLOv2 extends, and the loader of the authors' weights.

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
from lightning_modules.components.initialization import he_normal

# Table 6: (kernel size, channels); M is max pooling by 2.
DARKNET19: tuple[tuple[int, int] | str, ...] = (
    (3, 32), "M", (3, 64), "M", (3, 128), (1, 64), (3, 128), "M", (3, 256), (1, 128), (3, 256), "M",
    (3, 512), (1, 256), (3, 512), (1, 256), (3, 512), "M",
    (3, 1024), (1, 512), (3, 1024), (1, 512), (3, 1024),
)  # fmt: skip


def conv_bn_leaky(in_channels: int, out_channels: int, kernel_size: int, momentum: float) -> nn.Sequential:
    """Return a convolution, batch normalization and a leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        # The authors divide by sqrt(var) + 0.000001 (darknet/src/blas.c: normalize_cpu).
        nn.BatchNorm2d(out_channels, eps=1e-6, momentum=momentum),
        nn.LeakyReLU(0.1, inplace=True),
    )


class Darknet19(nn.Module):
    """Darknet-19: map normalized images, float (N, 3, H, W), to logits (N, C).

    Weights are drawn from He's normal distribution (darknet/src/convolutional_layer.c: make_convolutional_layer).

    Args:
        num_classes: number of classes, C.
        width_multiplier: scales the channels of all layers but the last.
        batch_norm_momentum: momentum of the batch statistics; 0.01 in the authors' code.
    """

    def __init__(
        self, num_classes: int = 1000, width_multiplier: float = 1.0, batch_norm_momentum: float = 0.01
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for layer in DARKNET19:
            if isinstance(layer, str):
                layers.append(nn.MaxPool2d(2))
                continue
            kernel_size, out_channels = layer[0], max(1, round(layer[1] * width_multiplier))
            layers.append(conv_bn_leaky(in_channels, out_channels, kernel_size, batch_norm_momentum))
            in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(in_channels, num_classes, 1)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).mean((2, 3))


def darknet_layers(network: nn.Module) -> list[tuple[nn.Module, nn.Module | None]]:
    """Return the convolutions and fully connected layers of a network, each with the module that follows it."""
    modules = list(network.modules())
    pairs = zip(modules, [*modules[1:], None], strict=True)
    return [(layer, after) for layer, after in pairs if isinstance(layer, (nn.Conv2d, nn.Linear))]


def load_darknet_weights(network: nn.Module, path: str | Path) -> int:
    """Load the authors' ``.weights`` file into the layers of a network, in order; print one line about it.

    The file may end after any layer, as darknet19_448.conv.23 does after the backbone; later layers keep their values.

    Args:
        network: `YOLOv1Network`, `YOLOv2Network` or `Darknet19`, on the CPU. Layers with a bias have no batch
            normalization; else it directly follows its convolution.
        path: the file. Header: major, minor, revision (int32) and images seen (int64 from version 0.2, int32 before).
            Then float32 per layer: bias, with batch normalization also scale, mean and variance, then weights. Those
            of fully connected layers are transposed if major or minor is above 1000: older files start with the
            learning rate.

    Returns:
        Number of layers that were loaded.

    Raises:
        UserError: the file is damaged or belongs to another network; the network is unchanged.
    """
    data = Path(path).read_bytes()
    layers = darknet_layers(network)
    kind = "convolution" if all(isinstance(layer, nn.Conv2d) for layer, _ in layers) else "layer"
    # darknet/src/parser.c: load_weights_upto.
    major, minor = struct.unpack("<ii", data[:8]) if len(data) >= 16 else (0, 0)
    header = 20 if 10 * major + minor >= 2 and major < 1000 and minor < 1000 else 16
    transposed = major > 1000 or minor > 1000
    if len(data) <= header or (len(data) - header) % 4:
        raise UserError(
            f"weights: expected a darknet file with a header of {header} bytes and float32 values, or a checkpoint, "
            f"found {len(data)} bytes in {path}; download it again"
        )
    values = torch.from_numpy(np.frombuffer(data, "<f4", offset=header).astype(np.float32))
    loaded: list[tuple[Tensor, Tensor]] = []
    start = count = 0
    for layer, norm in layers:
        if start == len(values):
            break
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        parts = [layer.weight] if layer.bias is None else [layer.bias, layer.weight]
        if layer.bias is None:
            assert isinstance(norm, nn.BatchNorm2d)
            parts = [norm.bias, norm.weight, norm.running_mean, norm.running_var, *parts]  # type: ignore[list-item]
        end = start + sum(part.numel() for part in parts)
        if end > len(values):
            raise UserError(
                f"weights: expected {end} values up to {kind} {count + 1} of {len(layers)}, found {len(values)} "
                f"in {path}; it is truncated or of another network"
            )
        pieces = values[start:end].split([part.numel() for part in parts])
        if not values[start:end].isfinite().all() or (len(parts) > 2 and (pieces[3] < 0).any()):
            raise UserError(
                f"weights: expected finite values and variances of 0 or more, found others in {kind} "
                f"{count + 1} of {path}; it is damaged or of another network"
            )
        if transposed and isinstance(layer, nn.Linear):
            pieces = (*pieces[:-1], pieces[-1].view(layer.in_features, layer.out_features).T)
        loaded += [(part, piece.reshape(part.shape)) for part, piece in zip(parts, pieces, strict=True)]
        start, count = end, count + 1
    if start < len(values):
        raise UserError(
            f"weights: expected {start} values, found {len(values)} in {path}; "
            "it is of another network, or for another number of classes or anchors"
        )
    with torch.no_grad():
        for part, piece in loaded:
            part.copy_(piece)
    rest = f"; the last {len(layers) - count} are newly initialized" if count < len(layers) else ""
    rank_zero_only(print)(f"weights: {path} loaded into {count} of {len(layers)} {kind}s{rest}", flush=True)
    return count
