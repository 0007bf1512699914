"""Person crops and whole-image views with their affine transforms."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

from datamodules.images import EncodedImage, resize
from datamodules.transforms import fitted, is_size, to_tensor
from errors import UserError

MARGIN = 0.15  # by which a box of joints is enlarged to each side: the part of its longer side that hands and feet take


TURNED = 0.4  # part of the training crops that are rotated (the author's code)


class View(NamedTuple):
    """An image as it enters the batch.

    Attributes:
        image: uint8 (3,H,W).
        matrix: float64 (2,3), from the image's coordinates to the image's.
        flipped: whether left and right are exchanged.
    """

    image: Tensor
    matrix: np.ndarray
    flipped: bool


def crop_matrix(center: Sequence[float], side: float, size: int, angle: float = 0.0, flip: bool = False) -> np.ndarray:
    """The affine map that makes a square of an image to ``size`` x ``size`` pixels: float64 (2,3).

    Args:
        center: (x, y) of the square; it becomes ((size - 1) / 2, (size - 1) / 2).
        side: of the square in the image's pixels.
        size: in pixels.
        angle: degrees by which what is shown is turned about the center, clockwise as one sees it.
        flip: reflect it then from left to right: x -> size - 1 - x.
    """
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    linear = np.array([[cosine, -sine], [sine, cosine]]) * (size / side)
    if flip:
        linear[0] *= -1
    return np.column_stack([linear, (size - 1) / 2 - linear @ np.asarray(center, np.float64)])


def apply_affine(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Maps points (...,2) by a matrix (2,3); in float64."""
    return points.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]


def warp(path: str, matrix: np.ndarray, size: int, exif_orientation: bool = False) -> np.ndarray:
    """The part of an image that ``matrix`` maps to ``size`` x ``size`` pixels: uint8 (S,S,3) RGB, black beyond it.

    An image that is reduced by two or more is first read smaller, so that nothing aliases: a JPEG by its DCT, others
    by means over areas. What is left is bilinear.

    Raises:
        BrokenImageError: the image cannot be read.
    """
    image = EncodedImage(path, exif_orientation)
    reduction = 1 / math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    height, width = (max(1, int(length / max(1.0, reduction))) for length in (image.height, image.width))
    pixels = image.decode(at_least=(height, width))
    # libjpeg rounds a reduced size up, so that the last pixel may stand for less than the others.
    factor = next(f for f in (1, 2, 4, 8) if pixels.shape[:2] == (-(-image.height // f), -(-image.width // f)))
    steps = np.array([factor, factor], np.float64)
    if reduction / factor >= 2:
        rest = int(reduction / factor)
        shrunk = max(1, pixels.shape[0] // rest), max(1, pixels.shape[1] // rest)
        steps *= np.array(pixels.shape[1::-1]) / shrunk[::-1]
        pixels = cv2.resize(pixels, shrunk[::-1], interpolation=cv2.INTER_AREA)
    linear = matrix[:, :2] * steps
    reduced = np.column_stack([linear, matrix[:, :2] @ ((steps - 1) / 2) + matrix[:, 2]])
    return cv2.warpAffine(pixels, reduced, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


def scale_channels(pixels: np.ndarray, color: float) -> np.ndarray:
    """Multiplies each channel of uint8 (H,W,3) by its own factor, uniform in 1 +- ``color``."""
    factors = np.random.uniform(1 - color, 1 + color, 3)
    table = np.rint(np.clip(np.arange(256)[:, None] * factors, 0, 255)).astype(np.uint8)
    return cv2.LUT(pixels, table[None])


class PersonCrop:
    """Cuts one person out: path, center and side of a square to a `View` of ``size`` x ``size`` pixels.

    With the defaults nothing is random: evaluation. The augmentation is that of Newell et al. 2016 (pose-hg-train):
    what is beyond the image is black.

    Args:
        size: side of the result in pixels.
        scale: the square's side changes by a factor 2^z, z normal with this deviation, clipped at twice that.
        rotation: two of five crops are turned by a normal angle of this deviation in degrees, clipped at twice that.
        hflip: probability of a horizontal flip.
        color: each channel is multiplied by its own factor, uniform in 1 +- this.
        exif_orientation: turn the image as its camera says; for prediction, since annotations are of stored pixels.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        size: int,
        scale: float = 0.0,
        rotation: float = 0.0,
        hflip: float = 0.0,
        color: float = 0.0,
        exif_orientation: bool = False,
    ) -> None:
        for name, right, expected, found in (
            ("image_size", isinstance(size, int) and size >= 1, "a side of 1 pixel or more for crops of people", size),
            ("scale", 0 <= scale <= 2, "0 to 2", scale),
            ("rotation", 0 <= rotation <= 90, "0 to 90 degrees", rotation),
            ("hflip", 0 <= hflip <= 1, "a probability", hflip),
            ("color", 0 <= color <= 1, "0 to 1", color),
        ):
            if not right:
                raise UserError(f"{name}: expected {expected}, found {found}")
        self.size, self.scale, self.rotation, self.hflip, self.color = size, scale, rotation, hflip, color
        self.exif_orientation = exif_orientation

    def __call__(self, path: str, center: Sequence[float], side: float) -> View:
        # As many draws whatever comes of them, so that an option changes nothing but itself.
        zoom, angle = (random.gauss(0, 1) for _ in range(2))
        turned, flip = random.random() < TURNED, random.random() < self.hflip
        side *= 2 ** (self.scale * min(2.0, max(-2.0, zoom)))
        angle = self.rotation * min(2.0, max(-2.0, angle)) if turned else 0.0
        matrix = crop_matrix(center, side, self.size, angle, flip)
        pixels = warp(path, matrix, self.size, self.exif_orientation)
        if self.color:
            pixels = scale_channels(pixels, self.color)
        return View(to_tensor(pixels), matrix, flip)


class WholePicture:
    """Reads an image whole: path to a `View`, for detectors of people.

    Args:
        size: its longest side in pixels, or (shorter, longest), either of which keeps the aspect; None: as it is.
        hflip: probability of a horizontal flip.
        color: see `PersonCrop`.
        exif_orientation: see `PersonCrop`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None,
        hflip: float = 0.0,
        color: float = 0.0,
        exif_orientation: bool = False,
    ) -> None:
        PersonCrop(1, hflip=hflip, color=color)
        if not is_size(size):
            raise UserError(f"image_size: expected 1 or more, found {size}")
        self.size = (size, size) if isinstance(size, int) else size
        self.hflip, self.color, self.exif_orientation = hflip, color, exif_orientation

    def __call__(self, path: str) -> View:
        flip = random.random() < self.hflip
        pixels = EncodedImage(path, self.exif_orientation).decode()
        height, width = pixels.shape[:2]
        new_height, new_width = fitted(height, width, self.size)
        pixels = resize(pixels, (new_height, new_width))
        y, x = new_height / height, new_width / width
        matrix = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2]])
        if flip:
            pixels = cv2.flip(pixels, 1)
            matrix[0] = -matrix[0] + [0, 0, new_width - 1]
        if self.color:
            pixels = scale_channels(pixels, self.color)
        return View(to_tensor(pixels), matrix, flip)
