"""Draws a small dataset in Food-101's layout: plates of food, which differ by color, texture and arrangement."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable

import cv2
import numpy as np

from datamodules.synthetic.drawing import Brush, background, check_arguments, save, with_noise


def write_food101(
    folder: str, classes: int = 4, train: int = 64, val: int = 16, size: int = 64, seed: int = 0
) -> list[str]:
    """Writes ``folder/food-101/images/<class>/<number>.jpg`` and ``folder/food-101/meta``.

    A class is a dish of Food-101, drawn from above or from the side. Table, plate, light, place, scale, turn and number
    of the pieces vary. The images are a function of the arguments alone. Their sides are ``size`` to 1.5 times that.

    Args:
        folder: where; it is made if missing, and what was written there before stays.
        classes: number of classes, 2 to 12.
        train, val: training and test images a class; there is no validation split.
        size: shorter side of the images in pixels, at least 16.
        seed: another seed draws other images of the same classes.

    Returns:
        Names of the classes, sorted: label order.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(classes, len(DISHES), train, val, size)
    names = list(DISHES)[:classes]
    top = os.path.join(folder, "food-101")
    os.makedirs(os.path.join(top, "meta"), exist_ok=True)
    for split_index, (split, count) in enumerate((("train", train), ("test", val))):
        entries: dict[str, list[str]] = {}
        for label, name in enumerate(names):
            os.makedirs(os.path.join(top, "images", name), exist_ok=True)
            entries[name] = [f"{name}/{100_000 * (split_index + 1) + i}" for i in range(count)]
            for i, entry in enumerate(entries[name]):
                picture = draw_dish(name, size, np.random.default_rng((seed, split_index, label, i)))
                save(os.path.join(top, "images", f"{entry}.jpg"), picture)
        entries = dict(sorted(entries.items()))
        with open(os.path.join(top, "meta", f"{split}.json"), "w") as file:
            json.dump(entries, file)
        _write_lines(os.path.join(top, "meta", f"{split}.txt"), [e for group in entries.values() for e in group])
    _write_lines(os.path.join(top, "meta", "classes.txt"), sorted(names))
    _write_lines(
        os.path.join(top, "meta", "labels.txt"), [name.replace("_", " ").capitalize() for name in sorted(names)]
    )
    return sorted(names)


def _write_lines(path: str, lines: list[str]) -> None:
    with open(path, "w") as file:
        file.writelines(f"{line}\n" for line in lines)


