"""The dense CRF, plain and fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_ratios_are_printed(run_benchmark: Callable[..., Any]) -> None:
    ratios = run_benchmark("dense_crf", "--size", "24", "32", "--repeats", "1", "--iterations", "2").ratios()
    assert len(ratios) >= 1
    assert min(ratios) > 0
