"""Muon for convolutions: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.

A layer's step has the directions of its momentum and none of their lengths: all singular values of its matrix are made
about equal, so that what a few directions dominate does not keep the others from learning. `torch.optim.Muon` takes
matrices alone; here a convolution is the matrix (out, in x height x width), all of one shape are treated at once, and
what is no hidden matrix is taken by SGD in the same optimizer, so that a config needs one and a checkpoint holds one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from errors import UserError

# The quintic of the authors' iteration, which brings singular values to 0.7 .. 1.2 in five steps rather than to 1.
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
IMAGE_CHANNELS = 3  # a layer that sees an image's colors is not a hidden one


def orthogonalized(matrices: Tensor) -> Tensor:
    """U V^T, nearly, of each matrix U S V^T: float (K,M,N) to the same, by Newton and Schulz's iteration."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class ConvMuon(Optimizer):
    """Muon for the weights of hidden convolutions, SGD with Nesterov's momentum for all else.

    Args:
        params: parameters or groups, as ever; each group is parted in two, whose rates a schedule moves together.
        lr: Muon's rate: a step changes a matrix by that times sqrt(max(1, M / N)) in each direction, before the
            momentum has built up and after.
        momentum: Muon's, a moving average with Nesterov's look ahead.
        weight_decay: Muon's, which shrinks a weight by lr times that a step (AdamW's way).
        sgd_lr: SGD's rate.
        sgd_momentum: SGD's.
        sgd_weight_decay: SGD's, which is added to the gradient.

    Raises:
        ValueError: a number is below 0, a momentum is 1 or more, or there is no hidden convolution.
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
        given = {
            "lr": lr, "weight_decay": weight_decay, "sgd_lr": sgd_lr, "sgd_weight_decay": sgd_weight_decay,
            "momentum": momentum, "sgd_momentum": sgd_momentum,
        }  # fmt: skip
        for name, value in given.items():
            if value < 0 or ("momentum" in name and value >= 1):
                raise UserError(f"{name}: expected 0 or more{', below 1' * ('momentum' in name)}, found {value}")
        muon = {"orthogonal": True, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        sgd = {"orthogonal": False, "lr": sgd_lr, "momentum": sgd_momentum, "weight_decay": sgd_weight_decay}
        listed = list(params)
        groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
        parted: list[dict[str, Any]] = []
        for group in groups:
            members = list(group["params"])
            hidden = [p for p in members if p.ndim == 4 and p.shape[1] > IMAGE_CHANNELS]
            rest = [p for p in members if p.ndim != 4 or p.shape[1] <= IMAGE_CHANNELS]
            parted += [
                {**options, **group, "params": chosen} for options, chosen in ((muon, hidden), (sgd, rest)) if chosen
            ]
        if not any(group["orthogonal"] for group in parted):
            raise UserError(
                "ConvMuon: expected weights of convolutions (out, in, height, width), found none: take SGD, "
                "also for a strategy that shards parameters (fsdp, deepspeed)"
            )
        super().__init__(parted, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            members, gradients, buffers = [], [], []
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    members.append(p)
                    gradients.append(p.grad)
                    buffers.append(state["momentum_buffer"])
            if members:
                (self._muon if group["orthogonal"] else self._sgd)(group, members, gradients, buffers)
        return loss

    @staticmethod
    def _sgd(group: dict[str, Any], members: list[Tensor], gradients: list[Tensor], buffers: list[Tensor]) -> None:
        steps = torch._foreach_add(gradients, members, alpha=group["weight_decay"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps)
        torch._foreach_add_(steps, buffers, alpha=group["momentum"])
        torch._foreach_add_(members, steps, alpha=-group["lr"])

    @staticmethod
    def _muon(group: dict[str, Any], members: list[Tensor], gradients: list[Tensor], buffers: list[Tensor]) -> None:
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
        shapes: dict[torch.Size, list[int]] = {}
        for i, p in enumerate(members):
            shapes.setdefault(p.shape, []).append(i)
        for shape, indices in shapes.items():
            out, fan_in = shape[0], shape[1:].numel()
            steps = orthogonalized(torch.stack([ahead[i].reshape(out, fan_in) for i in indices]))
            rate = group["lr"] * max(1.0, out / fan_in) ** 0.5
            for i, change in zip(indices, steps, strict=True):
                members[i].add_(change.view(shape), alpha=-rate)
