"""Drawing primitives shared by the synthetic datasets."""

from __future__ import annotations

import math
from itertools import product

import cv2
import numpy as np

from errors import UserError

SHAPES = ("disk", "square", "triangle", "cross", "star", "ring", "crescent", "bar")


TEXTURES = ("striped", "plain", "dotted", "checked")


# Neighbors differ in shape and texture both, so that a few classes are easier than all of them.
CLASSES = [f"{TEXTURES[(s + t) % 4]}_{SHAPES[s]}" for t, s in product(range(4), range(8))]


def check_arguments(classes: int, most: int, train: int, val: int, size: int) -> None:
    """Raises ValueError for the first argument of a writer that is out of its range; ``most`` is that of classes."""
    for name, value, low, high in (
        ("classes", classes, 2, most),
        ("train", train, 1, 100_000),
        ("val", val, 1, 100_000),
        ("size", size, 16, 1024),
    ):
        if not low <= value <= high:
            raise UserError(f"{name}: expected {low} to {high}, found {value}")


def save(path: str, picture: np.ndarray, gray: bool = False) -> None:
    """Writes uint8 (H,W,3), RGB, as a JPEG, of one channel if ``gray``."""
    stored = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY if gray else cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(path, stored, [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise UserError(f"{path}: could not be written")


def draw_picture(name: str, hue: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """One image of a class: uint8 (H,W,3), RGB, its shorter side ``size``.

    Args:
        name: one of `CLASSES`.
        hue: center of the shape's hues, 0..1.
        size: in pixels.
        rng: where all randomness comes from.
    """
    longer = int(size * rng.uniform(1, 1.5))
    height, width = (size, longer) if rng.random() < 0.7 else (longer, size)
    picture = background(height, width, rng)
    for _ in range(rng.integers(3, 8)):
        clutter(picture, rng)
    radius = size * rng.uniform(0.22, 0.42)
    center = np.array([rng.uniform(0.8 * radius, side - 0.8 * radius) for side in (width, height)])
    picture, _ = draw_object(picture, name, hue, center, radius, rng)
    return with_noise(picture, rng)


def draw_object(
    picture: np.ndarray, name: str, hue: float, center: np.ndarray, radius: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One object of a class upon an image, float (H,W,3): the new image, and its mask, uint8 (H,W) of 0 and 255."""
    texture, shape = name.split("_")
    height, width = picture.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    _fill(mask, shape, center, radius, rng.uniform(0, 2 * math.pi))
    first = color((hue + rng.normal(0, 0.12)) % 1, rng.uniform(0.5, 1), rng.uniform(0.6, 1))
    second = color(rng.random(), rng.uniform(0.2, 0.8), rng.uniform(0.0, 0.35))
    surface = np.where(_texture(texture, height, width, radius, rng)[..., None], first, second)
    surface = surface * rng.uniform(0.75, 1)
    alpha = cv2.GaussianBlur(mask, (3, 3), 0)[..., None] / 255
    return picture * (1 - alpha) + surface * alpha, mask


def with_noise(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Float (H,W,3) with a camera's grain, as uint8."""
    picture = picture + rng.normal(0, rng.uniform(2, 9), (*picture.shape[:2], 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


def color(hue: float, saturation: float, value: float) -> np.ndarray:
    hsv = np.array([[[hue * 360, saturation, value]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float64) * 255


def any_color(rng: np.random.Generator) -> np.ndarray:
    return color(rng.random(), rng.uniform(0, 0.7), rng.uniform(0.2, 1))


def background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A gradient between two colors under soft blotches: float64 (H,W,3)."""
    y, x = np.mgrid[0:height, 0:width]
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (math.cos(angle) * x / width + math.sin(angle) * y / height) / 2 + 0.5
    blotches = cv2.resize(rng.normal(0, 0.3, (5, 5)), (width, height), interpolation=cv2.INTER_CUBIC)
    mix = np.clip(ramp + blotches, 0, 1)[..., None]
    return np.ascontiguousarray(any_color(rng) * (1 - mix) + any_color(rng) * mix)


def clutter(picture: np.ndarray, rng: np.random.Generator) -> None:
    """Draws a line or a small blot that belongs to no class."""
    height, width = picture.shape[:2]
    paint = tuple(any_color(rng).tolist())
    points = rng.integers(0, (width, height), (3, 2))
    if rng.random() < 0.5:
        thickness = int(rng.integers(1, max(2, height // 24) + 1))
        cv2.line(picture, points[0].tolist(), points[1].tolist(), paint, thickness, cv2.LINE_AA)
    else:
        axes = (rng.uniform(0.03, 0.1, 2) * min(height, width)).astype(int) + 1
        cv2.ellipse(picture, points[0].tolist(), axes.tolist(), rng.uniform(0, 180), 0, 360, paint, -1, cv2.LINE_AA)


def _fill(mask: np.ndarray, shape: str, center: np.ndarray, radius: float, turn: float) -> None:
    """Fills a shape in a uint8 mask with 255."""

    def polygon(angles: np.ndarray, radii: np.ndarray | float) -> None:
        directions = np.stack([np.cos(angles + turn), np.sin(angles + turn)], axis=1)
        points = center + directions * np.reshape(np.asarray(radii) * radius, (-1, 1))
        cv2.fillPoly(mask, [np.rint(points).astype(np.int32)], 255)

    def disk(part: float, value: int, shift: float = 0) -> None:
        at = center + shift * radius * np.array([math.cos(turn), math.sin(turn)])
        cv2.circle(mask, np.rint(at).astype(int).tolist(), round(part * radius), value, -1)

    def rectangle(length: float, breadth: float, extra: float = 0) -> None:
        corner = math.atan2(breadth, length)
        angles = np.array([corner, math.pi - corner, math.pi + corner, -corner]) + extra
        polygon(angles, math.hypot(length, breadth))

    if shape == "disk":
        disk(0.9, 255)
    elif shape == "ring":
        disk(1, 255)
        disk(0.5, 0)
    elif shape == "crescent":
        disk(1, 255)
        disk(0.8, 0, shift=0.5)
    elif shape == "square":
        rectangle(0.75, 0.75)
    elif shape == "bar":
        rectangle(1.1, 0.35)
    elif shape == "cross":
        rectangle(1, 0.3)
        rectangle(1, 0.3, math.pi / 2)
    elif shape == "triangle":
        polygon(np.arange(3) * 2 * math.pi / 3, 1.1)
    else:
        polygon(np.arange(10) * math.pi / 5, np.tile([1.15, 0.5], 5))


def _texture(texture: str, height: int, width: int, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Where the first color shows: bool (H,W)."""
    y, x = np.mgrid[0:height, 0:width]
    angle = rng.uniform(0, math.pi)
    period = max(4.0, radius * rng.uniform(0.35, 0.5))
    u = (math.cos(angle) * x + math.sin(angle) * y) / period + rng.random()
    v = (math.cos(angle) * y - math.sin(angle) * x) / period + rng.random()
    if texture == "plain":
        return np.ones((height, width), bool)
    if texture == "striped":
        return u % 1 < 0.5
    if texture == "checked":
        return (u % 1 < 0.5) ^ (v % 1 < 0.5)
    return np.hypot(u % 1 - 0.5, v % 1 - 0.5) > 0.3


class Brush:
    """Draws round a center; lengths and positions are in units of a radius, before a turn that is drawn once.

    Args:
        canvas: uint8 (H,W,3), drawn on.
        center: (x, y) in pixels.
        radius: in pixels.
        rng: where all randomness comes from.
    """

    def __init__(self, canvas: np.ndarray, center: np.ndarray, radius: float, rng: np.random.Generator) -> None:
        self.canvas, self.center, self.radius, self.rng = canvas, center, radius, rng
        self.turn = rng.uniform(0, 2 * math.pi)

    def tone(self, hue: float, saturation: float, value: float) -> list[float]:
        """A color near to this one, 0..1 each, as RGB of 0..255."""
        hue = (hue + self.rng.normal(0, 0.015)) % 1
        saturation, value = np.clip(np.array([saturation, value]) + self.rng.normal(0, 0.06, 2), 0, 1)
        return color(hue, saturation, value).tolist()

    def at(self, point: np.ndarray | tuple[float, float]) -> list[int]:
        """A position in pixels."""
        x, y = point
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        turned = np.array([x * cos - y * sin, x * sin + y * cos])
        return np.rint(self.center + self.radius * turned).astype(int).tolist()

    def anywhere(self, within: float = 0.8) -> np.ndarray:
        """A position drawn evenly from a disk."""
        angle, distance = self.rng.uniform(0, 2 * math.pi), within * math.sqrt(self.rng.random())
        return distance * np.array([math.cos(angle), math.sin(angle)])

    def disk(self, at: np.ndarray | tuple[float, float], radius: float, tone: list[float]) -> None:
        cv2.circle(self.canvas, self.at(at), max(1, round(radius * self.radius)), tone, -1, cv2.LINE_AA)

    def arc(
        self,
        at: np.ndarray | tuple[float, float],
        axes: tuple[float, float],
        tone: list[float],
        angle: float = 0.0,
        part: tuple[float, float] = (0, 360),
        thickness: float = 0.0,
    ) -> None:
        """A part of an ellipse in degrees, filled where there is no thickness."""
        lengths = [max(1, round(axis * self.radius)) for axis in axes]
        pixels = max(1, round(thickness * self.radius)) if thickness else -1
        degrees = math.degrees(self.turn) + angle
        cv2.ellipse(self.canvas, self.at(at), lengths, degrees, *part, tone, pixels, cv2.LINE_AA)

    def polygon(self, points: list[tuple[float, float]], tone: list[float]) -> None:
        cv2.fillPoly(self.canvas, [np.array([self.at(point) for point in points])], tone, cv2.LINE_AA)

    def stick(self, at: np.ndarray, angle: float, length: float, thickness: float, tone: list[float]) -> None:
        half = length / 2 * np.array([math.cos(angle), math.sin(angle)])
        pixels = max(1, round(thickness * self.radius))
        cv2.line(self.canvas, self.at(at - half), self.at(at + half), tone, pixels, cv2.LINE_AA)
