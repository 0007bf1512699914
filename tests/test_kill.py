"""Processes that are killed and resumed: SIGKILL anywhere, SIGTERM to some ranks, Ctrl-C, a kill during a save."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.checkpoint import AtomicCheckpointIO, read_checkpoint
from tests.callbacks.wandb_reader import read_run
from tests.processes import FORKSERVER, finish, train, train_ranks, wait_for
from tests.small_system import differences, outcome

pytestmark = pytest.mark.xdist_group("processes")

FIT = [
    "fit", "--model", "tests.small_system.SmallNet", "--data", "tests.small_system.BlobsData", "--experiment", "blobs",
    "--data.batch_size", "4", "--data.num_workers", "2", "--data.seconds", "0.01", "--trainer.accelerator", "cpu",
    "--trainer.max_epochs", "4", "--trainer.val_check_interval", "0.5", "--trainer.log_every_n_steps", "2",
    "--trainer.enable_model_summary", "false", "--trainer.accumulate_grad_batches", "2", "--last.every_n_steps", "1",
    "--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay", "0.9",
    "--trainer.enable_progress_bar", "false",
    "--wandb.mode", "disabled",
]  # fmt: skip
# Long enough for a signal to arrive before the run ends; the time per sample does not change the result.
SLOW = ["--data.seconds", "0.05"]
RANKS = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.num_workers", "1", "--data.train", "37"]


def only_run(folder: Path) -> Path:
    (found,) = (folder / "runs" / "blobs").iterdir()
    return found


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("runs/blobs/*/checkpoints/step=*.ckpt"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert finish(train(FIT, folder)) == [0], (folder / "log.txt").read_text()
    return folder


@pytest.fixture(scope="module")
def uninterrupted_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted_ranks")
    assert finish(*train_ranks(FIT + RANKS, folder)) == [0, 0], (folder / "log.txt").read_text()
    return folder


def assert_same_run(expected: Path, folder: Path) -> None:
    assert differences(outcome(only_run(expected)), outcome(only_run(folder))) == []


def test_sigkill_at_random_points(tmp_path: Path, uninterrupted: Path) -> None:
    rng = random.Random(0)
    process = train(FIT + SLOW, tmp_path)
    for _ in range(3):
        before = len(checkpoints(tmp_path)) and checkpoints(tmp_path)[-1].name
        wait_for(lambda: checkpoints(tmp_path) and checkpoints(tmp_path)[-1].name != before, process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        process = train(["fit", "--resume", str(only_run(tmp_path))], tmp_path)
    assert finish(process) == [0], (tmp_path / "log.txt").read_text()
    assert_same_run(uninterrupted, tmp_path)


def test_the_wandb_run_continues(tmp_path: Path) -> None:
    offline = [*FIT, "--wandb.mode", "offline"]
    (tmp_path / "uninterrupted").mkdir()
    assert finish(train(offline, tmp_path / "uninterrupted")) == [0]
    process = train(offline + SLOW, tmp_path)
    wait_for(lambda: len(checkpoints(tmp_path)), process)
    process.kill()
    process.join()
    assert finish(train(["fit", "--ckpt_path", "last", "--experiment", "blobs"], tmp_path)) == [0]
    runs = sorted((only_run(tmp_path) / "wandb").glob("offline-run-*"))
    # W&B may have written nothing before the kill (metrics.csv has it all); the name of the directory ends in the id.
    first = read_run(runs[0], killed=True) if list(runs[0].glob("*.wandb")) else {"history": []}
    second = read_run(runs[1])
    assert runs[0].name.endswith("-" + second["id"])
    complete = read_run(next((only_run(tmp_path / "uninterrupted") / "wandb").glob("offline-run-*")))
    expected = accuracy_by_step(complete)
    found = accuracy_by_step(first) | accuracy_by_step(second)
    assert found.items() <= expected.items()
    assert max(found) == max(expected)


def accuracy_by_step(run: dict[str, Any]) -> dict[int, float]:
    return {row["trainer/global_step"]: row["val/accuracy"] for row in run["history"] if "val/accuracy" in row}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_ends_the_run(
    tmp_path: Path, uninterrupted: Path, number: signal.Signals, status: int
) -> None:
    process = train([*FIT, *SLOW, "--last.every_n_steps", "1000"], tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("runs/blobs/*/metrics.csv"))), process)
    time.sleep(0.2)
    os.kill(process.pid or 0, number)
    assert finish(process, timeout=30) == [status], (tmp_path / "log.txt").read_text()
    log = (tmp_path / "log.txt").read_text()
    assert number.name in log
    assert f"train.py fit --resume {only_run(tmp_path).relative_to(tmp_path)}" in log
    assert "Traceback" not in log
    assert finish(train(["fit", "--resume", "last", "--experiment", "blobs"], tmp_path)) == [0]
    assert_same_run(uninterrupted, tmp_path)


def test_sigkill_of_two_ranks(tmp_path: Path, uninterrupted_ranks: Path) -> None:
    processes = train_ranks(FIT + RANKS + SLOW, tmp_path)
    wait_for(lambda: len(checkpoints(tmp_path)), processes[0])
    time.sleep(0.1)
    for process in processes:
        process.kill()
        process.join()
    processes = train_ranks(["fit", "--resume", str(only_run(tmp_path))], tmp_path)
    assert finish(*processes) == [0, 0], (tmp_path / "log.txt").read_text()
    assert_same_run(uninterrupted_ranks, tmp_path)


@pytest.mark.parametrize("receiver", ["rank 0", "rank 1", "group"])
def test_sigterm_to_ranks(tmp_path: Path, uninterrupted_ranks: Path, receiver: str) -> None:
    processes = train_ranks(FIT + RANKS + SLOW, tmp_path)
    wait_for(lambda: len(checkpoints(tmp_path)), processes[0])
    if receiver == "group":
        os.killpg(processes[0].pid or 0, signal.SIGTERM)
    else:
        os.kill(processes[int(receiver[-1])].pid or 0, signal.SIGTERM)
    assert finish(*processes, timeout=30) == [75, 75], (tmp_path / "log.txt").read_text()
    assert finish(*train_ranks(["fit", "--resume", str(only_run(tmp_path))], tmp_path)) == [0, 0]
    assert_same_run(uninterrupted_ranks, tmp_path)


def save_forever(path: str) -> None:
    """Overwrite a checkpoint repeatedly; each version has one value in all of its tensors."""
    torch.set_num_threads(1)
    for number in range(10**6):
        state = {f"w{i}": torch.full((500_000,), float(number)) for i in range(4)}
        AtomicCheckpointIO().save_checkpoint({"pytorch-lightning_version": "2.6.6", "state_dict": state}, path)


def test_a_kill_during_saving_leaves_a_complete_file(tmp_path: Path) -> None:
    path, rng, caught = tmp_path / "step=1.ckpt", random.Random(1), 0
    for _ in range(6):
        process: BaseProcess = FORKSERVER.Process(target=save_forever, args=(str(path),))
        process.start()
        wait_for(path.exists, process)
        time.sleep(rng.uniform(0, 0.3))
        while not list(tmp_path.glob(f".*.{process.pid}.part")):
            pass
        process.kill()
        process.join()
        caught += len(list(tmp_path.glob(f".*.{process.pid}.part")))
        values = {float(v) for w in read_checkpoint(path)["state_dict"].values() for v in w.unique()}
        assert len(values) == 1
    assert caught, "expected a kill during a save, found none"
