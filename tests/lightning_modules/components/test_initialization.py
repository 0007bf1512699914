"""He initialization: bit-identical to a loop over torch's initializer."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import nn

from lightning_modules.components.initialization import he_normal


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2, bias=False), nn.Flatten(), nn.Linear(16, 5)
    )


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("negative_slope", [0.0, 0.3])
def test_weights_are_those_of_a_loop(mode: Literal["fan_in", "fan_out"], negative_slope: float) -> None:
    found, expected = network(), network()
    torch.manual_seed(0)
    he_normal(found, mode, negative_slope)
    torch.manual_seed(0)
    for layer in expected:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, a=negative_slope, mode=mode)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_slope_0_equals_the_gain_of_relu() -> None:
    found, expected = (nn.Conv2d(3, 8, 3) for _ in range(2))
    torch.manual_seed(0)
    he_normal(found)
    torch.manual_seed(0)
    nn.init.kaiming_normal_(expected.weight, nonlinearity="relu")
    assert torch.equal(found.weight, expected.weight)


def test_standard_deviation() -> None:
    layer = nn.Linear(400, 300)
    torch.manual_seed(0)
    he_normal(layer)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.01)
    assert (layer.bias == 0).all()


def test_a_generator_replaces_the_default_one() -> None:
    first, second = (nn.Linear(4, 3) for _ in range(2))
    state = torch.get_rng_state()
    for layer in (first, second):
        he_normal(layer, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(torch.get_rng_state(), state)
