"""Groups of parameters for the optimizer that several systems take."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def caffe_groups(network: nn.Module) -> list[dict[str, Any]]:
    """The weights; the biases, at twice the rate; batch normalization's. Only the first decay.

    So learned Caffe's networks, SSD and the R-CNN family among them.
    """
    groups: list[dict[str, Any]] = [
        {"params": []},
        {"params": [], "weight_decay": 0.0, "lr_scale": 2.0},
        {"params": [], "weight_decay": 0.0},
    ]
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = 2 if isinstance(module, _BatchNorm) else int(name == "bias")
            groups[kind]["params"] += [parameter] if parameter.requires_grad else []
    return [group for group in groups if group["params"]]
