"""Feature inversion by layer, at a small size."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_table_and_the_figure(run_benchmark: Callable[..., Any], style_images: Path, tmp_path: Path) -> None:
    figure = tmp_path / "row.png"
    finished = run_benchmark(
        "inversion_by_layer", "--content", style_images / "content", "--layers", "pool1", "fc6",
        "--weights", "random", "--steps", "1", "--batch_size", "2", "--size", "48", "--figure", figure,
    )  # fmt: skip
    assert finished.status == 0, finished.err
    assert re.search(r"^pool1 +[\d,]+ +[\d.]+ +[\d.]+ +[+-][\d.]+$", finished.out, re.M)
    assert re.search(r"^fc6 ", finished.out, re.M)
    assert figure.exists()


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    assert "missing" in run_benchmark("inversion_by_layer", "--content", "missing").user_error()
