"""Transforms of images with boxes: every crop, expansion and jitter is one window that is resized to the result."""

from __future__ import annotations

import math
import random
from typing import Literal

import cv2
import numpy as np
from torch import Tensor

from datamodules.images import read_image, resize
from datamodules.orientation import Size
from datamodules.transforms import FILL_COLOR, check_option, is_valid_size, output_size, to_tensor

Photometric = Literal["none", "ssd", "yolo", "yolo2"]
Window = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the image; it may extend beyond the image

# Minimum IoU of each of SSD's samplers: None does not crop, 0.0 accepts any crop.
MIN_IOUS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)


class BoxTransform:
    """Read an image and transform its boxes: from a path and boxes to an image, boxes and the indices of kept boxes.

    The defaults are deterministic (evaluation).

    Args:
        image_size: side of the square in pixels that the image is resized to, which changes the aspect ratio (YOLO,
            SSD); (shorter side, maximum of the longer side), which keeps it (Fast and Faster R-CNN: 600, 1000); None
            keeps the image's size.
        photometric: ``ssd`` (Liu et al. 2016, section 2.2, with the constants of the authors' code: brightness +-32,
            contrast and saturation 0.5 to 1.5, hue +-18 of OpenCV's 180, each with probability 0.5), ``yolo`` (Redmon
            et al. 2016: saturation and exposure scaled by up to 1.5 or 1/1.5) or ``yolo2`` (Redmon and Farhadi 2017,
            the authors' yolov2-voc.cfg: also hue +-0.1 of a full turn).
        expand: with probability 0.5, place the image on a canvas up to this many times as large (SSD: 4); 1 is off.
        iou_crop: SSD's crops of 0.3 to 1 of the sides with a minimum IoU with an object. Objects whose center is
            outside are dropped.
        jitter: each side moves by up to this fraction of the image's side (YOLO: 0.2). Objects with less than a pixel
            inside are dropped.
        hflip: probability of a horizontal flip.
        exif_orientation: apply the EXIF orientation where the size of the annotation does not tell.

    Raises:
        UserError: an argument is out of range.
        BrokenImageError: when called, the image cannot be read.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] | None,
        photometric: Photometric = "none",
        expand: float = 1.0,
        iou_crop: bool = False,
        jitter: float = 0.0,
        hflip: float = 0.0,
        exif_orientation: bool = True,
    ) -> None:
        check_option(is_valid_size(image_size), "image_size", "1 or more", image_size)
        known = photometric in ("none", "ssd", "yolo", "yolo2")
        check_option(known, "photometric", "none, ssd, yolo or yolo2", photometric)
        check_option(expand >= 1, "expand", "1 or more", expand)
        check_option(0 <= jitter < 0.5, "jitter", "0 to 0.5", jitter)
        check_option(0 <= hflip <= 1, "hflip", "a probability", hflip)
        self.image_size, self.photometric, self.expand = image_size, photometric, expand
        self.iou_crop, self.jitter, self.hflip = iou_crop, jitter, hflip
        self.exif_orientation = exif_orientation

    def __call__(
        self, path: str, boxes: np.ndarray, num_objects: int | None = None, annotated_size: Size | None = None
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Read and transform an image.

        Args:
            path: the image.
            boxes: float32 (N, 4), xyxy in pixels.
            num_objects: how many of the first boxes are objects, which crops depend on; None: all. The others
                (proposals) are transformed too.
            annotated_size: (height, width) of the image in whose pixels the boxes are; None if unknown.

        Returns:
            The image, uint8 (3, H, W); the kept boxes, float32 (M, 4), xyxy in its pixels; their indices in ``boxes``,
            int64 (M,), ascending.
        """
        return self.apply(read_image(path, self.exif_orientation, annotated_size), boxes, num_objects)

    def image_only(self, path: str) -> Tensor:
        """Read and transform an image without boxes: uint8 (3, H, W)."""
        return self(path, np.zeros((0, 4), np.float32))[0]

    def apply(
        self, pixels: np.ndarray, boxes: np.ndarray, num_objects: int | None = None
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Transform a decoded image, RGB uint8 (H, W, 3). See `__call__`."""
        if self.photometric == "ssd":
            pixels = distort_ssd(pixels)
        elif self.photometric == "yolo":
            pixels = distort_yolo(pixels)
        elif self.photometric == "yolo2":
            pixels = distort_yolo(pixels, hue=0.1)
        window = self._sample_window(pixels.shape[0], pixels.shape[1], boxes[:num_objects])
        flip = random.random() < self.hflip
        size = output_size(window[3] - window[1], window[2] - window[0], self.image_size)
        image = render_window(pixels, window, size)
        boxes, kept = transform_boxes(boxes, window, size, by_center=self.iou_crop)
        if flip:
            image = cv2.flip(image, 1)
            boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
        return to_tensor(image), boxes, kept

    def _sample_window(self, height: int, width: int, boxes: np.ndarray) -> Window:
        window = (0, 0, width, height)
        if self.expand > 1 and random.random() < 0.5:
            ratio = random.uniform(1, self.expand)
            w, h = round(width * ratio), round(height * ratio)
            left, top = random.randint(0, w - width), random.randint(0, h - height)
            window = (-left, -top, w - left, h - top)
        if self.iou_crop:
            window = iou_crop(window, boxes)
        if self.jitter:
            dx, dy = self.jitter * (window[2] - window[0]), self.jitter * (window[3] - window[1])
            left, top, right, bottom = (
                round(side + random.uniform(-d, d)) for side, d in zip(window, (dx, dy, dx, dy), strict=True)
            )
            window = (left, top, max(right, left + 1), max(bottom, top + 1))
        return window


def iou_crop(window: Window, boxes: np.ndarray) -> Window:
    """Sample a part of a window as SSD does (the authors' sampler.cpp), or return the window.

    Draw a sampler, then up to 50 crops. Accept the first crop that reaches the sampler's minimum IoU with an object and
    contains the center of one. If none does, draw another sampler. A crop has sides of scale * sqrt(aspect) and
    scale / sqrt(aspect) relative to the window, scale 0.3 to 1, aspect 0.5 to 2. The aspect is clamped so that no side
    is longer than the window's; as a result, 23% of the crops have a whole side of it.

    Args:
        window: what is cropped.
        boxes: float (N, 4), xyxy in the same pixels.
    """
    width, height = window[2] - window[0], window[3] - window[1]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while True:
        min_iou = random.choice(MIN_IOUS)
        if min_iou is None:
            return window
        for _ in range(50):
            scale = random.uniform(0.3, 1)
            aspect = min(max(random.uniform(0.5, 2), scale**2), 1 / scale**2)
            w, h = max(1, round(width * scale * math.sqrt(aspect))), max(1, round(height * scale / math.sqrt(aspect)))
            left = window[0] + random.randint(0, max(0, width - w))
            top = window[1] + random.randint(0, max(0, height - h))
            crop = (left, top, left + w, top + h)
            if not len(boxes):
                return crop
            sides = np.minimum(boxes[:, 2:], crop[2:]) - np.maximum(boxes[:, :2], crop[:2])
            intersection = sides.clip(0).prod(1)
            if (intersection / (areas + w * h - intersection)).max() < min_iou:
                continue
            if ((centers > crop[:2]) & (centers < crop[2:])).all(1).any():
                return crop


def render_window(pixels: np.ndarray, window: Window, size: tuple[int, int]) -> np.ndarray:
    """Resize a window of an image. Pixels beyond the image have the color `FILL_COLOR`.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        window: see `Window`.
        size: (height, width) of the result.

    Returns:
        New memory, uint8 (height, width, 3).
    """
    height, width = size
    left, top, right, bottom = window
    inner = max(0, left), max(0, top), min(pixels.shape[1], right), min(pixels.shape[0], bottom)
    part = pixels[inner[1] : inner[3], inner[0] : inner[2]]
    if inner == window:
        return part.copy() if part.shape[:2] == size else resize(part, size)
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = FILL_COLOR
    x, y = width / (right - left), height / (bottom - top)
    x0, x1 = round((inner[0] - left) * x), round((inner[2] - left) * x)
    y0, y1 = round((inner[1] - top) * y), round((inner[3] - top) * y)
    if x1 > x0 and y1 > y0 and part.size:
        canvas[y0:y1, x0:x1] = resize(part, (y1 - y0, x1 - x0))
    return canvas


def transform_boxes(
    boxes: np.ndarray, window: Window, size: tuple[int, int], by_center: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Map boxes from the image to a resized window, clip them to it, and drop those outside.

    Args:
        boxes: float (N, 4), xyxy in pixels of the image.
        window: see `Window`.
        size: (height, width) that the window is resized to.
        by_center: drop boxes whose center is outside; else boxes with less than a pixel inside.

    Returns:
        The kept boxes, float32 (M, 4), and their indices, int64 (M,).
    """
    scale = np.array([size[1] / (window[2] - window[0]), size[0] / (window[3] - window[1])] * 2, np.float32)
    limit = np.array([size[1], size[0]] * 2, np.float32)
    mapped = (boxes.astype(np.float32) - np.array([window[0], window[1]] * 2, np.float32)) * scale
    clipped = mapped.clip(0, limit)
    if by_center:
        centers = (mapped[:, :2] + mapped[:, 2:]) / 2
        inside = ((centers > 0) & (centers < limit[:2])).all(1)
    else:
        # Keep a box that was smaller than a pixel before clipping.
        inside = (clipped[:, 2:] - clipped[:, :2] >= np.minimum(1, mapped[:, 2:] - mapped[:, :2])).all(1)
    kept = np.flatnonzero(inside)
    return clipped[kept], kept


def distort_ssd(pixels: np.ndarray) -> np.ndarray:
    """Apply SSD's photometric distortion: brightness, contrast, hue and saturation, each with probability 0.5.

    Args:
        pixels: RGB, uint8 (H, W, 3).
    """
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
        pixels = adjust_hsv(pixels, hue, saturation, 1.0)
    return cv2.LUT(pixels, _table(np.arange(256) * contrast)) if contrast_last and contrast != 1 else pixels


def distort_yolo(pixels: np.ndarray, hue: float = 0.0) -> np.ndarray:
    """Apply YOLO's photometric distortion: multiply or divide saturation and exposure by a factor uniform in 1 to 1.5.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        hue: maximum hue shift of YOLOv2 in full turns, uniform in both directions (darknet, random_distort_image).
    """
    saturation, exposure = (random.uniform(1, 1.5) ** random.choice((-1, 1)) for _ in range(2))
    return adjust_hsv(pixels, 180 * random.uniform(-hue, hue) if hue else 0.0, saturation, exposure)


def adjust_hsv(pixels: np.ndarray, hue: float, saturation: float, value: float) -> np.ndarray:
    """Shift the hue and scale saturation and value.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        hue: shift in OpenCV's units: 180 is a full turn.
        saturation: factor.
        value: factor.
    """
    steps = np.arange(256, dtype=np.float32)
    tables = np.stack([_table((steps + hue) % 180), _table(steps * saturation), _table(steps * value)], axis=-1)
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), tables[None]), cv2.COLOR_HSV2RGB)


def _table(values: np.ndarray) -> np.ndarray:
    return np.rint(values.clip(0, 255)).astype(np.uint8)
