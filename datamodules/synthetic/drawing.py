"""Drawing primitives of the synthetic datasets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product

import cv2
import numpy as np

from errors import UserError

SHAPES = ("disk", "square", "triangle", "cross", "star", "ring", "crescent", "bar")
TEXTURES = ("striped", "plain", "dotted", "checked")
# Adjacent classes differ in both shape and texture, so that a small number of classes is easy to separate.
TEXTURED_SHAPES = [f"{TEXTURES[(s + t) % 4]}_{SHAPES[s]}" for t, s in product(range(4), range(8))]


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise a UserError if ``low <= value <= high`` does not hold."""
    if not low <= value <= high:
        raise UserError(f"{name}: expected {low} to {high}, found {value}")


def check_arguments(classes: int, max_classes: int, train: int, val: int, size: int) -> None:
    """Raise a UserError for the first argument of a writer that is out of range.

    Args:
        classes: number of classes, 2 to ``max_classes``.
        max_classes: number of classes that the writer can draw.
        train: training images per class, at least 1.
        val: validation images per class, at least 1.
        size: shorter side of the images in pixels, 16 to 1024.
    """
    require_range("classes", classes, 2, max_classes)
    require_range("train", train, 1, 100_000)
    require_range("val", val, 1, 100_000)
    require_range("size", size, 16, 1024)


def write_lines(path: str, lines: Iterable[str]) -> None:
    """Write a text file of one entry per line."""
    with open(path, "w") as file:
        file.writelines(f"{line}\n" for line in lines)


