"""Shared code of the style-transfer systems: style images, interpolation weights, padding, predictions, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from errors import UserError
from lightning_modules.components.image_batches import pad_to_multiple

# Pixels of the shorter side: reflection padding needs several cells in the deepest feature map, which has 1/4 or 1/8 of
# them, and VGG's relu5_1 has 1/16.
MIN_SIDE = 16

# --- inputs -----------------------------------------------------------------------------------------------------------


def read_style_image(path: str, max_size: int | None, min_side: int = 1) -> Tensor:
    """Read an image as float (1, 3, H, W) in 0..1.

    EXIF orientation is applied, alpha is composited on white, and 16-bit images are scaled to 8-bit.

    Args:
        path: path of the image.
        max_size: maximum of the longer side in pixels; None does not resize.
        min_side: minimum of the shorter side in pixels, after resizing.

    Raises:
        UserError: the file does not exist or cannot be read, or the image is too small.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"style: expected an image, found {path}: {error}") from None
    if max_size is not None and max(image.size) > max_size:
        scale = max_size / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if min(image.size) < min_side:
        raise UserError(
            f"style: expected an image of at least {min_side}x{min_side} pixels, found {path} with "
            f"{image.width}x{image.height}; use a larger image"
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def read_styles(paths: Sequence[str], max_size: int | None) -> list[Tensor]:
    """Read the images of the option ``styles``, see `read_style_image`.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    if not paths:
        raise UserError("styles: expected paths of style images, found none; set --model.styles '[IMAGE]'")
    return [read_style_image(path, max_size, MIN_SIDE) for path in paths]


def content_and_style(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the content and the style images of a batch, float (B, 3, H, W) in 0..1.

    Raises:
        UserError: the batch has no style images.
    """
    if "style" not in batch:
        raise UserError("style: expected style images, found none; set --data.with_style true")
    return batch["image"].float() / 255, batch["style"].float() / 255


def normalize_interpolation_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Normalize the interpolation weights of styles to a sum of 1.

    Args:
        weights: one non-negative weight per style; None gives equal weights.
        count: number of styles.

    Raises:
        UserError: another number of weights, a negative weight, or only zeros.
    """
    if weights is None:
        return [1 / max(1, count)] * count
    if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(
            f"style_interpolation_weights: expected one weight of 0 or more per style ({count}), found {list(weights)}"
        )
    return [weight / sum(weights) for weight in weights]


def require_non_negative(**weights: float) -> None:
    """Raise a UserError for a negative loss weight."""
    for name, value in weights.items():
        if value < 0:
            raise UserError(f"{name}: expected 0 or more, found {value}")


def require_fraction(**values: float) -> None:
    """Raise a UserError for a value outside of 0..1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}: expected 0 to 1, found {value}")


def pad_replicate(images: Tensor, multiple: int) -> Tensor:
    """Pad images (B, 3, H, W) by replication to multiples of ``multiple``, and to at least `MIN_SIDE`."""
    return pad_to_multiple(images, multiple, minimum=-(-MIN_SIDE // multiple) * multiple, mode="replicate")


# --- predictions and metrics ------------------------------------------------------------------------------------------


def to_uint8(images: Tensor) -> Tensor:
    """Convert images from about 0..1 to uint8; values outside are clamped."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def stylized_prediction(pixels: Tensor, random: bool) -> dict[str, Tensor]:
    """Return the prediction of a style-transfer system.

    Args:
        pixels: stylized images, uint8 (B, 3, H, W).
        random: whether the pretrained features were replaced by random ones.
    """
    return {"stylized": pixels, "random": torch.full((len(pixels),), random)}


def stylization_metrics(*terms: str) -> MetricCollection:
    """Return the mean over images of each loss term, of ``loss`` and of ``style_ratio``."""
    means = {name: MeanMetric() for name in (*terms, "loss", "style_ratio")}
    return MetricCollection(means, compute_groups=False)  # type: ignore[arg-type]


def update_stylization_metrics(metrics: MetricCollection, terms: dict[str, Tensor], content_style_loss: Tensor) -> None:
    """Update `stylization_metrics` with a batch.

    Args:
        metrics: result of `stylization_metrics`.
        terms: loss terms of the stylized images, float (B,) each; ``style`` is one of them.
        content_style_loss: the term ``style`` of the content images, float (B,). ``style_ratio`` is relative to it.
    """
    loss, ratio = torch.stack(list(terms.values())).sum(0), terms["style"] / content_style_loss
    for name, value in {**terms, "loss": loss, "style_ratio": ratio}.items():
        metrics[name].update(value)
