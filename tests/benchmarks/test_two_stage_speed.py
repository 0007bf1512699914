"""Seconds per image of the R-CNN family."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.synthetic.voc import write_voc


def test_the_table(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    write_voc(str(tmp_path), classes=2, train=1, val=1, size=64)
    finished = run_benchmark(
        "two_stage_speed", "--images", tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages", "--timed", 1,
        "--proposals", 5, "--width_multiplier", 0.05, "--device", "cpu",
    )  # fmt: skip
    ratios = finished.ratios()
    assert ratios.keys() == {
        f"seconds per image, {pair}"
        for pair in ("R-CNN / Fast R-CNN", "Fast R-CNN / Faster R-CNN", "R-CNN / Faster R-CNN")
    }
    assert min(ratios.values()) >= 0
    for name in ("R-CNN", "Fast R-CNN", "Faster R-CNN"):
        (percentages,) = re.findall(rf"^{name} +[\d.]+ +[\d.]+ +([\d.]+)% +([\d.]+)% +([\d.]+)% ", finished.out, re.M)
        assert abs(sum(map(float, percentages)) - 100) < 0.2


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    assert "missing" in run_benchmark("two_stage_speed", "--images", "missing").user_error()
    message = run_benchmark("two_stage_speed", "--images", "missing", "--timed", 0).user_error()
    assert message == "timed: expected at least 1, found 0"
