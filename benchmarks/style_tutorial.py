"""The peer of `benchmarks.style_speed`: neural style as PyTorch's tutorial has it, losses as layers of a Sequential."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.style_figures import lbfgs
from lightning_modules.components.features import Features
from lightning_modules.style.learned_image import keep_in_bounds
from lightning_modules.style.neural_style import CONTENT, STYLE

Mode = Literal["pass", "keep", "measure"]


class LossModule(nn.Module):
    """Gives on what it gets; ``loss`` is its distance from what it got while ``mode`` was ``keep``."""

    def __init__(self, statistic: Callable[[Tensor], Tensor], weight: float) -> None:
        super().__init__()
        self.statistic, self.weight = statistic, weight
        self.mode: Mode = "pass"
        self.target = self.loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "keep":
            self.target = self.statistic(x).detach()
        elif self.mode == "measure":
            self.loss = self.weight * F.mse_loss(self.statistic(x), self.target)
        return x


class Normalization(nn.Module):
    """The first layer of a `Tutorial`."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in features.normalization)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x.device)) / self.std.to(x.device)


def gram_of_one(x: Tensor) -> Tensor:
    """The Gram matrix of one image (1,N,h,w) by the number of places, as a product of matrices."""
    flat = x.flatten(0, 1).flatten(1)
    return torch.mm(flat, flat.t()) / flat.shape[1]


class Tutorial:
    """Neural style as the tutorial writes it.

    Args:
        features: of the module that it is compared with; they are copied.
        content, style: float (1,3,H,W) in 0..1.
        start: what the image begins as.
        recompute: the style's targets before each step.
        frozen: the weights get no gradients.
    """

    def __init__(
        self, features: Features, content: Tensor, style: Tensor, start: Tensor, recompute: bool, frozen: bool
    ) -> None:
        self.style, self.recompute = style, recompute
        self.content_losses, self.style_losses = nn.ModuleList(), nn.ModuleList()
        network: list[nn.Module] = [Normalization(features)]
        for name, layer in copy.deepcopy(features).layers.items():
            network.append(layer.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]
            if name in CONTENT:
                self.content_losses.append(LossModule(lambda x: x, 1.0))
                network.append(self.content_losses[-1])
            if name in STYLE:
                maps = next(p for p in reversed(list(nn.Sequential(*network).parameters()))).shape[0]
                self.style_losses.append(LossModule(gram_of_one, 1000 / maps**2))
                network.append(self.style_losses[-1])
        self.network = nn.Sequential(*network).requires_grad_(not frozen)
        self._keep(self.content_losses, content)
        self._keep(self.style_losses, style)
        self.image = nn.Parameter(start.clone())
        self.optimizer = lbfgs([self.image])
        self.loss = torch.zeros(())

    def _keep(self, losses: nn.ModuleList, image: Tensor) -> None:
        everything = [module for module in self.network if isinstance(module, LossModule)]
        for module in everything:
            module.mode = "keep" if module in losses else "pass"
        with torch.no_grad():
            self.network(image)
        for module in everything:
            module.mode = "measure"

    def step(self) -> None:
        """One iteration; ``loss`` is that of the image before it."""

        def closure() -> float:
            self.optimizer.zero_grad()
            if self.recompute:
                self._keep(self.style_losses, self.style)
            self.network(self.image)
            terms = [module.loss for module in (*self.content_losses, *self.style_losses)]
            loss = torch.stack(terms).sum()
            loss.backward()
            self.loss = loss.detach()
            return loss  # type: ignore[return-value]  # as the optimizer takes it

        before = self.image.detach().clone()
        self.optimizer.step(closure)
        keep_in_bounds(self.optimizer, self.image, before, before.new_zeros(()), before.new_ones(()))
