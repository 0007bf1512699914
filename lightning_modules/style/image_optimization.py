"""Optimization of an image: limited steps of L-BFGS, and the memory that a run needs."""

from __future__ import annotations

import copy
import os

import torch
from torch import Tensor, nn

MAX_PIXEL_STEP = 0.25  # largest change of a pixel in 0..1 per step of L-BFGS


@torch.no_grad()
def limit_step(
    optimizer: torch.optim.Optimizer, image: Tensor, previous: Tensor, low: Tensor | None, high: Tensor | None
) -> None:
    """Limit a step of L-BFGS and clamp the pixels, both in place.

    L-BFGS without a line search can take steps that are a hundred times too long while its estimate of the curvature is
    poor; then all pixels end at the bounds. The step is therefore scaled so that no pixel changes by more than
    `MAX_PIXEL_STEP`. The optimizer's state is set to the actual step, from which it estimates the curvature.

    Args:
        optimizer: optimizer that took the step; steps of other optimizers are not scaled.
        image: image after the step, float (1, 3, H, W).
        previous: image before the step.
        low: lower bound of the pixels; None does not clamp.
        high: upper bound of the pixels; None does not clamp.
    """
    is_lbfgs = isinstance(optimizer, torch.optim.LBFGS)
    if is_lbfgs:
        step = image - previous
        image.copy_(previous + step * (MAX_PIXEL_STEP / step.abs().max().clamp(min=MAX_PIXEL_STEP)))
    if low is not None:
        image.clamp_(low, high)
    if is_lbfgs:
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        if "d" in state:
            state["d"] = (image - previous).flatten() / state["t"]


def estimate_memory(features: nn.Module, height: int, width: int) -> int:
    """Return the bytes of activations, their gradients and weights for one image of height x width pixels.

    Raises:
        RuntimeError: the image is too small for the layers.
    """
    sizes: list[int] = []
    meta = copy.deepcopy(features).to("meta")
    hooks = [
        layer.register_forward_hook(lambda _, __, output: sizes.append(output.numel()))
        for layer in meta.layers.values()  # type: ignore[operator,union-attr]
    ]
    with torch.no_grad():
        meta(torch.empty(1, 3, height, width, device="meta"))
    for hook in hooks:
        hook.remove()
    return 4 * (2 * sum(sizes) + sum(p.numel() for p in features.parameters()))


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of the device, or None if they are unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
