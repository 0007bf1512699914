"""Tensors and networks that follow a module's device but are not part of its state.

A buffer is saved, averaged by a weight average, and broadcast by DDP, even if it is not persistent. A constant that is
averaged drifts by rounding, and a pretrained feature extractor does not belong in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Constant(nn.Module):
    """Hold a tensor that moves with its module; its dtype never changes.

    Args:
        value: the tensor, available as ``constant.value``.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constant:
        super()._apply(fn, recurse)
        self.value = self.value.to(fn(self.value).device)
        return self

    def forward(self) -> Tensor:
        return self.value


class FrozenNetwork(nn.Module):
    """Hold a pretrained network that is not trained: it moves with its module and stays in eval mode.

    Its parameters appear neither in ``parameters()`` nor in ``state_dict()`` of the module that holds it.

    Args:
        network: the network, available as ``frozen.network``. Its parameters no longer require gradients.
    """

    network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # Bypass nn.Module.__setattr__, which would register a submodule.
        self.__dict__["network"] = network.eval().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenNetwork:
        super()._apply(fn, recurse)
        self.network._apply(fn, recurse)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)
