"""Shared by all tests: no network, no W&B account, and a small system that has all that makes a resume hard."""

from __future__ import annotations

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two tests run at a time on two cores; and nobody's W&B key is read."""
    torch.set_num_threads(1)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
