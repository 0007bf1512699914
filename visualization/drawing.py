"""What all images are drawn with: colors, fonts, names, tiles and sheets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageFont
from torch import Tensor

GREEN, RED, BLUE = (22, 135, 62), (200, 35, 40), (62, 110, 190)
INK, PAPER, BAR_BED = (28, 30, 34), (255, 255, 255), (236, 238, 241)


def class_name(index: int, class_names: Sequence[str] | None) -> str:
    """The name in one line, or the number where there is no name."""
    known = class_names is not None and 0 <= index < len(class_names)
    return " ".join(str(class_names[index]).split()) if known else f"class {index}"  # type: ignore[index]


def to_picture(image: Tensor) -> Image.Image:
    """uint8 (3,H,W), or gray (1,H,W), to an RGB PIL image."""
    image = image.expand(3, -1, -1)
    return Image.fromarray(image.detach().cpu().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image scaled into a square of ``side`` pixels; small ones are enlarged with hard pixels."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    scaled = image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), BAR_BED)
    square.paste(scaled, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def contact_sheet(tiles: list[Image.Image]) -> Image.Image:
    """The tiles in rows of up to four, six from 25 tiles on."""
    columns = min(len(tiles), 4 if len(tiles) < 25 else 6)
    gap, width, height = 12, max(t.width for t in tiles), max(t.height for t in tiles)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (205, 208, 213))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


@lru_cache(maxsize=32)
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic and more; ``size`` in pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
