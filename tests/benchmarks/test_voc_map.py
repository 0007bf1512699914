"""Average precision against torchmetrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def test_the_ratio_is_printed(run_benchmark: Callable[..., Any]) -> None:
    finished = run_benchmark("voc_map", "--images", 20, "--detections", 10)
    assert finished.ratios()["seconds, torchmetrics / VOCMeanAP"] > 0
    ours, theirs = (float(value) for value in re.findall(r"mAP ([\d.]+)$", finished.out, re.M))
    assert abs(ours - theirs) < 0.05  # two protocols


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    assert run_benchmark("voc_map", "--images", 0).user_error() == "images: expected at least 1, found 0"
