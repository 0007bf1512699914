"""The sliding window as a loop and in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_ratios_are_printed(run_benchmark: Callable[..., Any]) -> None:
    finished = run_benchmark("sliding_window", "--size", 96, "--window", 48, "--repeats", 1)
    ratios = finished.ratios()
    assert list(ratios) == ["seconds, one at a time / one pass", "seconds, batches of 100 / one pass"]
    assert min(ratios.values()) > 0
    assert finished.out.startswith("7x7 windows of 48 pixels with stride 8 in 96x96")


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    message = run_benchmark("sliding_window", "--size", 32).user_error()
    assert message == "size: expected at least the window of 64 pixels, found 32"
    assert run_benchmark("sliding_window", "--window", 30).user_error().startswith("window_size: expected a multiple")
