"""Batching of images: size checks and padding.

A batch's images are one uint8 tensor (B, 3, H, W), or a list of (3, H, W) if their sizes differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError


def require_equal_size(images: Tensor | list[Tensor], advice: str = "--data.batch_size 1") -> Tensor:
    """Return the images as one tensor (B, 3, H, W).

    Args:
        images: tensor (B, 3, H, W), or a list of (3, H, W).
        advice: options that make the sizes equal, for the error message.

    Raises:
        UserError: the sizes differ.
    """
    if isinstance(images, Tensor):
        return images
    sizes = list(dict.fromkeys(f"{image.shape[-1]}x{image.shape[-2]}" for image in images))
    if len(sizes) > 1:
        raise UserError(f"image: expected images of one size, found {', '.join(sizes[:3])}; set {advice}")
    return torch.stack(images)


def require_size(
    images: Tensor | list[Tensor], accepts: Callable[[int, int], bool], expected: str, image_size: int
) -> Tensor:
    """Return the images as one tensor (B, 3, H, W), for networks with a fixed input size.

    Args:
        images: tensor (B, 3, H, W), or a list of (3, H, W).
        accepts: whether (H, W) is a valid size.
        expected: the valid sizes in words, for the error message.
        image_size: a valid value of ``--data.image_size``, for the error message.

    Raises:
        UserError: the sizes differ, or are not valid.
    """
    advice = f"--data.image_size {image_size}"
    images = require_equal_size(images, advice)
    height, width = images.shape[-2:]
    if not accepts(height, width):
        raise UserError(f"image: expected {expected}, found {width}x{height}; set {advice}")
    return images


def require_square(images: Tensor | list[Tensor], side: int) -> Tensor:
    """Return the images as one tensor (B, 3, side, side), see `require_size`."""
    return require_size(images, lambda height, width: height == width == side, f"{side}x{side} pixels", side)


def stack_images(images: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack images of any sizes; smaller ones are padded with 0 on the right and at the bottom.

    Args:
        images: tensor (B, 3, H, W), or a list of (3, H, W).

    Returns:
        The images (B, 3, H, W), and their sizes (width, height) in pixels, float32 (B, 2).
    """
    sizes = torch.tensor([[float(image.shape[-1]), float(image.shape[-2])] for image in images])
    if not isinstance(images, Tensor):
        height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        images = torch.stack([F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images])
    return images, sizes.to(images.device, non_blocking=True)


def pad_images(
    images: Tensor | list[Tensor], preprocess: Callable[[Tensor], Tensor], multiple: int = 32
) -> tuple[Tensor, Tensor]:
    """Normalize and stack images of any sizes; the padding is 0 after normalization, which is the mean color.

    Args:
        images: uint8 (B, 3, H, W), or a list of (3, H, W).
        preprocess: normalizes uint8 (B, 3, H, W) to float.
        multiple: both sides of the result are multiples of it, so that each feature map has exactly half the cells of
            the previous one.

    Returns:
        The normalized images, float (B, 3, H, W), and their sizes (width, height) in pixels, float32 (B, 2).
    """
    stacked, sizes = stack_images(images)
    pixels = preprocess(stacked)
    height, width = pixels.shape[-2:]
    if not isinstance(images, Tensor):
        x, y = (torch.arange(side, device=pixels.device) for side in (width, height))
        inside = (x < sizes[:, :1])[:, None] & (y < sizes[:, 1:])[:, :, None]
        pixels = torch.where(inside[:, None], pixels, 0)
    return pad_to_multiple(pixels, multiple), sizes


def pad_to_multiple(
    x: Tensor,
    multiple: int,
    offset: int = 0,
    minimum: int = 0,
    mode: Literal["constant", "replicate", "reflect"] = "constant",
    value: float = 0.0,
) -> Tensor:
    """Pad on the right and at the bottom, so that both sides are ``k * multiple + offset``.

    Args:
        x: tensor (..., H, W).
        multiple: step between valid sides.
        offset: 1 places the first and last cells of every feature map on the first and last pixels (DeepLab).
        minimum: smallest side of the result; it must be valid itself.
        mode: see `torch.nn.functional.pad`.
        value: value of constant padding.
    """
    right, bottom = (max(minimum, side + (offset - side) % multiple) - side for side in (x.shape[-1], x.shape[-2]))
    return F.pad(x, (0, right, 0, bottom), mode=mode, value=value if mode == "constant" else None)
