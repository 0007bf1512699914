"""Views of stylized images."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from visualization.drawing import INK, PAPER, load_font, shorten, to_picture


def is_stylized(prediction: Any) -> bool:
    """Whether a prediction is of this kind."""
    return isinstance(prediction, dict) and "stylized" in prediction


def draw_stylized(picture: Image.Image, prediction: dict[str, Tensor], truth: dict[str, Any]) -> Image.Image:
    """Side by side, each as high as the first: the image, the style, where there is one, and what was made of them.

    Args:
        image: RGB, of any size.
        prediction: see the module.
        truth: ``style`` uint8 (3,H,W), or nothing.
    """
    shown = [("picture", picture)]
    if "style" in truth:
        shown.append(("style", to_picture(truth["style"])))
    shown.append(("found (random features)" if is_random(prediction) else "found", to_picture(prediction["stylized"])))
    height, text = picture.height, max(11, min(28, round(picture.height / 20)))
    row, gap, font = round(1.6 * text), 4, load_font(text)
    panels = [
        x.resize((max(1, round(x.width * height / x.height)), height), Image.Resampling.BICUBIC) for _, x in shown
    ]
    canvas = Image.new("RGB", (sum(panel.width + gap for panel in panels) - gap, height + row), PAPER)
    draw, left = ImageDraw.Draw(canvas), 0
    for (title, _), panel in zip(shown, panels, strict=True):
        canvas.paste(panel, (left, row))
        room = panel.width - text
        draw.text((left + text // 2, row / 2), shorten(title, font, room), fill=INK, font=font, anchor="lm")
        left += panel.width + gap
    return canvas


def is_random(prediction: dict[str, Tensor]) -> bool:
    """Whether it was made by random features."""
    return bool(prediction.get("random", False))


def style_record(prediction: dict[str, Tensor]) -> dict[str, Any]:
    """What a line of ``predictions.json`` says: ``{"stylized": [width, height], "random_features": bool}``."""
    height, width = prediction["stylized"].shape[-2:]
    return {"stylized": [width, height], "random_features": is_random(prediction)}
