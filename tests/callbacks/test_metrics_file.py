"""metrics.csv: rows, resume, damage and kills."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.metrics_file import MetricsFile, read_metrics
from tests.callbacks.tiny import Tiny, loader, trainer


def text(folder: Path) -> str:
    return (folder / "metrics.csv").read_text()


def test_values_of_one_step_share_a_row_and_later_ones_win(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log_metrics({"train/loss": 1.5, "epoch": 0}, step=4)
    assert text(tmp_path) == "step,epoch,train/loss\n4,0,1.5\n"
    file.log_metrics({"train/loss": 0.25, "lr": 0.1}, step=4)
    file.log_metrics({"train/loss": 0.5, "epoch": 1}, step=9)
    assert text(tmp_path) == "step,epoch,train/loss,lr\n4,0,0.25,0.1\n9,1,0.5,\n"
    # The merged row gets shorter and then longer: nothing of the old one may stay behind.
    file.log_metrics({"train/loss": 2.0, "lr": 0.123456789}, step=9)
    file.log_metrics({"lr": 1.0}, step=9)
    assert text(tmp_path) == "step,epoch,train/loss,lr\n4,0,0.25,0.1\n9,1,2.0,1.0\n"
    assert read_metrics(tmp_path / "metrics.csv")[1] == {"step": 9, "epoch": 1, "train/loss": 2.0, "lr": 1.0}


def test_an_earlier_step_and_no_step_find_their_rows(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log_metrics({"a": 1.0}, step=3)
    file.log_metrics({"a": 2.0}, step=8)
    file.log_metrics({"b": 3.0}, step=3)
    file.log_metrics({"b": 4.0}, step=5)
    file.log_metrics({"b": 5.0})
    assert read_metrics(file.path) == [
        {"step": 3, "a": 1.0, "b": 3.0},
        {"step": 5, "b": 4.0},
        {"step": 8, "a": 2.0, "b": 5.0},
    ]


def test_floats_read_back_to_the_same_bits_and_other_things_are_left_out(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    values = np.random.default_rng(0).normal(size=50) * 10.0 ** np.arange(-25, 25)
    for step, value in enumerate(values):
        file.log_metrics({"x": float(value), "f32": torch.tensor(value, dtype=torch.float32)}, step=step)
    rows = read_metrics(file.path)
    assert [row["x"] for row in rows] == values.tolist()
    assert [np.float32(row["f32"]) for row in rows] == values.astype(np.float32).tolist()
    odd = {"nan": math.nan, "inf": -math.inf, "text": "no", "vector": torch.zeros(2), "none": None, "true": True}
    file.log_metrics({**odd, "numpy": np.float64(0.5), 'a "quoted", name': 1}, step=50)
    last = read_metrics(file.path)[-1]
    assert math.isnan(last.pop("nan"))
    assert last == {"step": 50, "inf": -math.inf, "true": 1, "numpy": 0.5, 'a "quoted", name': 1}


def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def log(file: MetricsFile, steps: range) -> None:
        for step in steps:
            file.log_metrics({"epoch": step // 4, "train/loss": 1 / (step + 1)}, step=step)
            if step % 4 == 3:
                file.log_metrics({"epoch": step // 4, "val/acc": step / 100}, step=step)

    log(MetricsFile(tmp_path / "whole"), range(12))
    for killed in range(1, 12):
        for saved in range(killed):
            folder = tmp_path / f"{killed}_{saved}"
            log(MetricsFile(folder), range(killed))
            with open(folder / "metrics.csv", "a") as file:
                file.write("99,0,0.3")  # killed in the middle of a line
            resumed = MetricsFile(folder)
            resumed.resume(saved)
            log(resumed, range(saved, 12))
            assert read_metrics(resumed.path) == read_metrics(tmp_path / "whole" / "metrics.csv")


@pytest.mark.parametrize("content", ["", "step,ep", "step,epoch,a\n", "step,epoch,a\n1,0,2.0\n2,0\n3,0"])
def test_damaged_files_are_repaired(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    file = MetricsFile(tmp_path, resume_step=5)
    file.log_metrics({"a": 7.0, "epoch": 1}, step=6)
    rows = read_metrics(file.path)
    assert rows[-1] == {"step": 6, "epoch": 1, "a": 7.0}
    assert len(rows) == (2 if "1,0,2.0" in content else 1)
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_after_the_first_log_is_an_error(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log_metrics({"a": 1.0}, step=1)
    with pytest.raises(RuntimeError, match="too late"):
        file.resume(3)


def log_for_ever(folder: str, reached: Any) -> None:
    file = MetricsFile(folder)
    for i in itertools.count():
        file.log_metrics({"a": i / 3, f"late{i // 500}": i}, step=i)
        file.log_metrics({"b": i / 7}, step=i)
        reached.value = i


def test_a_sigkill_loses_nothing_that_was_logged(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    reached = fork.Value("q", -1, lock=False)
    child = fork.Process(target=log_for_ever, args=(str(tmp_path), reached))
    child.start()
    end = time.monotonic() + 60
    while reached.value < 700 and time.monotonic() < end:
        time.sleep(0.01)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    logged = reached.value
    assert logged >= 700
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) > logged
    assert all(row["a"] == row["step"] / 3 and row["b"] == row["step"] / 7 for row in rows[: logged + 1])


def test_a_trainer_writes_it_and_takes_the_run_folder_from_it(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    t = trainer(tmp_path, logger=file, enable_checkpointing=True)
    t.fit(Tiny(), loader(), loader())
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[-1]["val/loss"] == 0.25
    assert all("train/loss" in row and row["epoch"] == 0 for row in rows)
    assert t.log_dir == str(tmp_path)
    assert t.checkpoint_callback.dirpath == str(tmp_path / "checkpoints")