def draw_dish(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One image of a dish: uint8 (H,W,3), RGB, its shorter side ``size``.

    Args:
        name: one of `DISHES`.
        size: in pixels.
        rng: where all randomness comes from.
    """
    longer = int(size * rng.uniform(1, 1.5))
    height, width = (size, longer) if rng.random() < 0.7 else (longer, size)
    # Drawn at twice the size: smooth edges once reduced.
    canvas = np.clip(0.8 * background(2 * height, 2 * width, rng), 0, 255).astype(np.uint8)
    radius = 2 * size * rng.uniform(0.4, 0.55)
    center = np.array([width, height]) + rng.normal(0, 0.08 * size, 2)
    brush = Brush(canvas, center, radius, rng)
    if rng.random() < 0.8:
        plate = brush.tone(rng.random(), rng.uniform(0, 0.15), rng.uniform(0.75, 0.95))
        brush.disk((0, 0), 1, plate)
        brush.disk((0, 0), 0.8, [0.93 * channel for channel in plate])
    brush.radius *= rng.uniform(0.75, 0.95)
    DISHES[name](brush)
    picture = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float64)
    light = rng.uniform(0.75, 1.1) * rng.uniform(0.9, 1.1, 3)  # its strength, and its color
    return with_noise(picture * light, rng)


# --- dishes -----------------------------------------------------------------------------------------------------------


def _pizza(brush: Brush) -> None:
    brush.disk((0, 0), 0.95, brush.tone(0.09, 0.6, 0.75))
    brush.disk((0, 0), 0.83, brush.tone(0.03, 0.8, 0.75))
    for _ in range(60):
        brush.disk(brush.anywhere(0.78), brush.rng.uniform(0.05, 0.12), brush.tone(0.13, 0.55, 0.95))
    for _ in range(brush.rng.integers(7, 13)):
        brush.disk(brush.anywhere(0.68), 0.12, brush.tone(0.0, 0.8, 0.6))


def _caesar_salad(brush: Brush) -> None:
    for _ in range(70):
        leaf = brush.tone(brush.rng.uniform(0.22, 0.32), 0.6, brush.rng.uniform(0.4, 0.8))
        axes = (brush.rng.uniform(0.1, 0.28), brush.rng.uniform(0.05, 0.12))
        brush.arc(brush.anywhere(), axes, leaf, brush.rng.uniform(0, 360))
    for _ in range(brush.rng.integers(6, 14)):
        brush.stick(brush.anywhere(), brush.rng.uniform(0, 3), 0.12, 0.12, brush.tone(0.1, 0.5, 0.75))
        brush.stick(brush.anywhere(), brush.rng.uniform(0, 3), 0.2, 0.05, brush.tone(0.13, 0.15, 0.95))


def _spaghetti_bolognese(brush: Brush) -> None:
    for _ in range(80):
        start, axes = brush.rng.uniform(0, 360), brush.rng.uniform(0.2, 0.6, 2)
        noodle = brush.tone(0.12, 0.5, brush.rng.uniform(0.75, 0.95))
        brush.arc(brush.anywhere(0.4), tuple(axes), noodle, brush.rng.uniform(0, 360), (start, start + 170), 0.035)
    for _ in range(40):
        brush.disk(brush.anywhere(0.42), brush.rng.uniform(0.04, 0.12), brush.tone(0.02, 0.8, 0.5))


def _donuts(brush: Brush) -> None:
    icing = brush.rng.choice([(0.93, 0.4, 0.95), (0.07, 0.7, 0.3), (0.1, 0.08, 0.97)])
    count = int(brush.rng.integers(2, 5))
    for i in range(count):
        angle = 2 * math.pi * i / count
        at = 0.52 * np.array([math.cos(angle), math.sin(angle)])
        brush.arc(at, (0.3, 0.3), brush.tone(0.08, 0.65, 0.65), thickness=0.28)
        brush.arc(at, (0.3, 0.3), brush.tone(*icing), thickness=0.17)
        for _ in range(14):
            turn = brush.rng.uniform(0, 2 * math.pi)
            place = at + brush.rng.uniform(0.24, 0.36) * np.array([math.cos(turn), math.sin(turn)])
            brush.stick(place, brush.rng.uniform(0, 3), 0.05, 0.02, brush.tone(brush.rng.random(), 0.8, 0.9))


def _french_fries(brush: Brush) -> None:
    for _ in range(55):
        angle, length = brush.rng.uniform(0, math.pi), brush.rng.uniform(0.5, 0.9)
        place = brush.anywhere(0.5)
        brush.stick(place + 0.02, angle, length, 0.1, brush.tone(0.1, 0.75, 0.6))
        brush.stick(place, angle, length, 0.08, brush.tone(0.13, 0.6, 0.92))


def _sushi(brush: Brush) -> None:
    filling = brush.rng.choice([(0.04, 0.65, 0.95), (0.3, 0.5, 0.7), (0.98, 0.7, 0.75)])
    for row in (-0.5, 0.0, 0.5):
        for column in (-0.5, 0.0, 0.5):
            if brush.rng.random() < 0.85:
                at = np.array([column, row]) + brush.rng.normal(0, 0.02, 2)
                brush.disk(at, 0.23, brush.tone(0.4, 0.3, 0.12))
                brush.disk(at, 0.19, brush.tone(0.12, 0.05, 0.95))
                brush.disk(at, 0.09, brush.tone(*filling))


def _waffles(brush: Brush) -> None:
    side, bars = 0.7, int(brush.rng.integers(4, 7))
    brush.polygon([(-side, -side), (side, -side), (side, side), (-side, side)], brush.tone(0.1, 0.6, 0.85))
    dark = brush.tone(0.08, 0.75, 0.5)
    for i in range(bars + 1):
        offset = side * (2 * i / bars - 1)
        brush.stick(np.array([0, offset]), 0, 2 * side, 0.05, dark)
        brush.stick(np.array([offset, 0]), math.pi / 2, 2 * side, 0.05, dark)
    for _ in range(brush.rng.integers(0, 6)):
        brush.disk(brush.anywhere(0.6), 0.1, brush.tone(0.98, 0.8, 0.8))


def _fried_rice(brush: Brush) -> None:
    for _ in range(420):
        grain = brush.tone(0.12, brush.rng.uniform(0.1, 0.35), brush.rng.uniform(0.8, 0.98))
        brush.arc(brush.anywhere(0.75), (0.06, 0.025), grain, brush.rng.uniform(0, 360))
    for _ in range(brush.rng.integers(12, 25)):
        brush.disk(brush.anywhere(0.7), 0.045, brush.tone(0.3, 0.7, 0.6))
        brush.stick(brush.anywhere(0.7), brush.rng.uniform(0, 3), 0.06, 0.06, brush.tone(0.06, 0.85, 0.9))


def _steak(brush: Brush) -> None:
    brush.arc((0, 0), (0.85, 0.55), brush.tone(0.1, 0.3, 0.75))
    brush.arc((0, 0), (0.79, 0.49), brush.tone(0.04, 0.6, brush.rng.uniform(0.3, 0.45)))
    slant, marks = brush.rng.uniform(0.8, 2.2), int(brush.rng.integers(4, 7))
    for i in range(marks):
        brush.stick(np.array([1.1 * (i + 0.5) / marks - 0.55, 0]), slant, 0.6, 0.06, brush.tone(0.05, 0.6, 0.13))


def _pancakes(brush: Brush) -> None:
    brush.turn = 0.0
    layers = int(brush.rng.integers(3, 6))
    for i in range(layers):
        height = 0.35 - 0.6 * i / layers
        brush.arc((0, height + 0.06), (0.75, 0.4), brush.tone(0.11, 0.4, 0.9))
        brush.arc((0, height), (0.75, 0.4), brush.tone(0.07, 0.7, 0.6))
    brush.arc((0, height), (0.5, 0.25), brush.tone(0.06, 0.9, 0.4))
    brush.stick(np.array([0.0, height]), brush.rng.uniform(0, 3), 0.14, 0.2, brush.tone(0.15, 0.55, 0.97))


def _hamburger(brush: Brush) -> None:
    brush.turn = brush.rng.normal(0, 0.08)
    bun = brush.tone(0.09, 0.65, 0.75)
    brush.arc((0, 0.35), (0.75, 0.35), bun, part=(0, 180))
    brush.polygon([(-0.75, 0.2), (0.75, 0.2), (0.75, 0.36), (-0.75, 0.36)], brush.tone(0.05, 0.6, 0.28))
    brush.polygon([(-0.8, 0.12), (0.8, 0.12), (0.45, 0.32), (0.1, 0.18)], brush.tone(0.13, 0.8, 0.95))
    brush.polygon([(-0.72, 0.0), (0.72, 0.0), (0.72, 0.13), (-0.72, 0.13)], brush.tone(0.0, 0.75, 0.75))
    for x in np.linspace(-0.8, 0.8, 9):
        brush.disk((x, 0.0), 0.1, brush.tone(0.28, 0.65, 0.7))
    brush.arc((0, -0.02), (0.8, 0.6), bun, part=(180, 360))
    for _ in range(12):
        x, y = brush.anywhere(0.5)
        brush.arc((x, -0.3 + 0.5 * y), (0.035, 0.02), brush.tone(0.12, 0.2, 0.95))


def _ice_cream(brush: Brush) -> None:
    for i in range(int(brush.rng.integers(2, 5))):
        angle = 2 * math.pi * i / 3 + brush.rng.normal(0, 0.2)
        at = (0.35 if i < 3 else 0.0) * np.array([math.cos(angle), math.sin(angle)])
        hue, saturation, value = brush.rng.choice(
            [(0.95, 0.3, 0.95), (0.12, 0.2, 0.97), (0.4, 0.25, 0.9), (0.06, 0.6, 0.45)]
        )
        brush.disk(at, 0.4, brush.tone(hue, saturation, 0.85 * value))
        brush.disk(at - 0.03, 0.35, brush.tone(hue, saturation, value))
        brush.disk(at - 0.13, 0.1, brush.tone(hue, saturation / 3, 1.0))


# Neighbors differ in color and arrangement both, so that a few classes are easier than all of them.
DISHES: dict[str, Callable[[Brush], None]] = {
    "pizza": _pizza,
    "caesar_salad": _caesar_salad,
    "sushi": _sushi,
    "spaghetti_bolognese": _spaghetti_bolognese,
    "hamburger": _hamburger,
    "ice_cream": _ice_cream,
    "french_fries": _french_fries,
    "donuts": _donuts,
    "fried_rice": _fried_rice,
    "steak": _steak,
    "waffles": _waffles,
    "pancakes": _pancakes,
}
