"""Run benchmarks as a user does, by their command lines."""

from __future__ import annotations

import logging
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import pytest
import torch

from datamodules.synthetic.style_images import write_style_images


class Finished(NamedTuple):
    """Exit status and printed text of a benchmark."""

    status: int
    out: str
    err: str

    def ratios(self) -> dict[str, float]:
        """Return the ratios by what they compare; fail if the benchmark failed."""
        assert self.status == 0, self.err
        found = re.findall(r"^ *ratio ([\d.]+|nan|inf): (.+)$", self.out, re.M)
        assert self.out.count("ratio ") == len(found)
        return {name: float(number) for number, name in found}

    def user_error(self) -> str:
        """Return the one line for the user; fail if the benchmark ended in another way."""
        assert self.status == 2, self.out
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


@pytest.fixture
def run_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Finished]]:
    """Return a function that runs ``python -m benchmarks.NAME ARGUMENTS`` in this process."""
    logger = logging.getLogger("pytorch_lightning")
    threads, opencv_threads, level = torch.get_num_threads(), cv2.getNumThreads(), logger.level

    def run(name: str, *arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        status: Any = 0
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    with warnings.catch_warnings():
        yield run
    # Benchmarks set these for the whole process.
    torch.set_num_threads(threads)
    cv2.setNumThreads(opencv_threads)
    logger.setLevel(level)


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the checkpoint of a system as ``train.py`` does."""

    def write(module: Any, **data_arguments: Any) -> Path:
        path = tmp_path / "best.ckpt"
        class_path = f"{type(module).__module__}.{type(module).__qualname__}"
        cli = {"_class_path": class_path, "_instantiator": "pytorch_lightning.cli.instantiate_module"}
        checkpoint = {
            "state_dict": module.state_dict(),
            "hyper_parameters": {**module.hparams, **cli},
            "datamodule_hyper_parameters": data_arguments,
            "pytorch-lightning_version": "2.6",
        }
        torch.save(checkpoint, path)
        return path

    return write


@pytest.fixture(scope="session")
def style_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three content images and one style image of 48 pixels."""
    folder = tmp_path_factory.mktemp("style_images")
    write_style_images(str(folder), contents=3, styles=1, size=48)
    return folder
