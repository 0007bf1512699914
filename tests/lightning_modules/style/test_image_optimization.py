"""Optimization of an image: memory estimate, limited steps of L-BFGS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.components.features import Features
from lightning_modules.style.image_optimization import MAX_PIXEL_STEP, estimate_memory, limit_step


def test_memory_estimate() -> None:
    features = Features(["relu1_2"], "vgg16", "random")
    weights = sum(p.numel() for p in features.parameters())
    assert estimate_memory(features, 50, 40) == 4 * (2 * 4 * 64 * 50 * 40 + weights)


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_long_steps_of_lbfgs_are_limited_and_its_state_follows(bounds: Any) -> None:
    image = torch.nn.Parameter(torch.full((1, 3, 4, 4), 0.5))
    optimizer = torch.optim.LBFGS([image], lr=1.0, max_iter=1)
    slope = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (image * slope).sum() + 1e-3 * image.square().sum()
        loss.backward()
        return loss

    low, high = (None, None) if bounds is None else (torch.tensor(bound) for bound in bounds)
    for _ in range(6):
        before = image.detach().clone()
        optimizer.step(closure)  # type: ignore[arg-type]
        limit_step(optimizer, image, before, low, high)
        moved = (image - before).detach()
        assert moved.abs().max() <= MAX_PIXEL_STEP + 1e-6
        state = optimizer.state[image]
        torch.testing.assert_close(state["d"] * state["t"], moved.flatten())
    if bounds is None:
        assert image.abs().max() > 1, "pixels are not clamped without bounds"
    else:
        assert image.min() >= 0
        assert image.max() <= 1
    plain = torch.nn.Parameter(torch.zeros(1, 3, 4, 4))
    limit_step(torch.optim.SGD([plain], 1.0), plain, plain.detach() - 9, None, None)
    assert (plain == 0).all(), "steps of other optimizers are not limited"
