"""Weight initialization."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn


def he_normal(
    network: nn.Module,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    negative_slope: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Draw all convolution and linear weights from He's normal distribution; set their biases to 0 (He et al. 2015).

    Args:
        network: the network, or a single layer.
        mode: ``fan_in`` keeps the variance of activations, ``fan_out`` that of gradients.
        negative_slope: slope of the leaky ReLU that follows each layer; 0 for ReLU.
        generator: source of randomness; None for torch's default generator.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, negative_slope, mode, "leaky_relu", generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
