"""Muon for convolutions: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.

Muon orthogonalizes the momentum of a weight matrix: all singular values of a step become about 1, so that a few strong
directions do not suppress the others. `torch.optim.Muon` accepts matrices only. Here the weight of a convolution is the
matrix (out, in * height * width), and all weights of one shape are processed in one batch. Parameters that are not
weights of hidden convolutions are trained by SGD in the same optimizer, so that one config and one checkpoint suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from errors import UserError

# Coefficients of the authors' quintic iteration: five steps bring singular values to 0.7..1.2 rather than to 1.
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
IMAGE_CHANNELS = 3  # a layer whose input is an RGB image is not a hidden layer


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate U V^T for each matrix U S V^T by Newton-Schulz iteration, float (K, M, N)."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class ConvMuon(Optimizer):
    """Muon for the weights of hidden convolutions, SGD with Nesterov momentum for all other parameters.

    Args:
        params: parameters or parameter groups; each group is split into one for Muon and one for SGD.
        lr: learning rate of Muon; a step changes a matrix (M, N) by lr * sqrt(max(1, M / N)) in each direction.
        momentum: momentum of Muon, an exponential moving average with Nesterov's look-ahead.
        weight_decay: decoupled weight decay of Muon, as in AdamW.
        sgd_lr: learning rate of SGD.
        sgd_momentum: momentum of SGD.
        sgd_weight_decay: weight decay of SGD, added to the gradient.

    Raises:
        UserError: a value is out of range, or no parameter is the weight of a hidden convolution.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 0.1,
        sgd_lr: float = 0.05,
        sgd_momentum: float = 0.9,
        sgd_weight_decay: float = 5e-4,
    ) -> None:
        values = {
            "lr": lr, "weight_decay": weight_decay, "sgd_lr": sgd_lr, "sgd_weight_decay": sgd_weight_decay,
            "momentum": momentum, "sgd_momentum": sgd_momentum,
        }  # fmt: skip
        for name, value in values.items():
            if value < 0 or ("momentum" in name and value >= 1):
                raise UserError(f"{name}: expected 0 or more{', below 1' * ('momentum' in name)}, found {value}")
        muon = {"use_muon": True, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        sgd = {"use_muon": False, "lr": sgd_lr, "momentum": sgd_momentum, "weight_decay": sgd_weight_decay}
        listed = list(params)
        groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
        split: list[dict[str, Any]] = []
        for group in groups:
            members = list(group["params"])
            hidden = [p for p in members if p.ndim == 4 and p.shape[1] > IMAGE_CHANNELS]
            rest = [p for p in members if p.ndim != 4 or p.shape[1] <= IMAGE_CHANNELS]
            split += [{**options, **group, "params": ps} for options, ps in ((muon, hidden), (sgd, rest)) if ps]
        if not any(group["use_muon"] for group in split):
            raise UserError(
                "ConvMuon: expected weights of convolutions (out, in, height, width), found none; use SGD "
                "(also with a strategy that shards parameters: fsdp, deepspeed)"
            )
        super().__init__(split, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one optimization step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, gradients, buffers = [], [], []
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    params.append(p)
                    gradients.append(p.grad)
                    buffers.append(state["momentum_buffer"])
            if params:
                (self._muon if group["use_muon"] else self._sgd)(group, params, gradients, buffers)
        return loss

    @staticmethod
    def _sgd(group: dict[str, Any], params: list[Tensor], gradients: list[Tensor], buffers: list[Tensor]) -> None:
        updates = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(updates, buffers, alpha=group["momentum"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    @staticmethod
    def _muon(group: dict[str, Any], params: list[Tensor], gradients: list[Tensor], buffers: list[Tensor]) -> None:
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[torch.Size, list[int]] = {}
        for i, p in enumerate(params):
            by_shape.setdefault(p.shape, []).append(i)
        for shape, indices in by_shape.items():
            out, fan_in = shape[0], shape[1:].numel()
            updates = orthogonalize(torch.stack([nesterov[i].reshape(out, fan_in) for i in indices]))
            lr = group["lr"] * max(1.0, out / fan_in) ** 0.5
            for i, update in zip(indices, updates, strict=True):
                params[i].add_(update.view(shape), alpha=-lr)
