"""Batching of images: padding, size checks, resizing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import resize


def fill_up(images: Tensor | list[Tensor], preprocess: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Images of one or several sizes, normalized, as one tensor, and their (width, height) float (B,2).

    Its sides are multiples of 32 pixels: no map cuts off what is at the edge, and each has half the cells of the last.

    Args:
        images: uint8 (B,3,H,W) or a list of (3,H,W).
        preprocess: uint8 (B,3,H,W) to float; what is filled up is 0 after it, the mean color.
    """
    together, size = stack(images)
    pixels = preprocess(together)
    height, width = pixels.shape[-2:]
    if not isinstance(images, Tensor):
        x, y = (torch.arange(side, device=pixels.device) for side in (width, height))
        inside = (x < size[:, :1])[:, None] & (y < size[:, 1:])[:, :, None]
        pixels = torch.where(inside[:, None], pixels, 0)
    return F.pad(pixels, (0, -width % 32, 0, -height % 32)), size


def checked(images: Tensor | list[Tensor], fits: Callable[[int, int], bool], expected: str, advice: int) -> Tensor:
    """The images of a batch, for networks that want one size.

    Args:
        images: uint8 (B,3,H,W), or a list where sizes differ.
        fits: whether (H, W) is right.
        expected: says in words what is.
        advice: a size of the data that is.

    Raises:
        ValueError: the images differ in size, or do not fit.
    """
    if isinstance(images, Tensor) and fits(images.shape[-2], images.shape[-1]):
        return images
    found = "images of different sizes" if isinstance(images, list) else f"{images.shape[-1]}x{images.shape[-2]}"
    raise ValueError(f"image: expected {expected}, found {found}: set --data.image_size {advice}")


def stack(images: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images of one or several sizes as one tensor (B,3,H,W), filled up with 0, and their (width, height) float (B,2).

    Args:
        images: uint8 (B,3,H,W) or a list of (3,H,W).
    """
    size = torch.tensor([[float(image.shape[-1]), float(image.shape[-2])] for image in images])
    if not isinstance(images, Tensor):
        height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        images = torch.stack([F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images])
    return images, size.to(images.device, non_blocking=True)


def of_one_size(images: Tensor | list[Tensor]) -> Tensor:
    """The images (B,3,H,W) of a training batch; a list of them, which differ in size, is an error."""
    if isinstance(images, Tensor):
        return images
    raise ValueError(
        "image: expected images of one size to train on, found several: set --data.crop_size, or --data.batch_size 1 "
        "for whole images"
    )


def shrink_or_grow(images: Tensor | list[Tensor], size: tuple[int, int] | None) -> Tensor | list[Tensor]:
    """Images uint8 resized to (shorter side, longest at most), their aspect kept; None leaves them."""
    if size is None:
        return images
    resized = []
    for image in images:
        sides = image.shape[-2:]
        factor = min(size[0] / min(sides), size[1] / max(sides))
        resized.append(resize(image, [max(1, round(side * factor)) for side in sides], antialias=True))
    return resized
