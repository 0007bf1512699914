"""Synthetic dataset in the layout of Food-101: dishes that differ in color, texture and arrangement."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable

import numpy as np

from datamodules.synthetic.drawing import (
    DishCanvas,
    check_arguments,
    draw_background,
    finish_image,
    random_shape,
    save_jpeg,
    write_lines,
)


def write_food101(
    folder: str, classes: int = 4, train: int = 64, val: int = 16, size: int = 64, seed: int = 0
) -> list[str]:
    """Write ``folder/food-101/images/<class>/<number>.jpg`` and ``folder/food-101/meta``.

    A class is a dish of Food-101, seen from above or from the side. Table, plate, light, position, scale, rotation and
    number of pieces vary. The images depend only on the arguments.

    Args:
        folder: output folder, created if missing; existing files stay.
        classes: number of classes, 2 to 12.
        train: training images per class.
        val: test images per class; there is no validation split.
        size: shorter side of the images in pixels, at least 16; the longer one is up to 1.5 times as long.
        seed: another seed draws other images of the same classes.

    Returns:
        Class names, sorted, in label order.

    Raises:
        UserError: an argument is out of range.
    """
    check_arguments(classes, len(DISHES), train, val, size)
    names = list(DISHES)[:classes]
    root = os.path.join(folder, "food-101")
    os.makedirs(os.path.join(root, "meta"), exist_ok=True)
    for split_index, (split, count) in enumerate((("train", train), ("test", val))):
        entries: dict[str, list[str]] = {}
        for label, name in enumerate(names):
            os.makedirs(os.path.join(root, "images", name), exist_ok=True)
            entries[name] = [f"{name}/{100_000 * (split_index + 1) + i}" for i in range(count)]
            for i, entry in enumerate(entries[name]):
                image = draw_dish(name, size, np.random.default_rng((seed, split_index, label, i)))
                save_jpeg(os.path.join(root, "images", f"{entry}.jpg"), image)
        entries = dict(sorted(entries.items()))
        with open(os.path.join(root, "meta", f"{split}.json"), "w") as file:
            json.dump(entries, file)
        write_lines(os.path.join(root, "meta", f"{split}.txt"), [e for group in entries.values() for e in group])
    write_lines(os.path.join(root, "meta", "classes.txt"), sorted(names))
    labels = [name.replace("_", " ").capitalize() for name in sorted(names)]
    write_lines(os.path.join(root, "meta", "labels.txt"), labels)
    return sorted(names)


def draw_dish(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one image of a dish.

    Args:
        name: one of `DISHES`.
        size: shorter side in pixels.
        rng: source of all randomness.

    Returns:
        RGB image, uint8 (H, W, 3).
    """
    height, width = random_shape(size, rng)
    image = np.clip(0.8 * draw_background(2 * height, 2 * width, rng), 0, 255).astype(np.uint8)
    radius = 2 * size * rng.uniform(0.4, 0.55)
    center = np.array([width, height]) + rng.normal(0, 0.08 * size, 2)
    dish = DishCanvas(image, center, radius, rng)
    if rng.random() < 0.8:
        plate = dish.color(rng.random(), rng.uniform(0, 0.15), rng.uniform(0.75, 0.95))
        dish.disk((0, 0), 1, plate)
        dish.disk((0, 0), 0.8, [0.93 * channel for channel in plate])
    dish.radius *= rng.uniform(0.75, 0.95)
    DISHES[name](dish)
    return finish_image(image, (0.75, 1.1), (0.9, 1.1), rng)


# --- dishes -----------------------------------------------------------------------------------------------------------


def _pizza(dish: DishCanvas) -> None:
    dish.disk((0, 0), 0.95, dish.color(0.09, 0.6, 0.75))
    dish.disk((0, 0), 0.83, dish.color(0.03, 0.8, 0.75))
    for _ in range(60):
        dish.disk(dish.random_point(0.78), dish.rng.uniform(0.05, 0.12), dish.color(0.13, 0.55, 0.95))
    for _ in range(dish.rng.integers(7, 13)):
        dish.disk(dish.random_point(0.68), 0.12, dish.color(0.0, 0.8, 0.6))


