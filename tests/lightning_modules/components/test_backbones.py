"""Backbones of the R-CNN family: strides, channels and names of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_modules.components.backbones import feature_maps, make_head, make_trunk


@pytest.mark.parametrize(
    ("options", "channels", "strides"),
    [
        ({"backbone": "vgg16"}, 51, (16,)),
        ({"backbone": "vgg16", "stride": 8, "batch_norm": True}, 51, (8,)),
        ({"backbone": "resnet50"}, 1024, (16,)),
        ({"backbone": "resnet50_fpn"}, 26, (4, 8, 16, 32, 64)),
    ],
)
def test_strides_and_channels(options: dict[str, Any], channels: int, strides: tuple[int, ...]) -> None:
    trunk = make_trunk(**options, width_multiplier=0.1)
    assert (trunk.channels, trunk.strides) == (channels, strides)
    maps = feature_maps(trunk.layers(torch.randn(1, 3, 64, 128)))
    assert [m.shape for m in maps] == [(1, channels, 64 // stride, 128 // stride) for stride in strides]
    head = make_head(options["backbone"], channels, 0.1)
    pooled = torch.randn(3, channels, head.pool_size, head.pool_size)
    assert head.layers(pooled).shape == (3, head.features)


def test_a_stride_of_8_keeps_the_names_of_the_weights() -> None:
    with torch.device("meta"):
        names = [make_trunk("vgg16", stride=stride).layers.state_dict().keys() for stride in (8, 16)]  # type: ignore[arg-type]
    assert names[0] == names[1]
