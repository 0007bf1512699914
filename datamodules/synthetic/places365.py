"""Synthetic dataset in the two layouts of Places365: outdoor scenes of sky and ground, and rooms."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import cv2
import numpy as np

from datamodules.synthetic.drawing import check_arguments, finish_image, save_jpeg, similar_color, write_lines

UNLABELED_IMAGES = 4  # images in test_256, whose labels are not public


def write_places365(
    folder: str, classes: int = 4, train: int = 64, val: int = 16, size: int = 64, seed: int = 0, easy: bool = False
) -> list[str]:
    """Write a dataset in the standard or the easy layout; both have ``categories_places365.txt``.

    Standard: ``places365_{train_standard,val,test}.txt``, ``data_256_standard/a/airfield/<image>.jpg``, ``val_256/``
    and ``test_256/``. Easy: ``places365_standard/{train,val}/<class>/<image>.jpg`` with ``train.txt`` and
    ``val.txt``, where the class of ``/d/desert/sand`` is ``desert-sand``.

    A class is a scene of Places365. Horizon, vanishing point, weather, light and details vary. The images are square,
    as in the small version of the dataset, and depend only on the arguments. Among the first classes, the order of
    the folder names differs from the order of the labels.

    Args:
        folder: output folder, created if missing; existing files stay.
        classes: number of classes, 2 to 11.
        train: training images per class.
        val: validation images per class.
        size: side of the images in pixels, at least 16.
        seed: another seed draws other images of the same classes.
        easy: write the easy layout.

    Returns:
        Categories in label order.

    Raises:
        UserError: an argument is out of range.
    """
    check_arguments(classes, len(SCENES), train, val, size)
    categories = sorted(list(SCENES)[:classes])
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for split_index, (split, count) in enumerate((("train", train), ("val", val))):
        for label, category in enumerate(categories):
            scene_index = list(SCENES).index(category)
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
                rng = np.random.default_rng((seed, split_index, scene_index, i))
                save_jpeg(path, draw_place(category, size, rng))
    write_lines(
        os.path.join(folder, "categories_places365.txt"), [f"{name} {label}" for label, name in enumerate(categories)]
    )
    if easy:
        for split in ("train", "val"):
            write_lines(os.path.join(folder, "places365_standard", f"{split}.txt"), lists[split])
        return categories
    os.makedirs(os.path.join(folder, "test_256"), exist_ok=True)
    for i in range(UNLABELED_IMAGES):
        name = f"Places365_test_{i + 1:08d}.jpg"
        image = draw_place(categories[i % classes], size, np.random.default_rng((seed, 2, 0, i)))
        save_jpeg(os.path.join(folder, "test_256", name), image)
        lists["test"].append(name)
    for split, file_name in (("train", "train_standard"), ("val", "val"), ("test", "test")):
        write_lines(os.path.join(folder, f"places365_{file_name}.txt"), lists[split])
    return categories


def draw_place(category: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one image of a scene.

    Args:
        category: one of `SCENES`.
        size: side in pixels.
        rng: source of all randomness.

    Returns:
        RGB image, uint8 (size, size, 3).
    """
    scene = SceneCanvas(2 * size, rng)
    SCENES[category](scene)
    image = finish_image(scene.image, (0.7, 1.1), (0.92, 1.08), rng)
    return np.ascontiguousarray(image[:, ::-1]) if rng.random() < 0.5 else image


# --- scenes -----------------------------------------------------------------------------------------------------------


