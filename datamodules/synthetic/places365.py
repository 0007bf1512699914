"""Draws a small dataset in either of Places365's layouts: outdoors a sky over a ground, indoors a room."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import cv2
import numpy as np

from datamodules.synthetic.drawing import check_arguments, color, save, with_noise

UNLABELLED = 4  # images in test_256, which have no public labels


def write_places365(
    folder: str, classes: int = 4, train: int = 64, val: int = 16, size: int = 64, seed: int = 0, easy: bool = False
) -> list[str]:
    """Writes a dataset in the standard layout, or in the easy one, with ``categories_places365.txt`` in both.

    Standard: ``places365_{train_standard,val,test}.txt``, ``data_256_standard/a/airfield/<image>.jpg``, ``val_256/``
    and ``test_256/``. Easy: ``places365_standard/{train,val}/<class>/<image>.jpg`` with ``train.txt`` and
    ``val.txt``, where a class is ``desert-sand`` for ``/d/desert/sand``.

    A class is a scene of Places365. Horizon, vanishing point, weather, light and all details vary. The images are a
    function of the arguments alone; they are square, as in the small version of the dataset. The first classes are such
    that sorted folder names would give wrong labels.

    Args:
        folder: where; it is made if missing, and what was written there before stays.
        classes: number of classes, 2 to 11.
        train, val: images a class.
        size: side of the images in pixels, at least 16.
        seed: another seed draws other images of the same classes.
        easy: the layout.

    Returns:
        The categories in label order.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(classes, len(SCENES), train, val, size)
    categories = sorted(list(SCENES)[:classes])
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for split_index, (split, count) in enumerate((("train", train), ("val", val))):
        for label, category in enumerate(categories):
            kind = list(SCENES).index(category)
            for i in range(count):
                number = i + 1 if split == "train" else label * count + i + 1
                name = f"{number:08d}.jpg" if split == "train" else f"Places365_val_{number:08d}.jpg"
                if easy:
                    path = f"places365_standard/{split}/{category.split('/', 2)[2].replace('/', '-')}/{name}"
                    lists[split].append(path.removeprefix("places365_standard/"))
                elif split == "train":
                    path = f"data_256_standard{category}/{name}"
                    lists[split].append(f"{category}/{name} {label}")
                else:
                    path = f"val_256/{name}"
                    lists[split].append(f"{name} {label}")
                path = os.path.join(folder, path)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                save(path, draw_scene(category, size, np.random.default_rng((seed, split_index, kind, i))))
    if not easy:
        os.makedirs(os.path.join(folder, "test_256"), exist_ok=True)
        for i in range(UNLABELLED):
            name = f"Places365_test_{i + 1:08d}.jpg"
            rng = np.random.default_rng((seed, 2, 0, i))
            save(os.path.join(folder, "test_256", name), draw_scene(categories[i % classes], size, rng))
            lists["test"].append(name)
    files = ("places365_train_standard.txt", "places365_val.txt", "places365_test.txt")
    if easy:
        files = ("places365_standard/train.txt", "places365_standard/val.txt", "")
    lines = [f"{category} {label}" for label, category in enumerate(categories)]
    for name, content in (("categories_places365.txt", lines), *zip(files, lists.values(), strict=True)):
        if name:
            with open(os.path.join(folder, name), "w") as file:
                file.writelines(f"{line}\n" for line in content)
    return categories


