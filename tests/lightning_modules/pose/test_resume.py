"""A pose run resumed in the middle of an epoch ends in the same bits, with all that is random in it."""

from __future__ import annotations

from pathlib import Path

import pytest

import cli.parser
from datamodules.synthetic.mpii import write_mpii
from tests.small_system import differences, kill_and_resume, load_system, outcome

# The smallest network of each that has all that makes a resume hard.
SYSTEMS = {
    "stacked_hourglass": [
        "--model", "StackedHourglass", "--model.num_stacks", "2", "--model.channels", "8", "--model.depth", "2",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven training images and two for validation."""
    folder = tmp_path_factory.mktemp("people")
    write_mpii(str(folder), train=7, val=2, size=64)
    return folder


@pytest.mark.parametrize("system", SYSTEMS)
def test_resume_in_mid_epoch(system: str, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "fit", *SYSTEMS[system], "--data", "MPII", "--data.root", str(people), "--data.image_size", "64",
        "--data.batch_size", "2", "--data.num_workers", "0", "--trainer.max_epochs", "3",
        "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled", "--last.every_n_steps", "7",
        "--last.keep", "9", "--experiment", "run", "--model.schedule", "lightning_modules.schedules.Cosine",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    cli.parser.run(options)
    (whole,) = Path("runs/run").iterdir()
    expected = outcome(whole)
    steps = expected["global_step"]
    assert steps > 9
    assert steps % 3 == 0
    assert steps // 3 != 7
    assert differences(expected, outcome(kill_and_resume(whole, 7))) == []
    # The checkpoint alone restores the system, with the linked joints.
    again = load_system(whole / "checkpoints" / expected["file"])
    assert type(again).__name__ == SYSTEMS[system][1]
    assert len(again.joint_names) == 16
