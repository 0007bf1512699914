"""Transforms from an image file to the tensor in a batch. The only file that imports albumentations."""

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

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # albumentations checks for a new version when imported
import albumentations

TrainCrop = Literal["random_resized", "scale_jitter", "pad"]
Resize = int | tuple[int, int] | None

FILL_COLOR = (124, 116, 104)  # mean RGB of ImageNet, for pixels beyond the image (as in SSD)
VOID = 255  # id of pixels that belong to no class

# Standard deviations and directions (columns) of ImageNet's RGB pixels in 0..1, as published with fb.resnet.torch.
# Krizhevsky et al. 2012 do not publish theirs.
PCA_STD = np.array([0.2175, 0.0188, 0.0045])
PCA_DIRECTIONS = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ]
)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert uint8 (H, W, 3) to a contiguous uint8 tensor (3, H, W)."""
    planes = np.empty((3, *pixels.shape[:2]), np.uint8)
    cv2.split(pixels, [planes[0], planes[1], planes[2]])
    return torch.from_numpy(planes)


def is_valid_size(size: int | tuple[int, int] | None) -> bool:
    """Return whether `output_size` accepts a size."""
    return size is None or (size if isinstance(size, int) else min(size)) >= 1


def output_size(height: int, width: int, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Compute the (height, width) that an image is resized to.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        size: side of a square, which changes the aspect ratio; (shorter side, maximum of the longer side), which
            keeps it; None keeps the image's size.
    """
    if size is None:
        return height, width
    if isinstance(size, int):
        return size, size
    shorter, longest = size
    scale = min(shorter / min(height, width), longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def random_resized_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Sample the crop that GoogLeNet is trained on (Szegedy et al. 2014); same distribution as RandomResizedCrop.

    If ten samples do not fit into the image, return the largest central crop with an allowed aspect ratio.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        scale: range of the crop's area relative to the image, sampled uniformly.
        ratio: range of width / height, sampled log-uniformly.

    Returns:
        Top, left, height, width in pixels.
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


def scale_jitter_box(height: int, width: int, crop_size: int, shorter: int) -> Box:
    """Sample a square crop of an image whose shorter side is resized first (Simonyan and Zisserman 2015, section 3.1).

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        crop_size: side of the crop after resizing.
        shorter: length of the shorter side after resizing.

    Returns:
        Top, left, height, width in pixels of the original image.
    """
    side = max(1, round(min(height, width) * crop_size / shorter))
    return random.randint(0, height - side), random.randint(0, width - side), side, side


def pca_color_jitter(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Shift the color along the principal components of ImageNet's colors (Krizhevsky et al. 2012, section 4.1).

    The same [p1 p2 p3] [a1 l1, a2 l2, a3 l3] is added to every pixel; a_i ~ N(0, sigma) is drawn once per image.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        sigma: 0.1 in the paper.
    """
    shift = 255 * PCA_DIRECTIONS @ (PCA_STD * np.random.normal(0, sigma, 3))
    table = np.rint(np.clip(np.arange(256)[:, None] + shift, 0, 255)).astype(np.uint8)
    return cv2.LUT(pixels, table[None])


class _AlbumentationsTransform:
    """Base of the transforms with an albumentations pipeline, which has its own random generators."""

    pipeline: albumentations.Compose | None = None

    def set_random_state(self, generator: np.random.Generator, py_random: random.Random) -> None:
        """Seed the pipeline. Everything else draws from ``random`` and ``numpy.random``."""
        if self.pipeline is not None:
            self.pipeline.set_random_state(generator, py_random)


class TrainTransform(_AlbumentationsTransform):
    """Read an image with random crop, horizontal flip and color jitter: from a path to uint8 (3, S, S).

    Args:
        image_size: side of the result S, in pixels.
        crop: ``random_resized`` (GoogLeNet and most networks since), ``scale_jitter`` (VGG, ResNet: resize the shorter
            side to a random length, then crop) or ``pad`` (CIFAR: zero padding, then crop).
        crop_scale: range of the area of a ``random_resized`` crop, relative to the image.
        resize_range: range of the shorter side for ``scale_jitter`` in pixels, both ends included.
        padding: zeros that ``pad`` adds on each side, in pixels.
        hflip: probability of a horizontal flip.
        color_jitter: brightness, contrast and saturation are scaled by factors uniform in 1 +- this, in random order.
        pca_jitter: sigma of `pca_color_jitter`.
        exif_orientation: apply the EXIF orientation.

    Raises:
        UserError: an argument is out of range; when called, an image is too small for ``pad``.
        BrokenImageError: when called, the image cannot be read.
    """

    def __init__(
        self,
        image_size: int,
        crop: TrainCrop = "random_resized",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        resize_range: tuple[int, int] = (256, 480),
        padding: int = 4,
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        pca_jitter: float = 0.0,
        exif_orientation: bool = True,
    ) -> None:
        check_option(image_size >= 1, "image_size", "at least 1", image_size)
        check_option(0 < crop_scale[0] <= crop_scale[1] <= 1, "crop_scale", "0 < smallest <= largest <= 1", crop_scale)
        check_option(0 <= hflip <= 1, "hflip", "a probability", hflip)
        check_option(padding >= 0, "padding", "at least 0", padding)
        check_option(0 <= color_jitter <= 1, "color_jitter", "0 to 1", color_jitter)
        check_option(pca_jitter >= 0, "pca_jitter", "at least 0", pca_jitter)
        if crop == "scale_jitter":
            expected = f"image_size ({image_size}) <= smallest <= largest"
            check_option(image_size <= resize_range[0] <= resize_range[1], "resize_range", expected, resize_range)
        self.image_size, self.crop, self.crop_scale, self.resize_range = image_size, crop, crop_scale, resize_range
        self.padding, self.hflip, self.pca_jitter = padding, hflip, pca_jitter
        self.exif_orientation = exif_orientation
        if color_jitter:
            self.pipeline = albumentations.Compose([_color_jitter(color_jitter)])

    def __call__(self, path: str) -> Tensor:
        image = EncodedImage(path, self.exif_orientation)
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
        if self.pipeline is not None:
            pixels = self.pipeline(image=pixels)["image"]
        if self.pca_jitter:
            pixels = pca_color_jitter(pixels, self.pca_jitter)
        return to_tensor(pixels)

    def _padded_crop(self, image: EncodedImage) -> np.ndarray:
        padding, size = self.padding, self.image_size
        height, width = image.height + 2 * padding, image.width + 2 * padding
        if height < size or width < size:
            raise UserError(
                f"{image.path}: expected {size}x{size} pixels or more after padding by {padding}, found "
                f"{width}x{height}; lower image_size or use train_crop random_resized"
            )
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[padding : padding + image.height, padding : padding + image.width] = image.decode()
        top, left = random.randint(0, height - size), random.randint(0, width - size)
        return canvas[top : top + size, left : left + size]


class EvalTransform:
    """Read the center crop of a resized image: from a path to uint8 (3, S, S).

    Resizing uses Pillow's antialiased bilinear filter, with which published weights were evaluated. The result differs
    from torchvision's Resize and CenterCrop by rounding only. A JPEG more than four times as large as the resized image
    is first decoded at 1/2 of its size or less.

    Args:
        crop_size: side of the crop S, in pixels. For 10-crop testing use the resized side (256): the module takes the
            ten crops on the device.
        resize: length of the shorter side after resizing; (height, width) changes the aspect ratio (Places365); None
            does not resize (CIFAR).
        exif_orientation: apply the EXIF orientation.

    Raises:
        UserError: the crop is larger than the resized image.
        BrokenImageError: when called, the image cannot be read.
    """

    def __init__(self, crop_size: int, resize: Resize = 256, exif_orientation: bool = True) -> None:
        if resize is not None:
            shorter = resize if isinstance(resize, int) else min(resize)
            check_option(1 <= crop_size <= shorter, "eval_crop_size", f"1 to resize ({resize})", crop_size)
        self.crop_size, self.resize, self.exif_orientation = crop_size, resize, exif_orientation

    def __call__(self, path: str) -> Tensor:
        image, size = EncodedImage(path, self.exif_orientation), self.crop_size
        height, width = self._resized_size(image.height, image.width)
        if min(height, width) < size:
            raise UserError(
                f"{path}: expected {size}x{size} pixels or more, found {width}x{height}; set resize or lower "
                "eval_crop_size"
            )
        top, left = round((height - size) / 2), round((width - size) / 2)
        if self.resize is None:
            return to_tensor(image.decode()[top : top + size, left : left + size])
        pixels = image.decode(min_size=(2 * height, 2 * width))
        # Resize the crop only: an image of 1x9000 pixels would become huge.
        y, x = pixels.shape[0] / height, pixels.shape[1] / width
        right, bottom = min(pixels.shape[1], (left + size) * x), min(pixels.shape[0], (top + size) * y)
        box = (left * x, top * y, right, bottom)
        resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=box)
        return to_tensor(np.asarray(resized))

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if not isinstance(self.resize, int):
            return self.resize
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize


class MaskTransform(_AlbumentationsTransform):
    """Resize, scale, crop and flip an image together with its mask of class ids.

    The defaults change nothing (evaluation). Pixels beyond the image have the color `FILL_COLOR` and the id `VOID`.
    Images are interpolated bilinearly; masks use the nearest pixel center.

    Args:
        image_size: size that the image is resized to first, see `output_size`.
        crop_size: side of the square crop in pixels; a smaller image is padded at a random position.
        scale: range of the factor by which the image is scaled before the crop, sampled uniformly.
        hflip: probability of a horizontal flip.
        color_jitter: brightness, contrast and saturation are scaled by factors uniform in 1 +- this, in random order.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] | None = None,
        crop_size: int | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        hflip: float = 0.0,
        color_jitter: float = 0.0,
    ) -> None:
        check_option(is_valid_size(image_size), "image_size", "1 or more", image_size)
        check_option(crop_size is None or crop_size >= 1, "crop_size", "1 or more", crop_size)
        check_option(0 < scale[0] <= scale[1], "scale", "0 < smallest <= largest", scale)
        check_option(0 <= hflip <= 1, "hflip", "a probability", hflip)
        check_option(0 <= color_jitter <= 1, "color_jitter", "0 to 1", color_jitter)
        self.image_size = image_size
        steps: list[albumentations.BasicTransform] = []
        if tuple(scale) != (1, 1):
            limits = (scale[0] - 1, scale[1] - 1)
            nearest = cv2.INTER_NEAREST_EXACT  # INTER_NEAREST shifts the ids by up to half a pixel
            steps.append(albumentations.RandomScale(limits, cv2.INTER_LINEAR, nearest, p=1))
        if crop_size is not None:
            padding = {"fill": FILL_COLOR, "fill_mask": VOID, "border_mode": cv2.BORDER_CONSTANT}
            steps.append(albumentations.RandomCrop(crop_size, crop_size, True, "random", **padding, p=1))
        if hflip:
            steps.append(albumentations.HorizontalFlip(p=hflip))
        if color_jitter:
            steps.append(_color_jitter(color_jitter))
        if steps:
            self.pipeline = albumentations.Compose(steps)

    def __call__(self, pixels: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Transform an image, RGB uint8 (H, W, 3), and its mask, uint8 (H, W)."""
        height, width = output_size(mask.shape[0], mask.shape[1], self.image_size)
        if (height, width) != mask.shape[:2]:
            pixels = resize(pixels, (height, width))
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        if self.pipeline is not None:
            result = self.pipeline(image=pixels, mask=mask)
            pixels, mask = result["image"], result["mask"]
        return pixels, mask


class FaceTransform(_AlbumentationsTransform):
    """Rotate, translate, scale and flip a gray face at random: from uint8 (H, W) to uint8 (H, W).

    All angles, distances and factors are uniform. Pixels beyond the image repeat the border. One bilinear warp applies
    them in the order of Keras's ImageDataGenerator, with which mini-Xception was trained.

    Args:
        rotation: maximum rotation to either side in degrees, 0 to 180.
        shift: maximum translation in each direction, relative to the side, 0 to 1.
        zoom: height and width are scaled by independent factors of 1 +- this.
        hflip: probability of a horizontal flip.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(self, rotation: float = 10.0, shift: float = 0.1, zoom: float = 0.1, hflip: float = 0.5) -> None:
        check_option(0 <= rotation <= 180, "rotation", "0 to 180 degrees", rotation)
        check_option(0 <= shift <= 1, "shift", "0 to 1", shift)
        check_option(0 <= zoom < 1, "zoom", "0 or more and less than 1", zoom)
        check_option(0 <= hflip <= 1, "hflip", "a probability", hflip)
        warp = albumentations.Affine(
            scale=dict.fromkeys("xy", (1 - zoom, 1 + zoom)),
            translate_percent=dict.fromkeys("xy", (-shift, shift)),
            rotate=(-rotation, rotation),
            border_mode=cv2.BORDER_REPLICATE,
            p=1,
        )
        self.pipeline: albumentations.Compose = albumentations.Compose([warp, albumentations.HorizontalFlip(p=hflip)])

    def __call__(self, face: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.pipeline(image=face)["image"])


def _color_jitter(strength: float) -> albumentations.ColorJitter:
    factors = (1 - strength, 1 + strength)
    return albumentations.ColorJitter(brightness=factors, contrast=factors, saturation=factors, hue=(0, 0), p=1)


def check_option(valid: bool, name: str, expected: str, found: object) -> None:
    """Raise a UserError that names an option unless its value is valid."""
    if not valid:
        raise UserError(f"{name}: expected {expected}, found {found}")