def draw_scene(category: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One image of a scene: uint8 (size,size,3), RGB.

    Args:
        category: one of `SCENES`.
        size: in pixels.
        rng: where all randomness comes from.
    """
    # Drawn at twice the size: smooth edges once reduced.
    view = View(2 * size, rng)
    SCENES[category](view)
    picture = cv2.resize(view.canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float64)
    light = rng.uniform(0.7, 1.1) * rng.uniform(0.92, 1.08, 3)  # its strength, and its color
    picture = with_noise(picture * light, rng)
    return np.ascontiguousarray(picture[:, ::-1]) if rng.random() < 0.5 else picture


# --- scenes -----------------------------------------------------------------------------------------------------------


class View:
    """A square image to draw on, in coordinates of 0..1 from its upper left.

    Args:
        size: in pixels.
        rng: where all randomness comes from.

    Attributes:
        canvas: uint8 (size,size,3).
        horizon: how far down it lies.
        vanishing: where on the horizon parallel lines meet.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.canvas = np.zeros((size, size, 3), np.uint8)
        self.horizon, self.vanishing = rng.uniform(0.35, 0.55), rng.uniform(0.35, 0.65)

    def tone(self, hue: float, saturation: float, value: float) -> list[float]:
        """A color near to this one, 0..1 each, as RGB of 0..255."""
        hue = (hue + self.rng.normal(0, 0.015)) % 1
        saturation, value = np.clip(np.array([saturation, value]) + self.rng.normal(0, 0.05, 2), 0, 1)
        return color(hue, saturation, value).tolist()

    def ramp(self, top: float, bottom: float, first: list[float], last: list[float]) -> None:
        """Fills rows from one color to another."""
        rows = slice(round(top * self.size), round(bottom * self.size))
        mix = np.linspace(0, 1, max(rows.stop - rows.start, 0))[:, None, None]
        self.canvas[rows] = (np.array(first) * (1 - mix) + np.array(last) * mix).astype(np.uint8)

    def polygon(self, points: list[tuple[float, float]], tone: list[float]) -> None:
        cv2.fillPoly(self.canvas, [np.rint(np.array(points) * self.size).astype(np.int32)], tone, cv2.LINE_AA)

    def box(self, left: float, top: float, right: float, bottom: float, tone: list[float]) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], tone)

    def line(self, points: list[tuple[float, float]], thickness: float, tone: list[float]) -> None:
        pixels = np.rint(np.array(points) * self.size).astype(np.int32)
        cv2.polylines(self.canvas, [pixels], False, tone, max(1, round(thickness * self.size)), cv2.LINE_AA)

    def blob(self, x: float, y: float, width: float, height: float, tone: list[float]) -> None:
        center, axes = (round(x * self.size), round(y * self.size)), (width * self.size, height * self.size)
        cv2.ellipse(self.canvas, center, [max(1, round(a)) for a in axes], 0, 0, 360, tone, -1, cv2.LINE_AA)

    def sky(self, bottom: float) -> None:
        """Clear, overcast or in the evening, with clouds or without."""
        upper, lower = [
            (self.tone(0.58, 0.6, 0.85), self.tone(0.56, 0.2, 0.97)),
            (self.tone(0.6, 0.08, 0.7), self.tone(0.6, 0.05, 0.85)),
            (self.tone(0.62, 0.5, 0.6), self.tone(0.07, 0.55, 0.95)),
        ][self.rng.integers(3)]
        self.ramp(0, bottom, upper, lower)
        for _ in range(self.rng.integers(0, 5)):
            x, y = self.rng.uniform(0, 1), self.rng.uniform(0, 0.7 * bottom)
            for _ in range(6):
                dx, dy = self.rng.normal(0, (0.07, 0.015))
                self.blob(x + dx, y + dy, 0.06, 0.03, self.tone(0.6, 0.03, 0.97))

    def ridge(self, base: float, height: float, steps: int) -> list[tuple[float, float]]:
        """A random outline from the left edge to the right."""
        x = np.linspace(-0.05, 1.05, steps)
        y = base - height * self.rng.random(steps)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    def road(self, tone: list[float], marked: bool) -> None:
        width = self.rng.uniform(0.25, 0.4)
        near = self.rng.uniform(0.35, 0.65)
        tip = (self.vanishing, self.horizon)
        self.polygon([tip, (near - width, 1.0), (near + width, 1.0)], tone)
        if marked:
            for start in np.arange(0.1, 1, 0.22):
                ends = [(tip[0] + t * (near - tip[0]), tip[1] + t * (1 - tip[1])) for t in (start, start + 0.1)]
                self.line(ends, 0.02 * start + 0.004, self.tone(0.14, 0.2, 0.95))


def _sand(view: View) -> None:
    view.ramp(view.horizon, 1, view.tone(0.1, 0.45, 0.85), view.tone(0.09, 0.55, 0.7))


def _field(view: View) -> None:
    view.ramp(view.horizon, 1, view.tone(0.25, 0.5, 0.65), view.tone(0.27, 0.6, 0.45))


