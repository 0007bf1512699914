"""Helpers for tests of the systems that optimize an image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.style.style_images import ImagePair
from lightning_modules.style.base import OptimizedImage

SMALL: dict[str, Any] = {"backbone": "vgg16", "weights": "random"}


def prepare(module: OptimizedImage, paths: dict[str, str], size: int = 32, device: str = "cpu") -> dict[str, Any]:
    """Set up the module's image, features and targets for a run on the device; return the batch."""
    data = ImagePair(paths["content"], paths["style"], size)
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        datamodule=data, world_size=1, strategy=SimpleNamespace(root_device=torch.device(device))
    )
    module.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module.prepare_targets(batch)
    return batch


def gram_in_float64(features: dict[str, Tensor], name: str) -> np.ndarray:
    flat = features[name][0].double().flatten(1).numpy()
    return flat @ flat.T / flat.shape[1]
