"""SSD's plain and batched matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_ratios_are_printed(run_benchmark: Callable[..., Any]) -> None:
    ratios = run_benchmark("ssd_matching", "--batch_size", "2", "--objects", "3", "--repeat", "1").ratios()
    assert len(ratios) >= 1
    assert min(ratios) > 0
