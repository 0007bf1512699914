"""Parameter groups for the optimizer that several systems use."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def caffe_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Group parameters as Caffe's solvers do: biases get twice the learning rate and no weight decay.

    SSD and the R-CNN family were trained this way. Batch normalization has its own group, without weight decay.

    Args:
        network: the network; parameters that do not require gradients are skipped.

    Returns:
        Groups of weights, biases and batch normalization; empty groups are omitted.
    """
    weights: dict[str, Any] = {"params": []}
    biases: dict[str, Any] = {"params": [], "weight_decay": 0.0, "lr_scale": 2.0}
    norms: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            group = norms if isinstance(module, _BatchNorm) else biases if name == "bias" else weights
            group["params"] += [parameter] if parameter.requires_grad else []
    return [group for group in (weights, biases, norms) if group["params"]]


def weight_decay_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Group parameters so that weight decay applies to the weights of convolutions and linear layers only.

    Args:
        network: the network; parameters that do not require gradients are skipped.

    Returns:
        Groups of weights, and of biases and batch normalization without weight decay; empty groups are omitted.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    weights = {"params": [p for p in parameters if p.ndim > 1]}
    rest = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    return [group for group in (weights, rest) if group["params"]]


def head_groups(network: nn.Module, heads: list[nn.Module], head_lr_scale: float) -> list[dict[str, Any]]:
    """Group parameters into the backbone and the heads; empty groups are omitted.

    Args:
        network: the network; parameters that do not require gradients are skipped.
        heads: modules of the network with a learning rate of their own.
        head_lr_scale: factor of the learning rate of the heads; 1 puts all parameters into one group.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if head_lr_scale == 1:
        return [{"params": parameters}]
    head = [p for module in heads for p in module.parameters() if p.requires_grad]
    in_head = {id(p) for p in head}
    backbone = [p for p in parameters if id(p) not in in_head]
    return [group for group in ({"params": backbone}, {"params": head, "lr_scale": head_lr_scale}) if group["params"]]