def _caesar_salad(dish: DishCanvas) -> None:
    for _ in range(70):
        leaf = dish.color(dish.rng.uniform(0.22, 0.32), 0.6, dish.rng.uniform(0.4, 0.8))
        axes = (dish.rng.uniform(0.1, 0.28), dish.rng.uniform(0.05, 0.12))
        dish.arc(dish.random_point(), axes, leaf, dish.rng.uniform(0, 360))
    for _ in range(dish.rng.integers(6, 14)):
        dish.stick(dish.random_point(), dish.rng.uniform(0, 3), 0.12, 0.12, dish.color(0.1, 0.5, 0.75))
        dish.stick(dish.random_point(), dish.rng.uniform(0, 3), 0.2, 0.05, dish.color(0.13, 0.15, 0.95))


def _spaghetti_bolognese(dish: DishCanvas) -> None:
    for _ in range(80):
        start, axes = dish.rng.uniform(0, 360), dish.rng.uniform(0.2, 0.6, 2)
        noodle = dish.color(0.12, 0.5, dish.rng.uniform(0.75, 0.95))
        dish.arc(dish.random_point(0.4), tuple(axes), noodle, dish.rng.uniform(0, 360), (start, start + 170), 0.035)
    for _ in range(40):
        dish.disk(dish.random_point(0.42), dish.rng.uniform(0.04, 0.12), dish.color(0.02, 0.8, 0.5))


def _donuts(dish: DishCanvas) -> None:
    icing = dish.rng.choice([(0.93, 0.4, 0.95), (0.07, 0.7, 0.3), (0.1, 0.08, 0.97)])
    count = int(dish.rng.integers(2, 5))
    for i in range(count):
        angle = 2 * math.pi * i / count
        center = 0.52 * np.array([math.cos(angle), math.sin(angle)])
        dish.arc(center, (0.3, 0.3), dish.color(0.08, 0.65, 0.65), thickness=0.28)
        dish.arc(center, (0.3, 0.3), dish.color(*icing), thickness=0.17)
        for _ in range(14):
            rotation = dish.rng.uniform(0, 2 * math.pi)
            point = center + dish.rng.uniform(0.24, 0.36) * np.array([math.cos(rotation), math.sin(rotation)])
            dish.stick(point, dish.rng.uniform(0, 3), 0.05, 0.02, dish.color(dish.rng.random(), 0.8, 0.9))


def _french_fries(dish: DishCanvas) -> None:
    for _ in range(55):
        angle, length = dish.rng.uniform(0, math.pi), dish.rng.uniform(0.5, 0.9)
        point = dish.random_point(0.5)
        dish.stick(point + 0.02, angle, length, 0.1, dish.color(0.1, 0.75, 0.6))
        dish.stick(point, angle, length, 0.08, dish.color(0.13, 0.6, 0.92))


def _sushi(dish: DishCanvas) -> None:
    filling = dish.rng.choice([(0.04, 0.65, 0.95), (0.3, 0.5, 0.7), (0.98, 0.7, 0.75)])
    for row in (-0.5, 0.0, 0.5):
        for column in (-0.5, 0.0, 0.5):
            if dish.rng.random() < 0.85:
                center = np.array([column, row]) + dish.rng.normal(0, 0.02, 2)
                dish.disk(center, 0.23, dish.color(0.4, 0.3, 0.12))
                dish.disk(center, 0.19, dish.color(0.12, 0.05, 0.95))
                dish.disk(center, 0.09, dish.color(*filling))


def _waffles(dish: DishCanvas) -> None:
    side, bars = 0.7, int(dish.rng.integers(4, 7))
    dish.polygon([(-side, -side), (side, -side), (side, side), (-side, side)], dish.color(0.1, 0.6, 0.85))
    dark = dish.color(0.08, 0.75, 0.5)
    for i in range(bars + 1):
        offset = side * (2 * i / bars - 1)
        dish.stick(np.array([0, offset]), 0, 2 * side, 0.05, dark)
        dish.stick(np.array([offset, 0]), math.pi / 2, 2 * side, 0.05, dark)
    for _ in range(dish.rng.integers(0, 6)):
        dish.disk(dish.random_point(0.6), 0.1, dish.color(0.98, 0.8, 0.8))


