"""Frames per second of the detectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    assert run_benchmark("detection_fps", "--ckpt_path", "missing.ckpt").is_user_error("detection_fps")
