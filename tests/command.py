"""Running train.py's commands in tests: quick options, the printed configuration, and the refusal of a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import cli.parser

ROOT = Path(__file__).resolve().parents[1]


QUICK = [
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--wandb.mode", "disabled", "--data.num_workers", "0",
]  # fmt: skip


TINY = [
    "--model", "ImageClassifier", "--model.backbone", "resnet20_cifar", "--model.base_channels", "4",
    "--data", "ImageFolder", "--data.image_size", "16", "--data.batch_size", "8",
]  # fmt: skip

CELLS = ["--data.classes", "[WBC, RBC, Platelets]"]


def config_of(*args: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``--print_config`` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.parser.run([*args, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command line is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.parser.run(args)
    assert stop.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]
