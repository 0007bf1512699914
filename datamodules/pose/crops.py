"""Transforms of images with people: a square crop around one person, or the full image.

The affine map of a crop is the only operation that moves coordinates. A square of side s becomes S pixels by
x -> (x + 0.5) S / s - 0.5, where x is relative to the first pixel of the square.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

from datamodules.images import EncodedImage, resize
from datamodules.transforms import check_option, is_valid_size, output_size, to_tensor

ROTATION_PROBABILITY = 0.4  # pose-hg-train, src/util/pose.lua


class TransformedImage(NamedTuple):
    """The result of a transform.

    Attributes:
        image: uint8 (3, H, W).
        matrix: affine map from pixels of the stored image to pixels of ``image``, float64 (2, 3).
        flipped: whether the image is flipped horizontally.
    """

    image: Tensor
    matrix: np.ndarray
    flipped: bool


def crop_matrix(center: Sequence[float], side: float, size: int, angle: float = 0.0, flip: bool = False) -> np.ndarray:
    """Return the affine map from an image to a crop, float64 (2, 3).

    Args:
        center: (x, y) of the square, which maps to the center of the crop.
        side: side of the square in pixels of the image.
        size: side of the crop in pixels.
        angle: clockwise rotation of the content about the center in degrees.
        flip: flip the crop horizontally after the rotation: x -> size - 1 - x.
    """
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    linear = np.array([[cosine, -sine], [sine, cosine]]) * (size / side)
    if flip:
        linear[0] *= -1
    return np.column_stack([linear, (size - 1) / 2 - linear @ np.asarray(center, np.float64)])


def apply_affine(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Map points (..., 2) by an affine map (2, 3) in float64."""
    return points.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]


def warp(path: str, matrix: np.ndarray, size: int, exif_orientation: bool = True) -> np.ndarray:
    """Read the part of an image that ``matrix`` maps to ``size`` x ``size`` pixels.

    Reductions by two and more do not alias: a JPEG is decoded at a reduced size, other formats are averaged over areas.
    The remaining reduction is bilinear.

    Args:
        path: the image.
        matrix: affine map from the image to the crop, float64 (2, 3).
        size: side of the crop in pixels.
        exif_orientation: apply the EXIF orientation.

    Returns:
        RGB, uint8 (size, size, 3), black outside the image.

    Raises:
        BrokenImageError: the image cannot be read.
    """
    image = EncodedImage(path, exif_orientation)
    reduction = 1 / math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    height, width = (max(1, int(length / max(1.0, reduction))) for length in (image.height, image.width))
    pixels = image.decode(min_size=(height, width))
    # libjpeg rounds a reduced size up, so that the last pixel may cover less area than the others.
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


def scale_channels(pixels: np.ndarray, color_jitter: float) -> np.ndarray:
    """Multiply each channel of an image, uint8 (H, W, 3), by a random factor in [1 - c, 1 + c]."""
    factors = np.random.uniform(1 - color_jitter, 1 + color_jitter, 3)
    table = np.rint(np.clip(np.arange(256)[:, None] * factors, 0, 255)).astype(np.uint8)
    return cv2.LUT(pixels, table[None])


class PersonCrop:
    """Crop a square around one person and resize it.

    The augmentation is that of Newell et al. 2016 (pose-hg-train), and the random translation of Toshev and Szegedy
    2014. The defaults disable it, for evaluation.

    Args:
        size: side of the crop in pixels.
        scale: standard deviation of z in the random factor 2^z of the square's side; z is clipped at 2 deviations.
        rotation: standard deviation in degrees of the random rotation, clipped at 2 deviations; 40% of the crops are
            rotated.
        hflip: probability of a horizontal flip.
        color_jitter: each channel is multiplied by a random factor in [1 - c, 1 + c].
        exif_orientation: apply the EXIF orientation.
        translation: the square's center moves along x and y by independent uniform offsets of up to this fraction of
            the square's side.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        size: int,
        scale: float = 0.0,
        rotation: float = 0.0,
        hflip: float = 0.0,
        color_jitter: float = 0.0,
        exif_orientation: bool = True,
        translation: float = 0.0,
    ) -> None:
        valid = isinstance(size, int) and size >= 1
        check_option(valid, "image_size", "one side of at least 1 px for person crops", size)
        check_option(0 <= scale <= 2, "scale", "0 to 2", scale)
        check_option(0 <= rotation <= 90, "rotation", "0 to 90 degrees", rotation)
        check_option(0 <= hflip <= 1, "hflip", "a probability", hflip)
        check_option(0 <= color_jitter <= 1, "color_jitter", "0 to 1", color_jitter)
        check_option(0 <= translation <= 0.5, "translation", "0 to 0.5 of the crop's side", translation)
        self.size, self.scale, self.rotation, self.hflip, self.color_jitter = size, scale, rotation, hflip, color_jitter
        self.exif_orientation, self.translation = exif_orientation, translation

    def __call__(self, path: str, center: Sequence[float], side: float) -> TransformedImage:
        # The number of draws is constant, so that an option changes only its own effect.
        zoom, angle = (random.gauss(0, 1) for _ in range(2))
        rotate, flip = random.random() < ROTATION_PROBABILITY, random.random() < self.hflip
        offset = [random.uniform(-1, 1) for _ in range(2)]
        side *= 2 ** (self.scale * min(2.0, max(-2.0, zoom)))
        center = [c + self.translation * side * o for c, o in zip(center, offset, strict=True)]
        angle = self.rotation * min(2.0, max(-2.0, angle)) if rotate else 0.0
        matrix = crop_matrix(center, side, self.size, angle, flip)
        pixels = warp(path, matrix, self.size, self.exif_orientation)
        if self.color_jitter:
            pixels = scale_channels(pixels, self.color_jitter)
        return TransformedImage(to_tensor(pixels), matrix, flip)


class FullImage:
    """Read a full image and resize it, for detectors of people.

    Args:
        size: longest side in pixels, or (shorter, longest); both keep the aspect ratio. None keeps the size.
        hflip: probability of a horizontal flip.
        color_jitter: see `PersonCrop`.
        exif_orientation: see `PersonCrop`.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None,
        hflip: float = 0.0,
        color_jitter: float = 0.0,
        exif_orientation: bool = True,
    ) -> None:
        PersonCrop(1, hflip=hflip, color_jitter=color_jitter)  # checks the options
        check_option(is_valid_size(size), "image_size", "at least 1", size)
        self.size = (size, size) if isinstance(size, int) else size
        self.hflip, self.color_jitter, self.exif_orientation = hflip, color_jitter, exif_orientation

    def __call__(self, path: str) -> TransformedImage:
        flip = random.random() < self.hflip
        pixels = EncodedImage(path, self.exif_orientation).decode()
        height, width = pixels.shape[:2]
        new_height, new_width = output_size(height, width, self.size)
        pixels = resize(pixels, (new_height, new_width))
        x, y = new_width / width, new_height / height
        matrix = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2]])
        if flip:
            pixels = cv2.flip(pixels, 1)
            matrix[0] = -matrix[0] + [0, 0, new_width - 1]
        if self.color_jitter:
            pixels = scale_channels(pixels, self.color_jitter)
        return TransformedImage(to_tensor(pixels), matrix, flip)
