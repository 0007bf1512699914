"""Draws contents, scenes with objects, and styles, textures of many kinds, in folders as `StyleImages` reads them."""

from __future__ import annotations

import os
from collections.abc import Callable

import cv2
import numpy as np

from datamodules.synthetic.drawing import CLASSES, check_arguments, color, draw_picture, save, with_noise


def write_style_images(folder: str, contents: int = 12, styles: int = 6, size: int = 128, seed: int = 0) -> list[str]:
    """Writes ``folder/content/<nnn>.jpg`` and ``folder/style/<kind>_<nn>.jpg``.

    Contents are scenes of objects before clutter. Styles are squares of one texture in two to four colors each:
    stripes, dots, checks, waves, cells and strokes in turn.

    Args:
        folder: where; it is made if missing.
        contents, styles: how many images of each.
        size: side of the styles and the contents' shorter side in pixels, at least 16.
        seed: another seed draws other images.

    Returns:
        The kinds of styles that were drawn.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(2, 2, contents, styles, size)
    for name in ("content", "style"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    for i in range(contents):
        rng = np.random.default_rng((seed, 0, i))
        picture = draw_picture(CLASSES[i % len(CLASSES)], rng.random(), size, rng)
        save(os.path.join(folder, "content", f"{i:03d}.jpg"), picture)
    kinds = list(KINDS)
    for i in range(styles):
        rng = np.random.default_rng((seed, 1, i))
        kind = kinds[i % len(kinds)]
        save(os.path.join(folder, "style", f"{kind}_{i:02d}.jpg"), draw_texture(kind, size, rng))
    return kinds[:styles]


def draw_texture(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A texture of one of `KINDS`: uint8 (S,S,3), RGB."""
    palette = np.stack([color(rng.random(), rng.uniform(0.4, 1), rng.uniform(0.3, 1)) for _ in range(4)])
    return with_noise(KINDS[kind](size, palette, rng), rng)


def _turned(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across a random direction, in periods of a tenth to a fifth of the side."""
    y, x = np.mgrid[:size, :size] / size * rng.uniform(5, 10)
    angle = rng.uniform(0, np.pi)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _stripes(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    along, _ = _turned(size, rng)
    return palette[np.floor(along * 2).astype(int) % 3]


def _checks(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    along, across = _turned(size, rng)
    return palette[(np.floor(along).astype(int) + np.floor(across).astype(int)) % 2]


def _dots(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    along, across = _turned(size, rng)
    inside = np.hypot(along % 1 - 0.5, across % 1 - 0.5) < rng.uniform(0.2, 0.4)
    return palette[inside.astype(int)]


def _waves(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    along, across = _turned(size, rng)
    height = along + rng.uniform(0.3, 0.8) * np.sin(across * rng.uniform(1, 3))
    part = (0.5 + 0.5 * np.sin(2 * np.pi * height))[..., None]
    return palette[0] * part + palette[1] * (1 - part)


def _cells(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each place in the color of the nearest of many points, with seams."""
    points = rng.uniform(0, size, (60, 2))
    y, x = np.mgrid[:size, :size]
    distances = np.hypot(y[..., None] - points[:, 0], x[..., None] - points[:, 1])
    nearest = np.sort(distances, -1)[..., :2]
    picture = palette[1 + distances.argmin(-1) % 3]
    picture[nearest[..., 1] - nearest[..., 0] < size / 64] = palette[0] * 0.3
    return picture


def _strokes(size: int, palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = np.tile(palette[0], (size, size, 1))
    lean = rng.uniform(0, np.pi)
    for _ in range(400):
        start, angle = rng.uniform(0, size, 2), lean + rng.normal(0, 0.4)
        end = start + size * rng.uniform(0.05, 0.15) * np.array([np.cos(angle), np.sin(angle)])
        shade = palette[rng.integers(4)] * rng.uniform(0.7, 1.1)
        cv2.line(picture, start.astype(int).tolist(), end.astype(int).tolist(), shade.tolist(), max(1, size // 40))
    return picture


KINDS: dict[str, Callable[[int, np.ndarray, np.random.Generator], np.ndarray]] = {
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "waves": _waves,
    "cells": _cells,
    "strokes": _strokes,
}
