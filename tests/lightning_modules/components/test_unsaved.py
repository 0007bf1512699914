"""Constants and frozen networks: outside of the state, but on the module's device."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_modules.components.unsaved import Constant, FrozenNetwork


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.constant = Constant(torch.tensor([1.0, 2.0]))
        self.frozen = FrozenNetwork(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)))


def test_the_state_has_neither() -> None:
    module = Holder()
    assert list(module.state_dict()) == ["layer.weight", "layer.bias"]
    assert [name for name, _ in module.named_parameters()] == ["layer.weight", "layer.bias"]
    assert list(module.named_buffers()) == []


def test_both_follow_the_device() -> None:
    module = Holder().to("meta")
    assert module.constant().device.type == "meta"
    assert all(p.device.type == "meta" for p in module.frozen.network.parameters())


def test_a_constant_keeps_its_dtype() -> None:
    module = Holder().half()
    assert module.constant.value.dtype == torch.float32
    assert torch.equal(module.constant(), torch.tensor([1.0, 2.0]))


def test_a_frozen_network_stays_in_eval_mode_without_gradients() -> None:
    module = Holder().train()
    assert not module.frozen.network.training
    assert not any(layer.training for layer in module.frozen.network.modules())
    assert not any(p.requires_grad for p in module.frozen.network.parameters())
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    module.frozen(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in module.frozen.network.parameters())


def test_a_copy_has_its_own_network() -> None:
    module = Holder()
    other = copy.deepcopy(module)
    assert other.frozen.network is not module.frozen.network
    x = torch.rand(1, 3, 2, 2)
    assert torch.equal(other.frozen(x), module.frozen(x))
