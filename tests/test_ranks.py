"""Two gloo ranks equal one process: the same weights for the same global batch, the same metrics on uneven sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from callbacks.metrics_file import read_metrics
from tests.processes import finish, train, train_ranks

pytestmark = pytest.mark.xdist_group("processes")

FIT = [
    "fit", "--model", "tests.small_system.SmallNet", "--data", "tests.small_system.BlobsData", "--experiment", "ranks",
    "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "-1",
    "--trainer.max_steps", "20",
    "--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false", "--wandb.mode", "disabled",
]  # fmt: skip
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def run_of(folder: Path) -> Path:
    (run,) = (folder / "runs" / "ranks").iterdir()
    return run


def test_same_weights_as_one_process(tmp_path: Path) -> None:
    """Train 20 steps with a global batch of 8, without batch norm and dropout, which differ between ranks."""
    plain = [*FIT, "--model.norm", "false", "--model.dropout", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert finish(train([*plain, "--data.batch_size", "8"], one)) == [0], (one / "log.txt").read_text()
    assert finish(*train_ranks([*plain, "--data.batch_size", "4", *TWO], two)) == [0, 0], (two / "log.txt").read_text()
    a, b = (
        torch.load(run_of(f) / "checkpoints" / "step=00000020.ckpt", weights_only=True)["state_dict"]
        for f in (one, two)
    )
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(a["network.0.weight"], torch.zeros(()))
    for row_a, row_b in zip(*(read_metrics(run_of(f) / "metrics.csv") for f in (one, two)), strict=True):
        if "val/accuracy" in row_a:
            assert row_a["val/accuracy"] == row_b["val/accuracy"]
            assert row_a["val/confidence"] == pytest.approx(row_b["val/confidence"], rel=1e-5)


@pytest.mark.parametrize("val", [9, 13])
def test_metrics_of_uneven_sets(tmp_path: Path, val: int) -> None:
    """9 samples are 2 batches on one rank and 1 on the other: no rank hangs, and each sample counts once."""
    sizes = ["--data.batch_size", "4", "--data.val", str(val)]
    assert finish(*train_ranks([*FIT, *sizes, *TWO], tmp_path)) == [0, 0], (tmp_path / "log.txt").read_text()
    run = run_of(tmp_path)
    last = [row for row in read_metrics(run / "metrics.csv") if "val/accuracy" in row][-1]
    validate = [
        "validate", "--ckpt_path", str(run / "checkpoints" / f"step={int(last['step']) + 1:08d}.ckpt"),
        "--trainer.devices", "1", "--trainer.strategy", "auto", "--experiment", "alone",
    ]  # fmt: skip
    assert finish(train(validate, tmp_path)) == [0], (tmp_path / "log.txt").read_text()
    (alone,) = (tmp_path / "runs" / "alone").iterdir()
    (row,) = read_metrics(alone / "metrics.csv")
    assert row["val/accuracy"] == last["val/accuracy"]
    assert row["val/confidence"] == pytest.approx(last["val/confidence"], rel=1e-6)
    assert round(row["val/accuracy"] * val, 4) % 1 == 0


def test_fewer_samples_than_ranks_are_rejected(tmp_path: Path) -> None:
    assert finish(*train_ranks([*FIT, "--data.val", "1", *TWO], tmp_path)) == [1, 1]
    assert (
        "error: BlobsData: expected a val sample per rank, found 1 for 2 ranks; use fewer ranks"
        in (tmp_path / "log.txt").read_text()
    )


def test_all_ranks_drop_a_last_batch_of_one(tmp_path: Path) -> None:
    """17 samples are 9 per rank, in batches of 4: two steps per epoch. The last weights are validated on both ranks."""
    sizes = ["--data.train", "17", "--data.batch_size", "4", "--trainer.max_steps", "5"]
    assert finish(*train_ranks([*FIT, *sizes, *TWO], tmp_path)) == [0, 0], (tmp_path / "log.txt").read_text()
    log = (tmp_path / "log.txt").read_text()
    assert log.count("9 training samples (per rank) in batches of 4 leave a batch of one") == 1
    rows = read_metrics(run_of(tmp_path) / "metrics.csv")
    assert [row["step"] + 1 for row in rows if "val/accuracy" in row] == [2, 4, 5]
