"""The lecture's figures of style transfer, at a small size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.mark.parametrize(("name", "columns"), [("inversion", 3), ("textures", 6), ("row", 7), ("styles", 2)])
def test_a_figure(
    run_benchmark: Callable[..., Any], style_images: Path, tmp_path: Path, name: str, columns: int
) -> None:
    content, style = (next((style_images / kind).iterdir()) for kind in ("content", "style"))
    finished = run_benchmark(
        "style_figures", "--figures", name, "--content", content, "--style", style, "--size", 48, "--steps", 2,
        "--backbone", "vgg16", "--weights", "random", "--layers", "relu1_1", "fc8", "--out", tmp_path,
    )  # fmt: skip
    assert finished.status == 0, finished.err
    # A tile has 192 pixels.
    assert Image.open(tmp_path / f"{name}.png").width // 192 == columns
    if name == "inversion":
        assert "relu1_1" in finished.out


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["--content", str(tmp_path / "no.jpg"), "--out", str(tmp_path), "--steps", "2"]
    assert "no.jpg" in run_benchmark("style_figures", *arguments).user_error()
