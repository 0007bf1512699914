"""Average precision against torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_ratios_are_printed(run_benchmark: Callable[..., Any]) -> None:
    ratios = run_benchmark("voc_map", "--images", "20", "--detections", "10").ratios()
    assert len(ratios) >= 1
    assert min(ratios) > 0
