"""Views of classified images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from visualization.drawing import (
    BAR_BED,
    BLUE,
    GREEN,
    INK,
    PAPER,
    RED,
    class_name,
    load_font,
    shorten,
)

TOP = 5


def draw_classification(
    image: Image.Image, prediction: dict[str, Tensor], truth: dict[str, Any], class_names: Sequence[str] | None
) -> Image.Image:
    """The image, below it the truth, if known, and the five most probable classes with their bars.

    Right is green, wrong is red; without a truth the bars are blue. The image keeps its size, the text is scaled to
    it.

    Args:
        image: RGB.
        prediction: ``probabilities`` float (C,).
        truth: ``label``, an int, or nothing.
        class_names: C names; None shows the numbers.
    """
    label = truth.get("label")
    best = top_classes(prediction["probabilities"], class_names)
    width = max(image.width, 224)
    size = max(13, min(40, round(width / 20)))
    font, pad, row = load_font(size), round(size * 0.4), round(size * 1.5)
    headline = 0 if label is None else row + pad // 2
    canvas = Image.new("RGB", (width, image.height + headline + row * len(best) + 2 * pad), PAPER)
    canvas.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    y = image.height + pad
    if label is not None:
        right = best[0][0] == int(label)
        color = GREEN if right else RED
        text = shorten(f"{'✓' if right else '✗'} truth: {class_name(int(label), class_names)}", font, width - 2 * pad)
        draw.rectangle((0, image.height, width, image.height + row + pad // 2), fill=color)
        draw.text((pad, image.height + (row + pad // 2) // 2), text, fill=PAPER, font=font, anchor="lm")
        y = image.height + headline + pad
    for index, name, probability in best:
        color = BLUE if label is None else GREEN if index == int(label) else RED
        box = (pad, y, width - pad - 1, y + row - max(2, size // 6))
        middle = (box[1] + box[3]) // 2
        draw.rectangle(box, fill=BAR_BED)
        draw.rectangle((box[0], box[1], box[0] + probability * (box[2] - box[0]), box[3]), fill=_pale(color))
        percent = f"{100 * probability:.1f}%"
        room = box[2] - box[0] - font.getlength(percent) - 3 * pad
        draw.text((box[0] + pad, middle), shorten(name, font, room), fill=INK, font=font, anchor="lm")
        draw.text((box[2] - pad, middle), percent, fill=INK, font=font, anchor="rm")
        y += row
    return canvas


def top_classes(
    probabilities: Tensor, class_names: Sequence[str] | None, count: int = TOP
) -> list[tuple[int, str, float]]:
    """(class, name, probability) of the most probable classes, best first; fewer where there are fewer classes."""
    values, indices = probabilities.detach().float().cpu().topk(min(count, len(probabilities)))
    return [(int(i), class_name(int(i), class_names), float(p)) for i, p in zip(indices, values, strict=True)]


def classification_record(probabilities: Tensor, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """The five most probable classes, best first."""
    return [{"label": i, "class": name, "probability": p} for i, name, p in top_classes(probabilities, class_names)]


def _pale(color: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple((value + 255) // 2 for value in color)