def _desert_sand(view: View) -> None:
    view.sky(view.horizon)
    _sand(view)
    for base in np.linspace(view.horizon + 0.05, 0.95, 4):
        x = np.linspace(-0.05, 1.05, 30)
        bend, shift = view.rng.uniform(3, 8), view.rng.uniform(0, 6)
        crest = list(zip(x, base - 0.06 - 0.05 * np.sin(bend * x + shift), strict=True))
        view.polygon([*crest, (1.05, 1), (-0.05, 1)], view.tone(0.09, 0.5, view.rng.uniform(0.6, 0.9)))
        view.line(crest, 0.008, view.tone(0.11, 0.35, 0.95))


def _desert_road(view: View) -> None:
    view.sky(view.horizon)
    _sand(view)
    view.road(view.tone(0.6, 0.05, 0.4), marked=True)


def _field_cultivated(view: View) -> None:
    view.sky(view.horizon)
    _field(view)
    dark, light = view.tone(0.1, 0.5, 0.4), view.tone(0.27, 0.6, 0.7)
    for i, x in enumerate(np.arange(-1.5, 2.5, view.rng.uniform(0.12, 0.2))):
        view.line([(view.vanishing, view.horizon), (x, 1.02)], 0.025, light if i % 2 else dark)


def _field_road(view: View) -> None:
    view.sky(view.horizon)
    _field(view)
    for _ in range(25):
        y = view.rng.uniform(view.horizon, 1)
        view.blob(view.rng.random(), y, 0.02, 0.008, view.tone(0.22, 0.6, 0.75))
    view.road(view.tone(0.09, 0.35, 0.6), marked=False)


def _ocean(view: View) -> None:
    view.sky(view.horizon)
    view.ramp(view.horizon, 1, view.tone(0.55, 0.5, 0.65), view.tone(0.56, 0.75, 0.4))
    for _ in range(45):
        depth = view.rng.random() ** 1.5
        x, y = view.rng.random(), view.horizon + depth * (1 - view.horizon)
        half = 0.02 + 0.1 * depth
        crest = [(x + t * half, y - 0.012 * depth * math.cos(3 * t)) for t in np.linspace(-1, 1, 7)]
        view.line(crest, 0.003 + 0.01 * depth, view.tone(0.54, 0.25, view.rng.uniform(0.7, 0.95)))


def _mountain_snowy(view: View) -> None:
    view.sky(0.8)
    for base, shade in ((0.75, 0.65), (0.9, 0.5)):
        ridge = view.ridge(base, 0.5, int(view.rng.integers(5, 9)))
        view.polygon([*ridge, (1.05, 1), (-0.05, 1)], view.tone(0.6, 0.15, shade))
        for (x0, y0), (x1, y1), (x2, y2) in zip(ridge, ridge[1:], ridge[2:], strict=False):
            if y1 < min(y0, y2):  # a summit
                (left, low), (right, deep) = (
                    (x1 + 0.45 * (x - x1), y1 + 0.45 * (y - y1)) for x, y in ((x0, y0), (x2, y2))
                )
                snow = [(x1, y1), (right, deep), (x1, (low + deep) / 2 - 0.04), (left, low)]
                view.polygon(snow, view.tone(0.58, 0.03, 0.98))
    view.ramp(0.9, 1, view.tone(0.58, 0.03, 0.95), view.tone(0.58, 0.05, 0.85))


def _forest(view: View) -> None:
    view.ramp(0, 0.7, view.tone(0.25, 0.45, 0.75), view.tone(0.22, 0.4, 0.6))
    view.ramp(0.7, 1, view.tone(0.1, 0.5, 0.4), view.tone(0.2, 0.5, 0.3))
    for scale in np.sort(view.rng.uniform(0.3, 1, 14)):
        x = view.rng.random()
        view.box(x - 0.02 * scale, 0, x + 0.02 * scale, 0.65 + 0.3 * scale, view.tone(0.08, 0.4, 0.2 + 0.2 * scale))
    for _ in range(120):
        x, y = view.rng.random(), 0.55 * view.rng.random()
        size = view.rng.uniform(0.02, 0.05)
        view.blob(x, y, size, 0.7 * size, view.tone(view.rng.uniform(0.22, 0.33), 0.6, view.rng.uniform(0.3, 0.75)))


