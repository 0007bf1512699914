"""From an image's path to the tensor that enters a batch. The only file that imports albumentations."""

from __future__ import annotations

import math
import os
import random
from typing import Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.images import Box, EncodedImage, resize
from errors import UserError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for a newer version when imported
import albumentations

TrainCrop = Literal["random_resized", "scale_jitter", "pad"]
Resize = int | tuple[int, int] | None

# ImageNet's mean color, with which is filled what lies beyond an image (as SSD does).
FILL = (124, 116, 104)
VOID = 255  # the id of pixels that belong to no class

# Standard deviations and directions (columns) of ImageNet's RGB pixels on a 0..1 scale, as published with
# fb.resnet.torch; Krizhevsky et al. 2012 do not print theirs.
PCA_SCALE = np.array([0.2175, 0.0188, 0.0045])
PCA_DIRECTIONS = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ]
)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (H,W,3) to a contiguous uint8 tensor (3,H,W)."""
    planes = np.empty((3, *pixels.shape[:2]), np.uint8)
    cv2.split(pixels, [planes[0], planes[1], planes[2]])
    return torch.from_numpy(planes)


def is_size(size: int | tuple[int, int] | None) -> bool:
    """Whether `fitted` takes it."""
    return size is None or (size if isinstance(size, int) else min(size)) >= 1


def fitted(height: int, width: int, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) to which an image is resized.

    Args:
        height, width: the image's, in pixels.
        size: the side of a square, which changes its aspect; (shorter, longest side), which keeps it; None: its own.
    """
    if size is None:
        return height, width
    if isinstance(size, int):
        return size, size
    shorter, longest = size
    scale = min(shorter / min(height, width), longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def random_resized_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Draws the part of an image that Szegedy et al. 2014 train GoogLeNet on: top, left, height, width in pixels.

    An area uniform in ``scale`` times the image's and a width/height log-uniform in ``ratio``. After ten draws that
    do not fit, the largest central part whose ratio is allowed. The distribution is that of torchvision's
    RandomResizedCrop.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def scale_jitter_box(height: int, width: int, crop: int, shorter: int) -> Box:
    """Draws a square of ``crop`` pixels from an image whose shorter side is resized to ``shorter``, in the pixels of
    the image as it is (Simonyan and Zisserman 2015, section 3.1)."""
    side = max(1, round(min(height, width) * crop / shorter))
    return random.randint(0, height - side), random.randint(0, width - side), side, side


def pca_color_jitter(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Adds one random multiple of each principal component of ImageNet's colors (Krizhevsky et al. 2012, section 4.1).

    The same [p1 p2 p3][a1 l1, a2 l2, a3 l3] is added to every pixel, a_i ~ N(0, sigma), drawn once an image.

    Args:
        pixels: uint8 (H,W,3), RGB.
        sigma: 0.1 in the paper.
    """
    shift = 255 * PCA_DIRECTIONS @ (PCA_SCALE * np.random.normal(0, sigma, 3))
    table = np.rint(np.clip(np.arange(256)[:, None] + shift, 0, 255)).astype(np.uint8)
    return cv2.LUT(pixels, table[None])


class TrainTransform:
    """Reads an image with random crop, flip and colors: path to uint8 (3,S,S).

    Args:
        image_size: side S of the result in pixels.
        crop: ``random_resized`` (GoogLeNet and most since), ``scale_jitter`` (VGG, ResNet: resize the shorter side to
            a random length, then crop) or ``pad`` (CIFAR: zero padding, then crop).
        crop_scale: smallest and largest area of a random_resized crop, as a part of the image's.
        resize_range: shortest and longest shorter side of scale_jitter in pixels, both included.
        pad: zeros added on each side by ``pad``, in pixels.
        hflip: probability of a horizontal flip.
        color_jitter: brightness, contrast and saturation change by factors uniform in 1 +- this, in random order.
        pca_jitter: sigma of `pca_color_jitter`.

    Raises:
        ValueError: an argument is out of its range; when called, an image is too small for ``pad``.
        BrokenImageError: when called, the image cannot be read.
    """

    def __init__(
        self,
        image_size: int,
        crop: TrainCrop = "random_resized",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        resize_range: tuple[int, int] = (256, 480),
        pad: int = 4,
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        pca_jitter: float = 0.0,
    ) -> None:
        _check(image_size >= 1, "image_size", "at least 1", image_size)
        _check(0 < crop_scale[0] <= crop_scale[1] <= 1, "crop_scale", "0 < smallest <= largest <= 1", crop_scale)
        _check(0 <= hflip <= 1, "hflip", "a probability", hflip)
        _check(pad >= 0, "pad", "at least 0", pad)
        _check(0 <= color_jitter <= 1, "color_jitter", "0 to 1", color_jitter)
        _check(pca_jitter >= 0, "pca_jitter", "at least 0", pca_jitter)
        if crop == "scale_jitter":
            expected = f"image_size ({image_size}) <= shortest <= longest"
            _check(image_size <= resize_range[0] <= resize_range[1], "resize_range", expected, resize_range)
        self.image_size, self.crop, self.crop_scale, self.resize_range = image_size, crop, crop_scale, resize_range
        self.pad, self.hflip, self.pca_jitter = pad, hflip, pca_jitter
        self.colors: albumentations.Compose | None = None
        if color_jitter:
            span = (1 - color_jitter, 1 + color_jitter)
            jitter = albumentations.ColorJitter(brightness=span, contrast=span, saturation=span, hue=(0, 0), p=1)
            self.colors = albumentations.Compose([jitter])

    def set_random_state(self, generator: np.random.Generator, py_random: random.Random) -> None:
        """Seeds albumentations, which keeps generators of its own; the rest draws from ``random`` and ``np.random``."""
        if self.colors is not None:
            self.colors.set_random_state(generator, py_random)

    def __call__(self, path: str) -> Tensor:
        image = EncodedImage(path)
        size = (self.image_size, self.image_size)
        if self.crop == "pad":
            pixels = self._padded_crop(image)
        elif self.crop == "scale_jitter":
            shorter = random.randint(*self.resize_range)
            pixels = image.crop(scale_jitter_box(image.height, image.width, self.image_size, shorter), size)
        else:
            box = random_resized_box(image.height, image.width, self.crop_scale, (3 / 4, 4 / 3))
            pixels = image.crop(box, size)
        if random.random() < self.hflip:
            pixels = cv2.flip(pixels, 1)
        if self.colors is not None:
            pixels = self.colors(image=pixels)["image"]
        if self.pca_jitter:
            pixels = pca_color_jitter(pixels, self.pca_jitter)
        return to_tensor(pixels)

    def _padded_crop(self, image: EncodedImage) -> np.ndarray:
        pad, size = self.pad, self.image_size
        height, width = image.height + 2 * pad, image.width + 2 * pad
        if height < size or width < size:
            raise UserError(
                f"{image.path}: {image.width}x{image.height} pixels, padded by {pad}, are fewer than the crop of "
                f"{size}: lower image_size or take train_crop random_resized"
            )
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[pad : pad + image.height, pad : pad + image.width] = image.decode()
        top, left = random.randint(0, height - size), random.randint(0, width - size)
        return canvas[top : top + size, left : left + size]


class MaskTransform:
    """An image and its mask of ids, resized, scaled, cropped and reflected together: new uint8 (H,W,3) and (H,W).

    With the defaults nothing is changed: evaluation. What lies beyond the image has the color `FILL` and the id
    `VOID`. Images are interpolated bilinearly; ids are taken from the nearest pixel, measured between their centers.

    Args:
        size: to which the image is resized first, see `fitted`.
        crop: side in pixels of the square that is cut out; where the image is smaller, it lies anywhere in it.
        scale: smallest and largest factor, drawn uniformly, by which the image is scaled before the crop.
        hflip: probability of a horizontal flip.
        color_jitter: brightness, contrast and saturation change by factors uniform in 1 +- this, in random order.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        crop: int | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        hflip: float = 0.0,
        color_jitter: float = 0.0,
    ) -> None:
        _check(is_size(size), "image_size", "1 or more", size)
        _check(crop is None or crop >= 1, "crop_size", "1 or more", crop)
        _check(0 < scale[0] <= scale[1], "scale", "0 < smallest <= largest", scale)
        _check(0 <= hflip <= 1, "hflip", "a probability", hflip)
        _check(0 <= color_jitter <= 1, "color_jitter", "0 to 1", color_jitter)
        self.size = size
        steps: list[albumentations.BasicTransform] = []
        if tuple(scale) != (1, 1):
            limits = (scale[0] - 1, scale[1] - 1)
            nearest = cv2.INTER_NEAREST_EXACT  # INTER_NEAREST moves the ids by up to half a pixel
            steps.append(albumentations.RandomScale(limits, cv2.INTER_LINEAR, nearest, p=1))
        if crop is not None:
            beyond = {"fill": FILL, "fill_mask": VOID, "border_mode": cv2.BORDER_CONSTANT}
            steps.append(albumentations.RandomCrop(crop, crop, True, "random", **beyond, p=1))
        if hflip:
            steps.append(albumentations.HorizontalFlip(p=hflip))
        if color_jitter:
            span = (1 - color_jitter, 1 + color_jitter)
            steps.append(albumentations.ColorJitter(brightness=span, contrast=span, saturation=span, hue=(0, 0), p=1))
        self.transform = albumentations.Compose(steps) if steps else None

    def set_random_state(self, generator: np.random.Generator, py_random: random.Random) -> None:
        """Seeds albumentations, which keeps generators of its own."""
        if self.transform is not None:
            self.transform.set_random_state(generator, py_random)

    def __call__(self, pixels: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (h,w,3) RGB and the mask, uint8 (h,w), of the same size."""
        height, width = fitted(mask.shape[0], mask.shape[1], self.size)
        if (height, width) != mask.shape[:2]:
            pixels = resize(pixels, (height, width))
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        if self.transform is not None:
            moved = self.transform(image=pixels, mask=mask)
            pixels, mask = moved["image"], moved["mask"]
        return pixels, mask


class FaceTransform:
    """Turns, moves, scales and reflects a gray face at random: uint8 (H,W) to the same, new memory.

    All angles, distances and factors are uniform. What lies outside repeats the border. The order is that of Keras's
    ImageDataGenerator, with which mini-Xception was trained: one bilinear warp.

    Args:
        rotation: most degrees to either side, 0 to 180.
        shift: most in either direction, as a part of the side, 0 to 1.
        zoom: height and width are scaled by factors of 1 +- this, each by its own.
        hflip: probability of a horizontal flip.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, rotation: float = 10.0, shift: float = 0.1, zoom: float = 0.1, hflip: float = 0.5) -> None:
        _check(0 <= rotation <= 180, "rotation", "0 to 180 degrees", rotation)
        _check(0 <= shift <= 1, "shift", "0 to 1", shift)
        _check(0 <= zoom < 1, "zoom", "0 or more and less than 1", zoom)
        _check(0 <= hflip <= 1, "hflip", "a probability", hflip)
        warp = albumentations.Affine(
            scale=dict.fromkeys("xy", (1 - zoom, 1 + zoom)),
            translate_percent=dict.fromkeys("xy", (-shift, shift)),
            rotate=(-rotation, rotation),
            border_mode=cv2.BORDER_REPLICATE,
            p=1,
        )
        self.transform = albumentations.Compose([warp, albumentations.HorizontalFlip(p=hflip)])

    def set_random_state(self, generator: np.random.Generator, py_random: random.Random) -> None:
        """Seeds albumentations, which keeps generators of its own."""
        self.transform.set_random_state(generator, py_random)

    def __call__(self, face: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.transform(image=face)["image"])


class EvalTransform:
    """Reads the center of a resized image: path to uint8 (3,crop,crop).

    Resized by Pillow's antialiased bilinear filter, as the published weights were evaluated: the result differs from
    torchvision's Resize and CenterCrop by rounding alone. A JPEG more than four times as large as the resized image
    is first decoded at half its size or less.

    Args:
        crop: side of the central square in pixels. For ten-crop testing give the resized side (256): the module cuts
            the ten on the device.
        resize: length of the shorter side after resizing; (height, width), which does not keep the aspect (Places365);
            None leaves the image as it is (CIFAR).
        exif_orientation: turn the image as its camera says.

    Raises:
        ValueError: the crop is larger than the resized image.
        BrokenImageError: when called, the image cannot be read.
    """

    def __init__(self, crop: int, resize: Resize = 256, exif_orientation: bool = False) -> None:
        if resize is not None:
            shorter = resize if isinstance(resize, int) else min(resize)
            _check(1 <= crop <= shorter, "crop", f"1 to resize ({resize})", crop)
        self.crop, self.resize, self.exif_orientation = crop, resize, exif_orientation

    def __call__(self, path: str) -> Tensor:
        image = EncodedImage(path, self.exif_orientation)
        height, width = self._resized(image.height, image.width)
        if min(height, width) < self.crop:
            raise UserError(
                f"{path}: {width}x{height} pixels are fewer than the crop of {self.crop}: set resize, or lower the crop"
            )
        top, left = round((height - self.crop) / 2), round((width - self.crop) / 2)
        if self.resize is None:
            return to_tensor(image.decode()[top : top + self.crop, left : left + self.crop])
        pixels = image.decode(at_least=(2 * height, 2 * width))
        # Resizing the crop alone, so that an image of one pixel by thousands does not become a giant first.
        y, x = pixels.shape[0] / height, pixels.shape[1] / width
        box = (
            left * x,
            top * y,
            min(pixels.shape[1], (left + self.crop) * x),
            min(pixels.shape[0], (top + self.crop) * y),
        )
        resized = Image.fromarray(pixels).resize((self.crop, self.crop), Image.Resampling.BILINEAR, box=box)
        return to_tensor(np.asarray(resized))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if not isinstance(self.resize, int):
            return self.resize
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize


def _check(right: bool, name: str, expected: str, found: object) -> None:
    if not right:
        raise UserError(f"{name}: expected {expected}, found {found}")
