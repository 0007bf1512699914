"""Backbones of the R-CNN family: strides, channels and names of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errors import UserError
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


@pytest.mark.parametrize("options", [{"backbone": "vgg16", "batch_norm": True}, {"backbone": "resnet50"}])
def test_frozen_blocks_do_not_change_in_training(options: dict[str, Any]) -> None:
    """Neither by gradients nor by batch statistics; the other layers of VGG-16 still update theirs."""
    torch.manual_seed(0)
    trunk = make_trunk(**options, width_multiplier=0.05, freeze_backbone=True).layers.train()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in trunk.parameters() if p.requires_grad], lr=0.1)
    for m in feature_maps(trunk(torch.randn(2, 3, 64, 64))):
        m.mean().backward()
    optimizer.step()
    changed = {name for name, value in trunk.state_dict().items() if not torch.equal(value, before[name])}
    frozen = [f"{i}." for i in range(14)] if options["backbone"] == "vgg16" else ["conv1.", "bn1.", "layer1."]
    assert not [name for name in changed if name.startswith(tuple(frozen))]
    assert any("running_mean" in name for name in changed) == (options["backbone"] == "vgg16")
    # The names are those of an unfrozen trunk, whose checkpoints it loads.
    free = make_trunk(**options, width_multiplier=0.05).layers
    assert not [key for key in trunk.load_state_dict(free.state_dict()).missing_keys if "num_batches" not in key]


def test_batch_norm_is_an_option_of_vgg16_only() -> None:
    with pytest.raises(UserError, match="batch_norm: expected false for backbone resnet50_fpn"):
        make_trunk("resnet50_fpn", 0.1, batch_norm=True)