def _skyscraper(view: View) -> None:
    view.sky(1)
    for _ in range(int(view.rng.integers(3, 7))):
        left, width = view.rng.uniform(-0.05, 0.85), view.rng.uniform(0.15, 0.3)
        top = view.rng.uniform(0.05, 0.5)
        hue, value = view.rng.uniform(0.5, 0.65), view.rng.uniform(0.3, 0.6)
        view.box(left, top, left + width, 1, view.tone(hue, 0.25, value))
        pane = view.tone(hue, 0.2, value + 0.35)
        for y in np.arange(top + 0.03, 1, 0.06):
            for x in np.linspace(left + 0.02, left + width - 0.04, 4):
                view.box(x, y, x + 0.022, y + 0.03, pane)


def _corridor(view: View) -> None:
    wall, x, y = view.tone(view.rng.random(), 0.15, 0.8), view.vanishing, view.horizon
    depth = view.rng.uniform(0.07, 0.12)
    far = (x - depth, y - depth, x + depth, y + depth)
    view.box(0, 0, 1, 1, wall)
    view.polygon([(0, 0), (1, 0), (far[2], far[1]), (far[0], far[1])], view.tone(0.1, 0.03, 0.92))
    view.polygon([(0, 1), (1, 1), (far[2], far[3]), (far[0], far[3])], view.tone(0.08, 0.3, 0.5))
    view.box(*far, [0.75 * channel for channel in wall])
    door = view.tone(0.07, 0.5, 0.45)
    for t in (0.15, 0.45, 0.7):
        for side, edge in ((0, far[0]), (1, far[2])):
            (x0, top0, low0), (x1, top1, low1) = (
                (side + u * (edge - side), 0.25 + u * (far[1] + 0.3 * depth - 0.25), 1 + u * (far[3] - 1))
                for u in (t, t + 0.15)
            )
            view.polygon([(x0, top0), (x1, top1), (x1, low1), (x0, low0)], door)
        middle, half = t * x + (1 - t) * 0.5, (1 - t) * 0.1
        view.box(middle - half, t * far[1], middle + half, t * far[1] + 0.02, [255.0] * 3)


def _bedroom(view: View) -> None:
    floor = view.rng.uniform(0.6, 0.72)
    view.ramp(0, floor, view.tone(view.rng.random(), 0.15, 0.85), view.tone(0.1, 0.15, 0.8))
    view.ramp(floor, 1, view.tone(0.08, 0.45, 0.55), view.tone(0.08, 0.5, 0.45))
    window = view.rng.uniform(0.05, 0.2)
    view.box(window - 0.02, 0.08, window + 0.24, 0.4, view.tone(0.1, 0.1, 0.95))
    view.box(window, 0.1, window + 0.22, 0.38, view.tone(0.57, 0.35, 0.95))
    view.line([(window + 0.11, 0.1), (window + 0.11, 0.38)], 0.012, view.tone(0.1, 0.1, 0.95))
    left, top = view.rng.uniform(0.3, 0.4), floor - view.rng.uniform(0.02, 0.1)
    cover = view.tone(view.rng.random(), 0.5, 0.7)
    view.box(left, top - 0.25, left + 0.55, top, view.tone(0.07, 0.6, 0.35))
    view.polygon([(left, top), (left + 0.55, top), (left + 0.65, 0.92), (left - 0.12, 0.92)], cover)
    for x in (left + 0.07, left + 0.31):
        view.box(x, top - 0.07, x + 0.18, top + 0.03, view.tone(0.12, 0.04, 0.97))


def _sky(view: View) -> None:
    view.sky(1)
    for _ in range(view.rng.integers(3, 8)):
        x, y = view.rng.random(2)
        for _ in range(14):
            dx, dy = view.rng.normal(0, (0.09, 0.03))
            view.blob(x + dx, y + dy, 0.07, 0.045, view.tone(0.6, 0.03, view.rng.uniform(0.88, 1)))


# Neighbors differ much, so that a few classes are easier than all of them.
SCENES: dict[str, Callable[[View], None]] = {
    "/d/desert/sand": _desert_sand,
    "/b/bedroom": _bedroom,
    "/d/desert_road": _desert_road,
    "/o/ocean": _ocean,
    "/f/forest/broadleaf": _forest,
    "/m/mountain_snowy": _mountain_snowy,
    "/c/corridor": _corridor,
    "/s/skyscraper": _skyscraper,
    "/f/field/cultivated": _field_cultivated,
    "/s/sky": _sky,
    "/f/field_road": _field_road,
}
