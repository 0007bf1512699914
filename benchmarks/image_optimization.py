"""Shared parts of the benchmarks of optimized images: backbones, optimizer, quiet Trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

BACKBONES = ("vgg16", "vgg16_bn", "vgg19", "vgg19_bn")


def lbfgs(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return L-BFGS with one iteration per step, which is much faster than the authors' gradient descent."""
    return torch.optim.LBFGS(params, lr=1.0, max_iter=1, history_size=20)


def silence_trainer() -> None:
    """Suppress the Trainer's notes about devices and data loaders."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
