"""Neural style as in PyTorch's tutorial, with losses as layers of a Sequential; a peer of `benchmarks.style_speed`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.image_optimization import lbfgs
from lightning_modules.components.features import Features
from lightning_modules.components.unsaved import Constant
from lightning_modules.style.image_optimization import limit_step
from lightning_modules.style.neural_style import CONTENT_LAYERS, STYLE_LAYERS

Mode = Literal["pass", "store", "measure"]


class LossModule(nn.Module):
    """Return the input; ``loss`` is its distance from the target, the input while ``mode`` was ``store``."""

    def __init__(self, statistic: Callable[[Tensor], Tensor], weight: float) -> None:
        super().__init__()
        self.statistic, self.weight = statistic, weight
        self.mode: Mode = "pass"
        self.target = self.loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "store":
            self.target = self.statistic(x).detach()
        elif self.mode == "measure":
            self.loss = self.weight * F.mse_loss(self.statistic(x), self.target)
        return x


class Normalization(nn.Module):
    """Normalize images as the features expect it."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.mean, self.std = (Constant(torch.tensor(values).view(-1, 1, 1)) for values in features.normalization)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean()) / self.std()


def gram_of_single_image(x: Tensor) -> Tensor:
    """Compute the Gram matrix of one image (1, C, h, w), divided by h w, with one matrix product."""
    flat = x.flatten(0, 1).flatten(1)
    return torch.mm(flat, flat.t()) / flat.shape[1]


class Tutorial:
    """Optimize an image as the tutorial does.

    Args:
        features: feature extractor of the module under comparison; it is copied.
        content: content image, float (1, 3, H, W) in 0..1.
        style: style image, float (1, 3, H, W) in 0..1.
        init: initial image.
        recompute_targets: recompute the targets of the style before each step.
        freeze: compute no gradients of the weights.
    """

    def __init__(
        self, features: Features, content: Tensor, style: Tensor, init: Tensor, recompute_targets: bool, freeze: bool
    ) -> None:
        self.style, self.recompute_targets = style, recompute_targets
        self.content_losses, self.style_losses = nn.ModuleList(), nn.ModuleList()
        network: list[nn.Module] = [Normalization(features)]
        for name, layer in copy.deepcopy(features).layers.items():
            network.append(layer.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]
            if name in CONTENT_LAYERS:
                self.content_losses.append(LossModule(lambda x: x, 1.0))
                network.append(self.content_losses[-1])
            if name in STYLE_LAYERS:
                channels = next(p for p in reversed(list(nn.Sequential(*network).parameters()))).shape[0]
                self.style_losses.append(LossModule(gram_of_single_image, 1000 / channels**2))
                network.append(self.style_losses[-1])
        self.network = nn.Sequential(*network).to(content.device).requires_grad_(not freeze)
        self._store_targets(self.content_losses, content)
        self._store_targets(self.style_losses, style)
        self.image = nn.Parameter(init.clone())
        self.optimizer = lbfgs([self.image])
        self.loss = torch.zeros(())

    def _store_targets(self, losses: nn.ModuleList, image: Tensor) -> None:
        modules = [module for module in self.network if isinstance(module, LossModule)]
        for module in modules:
            module.mode = "store" if module in losses else "pass"
        with torch.no_grad():
            self.network(image)
        for module in modules:
            module.mode = "measure"

    def step(self) -> None:
        """Take one iteration; ``loss`` is that of the image before it."""

        def closure() -> float:
            self.optimizer.zero_grad()
            if self.recompute_targets:
                self._store_targets(self.style_losses, self.style)
            self.network(self.image)
            terms = [module.loss for module in (*self.content_losses, *self.style_losses)]
            loss = torch.stack(terms).sum()
            loss.backward()
            self.loss = loss.detach()
            return loss  # type: ignore[return-value]  # the optimizer accepts tensors

        previous = self.image.detach().clone()
        self.optimizer.step(closure)
        limit_step(self.optimizer, self.image, previous, previous.new_zeros(()), previous.new_ones(()))
