"""Runs in W&B: online, offline, resumed, without an account."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.figures import Figures
from callbacks.metrics_file import MetricsFile, read_metrics
from callbacks.wandb_run import has_credentials, make_wandb_logger
from tests.callbacks.tiny import Tiny, loader, trainer
from tests.callbacks.wandb_reader import read_run

ROOT = Path(__file__).parents[2]
PROGRAM = (
    "import sys, time\n"
    "from callbacks.wandb_run import make_wandb_logger\n"
    "assert 'wandb' not in sys.modules\n"
    "start = time.monotonic()\n"
    "logger = make_wandb_logger(sys.argv[1], 'project', 'run1')\n"
    "logger.log_metrics({'a': 1.5}, step=7)\n"
    "print('seconds', time.monotonic() - start)\n"
)


@pytest.mark.usefixtures("no_account")
def test_metrics_config_tables_and_figures_are_in_the_offline_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    logger = make_wandb_logger(tmp_path, "vision", "abc123")
    assert isinstance(logger, WandbLogger)
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    assert "wandb login" in line
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in line
    assert err == ""
    logger.log_hyperparams({"model": {"class_path": "Tiny", "init_args": {"lr": 0.01}}, "seed": 3})
    file = MetricsFile(tmp_path)
    t = trainer(tmp_path, logger=[file, logger], callbacks=[Figures(), ConfusionMatrix()])
    t.fit(Tiny(), loader(), loader())
    wandb.finish()
    assert capfd.readouterr().out == ""

    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    run = read_run(folder)
    assert (run["id"], run["project"]) == ("abc123", "vision")
    assert run["config"]["seed"] == 3
    assert run["config"]["model"]["init_args"] == {"lr": 0.01}
    by_step: dict[int, dict] = {}
    for row in run["history"]:
        by_step.setdefault(row["trainer/global_step"], {}).update(row)
    for row in read_metrics(file.path):
        assert by_step[row["step"]]["train/loss"] == row["train/loss"]
    assert by_step[2]["val/loss"] == 0.25
    assert run["metrics"]["*"] == "trainer/global_step"

    table = by_step[2]["val/predictions"]
    assert (table["_type"], table["nrows"], table["ncols"]) == ("table-file", 12, 6)
    sheet = by_step[2]["val/figures"]
    (png,) = (tmp_path / "figures").glob("val_step=*.png")
    assert (sheet["width"], sheet["height"]) == Image.open(png).size
    for media in (table, sheet, by_step[2]["val/confusion_matrix"]):
        assert (folder / "files" / media["path"]).exists()


@pytest.mark.usefixtures("no_account")
def test_a_resumed_run_keeps_id_and_step_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import wandb

    for steps in (range(3), range(2, 5)):
        logger = make_wandb_logger(tmp_path, "vision", "same-id", "offline")
        assert logger is not None
        assert logger.version == "same-id"
        for step in steps:
            logger.log_metrics({"train/loss": step / 10}, step=step)
        wandb.finish()
        time.sleep(1.1)  # the folder's name has the second in it
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    runs = [read_run(first), read_run(second)]
    assert [run["id"] for run in runs] == ["same-id", "same-id"]
    # W&B's own _step restarts offline; our axis does not.
    assert [row["_step"] for row in runs[1]["history"]] == [0, 1, 2]
    assert [row["trainer/global_step"] for row in runs[1]["history"]] == [2, 3, 4]
    assert all(run["metrics"]["*"] == "trainer/global_step" for run in runs)


@pytest.mark.usefixtures("no_account")
def test_another_run_in_the_same_process_is_not_mixed_up(tmp_path: Path) -> None:
    import wandb

    for name in ("one", "two"):
        logger = make_wandb_logger(tmp_path / name, "vision", name, "offline")
        assert logger is not None
        logger.log_metrics({"x": 1.0}, step=0)
    wandb.finish()
    for name in ("one", "two"):
        (folder,) = (tmp_path / name / "wandb").glob("offline-run-*")
        assert read_run(folder)["id"] == name


def test_without_a_terminal_or_stdin_it_is_offline_at_once(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_") and key != "NETRC"}
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", sys.executable, "-c", PROGRAM, str(tmp_path / "run")],
        cwd=ROOT,
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    line, seconds = done.stdout.splitlines()
    assert line.startswith("W&B: not logged in")
    assert float(seconds.split()[1]) < 20
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert read_run(folder)["history"][0]["a"] == 1.5


@pytest.mark.usefixtures("no_account")
def test_an_unreachable_server_makes_it_offline_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        start = time.monotonic()
        logger = make_wandb_logger(tmp_path, "vision", "run1", init_timeout=3)
        seconds = time.monotonic() - start
    assert logger is not None
    logger.log_metrics({"a": 1.5}, step=7)
    wandb.finish()
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    assert line.startswith("W&B: no connection")
    assert "wandb sync" in line
    assert err == ""
    assert 2 < seconds < 25
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert read_run(folder)["history"][0]["a"] == 1.5


@pytest.mark.usefixtures("no_account")
def test_credentials_are_found_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_credentials()
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    (home / ".netrc").write_text("machine example.org\n  login user\n  password " + "b" * 40 + "\n")
    assert not has_credentials()
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "b" * 40 + "\n")
    (home / ".netrc").chmod(0o600)
    assert has_credentials()
    (home / ".netrc").write_text("machine\n")
    assert not has_credentials()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert has_credentials()


@pytest.mark.usefixtures("no_account")
@pytest.mark.parametrize("value", ["disabled", "offline", "dryrun"])
def test_wandb_mode_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WANDB_MODE", value)
    logger = make_wandb_logger(tmp_path, "vision", "x")
    assert (logger is None) == (value == "disabled")
    assert bool(list(tmp_path.glob("wandb/offline-run-*"))) == (value != "disabled")


@pytest.mark.usefixtures("no_account")
def test_a_broken_installation_gives_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert make_wandb_logger(tmp_path, "vision", "x", "offline") is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("W&B: not usable")


@pytest.mark.usefixtures("no_account")
def test_other_ranks_make_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = make_wandb_logger(tmp_path, "vision", "x", "offline")
    assert logger is not None
    logger.log_metrics({"a": torch.tensor(1.0)}, step=0)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "wandb").exists()
