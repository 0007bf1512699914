"""Settings of all tests: no network, no W&B account, one thread, and a GPU only for ``-m gpu``."""

from __future__ import annotations

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, unless the tests that need one are selected."""
    expression = config.getoption("markexpr") or ""
    if "gpu" not in expression.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _one_thread_and_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use one thread, since two tests run at a time on two cores, and a home directory without W&B's key."""
    torch.set_num_threads(1)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