def save_jpeg(path: str, image: np.ndarray, gray: bool = False) -> None:
    """Write an RGB image, uint8 (H, W, 3), as a JPEG; convert it to one channel if ``gray``."""
    stored = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY if gray else cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(path, stored, [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise UserError(f"{path}: expected a file that can be written, found none; check the folder and the disk")


# --- colors and whole images ------------------------------------------------------------------------------------------


def hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert a color from HSV, 0 to 1, to RGB, float64 (3,), 0 to 255."""
    hsv = np.array([[[hue * 360, saturation, value]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float64) * 255


def random_color(rng: np.random.Generator) -> np.ndarray:
    """Draw a random color: RGB, float64 (3,), 0 to 255."""
    return hsv_to_rgb(rng.random(), rng.uniform(0, 0.7), rng.uniform(0.2, 1))


def similar_color(hue: float, saturation: float, value: float, std: float, rng: np.random.Generator) -> list[float]:
    """Draw a color near the given one.

    Args:
        hue: 0 to 1; its standard deviation is 0.015.
        saturation: 0 to 1.
        value: 0 to 1.
        std: standard deviation of saturation and value.
        rng: source of all randomness.

    Returns:
        Red, green and blue, 0 to 255.
    """
    hue = (hue + rng.normal(0, 0.015)) % 1
    saturation, value = np.clip(np.array([saturation, value]) + rng.normal(0, std, 2), 0, 1)
    return hsv_to_rgb(hue, saturation, value).tolist()


def random_shape(size: int, rng: np.random.Generator, max_ratio: float = 1.5) -> tuple[int, int]:
    """Draw height and width: the shorter one is ``size``, the longer one up to ``max_ratio`` times as long."""
    longer = int(size * rng.uniform(1, max_ratio))
    return (size, longer) if rng.random() < 0.7 else (longer, size)


def draw_background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a gradient between two colors with soft blotches, float64 (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (math.cos(angle) * x / width + math.sin(angle) * y / height) / 2 + 0.5
    blotches = cv2.resize(rng.normal(0, 0.3, (5, 5)), (width, height), interpolation=cv2.INTER_CUBIC)
    mix = np.clip(ramp + blotches, 0, 1)[..., None]
    return np.ascontiguousarray(random_color(rng) * (1 - mix) + random_color(rng) * mix)


def draw_clutter(image: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a line or a small ellipse that belongs to no class, in place."""
    height, width = image.shape[:2]
    color = tuple(random_color(rng).tolist())
    points = rng.integers(0, (width, height), (3, 2))
    if rng.random() < 0.5:
        thickness = int(rng.integers(1, max(2, height // 24) + 1))
        cv2.line(image, points[0].tolist(), points[1].tolist(), color, thickness, cv2.LINE_AA)
    else:
        axes = (rng.uniform(0.03, 0.1, 2) * min(height, width)).astype(int) + 1
        cv2.ellipse(image, points[0].tolist(), axes.tolist(), rng.uniform(0, 180), 0, 360, color, -1, cv2.LINE_AA)


def add_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise to an image, float (H, W, C); return it as uint8."""
    image = image + rng.normal(0, rng.uniform(2, 9), (*image.shape[:2], 1))
    return np.clip(image, 0, 255).astype(np.uint8)


def finish_image(
    canvas: np.ndarray, brightness: tuple[float, float], tint: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Downsample a canvas of twice the image's size, which smooths edges, then apply random light and noise.

    Args:
        canvas: uint8 (2H, 2W, 3).
        brightness: range of the factor of all channels.
        tint: range of the factor of each channel.
        rng: source of all randomness.

    Returns:
        Image, uint8 (H, W, 3).
    """
    height, width = canvas.shape[0] // 2, canvas.shape[1] // 2
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float64)
    light = rng.uniform(*brightness) * rng.uniform(*tint, 3)
    return add_noise(image * light, rng)


# --- textured shapes --------------------------------------------------------------------------------------------------


def draw_shape_image(name: str, hue: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one textured shape in front of clutter.

    Args:
        name: one of `TEXTURED_SHAPES`.
        hue: mean hue of the shape, 0 to 1.
        size: shorter side of the image in pixels.
        rng: source of all randomness.

    Returns:
        RGB image, uint8 (H, W, 3).
    """
    height, width = random_shape(size, rng)
    image = draw_background(height, width, rng)
    for _ in range(rng.integers(3, 8)):
        draw_clutter(image, rng)
    radius = size * rng.uniform(0.22, 0.42)
    center = np.array([rng.uniform(0.8 * radius, side - 0.8 * radius) for side in (width, height)])
    image, _ = draw_shape(image, name, hue, center, radius, rng)
    return add_noise(image, rng)


def draw_shape(
    image: np.ndarray, name: str, hue: float, center: np.ndarray, radius: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a textured shape, rotated at random, on a copy of an image.

    Args:
        image: float (H, W, 3), 0 to 255.
        name: one of `TEXTURED_SHAPES`.
        hue: mean hue, 0 to 1.
        center: (x, y) in pixels.
        radius: in pixels.
        rng: source of all randomness.

    Returns:
        The new image, float64 (H, W, 3), and the mask of the shape, uint8 (H, W), 0 or 255.
    """
    texture, shape = name.split("_")
    height, width = image.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    _fill_shape(mask, shape, center, radius, rng.uniform(0, 2 * math.pi))
    first = hsv_to_rgb((hue + rng.normal(0, 0.12)) % 1, rng.uniform(0.5, 1), rng.uniform(0.6, 1))
    second = hsv_to_rgb(rng.random(), rng.uniform(0.2, 0.8), rng.uniform(0.0, 0.35))
    surface = np.where(_draw_texture(texture, height, width, radius, rng)[..., None], first, second)
    surface = surface * rng.uniform(0.75, 1)
    alpha = cv2.GaussianBlur(mask, (3, 3), 0)[..., None] / 255
    return image * (1 - alpha) + surface * alpha, mask


def _fill_shape(mask: np.ndarray, shape: str, center: np.ndarray, radius: float, rotation: float) -> None:
    """Fill a shape in a uint8 mask with 255."""

    def polygon(angles: np.ndarray, radii: np.ndarray | float) -> None:
        directions = np.stack([np.cos(angles + rotation), np.sin(angles + rotation)], axis=1)
        points = center + directions * np.reshape(np.asarray(radii) * radius, (-1, 1))
        cv2.fillPoly(mask, [np.rint(points).astype(np.int32)], 255)

    def disk(scale: float, value: int, shift: float = 0) -> None:
        disk_center = center + shift * radius * np.array([math.cos(rotation), math.sin(rotation)])
        cv2.circle(mask, np.rint(disk_center).astype(int).tolist(), round(scale * radius), value, -1)

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


def _draw_texture(texture: str, height: int, width: int, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Return where a texture has its first color, bool (H, W)."""
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


# --- food -------------------------------------------------------------------------------------------------------------


class DishCanvas:
    """An image with the coordinate system of a plate: rotated at random, in units of the radius around the center.

    Args:
        image: uint8 (H, W, 3), drawn on in place.
        center: (x, y) in pixels.
        radius: in pixels.
        rng: source of all randomness.
    """

    def __init__(self, image: np.ndarray, center: np.ndarray, radius: float, rng: np.random.Generator) -> None:
        self.image, self.center, self.radius, self.rng = image, center, radius, rng
        self.rotation = rng.uniform(0, 2 * math.pi)

    def color(self, hue: float, saturation: float, value: float) -> list[float]:
        """Draw a color near the given one (`similar_color`)."""
        return similar_color(hue, saturation, value, 0.06, self.rng)

    def to_pixels(self, point: np.ndarray | tuple[float, float]) -> list[int]:
        """Convert a point to pixels."""
        x, y = point
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        rotated = np.array([x * cos - y * sin, x * sin + y * cos])
        return np.rint(self.center + self.radius * rotated).astype(int).tolist()

    def random_point(self, within: float = 0.8) -> np.ndarray:
        """Draw a point uniformly from the disk of radius ``within``."""
        angle, distance = self.rng.uniform(0, 2 * math.pi), within * math.sqrt(self.rng.random())
        return distance * np.array([math.cos(angle), math.sin(angle)])

    def disk(self, center: np.ndarray | tuple[float, float], radius: float, color: list[float]) -> None:
        cv2.circle(self.image, self.to_pixels(center), max(1, round(radius * self.radius)), color, -1, cv2.LINE_AA)

    def arc(
        self,
        center: np.ndarray | tuple[float, float],
        axes: tuple[float, float],
        color: list[float],
        angle: float = 0.0,
        span: tuple[float, float] = (0, 360),
        thickness: float = 0.0,
    ) -> None:
        """Draw an elliptic arc from ``span[0]`` to ``span[1]`` degrees; fill it if ``thickness`` is 0."""
        lengths = [max(1, round(axis * self.radius)) for axis in axes]
        pixels = max(1, round(thickness * self.radius)) if thickness else -1
        degrees = math.degrees(self.rotation) + angle
        cv2.ellipse(self.image, self.to_pixels(center), lengths, degrees, *span, color, pixels, cv2.LINE_AA)

    def polygon(self, points: list[tuple[float, float]], color: list[float]) -> None:
        cv2.fillPoly(self.image, [np.array([self.to_pixels(point) for point in points])], color, cv2.LINE_AA)

    def stick(self, center: np.ndarray, angle: float, length: float, thickness: float, color: list[float]) -> None:
        half = length / 2 * np.array([math.cos(angle), math.sin(angle)])
        pixels = max(1, round(thickness * self.radius))
        cv2.line(self.image, self.to_pixels(center - half), self.to_pixels(center + half), color, pixels, cv2.LINE_AA)
