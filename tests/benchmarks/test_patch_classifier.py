"""Separate and dense inference of the patch classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_ratios_are_printed(run_benchmark: Callable[..., Any]) -> None:
    ratios = run_benchmark("patch_classifier", "--size", "40", "48", "--patch_size", "32", "--repeats", "1").ratios()
    assert len(ratios) >= 1
    assert min(ratios) > 0
