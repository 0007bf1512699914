"""The sliding window as a loop and in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_ratios_are_printed(run_benchmark: Callable[..., Any]) -> None:
    ratios = run_benchmark("sliding_window", "--size", "96", "--window", "48", "--repeats", "1").ratios()
    assert len(ratios) >= 2
    assert min(ratios) > 0
