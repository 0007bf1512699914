"""SSD's plain and batched matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_ratios_are_printed(run_benchmark: Callable[..., Any]) -> None:
    finished = run_benchmark("ssd_matching", "--batch_size", 2, "--objects", 3, "--repeats", 1)
    assert finished.ratios()["seconds, plain / batched, 3 objects"] > 0


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    message = run_benchmark("ssd_matching", "--objects", 3, 0).user_error()
    assert message == "objects: expected at least 1, found [3, 0]"
