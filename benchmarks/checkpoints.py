"""Load systems from checkpoints that ``train.py`` wrote."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from callbacks.checkpoint import read_checkpoint
from errors import CheckpointError


def load_system(
    path: str, classes: tuple[type, ...] = (), device: torch.device | str = "cpu", **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a system for evaluation.

    Args:
        path: a checkpoint of ``train.py``.
        classes: accepted classes; none accepts all.
        device: device of the weights.
        **arguments: constructor arguments that replace those of the checkpoint.

    Returns:
        The system, and the constructor arguments of its training data.

    Raises:
        CheckpointError: the file is not such a checkpoint, or its system is of another class.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    class_path = checkpoint.get("hyper_parameters", {}).get("_class_path")
    if class_path is None:
        raise CheckpointError(f"{path}: expected a checkpoint of train.py, found no class in it")
    module, name = class_path.rsplit(".", 1)
    system = getattr(importlib.import_module(module), name)
    if classes and system not in classes:
        expected = " or ".join(cls.__name__ for cls in classes)
        raise CheckpointError(f"{path}: expected a checkpoint of {expected}, found {name}")
    loaded = system.load_from_checkpoint(path, map_location=device, weights_only=True, **arguments).eval()
    return loaded.to(memory_format=loaded.memory_format), checkpoint.get("datamodule_hyper_parameters", {})
