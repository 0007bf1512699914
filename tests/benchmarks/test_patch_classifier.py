"""Separate and dense inference of the patch classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TINY = ("--size", 40, 48, "--patch_size", 32, "--repeats", 1)


def test_the_ratio_is_printed(run_benchmark: Callable[..., Any]) -> None:
    finished = run_benchmark("patch_classifier", *TINY)
    assert finished.ratios()["seconds, separate / dense"] > 0
    assert finished.out.startswith("5x6 patches of 32 pixels with stride 8 in 40x48: largest difference ")


def test_vgg16_may_differ(run_benchmark: Callable[..., Any]) -> None:
    finished = run_benchmark(
        "patch_classifier", *TINY, "--backbone", "vgg16", "--stride", 4, "--width_multiplier", 0.05
    )
    assert finished.ratios()["seconds, separate / dense"] > 0


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    message = run_benchmark("patch_classifier", "--size", 8, 48).user_error()
    assert message == "size: expected at least a patch of 64 pixels, found 8 48"
    assert run_benchmark("patch_classifier", "--stride", 0).user_error() == "stride: expected at least 1, found 0"
