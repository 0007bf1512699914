"""Checkpoint files: all damage is detected or harmless, and no code in them is executed."""

from __future__ import annotations

import os
import pickle
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint, checkpoints_by_age, read_checkpoint
from callbacks.early_stopping import EarlyStop
from errors import CheckpointError, UserError
from lightning_modules.schedules import Plateau
from tests.small_system import SmallNet, differences, fit


def checkpoint() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pytorch-lightning_version": "2.6.6",
        "global_step": 7,
        "state_dict": {f"layer{i}.weight": torch.randn(20, 30, generator=generator) for i in range(4)},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "step=00000007.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), path)
    return path


def test_what_is_written_is_read(file: Path) -> None:
    assert differences(read_checkpoint(file), checkpoint()) == []
    assert differences(read_checkpoint(file, mmap=True), checkpoint()) == []
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_every_flipped_bit_is_noticed_or_harmless(file: Path) -> None:
    whole, chance, noticed = file.read_bytes(), random.Random(0), 0
    for _ in range(300):
        position, bit = chance.randrange(len(whole)), chance.randrange(8)
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        file.write_bytes(damaged)
        try:
            loaded = read_checkpoint(file)
        except CheckpointError as error:
            noticed += 1
            assert str(file) in str(error)
            assert "\n" not in str(error)
        else:  # padding, dates and the like
            assert differences(loaded, checkpoint()) == []
    assert noticed > 150


@pytest.mark.parametrize("part", [0, 1, 10, 500, 0.5, 0.99, -1])
def test_every_truncation_is_noticed(file: Path, part: float) -> None:
    whole = file.read_bytes()
    length = int(part * len(whole)) if 0 < part < 1 else int(part)
    file.write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match="step=00000007.ckpt: "):
        read_checkpoint(file)


def test_foreign_files(tmp_path: Path) -> None:
    text = tmp_path / "notes.ckpt"
    text.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_checkpoint(text)
    weights = tmp_path / "weights.pt"
    torch.save({"layer.weight": torch.zeros(2)}, weights)
    with pytest.raises(CheckpointError, match=r"--model\.weights"):
        read_checkpoint(weights)
    with pytest.raises(CheckpointError, match="URL"):
        read_checkpoint("https://example.org/a.ckpt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "nothing.ckpt")


class Evil:
    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.witness,)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    witness, path = tmp_path / "witness", tmp_path / "evil.ckpt"
    torch.save({"pytorch-lightning_version": "2.6.6", "x": Evil(str(witness))}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil(str(witness))))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not witness.exists()


def test_the_newest_sound_one_is_offered(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        AtomicCheckpointIO().save_checkpoint(checkpoint(), tmp_path / f"step={step:08d}.ckpt")
        time.sleep(0.01)
    newest, second, third = checkpoints_by_age(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-50])
    second_time = second.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:100])
    os.utime(second, ns=(second_time, second_time))
    with pytest.raises(CheckpointError, match=f"{third.name} is intact"):
        read_checkpoint(newest)


def test_the_io_refuses_too(tmp_path: Path, file: Path) -> None:
    """Lightning itself also reads through `AtomicCheckpointIO`."""
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="truncated"):
        AtomicCheckpointIO().load_checkpoint(file)


