"""What the systems that paint share: styles read and mixed, sizes, pixels, and how painted images are scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from errors import UserError
from lightning_modules.components.image_batches import pad_to_multiple

LEAST = 16  # pixels a side: the deepest maps have a quarter or an eighth of them, and are reflected at their borders


def read_style(path: str, longest: int | None) -> Tensor:
    """An image as float (1,3,H,W) in 0..1, its longer side at most so many pixels.

    Turned as its camera says, white where it is transparent; of 16 bits the upper 8.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):
                picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"style: expected an image, found {path}: {error}") from None
    if longest is not None and max(picture.size) > longest:
        scale = longest / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def shares_of(styles: Sequence[str], mix: Sequence[float] | None) -> list[float]:
    """Each style's part of a mixture, 1 in all; equal parts where nothing is said.

    Raises:
        ValueError: ``mix`` is not one number of 0 or more a style.
    """
    if mix is None:
        return [1 / max(1, len(styles))] * len(styles)
    if len(mix) != len(styles) or min(mix) < 0 or sum(mix) <= 0:
        raise UserError(f"mix: expected one number of 0 or more a style, {len(styles)}, found {list(mix)}")
    return [part / sum(mix) for part in mix]


def check_weights(**weights: float) -> None:
    """Raises a ValueError unless all weights of a loss are 0 or more."""
    for name, value in weights.items():
        if value < 0:
            raise UserError(f"{name}: expected 0 or more, found {value}")


def enlarged(images: Tensor, multiple: int) -> Tensor:
    """Images (B,3,H,W), their last rows and columns repeated: sides are multiples, and `LEAST` at least."""
    return pad_to_multiple(images, multiple, minimum=-(-LEAST // multiple) * multiple, mode="replicate")


def to_pixels(images: Tensor) -> Tensor:
    """Images about 0..1 to uint8, what lies outside clamped."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def painting_metrics(*terms: str) -> MetricCollection:
    """Means over a set's images of the loss's terms, of the loss, and of ``style_ratio``; see `score_paintings`."""
    means = {name: MeanMetric() for name in (*terms, "loss", "style_ratio")}
    return MetricCollection(means, compute_groups=False)  # type: ignore[arg-type]


def score_paintings(metrics: MetricCollection, terms: dict[str, Tensor], unchanged: Tensor) -> None:
    """Adds painted images to `painting_metrics`.

    Args:
        terms: of the loss, float (B,) each, among them ``style``.
        unchanged: the term ``style`` of the images as they were. What is left of it is the image's style_ratio.
    """
    values = {**terms, "loss": torch.stack(list(terms.values())).sum(0), "style_ratio": terms["style"] / unchanged}
    for name, value in values.items():
        metrics[name].update(value)
