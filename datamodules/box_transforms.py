"""Images with boxes: every crop, expansion and jitter is one rectangle of the image that fills the result."""

from __future__ import annotations

import math
import random
from typing import Literal

import cv2
import numpy as np
from torch import Tensor

from datamodules.images import EncodedImage, resize
from datamodules.transforms import FILL, fitted, is_size, to_tensor
from errors import UserError

Photometric = Literal["none", "ssd", "yolo", "yolo2"]
View = tuple[int, int, int, int]  # left, top, right, bottom in the image's pixels; it may reach beyond the image

# SSD's samplers: no crop at all, a least overlap with some object, or any crop.
LEAST_OVERLAPS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)


class BoxTransform:
    """Reads an image and moves its boxes along: path and boxes to uint8 (3,H,W), boxes and which of them are left.

    With the defaults nothing is random: evaluation.

    Args:
        size: side in pixels of the square that the image is warped to, which changes its aspect (YOLO, SSD);
            (shorter side, longest side), which keeps it (Fast and Faster R-CNN: 600, 1000); or None for the image's.
        photometric: ``ssd`` (Liu et al. 2016, section 2.2, with the constants of the authors' code: brightness +-32,
            contrast and saturation .5-1.5, hue +-18 of OpenCV's 180, each for half of the images), ``yolo`` (Redmon
            et al. 2016: saturation and exposure up to 1.5 times more or less) or ``yolo2`` (Redmon and Farhadi 2017,
            the authors' yolov2-voc.cfg: hue by up to a tenth of a turn too).
        expand: half of the images lie somewhere on a canvas up to this many times as large (SSD: 4); 1 is off.
        iou_crop: SSD's crops: of 0.3 to 1 of the sides, that overlap some object enough. Objects stay whose center does.
        jitter: each side moves by up to this part of the image's (YOLO: 0.2). Objects stay of which a pixel does.
        hflip: probability of a horizontal flip.
        exif_orientation: turn the image as its camera says; for prediction, since annotations are of stored pixels.

    Raises:
        ValueError: an argument is out of its range.
        BrokenImageError: when called, the image cannot be read.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None,
        photometric: Photometric = "none",
        expand: float = 1.0,
        iou_crop: bool = False,
        jitter: float = 0.0,
        hflip: float = 0.0,
        exif_orientation: bool = False,
    ) -> None:
        for name, right, expected, found in (
            ("size", is_size(size), "1 or more", size),
            ("photometric", photometric in ("none", "ssd", "yolo", "yolo2"), "none, ssd, yolo or yolo2", photometric),
            ("expand", expand >= 1, "1 or more", expand),
            ("jitter", 0 <= jitter < 0.5, "0 to 0.5", jitter),
            ("hflip", 0 <= hflip <= 1, "a probability", hflip),
        ):
            if not right:
                raise UserError(f"{name}: expected {expected}, found {found}")
        self.size, self.photometric, self.expand = size, photometric, expand
        self.iou_crop, self.jitter, self.hflip = iou_crop, jitter, hflip
        self.exif_orientation = exif_orientation

    def __call__(
        self, path: str, boxes: np.ndarray, objects: int | None = None
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Boxes are float32 (N,4) xyxy in the image's pixels.

        ``objects`` of them, the first, are what crops look for; None for all. The others (proposals) are moved along.

        Returns:
            The image, uint8 (3,H,W); the boxes that are left, float32 (M,4) xyxy in its pixels; their indices among
            those given, int64 (M,), rising.
        """
        return self.apply(EncodedImage(path, self.exif_orientation).decode(), boxes, objects)

    def apply(
        self, pixels: np.ndarray, boxes: np.ndarray, objects: int | None = None
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """The same of an image that was read, uint8 (H,W,3) RGB."""
        if self.photometric == "ssd":
            pixels = distort_ssd(pixels)
        elif self.photometric == "yolo":
            pixels = distort_yolo(pixels)
        elif self.photometric == "yolo2":
            pixels = distort_yolo(pixels, hue=0.1)
        view = self._view(pixels.shape[0], pixels.shape[1], boxes[:objects])
        flip = random.random() < self.hflip
        size = fitted(view[3] - view[1], view[2] - view[0], self.size)
        image = render(pixels, view, size)
        moved, kept = move(boxes, view, size, by_center=self.iou_crop)
        if flip:
            image = cv2.flip(image, 1)
            moved[:, [0, 2]] = size[1] - moved[:, [2, 0]]
        return to_tensor(image), moved, kept

    def _view(self, height: int, width: int, boxes: np.ndarray) -> View:
        view = (0, 0, width, height)
        if self.expand > 1 and random.random() < 0.5:
            ratio = random.uniform(1, self.expand)
            w, h = round(width * ratio), round(height * ratio)
            left, top = random.randint(0, w - width), random.randint(0, h - height)
            view = (-left, -top, w - left, h - top)
        if self.iou_crop:
            view = iou_crop(view, boxes)
        if self.jitter:
            dx, dy = self.jitter * (view[2] - view[0]), self.jitter * (view[3] - view[1])
            left, top, right, bottom = (
                round(side + random.uniform(-d, d)) for side, d in zip(view, (dx, dy, dx, dy), strict=True)
            )
            view = (left, top, max(right, left + 1), max(bottom, top + 1))
        return view


def iou_crop(view: View, boxes: np.ndarray) -> View:
    """A part of the view as SSD samples it (the authors' sampler.cpp), or all of it.

    A sampler is drawn, then up to 50 crops: sides of scale * sqrt(aspect) and scale / sqrt(aspect) of the view's, scale
    0.3 to 1, aspect 0.5 to 2. The first one that overlaps some object by the sampler's least IoU, and holds the center of
    one, is taken; where none does, another sampler is drawn.

    Args:
        view: what is cropped.
        boxes: float (N,4) xyxy in the same pixels.
    """
    width, height = view[2] - view[0], view[3] - view[1]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while True:
        least = random.choice(LEAST_OVERLAPS)
        if least is None:
            return view
        for _ in range(50):
            scale = random.uniform(0.3, 1)
            aspect = random.uniform(max(0.5, scale**2), min(2, 1 / scale**2))
            w, h = max(1, round(width * scale * math.sqrt(aspect))), max(1, round(height * scale / math.sqrt(aspect)))
            left, top = view[0] + random.randint(0, max(0, width - w)), view[1] + random.randint(0, max(0, height - h))
            crop = (left, top, left + w, top + h)
            if not len(boxes):
                return crop
            inner = np.minimum(boxes[:, 2:], crop[2:]) - np.maximum(boxes[:, :2], crop[:2])
            shared = inner.clip(0).prod(1)
            if (shared / (areas + w * h - shared)).max() < least:
                continue
            if ((centers > crop[:2]) & (centers < crop[2:])).all(1).any():
                return crop


def render(pixels: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """The view, resized: uint8 (height, width, 3); what lies beyond the image has the color `FILL`."""
    height, width = size
    left, top, right, bottom = view
    inner = max(0, left), max(0, top), min(pixels.shape[1], right), min(pixels.shape[0], bottom)
    part = pixels[inner[1] : inner[3], inner[0] : inner[2]]
    if inner == view:
        # A copy of its own where nothing was resized: the image may be used again.
        return part.copy() if part.shape[:2] == size else resize(part, size)
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = FILL
    x, y = width / (right - left), height / (bottom - top)
    x0, x1 = round((inner[0] - left) * x), round((inner[2] - left) * x)
    y0, y1 = round((inner[1] - top) * y), round((inner[3] - top) * y)
    if x1 > x0 and y1 > y0 and part.size:
        canvas[y0:y1, x0:x1] = resize(part, (y1 - y0, x1 - x0))
    return canvas


def move(
    boxes: np.ndarray, view: View, size: tuple[int, int], by_center: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as they lie in the resized view, clipped to it: float32 (M,4), and their indices, int64 (M,).

    Args:
        boxes: float (N,4) xyxy in the image's pixels.
        view: see `View`.
        size: (height, width) that the view is resized to.
        by_center: leave out boxes whose center lies outside; else those of which less than a pixel is left.
    """
    scale = np.array([size[1] / (view[2] - view[0]), size[0] / (view[3] - view[1])] * 2, np.float32)
    limit = np.array([size[1], size[0]] * 2, np.float32)
    moved = (boxes.astype(np.float32) - np.array([view[0], view[1]] * 2, np.float32)) * scale
    clipped = moved.clip(0, limit)
    if by_center:
        centers = (moved[:, :2] + moved[:, 2:]) / 2
        inside = ((centers > 0) & (centers < limit[:2])).all(1)
    else:
        # A box that was smaller than a pixel all along is no worse for being moved.
        inside = (clipped[:, 2:] - clipped[:, :2] >= np.minimum(1, moved[:, 2:] - moved[:, :2])).all(1)
    kept = np.flatnonzero(inside)
    return clipped[kept], kept


def distort_ssd(pixels: np.ndarray) -> np.ndarray:
    """SSD's photometric distortion of uint8 (H,W,3) RGB: brightness, contrast, hue, saturation, each for one in two."""
    values: np.ndarray = np.arange(256, dtype=np.float32)
    contrast_last = random.random() < 0.5
    if random.random() < 0.5:
        values = values + random.uniform(-32, 32)
    contrast = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    hue = random.uniform(-18, 18) if random.random() < 0.5 else 0.0
    if not contrast_last:
        values = values.clip(0, 255) * contrast
    pixels = cv2.LUT(pixels, _table(values))
    if saturation != 1 or hue:
        pixels = change_hsv(pixels, hue, saturation, 1.0)
    return cv2.LUT(pixels, _table(np.arange(256) * contrast)) if contrast_last and contrast != 1 else pixels


def distort_yolo(pixels: np.ndarray, hue: float = 0.0) -> np.ndarray:
    """YOLO's of uint8 (H,W,3) RGB: saturation and exposure times or divided by a factor uniform in 1 to 1.5.

    YOLOv2 turns the hue too (darknet, random_distort_image), uniformly by up to ``hue`` of a full turn each way.
    """
    saturation, exposure = (random.uniform(1, 1.5) ** random.choice((-1, 1)) for _ in range(2))
    return change_hsv(pixels, 180 * random.uniform(-hue, hue) if hue else 0.0, saturation, exposure)


def change_hsv(pixels: np.ndarray, hue: float, saturation: float, value: float) -> np.ndarray:
    """Hue plus ``hue`` (OpenCV's, a full turn is 180), saturation and value times a factor, of uint8 (H,W,3) RGB."""
    steps = np.arange(256, dtype=np.float32)
    tables = np.stack([_table((steps + hue) % 180), _table(steps * saturation), _table(steps * value)], axis=-1)
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), tables[None]), cv2.COLOR_HSV2RGB)


def _table(values: np.ndarray) -> np.ndarray:
    return np.rint(values.clip(0, 255)).astype(np.uint8)
