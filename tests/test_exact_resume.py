"""A run resumed from any checkpoint is bit-identical to an uninterrupted one in weights, optimizer and log."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import EMAWeightAveraging

from callbacks.early_stopping import EarlyStop
from lightning_modules.schedules import Plateau
from tests.small_system import differences, fit, outcome

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "validation in mid-epoch": {"val_check_interval": 0.5},
    "validation every 4 batches over epochs": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    "accumulation": {"accumulate_grad_batches": 3, "max_epochs": 4},
    "accumulation and validation in mid-epoch": {"accumulate_grad_batches": 2, "val_check_interval": 3},
    "ema": {"callbacks": lambda: [EMAWeightAveraging(decay=0.9)], "val_check_interval": 0.5},
    "balanced sampling": {"data": {"train": 23, "sampling": "balanced"}},
    # The learning rate drops several times before the run stops early; resuming must change neither.
    "plateau and early stopping": {
        "model": {"schedule": partial(Plateau, factor=0.5, patience=1)},
        "callbacks": lambda: [EarlyStop("val/accuracy", "max", patience=3)],
        "max_epochs": 9,
        "every_n_steps": 2,
    },
    "plateau, validation in mid-epoch": {
        "model": {"schedule": partial(Plateau, factor=0.5, patience=1)},
        "val_check_interval": 0.5,
    },
    "max_steps within an epoch": {"max_epochs": -1, "max_steps": 10},
    "clipping, no sanity check, last batch dropped": {
        "gradient_clip_val": 0.5,
        "num_sanity_val_steps": 0,
        "data": {"drop_last": True},
    },
}


def resume_from_each(tmp_path: Path, every: int, resumed: dict[str, Any], **options: Any) -> None:
    """Resume a run from every ``every``-th checkpoint, with the options ``resumed`` changed; compare the results."""
    uninterrupted = tmp_path / "uninterrupted"
    fit(uninterrupted, **options)
    expected = outcome(uninterrupted)
    assert expected["metrics"]
    checkpoints = sorted((uninterrupted / "checkpoints").glob("step=*.ckpt"))
    for checkpoint in checkpoints[:-1:every]:
        folder = tmp_path / checkpoint.stem
        folder.mkdir()
        # After a kill, the log has later steps than the checkpoint.
        shutil.copy(uninterrupted / "metrics.csv", folder)
        fit(folder, resume=checkpoint, **{**options, **resumed})
        assert differences(expected, outcome(folder)) == [], f"resumed from {checkpoint.name}"


@pytest.mark.parametrize("case", CASES)
def test_resume_from_every_checkpoint(tmp_path: Path, case: str) -> None:
    resume_from_each(tmp_path, every=1, resumed={}, **CASES[case])


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    """The last checkpoint is written after the decision to stop, so resuming from it adds no step."""
    options: dict[str, Any] = {
        "model": {"schedule": partial(Plateau, patience=1)},
        "callbacks": lambda: [EarlyStop("val/accuracy", "max", patience=2)],
        "max_epochs": 30,
    }
    trainer = fit(tmp_path / "uninterrupted", **options)
    assert 2 < trainer.current_epoch < 30
    final = max((tmp_path / "uninterrupted" / "checkpoints").glob("step=*.ckpt"))
    assert fit(tmp_path / "resumed", resume=final, **options).global_step == trainer.global_step


def test_resume_with_another_number_of_workers(tmp_path: Path) -> None:
    two, zero = {"data": {"num_workers": 2}}, {"data": {"num_workers": 0}}
    resume_from_each(tmp_path / "a", every=5, resumed=zero, **two)
    resume_from_each(tmp_path / "b", every=5, resumed=two, **zero)
