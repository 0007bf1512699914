"""Primitives of all figures: colors, fonts, names, tiles and contact sheets."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GREEN, RED, BLUE = (22, 135, 62), (200, 35, 40), (62, 110, 190)
INK, PAPER, BAR_BED = (28, 30, 34), (255, 255, 255), (236, 238, 241)
GAP = 4  # pixels between panels


def class_name(index: int, class_names: Sequence[str] | None) -> str:
    """Return the name on one line, or ``class <index>`` if there is none."""
    known = class_names is not None and 0 <= index < len(class_names)
    return " ".join(str(class_names[index]).split()) if known else f"class {index}"  # type: ignore[index]


def class_color(label: int) -> tuple[int, int, int]:
    """Return a color for a class or an object that differs from those of nearby indices."""
    if label == 0:
        return BLUE
    # Steps of the golden ratio never return close to an earlier hue.
    red, green, blue = colorsys.hsv_to_rgb((0.61 + 0.618034 * label) % 1, 0.75, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def to_pil(image: Tensor) -> Image.Image:
    """Convert uint8 (3, H, W), or gray (1, H, W), to an RGB PIL image."""
    image = image.expand(3, -1, -1)
    return Image.fromarray(image.detach().cpu().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """Scale an image into a gray square of ``side`` pixels; images below half of it are enlarged without smoothing."""
    scale = side / max(image.size)
    scaled = resize_long_side(image, side, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), BAR_BED)
    square.paste(scaled, ((side - scaled.width) // 2, (side - scaled.height) // 2))
    return square


def resize_long_side(
    image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Scale an image so that its longer side has ``side`` pixels."""
    scale = side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)


def contact_sheet(tiles: list[Image.Image]) -> Image.Image:
    """Arrange tiles in rows of up to four, or six from 25 tiles on."""
    columns = min(len(tiles), 4 if len(tiles) < 25 else 6)
    gap, width, height = 12, max(t.width for t in tiles), max(t.height for t in tiles)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (205, 208, 213))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


def titled_panels(panels: Sequence[tuple[str, Image.Image]], text_size: int) -> Image.Image:
    """Place images of equal height side by side, each below its title."""
    row, font = round(1.6 * text_size), load_font(text_size)
    width = sum(panel.width + GAP for _, panel in panels) - GAP
    canvas = Image.new("RGB", (width, panels[0][1].height + row), PAPER)
    draw, left = ImageDraw.Draw(canvas), 0
    for title, panel in panels:
        canvas.paste(panel, (left, row))
        title = shorten(title, font, panel.width - text_size)
        draw.text((left + text_size // 2, row / 2), title, fill=INK, font=font, anchor="lm")
        left += panel.width + GAP
    return canvas


def font_size(pixels: float, low: int = 11, high: int = 28) -> int:
    """Round a font size and limit it to ``low`` and ``high``."""
    return max(low, min(high, round(pixels)))


@lru_cache(maxsize=32)
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which matplotlib ships (Latin, Greek, Cyrillic and more), at ``size`` pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut a text with an ellipsis if it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