def test_a_failed_save_leaves_the_old_file(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        AtomicCheckpointIO().save_checkpoint({"not picklable": lambda: None}, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_moved_run_folder_keeps_its_best(tmp_path: Path) -> None:
    """Lightning forgets the best value if the directory's path changes, and would replace the best checkpoint."""
    best = BestCheckpoint("val/accuracy", "max")
    best.dirpath = str(tmp_path / "old")
    fit(tmp_path / "old", callbacks=lambda: [best])
    moved = tmp_path / "new"
    (tmp_path / "old").rename(moved)
    resumed = BestCheckpoint("val/accuracy", "max")
    resumed.dirpath = str(moved)
    resumed.load_state_dict(best.state_dict())
    assert resumed.best_model_score == best.best_model_score
    assert resumed.best_model_path == str(moved / "best.ckpt")


def test_hyperparameters_are_plain(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=1)
    newest = checkpoints_by_age(tmp_path / "checkpoints")[0]
    assert read_checkpoint(newest)["hyper_parameters"] == {"norm": True, "dropout": 0.3}


# --- the best checkpoint --------------------------------------------------------------------------------------------


NAN = float("nan")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the values of ``val/accuracy`` of the next run; it is validated after each epoch of 6 steps."""
    values: list[float] = []

    def end(module: SmallNet) -> None:
        module.log("val/accuracy", values.pop(0))

    monkeypatch.setattr(SmallNet, "on_validation_epoch_end", end)
    return values


@pytest.mark.parametrize(
    ("values", "best", "score"),
    [
        ([NAN, 0.2, NAN, 0.5, 0.3], 24, 0.5),
        ([0.5, NAN, 0.2], 6, 0.5),
        ([NAN, NAN, 0.0], 18, 0.0),
        ([NAN, NAN, NAN], None, None),
    ],
)
def test_nan_is_never_the_best(
    tmp_path: Path, scripted: list[float], values: list[float], best: int | None, score: float | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    scripted += values
    trainer = fit(tmp_path, max_epochs=len(values), num_sanity_val_steps=0)
    (callback,) = [c for c in trainer.callbacks if isinstance(c, BestCheckpoint)]
    file = tmp_path / "checkpoints" / "best.ckpt"
    assert (torch.load(file, weights_only=True)["global_step"] if file.exists() else None) == best
    assert (None if score is None else float(callback.best_model_score)) == (score and pytest.approx(score))
    printed = capsys.readouterr().out
    assert "best.ckpt: selected by the maximum of val/accuracy\n" in printed
    step = 6 * (1 + next(i for i, value in enumerate(values) if value != value))
    assert printed.count("is nan") == 1
    assert f"best.ckpt: val/accuracy is nan after step {step}; " in printed


def test_a_value_replaces_a_nan_of_an_older_checkpoint(tmp_path: Path) -> None:
    best = BestCheckpoint("val/accuracy", "max")
    best.best_k_models, best.kth_best_model_path = {"best.ckpt": torch.tensor(NAN)}, "best.ckpt"
    trainer = fit(tmp_path, max_epochs=1)
    assert best.check_monitor_top_k(trainer, torch.tensor(0.1))
    assert not best.check_monitor_top_k(trainer, torch.tensor(NAN))


def test_nan_is_no_improvement_for_early_stopping(
    tmp_path: Path, scripted: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted += [NAN, 0.2, NAN, NAN, 0.9]
    options: dict[str, Any] = {"max_epochs": 5, "num_sanity_val_steps": 0}
    trainer = fit(tmp_path, callbacks=lambda: [EarlyStop("val/accuracy", "max", patience=2)], **options)
    assert trainer.global_step == 24
    assert "stopped early after step 24: val/accuracy has not improved in 2 validations\n" in capsys.readouterr().out


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_monitored_metric_that_is_not_logged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sanity: int
) -> None:
    """The first validation ends the run, also if it is the sanity check."""
    known = "val/accuracy, val/confidence"
    early = {"callbacks": lambda: [EarlyStop("val/loss", "min")], "num_sanity_val_steps": sanity}
    with pytest.raises(UserError, match=f"EarlyStop: monitor: expected .*, found val/loss; logged are {known}"):
        fit(tmp_path / "early", **early)
    monkeypatch.setattr(SmallNet, "monitor", ("val/map", "max"))
    with pytest.raises(UserError, match=f"--best.monitor: expected .*, found val/map; logged are {known}"):
        fit(tmp_path / "best", num_sanity_val_steps=sanity)
    with pytest.raises(UserError, match="schedule: Plateau needs val/map, found val/accuracy, val/confidence"):
        fit(tmp_path / "plateau", model={"schedule": Plateau}, num_sanity_val_steps=0)