def _fried_rice(dish: DishCanvas) -> None:
    for _ in range(420):
        grain = dish.color(0.12, dish.rng.uniform(0.1, 0.35), dish.rng.uniform(0.8, 0.98))
        dish.arc(dish.random_point(0.75), (0.06, 0.025), grain, dish.rng.uniform(0, 360))
    for _ in range(dish.rng.integers(12, 25)):
        dish.disk(dish.random_point(0.7), 0.045, dish.color(0.3, 0.7, 0.6))
        dish.stick(dish.random_point(0.7), dish.rng.uniform(0, 3), 0.06, 0.06, dish.color(0.06, 0.85, 0.9))


def _steak(dish: DishCanvas) -> None:
    dish.arc((0, 0), (0.85, 0.55), dish.color(0.1, 0.3, 0.75))
    dish.arc((0, 0), (0.79, 0.49), dish.color(0.04, 0.6, dish.rng.uniform(0.3, 0.45)))
    slant, marks = dish.rng.uniform(0.8, 2.2), int(dish.rng.integers(4, 7))
    for i in range(marks):
        dish.stick(np.array([1.1 * (i + 0.5) / marks - 0.55, 0]), slant, 0.6, 0.06, dish.color(0.05, 0.6, 0.13))


def _pancakes(dish: DishCanvas) -> None:
    dish.rotation = 0.0
    layers = int(dish.rng.integers(3, 6))
    for i in range(layers):
        height = 0.35 - 0.6 * i / layers
        dish.arc((0, height + 0.06), (0.75, 0.4), dish.color(0.11, 0.4, 0.9))
        dish.arc((0, height), (0.75, 0.4), dish.color(0.07, 0.7, 0.6))
    dish.arc((0, height), (0.5, 0.25), dish.color(0.06, 0.9, 0.4))
    dish.stick(np.array([0.0, height]), dish.rng.uniform(0, 3), 0.14, 0.2, dish.color(0.15, 0.55, 0.97))


def _hamburger(dish: DishCanvas) -> None:
    dish.rotation = dish.rng.normal(0, 0.08)
    bun = dish.color(0.09, 0.65, 0.75)
    dish.arc((0, 0.35), (0.75, 0.35), bun, span=(0, 180))
    dish.polygon([(-0.75, 0.2), (0.75, 0.2), (0.75, 0.36), (-0.75, 0.36)], dish.color(0.05, 0.6, 0.28))
    dish.polygon([(-0.8, 0.12), (0.8, 0.12), (0.45, 0.32), (0.1, 0.18)], dish.color(0.13, 0.8, 0.95))
    dish.polygon([(-0.72, 0.0), (0.72, 0.0), (0.72, 0.13), (-0.72, 0.13)], dish.color(0.0, 0.75, 0.75))
    for x in np.linspace(-0.8, 0.8, 9):
        dish.disk((x, 0.0), 0.1, dish.color(0.28, 0.65, 0.7))
    dish.arc((0, -0.02), (0.8, 0.6), bun, span=(180, 360))
    for _ in range(12):
        x, y = dish.random_point(0.5)
        dish.arc((x, -0.3 + 0.5 * y), (0.035, 0.02), dish.color(0.12, 0.2, 0.95))


def _ice_cream(dish: DishCanvas) -> None:
    for i in range(int(dish.rng.integers(2, 5))):
        angle = 2 * math.pi * i / 3 + dish.rng.normal(0, 0.2)
        center = (0.35 if i < 3 else 0.0) * np.array([math.cos(angle), math.sin(angle)])
        hue, saturation, value = dish.rng.choice(
            [(0.95, 0.3, 0.95), (0.12, 0.2, 0.97), (0.4, 0.25, 0.9), (0.06, 0.6, 0.45)]
        )
        dish.disk(center, 0.4, dish.color(hue, saturation, 0.85 * value))
        dish.disk(center - 0.03, 0.35, dish.color(hue, saturation, value))
        dish.disk(center - 0.13, 0.1, dish.color(hue, saturation / 3, 1.0))


# Adjacent classes differ in both color and arrangement, so that a small number of classes is easy to separate.
DISHES: dict[str, Callable[[DishCanvas], None]] = {
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
