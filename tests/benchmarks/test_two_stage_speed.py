"""Seconds per image of the R-CNN family."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.synthetic.voc import write_voc


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    assert run_benchmark("two_stage_speed", "--images", "missing").is_user_error("two_stage_speed")


def test_the_table(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    write_voc(str(tmp_path), classes=2, train=1, val=1, size=64)
    finished = run_benchmark(
        "two_stage_speed", "--images", str(tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages"), "--timed", "1",
        "--proposals", "5", "--width_multiplier", "0.05", "--device", "cpu",
    )  # fmt: skip
    assert finished.status == 0, finished.err
    for name in ("R-CNN", "Fast R-CNN", "Faster R-CNN"):
        assert re.search(rf"^{name} +[\d.]+ +[\d.]+ ", finished.out, re.M)
