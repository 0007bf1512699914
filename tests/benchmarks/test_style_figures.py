"""The lecture's figures of style transfer, at a small size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image


def test_figures(run_benchmark: Callable[..., Any], style_images: Path, tmp_path: Path) -> None:
    content, style = (str(next((style_images / name).iterdir())) for name in ("content", "style"))
    arguments = ["--content", content, "--style", style, "--size", "48", "--steps", "2", "--backbone", "vgg16"]
    arguments += ["--weights", "random", "--layers", "relu1_1", "fc8", "--out", str(tmp_path)]
    finished = run_benchmark("style_figures", *arguments)
    assert finished.status == 0, finished.err
    # Columns of a figure; a tile has 192 pixels.
    for name, columns in (("inversion", 3), ("textures", 6), ("row", 7), ("styles", 2)):
        assert Image.open(tmp_path / f"{name}.png").width // 192 == columns
    assert "relu1_1" in finished.out


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["--content", str(tmp_path / "no.jpg"), "--out", str(tmp_path), "--steps", "2"]
    finished = run_benchmark("style_figures", *arguments)
    assert finished.status == 2
    (line,) = finished.err.strip().splitlines()
    assert line.startswith("style_figures: ")
