"""Run benchmarks as a user does, by their command lines."""

from __future__ import annotations

import logging
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from datamodules.synthetic.style_images import write_style_images


class Finished(NamedTuple):
    """Exit status and printed text of a benchmark."""

    status: int
    out: str
    err: str

    def ratios(self) -> list[float]:
        """Return the ratios that were printed; fail if the benchmark failed."""
        assert self.status == 0, self.err
        return [float(number) for number in re.findall(r"ratio[^\d\n]*([\d.]+)", self.out)]

    def is_user_error(self, name: str) -> bool:
        """Whether the benchmark ended with one line for the user."""
        lines = self.err.splitlines()
        return self.status in (1, 2) and "Traceback" not in self.err and lines[0].startswith(("error: ", f"{name}: "))


@pytest.fixture
def run_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Finished]]:
    """Return a function that runs ``python -m benchmarks.NAME ARGUMENTS`` in this process."""
    logger = logging.getLogger("pytorch_lightning")
    threads, level = torch.get_num_threads(), logger.level

    def run(name: str, *arguments: str) -> Finished:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        status: int | str | None = 0
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return Finished(status if isinstance(status, int) else int(status is not None), captured.out, captured.err)

    yield run
    # Benchmarks set both for the whole process.
    torch.set_num_threads(threads)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def style_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three content images and one style image of 48 pixels."""
    folder = tmp_path_factory.mktemp("style_images")
    write_style_images(str(folder), contents=3, styles=1, size=48)
    return folder
