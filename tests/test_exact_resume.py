"""A run resumed from any checkpoint is bit-identical to an uninterrupted one: weights, optimizer, log, best model."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch.optim.lr_scheduler import LambdaLR

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
    # Endings between two validations of the schedule: the last weights are validated nonetheless.
    "max_steps within an epoch": {"max_epochs": -1, "max_steps": 10},
    "max_steps and validation in mid-epoch": {"max_epochs": -1, "max_steps": 11, "val_check_interval": 4},
    "max_steps and accumulation": {"max_epochs": -1, "max_steps": 4, "accumulate_grad_batches": 4},
    "validation every 2 epochs of 3": {"check_val_every_n_epoch": 2},
    "validation after 4 of 6 batches": {"val_check_interval": 4},
    "early stopping before min_steps": {
        "callbacks": lambda: [EarlyStop("val/accuracy", "max", patience=1)],
        "min_steps": 20,
        "max_epochs": 9,
        "check_val_every_n_epoch": 2,
    },
    # 21 samples in batches of 4 leave one, which batch normalization cannot use.
    "last batch of one": {"data": {"train": 21}},
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
        if expected["best"].get("global_step", 0) <= torch.load(checkpoint, weights_only=True)["global_step"]:
            (folder / "checkpoints").mkdir()
            shutil.copy(uninterrupted / "checkpoints" / "best.ckpt", folder / "checkpoints")
        fit(folder, resume=checkpoint, **{**options, **resumed})
        assert differences(expected, outcome(folder)) == [], f"resumed from {checkpoint.name}"


@pytest.mark.parametrize("case", CASES)
def test_resume_from_every_checkpoint(tmp_path: Path, case: str) -> None:
    resume_from_each(tmp_path, every=1, resumed={}, **CASES[case])


#: Optimizer steps after which these runs are validated; an epoch has 6 batches.
VALIDATED = {
    "max_steps within an epoch": [6, 10],
    "max_steps and validation in mid-epoch": [4, 10, 11],
    "max_steps and accumulation": [2, 4],
    "validation every 2 epochs of 3": [12, 18],
    "validation after 4 of 6 batches": [4, 10, 16, 18],
    "plain": [6, 12, 18],
    "validation in mid-epoch": [3, 6, 9, 12, 15, 18],
}


@pytest.mark.parametrize("case", VALIDATED)
def test_the_last_weights_are_validated_once(tmp_path: Path, case: str) -> None:
    """The last step is validated once; resuming the complete run adds nothing."""
    trainer = fit(tmp_path, every_n_steps=100, **CASES[case])
    expected = outcome(tmp_path)
    steps = [row["step"] + 1 for row in expected["metrics"] if "val/accuracy" in row]
    assert steps == VALIDATED[case]
    assert steps[-1] == trainer.global_step
    last = max((tmp_path / "checkpoints").glob("step=*.ckpt"))
    assert torch.load(last, weights_only=True)["global_step"] == trainer.global_step
    fit(tmp_path, resume=last, every_n_steps=100, **CASES[case])
    assert differences(expected, outcome(tmp_path)) == []


@pytest.mark.parametrize(
    ("options", "longer", "steps"),
    [
        ({"max_epochs": -1, "max_steps": 10}, {"max_steps": 15}, [6, 10, 12, 15]),
        ({"check_val_every_n_epoch": 2}, {"max_epochs": 5}, [12, 18, 24, 30]),
    ],
)
def test_a_longer_run_continues_after_the_last_validation(
    tmp_path: Path, options: dict[str, Any], longer: dict[str, Any], steps: list[int]
) -> None:
    """The weights equal those of a run that was longer from the start, at a constant learning rate."""
    constant = {"model": {"schedule": lambda optimizer, total: LambdaLR(optimizer, lambda step: 1.0)}}
    fit(tmp_path / "short", **constant, **options)
    last = max((tmp_path / "short" / "checkpoints").glob("step=*.ckpt"))
    fit(tmp_path / "short", resume=last, **constant, **{**options, **longer})
    fit(tmp_path / "long", **constant, **{**options, **longer})
    found, expected = outcome(tmp_path / "short"), outcome(tmp_path / "long")
    assert differences(expected["state_dict"], found["state_dict"]) == []
    assert [row["step"] + 1 for row in found["metrics"] if "val/accuracy" in row] == steps


def test_max_time_validates_the_last_weights(tmp_path: Path) -> None:
    trainer = fit(
        tmp_path, max_epochs=10**6, max_time={"seconds": 2}, check_val_every_n_epoch=10**6, every_n_steps=10**6
    )
    rows = [row["step"] + 1 for row in outcome(tmp_path)["metrics"] if "val/accuracy" in row]
    assert rows == [trainer.global_step]


def test_no_validation_at_the_end_without_validation(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_epochs=-1, max_steps=7, limit_val_batches=0)
    assert trainer.global_step == 7
    assert not any("val/accuracy" in row for row in outcome(tmp_path)["metrics"])


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
