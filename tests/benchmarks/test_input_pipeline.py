"""Decoding and transforms against torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.synthetic.imagenet import write_imagenet


def test_ratios_are_printed(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    write_imagenet(str(tmp_path), classes=2, train=2, val=1, size=256)
    assert len(run_benchmark("input_pipeline", str(tmp_path), "--repeats", "1").ratios()) >= 2


def test_a_missing_folder_is_skipped(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    assert "skipped: input_pipeline needs" in run_benchmark("input_pipeline", str(tmp_path / "missing")).out
