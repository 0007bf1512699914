"""Decoding and transforms against torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.synthetic.imagenet import write_imagenet


def test_ratios_are_printed(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    write_imagenet(str(tmp_path), classes=2, train=2, val=1, size=256)
    finished = run_benchmark("input_pipeline", tmp_path, "--batches", "1", "--repeats", "1")
    assert list(finished.ratios()) == [
        "reference / ours, batches",
        "reference / ours",
        "reference / ours, normalized",
        "ours, all rows / ours",
    ]
    assert min(finished.ratios().values()) > 0
    assert finished.out.startswith("6 images of ")


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    message = run_benchmark("input_pipeline", tmp_path / "missing").user_error()
    assert "expected a folder of images" in message
    assert run_benchmark("input_pipeline", "--batches", "0").user_error() == "batches: expected at least 1, found 0"
