"""Synthetic content and style images in the folders that `StyleImages` reads."""

from __future__ import annotations

import os
from collections.abc import Callable

import cv2
import numpy as np

from datamodules.synthetic.drawing import (
    TEXTURED_SHAPES,
    add_noise,
    draw_shape_image,
    hsv_to_rgb,
    require_range,
    save_jpeg,
)


def write_style_images(folder: str, contents: int = 12, styles: int = 6, size: int = 128, seed: int = 0) -> list[str]:
    """Write ``folder/content/<nnn>.jpg`` and ``folder/style/<texture>_<nn>.jpg``.

    Content images show a shape in front of clutter. Style images are square and show one texture in two to four
    colors; the textures are `STYLE_TEXTURES` in turn.

    Args:
        folder: output folder, created if missing; existing files stay.
        contents: number of content images.
        styles: number of style images.
        size: side of the style images and shorter side of the content images in pixels, at least 16.
        seed: another seed draws other images.

    Returns:
        Names of the textures that were drawn.

    Raises:
        UserError: an argument is out of range.
    """
    require_range("contents", contents, 1, 100_000)
    require_range("styles", styles, 1, 100_000)
    require_range("size", size, 16, 1024)
    for name in ("content", "style"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    for i in range(contents):
        rng = np.random.default_rng((seed, 0, i))
        image = draw_shape_image(TEXTURED_SHAPES[i % len(TEXTURED_SHAPES)], rng.random(), size, rng)
        save_jpeg(os.path.join(folder, "content", f"{i:03d}.jpg"), image)
    textures = list(STYLE_TEXTURES)
    for i in range(styles):
        rng = np.random.default_rng((seed, 1, i))
        texture = textures[i % len(textures)]
        save_jpeg(os.path.join(folder, "style", f"{texture}_{i:02d}.jpg"), draw_style(texture, size, rng))
    return textures[:styles]


def draw_style(texture: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one of `STYLE_TEXTURES`: RGB, uint8 (size, size, 3)."""
    palette = np.stack([hsv_to_rgb(rng.random(), rng.uniform(0.4, 1), rng.uniform(0.3, 1)) for _ in range(4)])
    return add_noise(STYLE_TEXTURES[texture](size, palette, rng), rng)


def _rotated_grid(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates along and across a random direction, in periods of a tenth to a fifth of the side."""
    y, x = np.mgrid[:size, :size] / size * rng.uniform(5, 10)
    angle = rng.uniform(0, np.pi)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _stripes(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    along, _ = _rotated_grid(size, rng)
    return palette[np.floor(along * 2).astype(int) % 3]


def _checks(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    along, across = _rotated_grid(size, rng)
    return palette[(np.floor(along).astype(int) + np.floor(across).astype(int)) % 2]


def _dots(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    along, across = _rotated_grid(size, rng)
    inside = np.hypot(along % 1 - 0.5, across % 1 - 0.5) < rng.uniform(0.2, 0.4)
    return palette[inside.astype(int)]


def _waves(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    along, across = _rotated_grid(size, rng)
    phase = along + rng.uniform(0.3, 0.8) * np.sin(across * rng.uniform(1, 3))
    mix = (0.5 + 0.5 * np.sin(2 * np.pi * phase))[..., None]
    return palette[0] * mix + palette[1] * (1 - mix)


def _cells(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the Voronoi cells of random points, with dark edges."""
    points = rng.uniform(0, size, (60, 2))
    y, x = np.mgrid[:size, :size]
    distances = np.hypot(y[..., None] - points[:, 0], x[..., None] - points[:, 1])
    nearest = np.sort(distances, -1)[..., :2]
    image = palette[1 + distances.argmin(-1) % 3]
    image[nearest[..., 1] - nearest[..., 0] < size / 64] = palette[0] * 0.3
    return image


def _strokes(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    image = np.tile(palette[0], (size, size, 1))
    mean_angle = rng.uniform(0, np.pi)
    for _ in range(400):
        start, angle = rng.uniform(0, size, 2), mean_angle + rng.normal(0, 0.4)
        end = start + size * rng.uniform(0.05, 0.15) * np.array([np.cos(angle), np.sin(angle)])
        color = palette[rng.integers(4)] * rng.uniform(0.7, 1.1)
        cv2.line(image, start.astype(int).tolist(), end.astype(int).tolist(), color.tolist(), max(1, size // 40))
    return image


STYLE_TEXTURES: dict[str, Callable[[int, np.ndarray, np.random.Generator], np.ndarray]] = {
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "waves": _waves,
    "cells": _cells,
    "strokes": _strokes,
}