class SceneCanvas:
    """A square image with a horizon; coordinates are 0 to 1 from the upper left corner.

    Args:
        size: side in pixels.
        rng: source of all randomness.

    Attributes:
        image: uint8 (size, size, 3).
        horizon: y of the horizon.
        vanishing_point: x of the point on the horizon where parallel lines meet.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.image = np.zeros((size, size, 3), np.uint8)
        self.horizon, self.vanishing_point = rng.uniform(0.35, 0.55), rng.uniform(0.35, 0.65)

    def color(self, hue: float, saturation: float, value: float) -> list[float]:
        """Draw a color near the given one (`similar_color`)."""
        return similar_color(hue, saturation, value, 0.05, self.rng)

    def ramp(self, top: float, bottom: float, first: list[float], last: list[float]) -> None:
        """Fill rows with a gradient from one color to another."""
        rows = slice(round(top * self.size), round(bottom * self.size))
        mix = np.linspace(0, 1, max(rows.stop - rows.start, 0))[:, None, None]
        self.image[rows] = (np.array(first) * (1 - mix) + np.array(last) * mix).astype(np.uint8)

    def polygon(self, points: list[tuple[float, float]], color: list[float]) -> None:
        cv2.fillPoly(self.image, [np.rint(np.array(points) * self.size).astype(np.int32)], color, cv2.LINE_AA)

    def box(self, left: float, top: float, right: float, bottom: float, color: list[float]) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)

    def line(self, points: list[tuple[float, float]], thickness: float, color: list[float]) -> None:
        pixels = np.rint(np.array(points) * self.size).astype(np.int32)
        cv2.polylines(self.image, [pixels], False, color, max(1, round(thickness * self.size)), cv2.LINE_AA)

    def ellipse(self, x: float, y: float, width: float, height: float, color: list[float]) -> None:
        center, axes = (round(x * self.size), round(y * self.size)), (width * self.size, height * self.size)
        cv2.ellipse(self.image, center, [max(1, round(a)) for a in axes], 0, 0, 360, color, -1, cv2.LINE_AA)

    def sky(self, bottom: float) -> None:
        """Draw a clear, overcast or evening sky with up to four clouds."""
        upper, lower = [
            (self.color(0.58, 0.6, 0.85), self.color(0.56, 0.2, 0.97)),
            (self.color(0.6, 0.08, 0.7), self.color(0.6, 0.05, 0.85)),
            (self.color(0.62, 0.5, 0.6), self.color(0.07, 0.55, 0.95)),
        ][self.rng.integers(3)]
        self.ramp(0, bottom, upper, lower)
        for _ in range(self.rng.integers(0, 5)):
            x, y = self.rng.uniform(0, 1), self.rng.uniform(0, 0.7 * bottom)
            for _ in range(6):
                dx, dy = self.rng.normal(0, (0.07, 0.015))
                self.ellipse(x + dx, y + dy, 0.06, 0.03, self.color(0.6, 0.03, 0.97))

    def ridge(self, base: float, height: float, steps: int) -> list[tuple[float, float]]:
        """Return a random outline from the left edge to the right."""
        x = np.linspace(-0.05, 1.05, steps)
        y = base - height * self.rng.random(steps)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    def road(self, color: list[float], marked: bool) -> None:
        """Draw a road to the vanishing point, with a dashed center line if ``marked``."""
        width = self.rng.uniform(0.25, 0.4)
        near = self.rng.uniform(0.35, 0.65)
        tip = (self.vanishing_point, self.horizon)
        self.polygon([tip, (near - width, 1.0), (near + width, 1.0)], color)
        if marked:
            for start in np.arange(0.1, 1, 0.22):
                ends = [(tip[0] + t * (near - tip[0]), tip[1] + t * (1 - tip[1])) for t in (start, start + 0.1)]
                self.line(ends, 0.02 * start + 0.004, self.color(0.14, 0.2, 0.95))


def _sand(scene: SceneCanvas) -> None:
    scene.ramp(scene.horizon, 1, scene.color(0.1, 0.45, 0.85), scene.color(0.09, 0.55, 0.7))


def _field(scene: SceneCanvas) -> None:
    scene.ramp(scene.horizon, 1, scene.color(0.25, 0.5, 0.65), scene.color(0.27, 0.6, 0.45))


def _desert_sand(scene: SceneCanvas) -> None:
    scene.sky(scene.horizon)
    _sand(scene)
    for base in np.linspace(scene.horizon + 0.05, 0.95, 4):
        x = np.linspace(-0.05, 1.05, 30)
        bend, shift = scene.rng.uniform(3, 8), scene.rng.uniform(0, 6)
        crest = list(zip(x, base - 0.06 - 0.05 * np.sin(bend * x + shift), strict=True))
        scene.polygon([*crest, (1.05, 1), (-0.05, 1)], scene.color(0.09, 0.5, scene.rng.uniform(0.6, 0.9)))
        scene.line(crest, 0.008, scene.color(0.11, 0.35, 0.95))


def _desert_road(scene: SceneCanvas) -> None:
    scene.sky(scene.horizon)
    _sand(scene)
    scene.road(scene.color(0.6, 0.05, 0.4), marked=True)


def _field_cultivated(scene: SceneCanvas) -> None:
    scene.sky(scene.horizon)
    _field(scene)
    dark, light = scene.color(0.1, 0.5, 0.4), scene.color(0.27, 0.6, 0.7)
    for i, x in enumerate(np.arange(-1.5, 2.5, scene.rng.uniform(0.12, 0.2))):
        scene.line([(scene.vanishing_point, scene.horizon), (x, 1.02)], 0.025, light if i % 2 else dark)


def _field_road(scene: SceneCanvas) -> None:
    scene.sky(scene.horizon)
    _field(scene)
    for _ in range(25):
        y = scene.rng.uniform(scene.horizon, 1)
        scene.ellipse(scene.rng.random(), y, 0.02, 0.008, scene.color(0.22, 0.6, 0.75))
    scene.road(scene.color(0.09, 0.35, 0.6), marked=False)


def _ocean(scene: SceneCanvas) -> None:
    scene.sky(scene.horizon)
    scene.ramp(scene.horizon, 1, scene.color(0.55, 0.5, 0.65), scene.color(0.56, 0.75, 0.4))
    for _ in range(45):
        depth = scene.rng.random() ** 1.5
        x, y = scene.rng.random(), scene.horizon + depth * (1 - scene.horizon)
        half = 0.02 + 0.1 * depth
        crest = [(x + t * half, y - 0.012 * depth * math.cos(3 * t)) for t in np.linspace(-1, 1, 7)]
        scene.line(crest, 0.003 + 0.01 * depth, scene.color(0.54, 0.25, scene.rng.uniform(0.7, 0.95)))


def _mountain_snowy(scene: SceneCanvas) -> None:
    scene.sky(0.8)
    for base, shade in ((0.75, 0.65), (0.9, 0.5)):
        ridge = scene.ridge(base, 0.5, int(scene.rng.integers(5, 9)))
        scene.polygon([*ridge, (1.05, 1), (-0.05, 1)], scene.color(0.6, 0.15, shade))
        for (x0, y0), (x1, y1), (x2, y2) in zip(ridge, ridge[1:], ridge[2:], strict=False):
            if y1 < min(y0, y2):  # a summit
                (left, low), (right, deep) = (
                    (x1 + 0.45 * (x - x1), y1 + 0.45 * (y - y1)) for x, y in ((x0, y0), (x2, y2))
                )
                snow = [(x1, y1), (right, deep), (x1, (low + deep) / 2 - 0.04), (left, low)]
                scene.polygon(snow, scene.color(0.58, 0.03, 0.98))
    scene.ramp(0.9, 1, scene.color(0.58, 0.03, 0.95), scene.color(0.58, 0.05, 0.85))


def _forest(scene: SceneCanvas) -> None:
    scene.ramp(0, 0.7, scene.color(0.25, 0.45, 0.75), scene.color(0.22, 0.4, 0.6))
    scene.ramp(0.7, 1, scene.color(0.1, 0.5, 0.4), scene.color(0.2, 0.5, 0.3))
    for scale in np.sort(scene.rng.uniform(0.3, 1, 14)):
        x = scene.rng.random()
        scene.box(x - 0.02 * scale, 0, x + 0.02 * scale, 0.65 + 0.3 * scale, scene.color(0.08, 0.4, 0.2 + 0.2 * scale))
    for _ in range(120):
        x, y = scene.rng.random(), 0.55 * scene.rng.random()
        size = scene.rng.uniform(0.02, 0.05)
        scene.ellipse(
            x, y, size, 0.7 * size, scene.color(scene.rng.uniform(0.22, 0.33), 0.6, scene.rng.uniform(0.3, 0.75))
        )


def _skyscraper(scene: SceneCanvas) -> None:
    scene.sky(1)
    for _ in range(int(scene.rng.integers(3, 7))):
        left, width = scene.rng.uniform(-0.05, 0.85), scene.rng.uniform(0.15, 0.3)
        top = scene.rng.uniform(0.05, 0.5)
        hue, value = scene.rng.uniform(0.5, 0.65), scene.rng.uniform(0.3, 0.6)
        scene.box(left, top, left + width, 1, scene.color(hue, 0.25, value))
        pane = scene.color(hue, 0.2, value + 0.35)
        for y in np.arange(top + 0.03, 1, 0.06):
            for x in np.linspace(left + 0.02, left + width - 0.04, 4):
                scene.box(x, y, x + 0.022, y + 0.03, pane)


def _corridor(scene: SceneCanvas) -> None:
    wall, x, y = scene.color(scene.rng.random(), 0.15, 0.8), scene.vanishing_point, scene.horizon
    depth = scene.rng.uniform(0.07, 0.12)
    far = (x - depth, y - depth, x + depth, y + depth)
    scene.box(0, 0, 1, 1, wall)
    scene.polygon([(0, 0), (1, 0), (far[2], far[1]), (far[0], far[1])], scene.color(0.1, 0.03, 0.92))
    scene.polygon([(0, 1), (1, 1), (far[2], far[3]), (far[0], far[3])], scene.color(0.08, 0.3, 0.5))
    scene.box(*far, [0.75 * channel for channel in wall])
    door = scene.color(0.07, 0.5, 0.45)
    for t in (0.15, 0.45, 0.7):
        for side, edge in ((0, far[0]), (1, far[2])):
            (x0, top0, low0), (x1, top1, low1) = (
                (side + u * (edge - side), 0.25 + u * (far[1] + 0.3 * depth - 0.25), 1 + u * (far[3] - 1))
                for u in (t, t + 0.15)
            )
            scene.polygon([(x0, top0), (x1, top1), (x1, low1), (x0, low0)], door)
        middle, half = t * x + (1 - t) * 0.5, (1 - t) * 0.1
        scene.box(middle - half, t * far[1], middle + half, t * far[1] + 0.02, [255.0] * 3)


def _bedroom(scene: SceneCanvas) -> None:
    floor = scene.rng.uniform(0.6, 0.72)
    scene.ramp(0, floor, scene.color(scene.rng.random(), 0.15, 0.85), scene.color(0.1, 0.15, 0.8))
    scene.ramp(floor, 1, scene.color(0.08, 0.45, 0.55), scene.color(0.08, 0.5, 0.45))
    window = scene.rng.uniform(0.05, 0.2)
    scene.box(window - 0.02, 0.08, window + 0.24, 0.4, scene.color(0.1, 0.1, 0.95))
    scene.box(window, 0.1, window + 0.22, 0.38, scene.color(0.57, 0.35, 0.95))
    scene.line([(window + 0.11, 0.1), (window + 0.11, 0.38)], 0.012, scene.color(0.1, 0.1, 0.95))
    left, top = scene.rng.uniform(0.3, 0.4), floor - scene.rng.uniform(0.02, 0.1)
    cover = scene.color(scene.rng.random(), 0.5, 0.7)
    scene.box(left, top - 0.25, left + 0.55, top, scene.color(0.07, 0.6, 0.35))
    scene.polygon([(left, top), (left + 0.55, top), (left + 0.65, 0.92), (left - 0.12, 0.92)], cover)
    for x in (left + 0.07, left + 0.31):
        scene.box(x, top - 0.07, x + 0.18, top + 0.03, scene.color(0.12, 0.04, 0.97))


def _sky(scene: SceneCanvas) -> None:
    scene.sky(1)
    for _ in range(scene.rng.integers(3, 8)):
        x, y = scene.rng.random(2)
        for _ in range(14):
            dx, dy = scene.rng.normal(0, (0.09, 0.03))
            scene.ellipse(x + dx, y + dy, 0.07, 0.045, scene.color(0.6, 0.03, scene.rng.uniform(0.88, 1)))


# Adjacent classes differ strongly, so that a small number of classes is easy to separate.
SCENES: dict[str, Callable[[SceneCanvas], None]] = {
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
