"""View of classified images: ``{"probabilities": float (C,)}``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from visualization.base import PredictionView, Scale, Size, Table
from visualization.drawing import (
    BAR_BED,
    BLUE,
    GREEN,
    INK,
    PAPER,
    RED,
    class_name,
    font_size,
    load_font,
    shorten,
    to_pil,
)
from visualization.samples import Sample

TOP = 5
TOP_COLUMNS = [f"{key}{k}" for k in range(1, TOP + 1) for key in ("class", "probability")]


class ClassificationView(PredictionView):
    """The five most probable classes with their bars below the image.

    With a ``label`` in the ground truth, the correct class is green and all others are red; without, bars are blue.
    The image keeps its size; the text is scaled to it.
    """

    key = "predictions"
    tile_size = 256
    square_tiles = True

    def matches(self, prediction: Any) -> bool:
        return isinstance(prediction, dict) and "probabilities" in prediction and "boxes" not in prediction

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        label = ground_truth.get("label")
        best = top_classes(prediction["probabilities"], names)
        width = max(image.width, 224)
        text_size = font_size(width / 20, 13, 40)
        font, pad, row = load_font(text_size), round(text_size * 0.4), round(text_size * 1.5)
        headline = 0 if label is None else row + pad // 2
        canvas = Image.new("RGB", (width, image.height + headline + row * len(best) + 2 * pad), PAPER)
        canvas.paste(image, ((width - image.width) // 2, 0))
        draw = ImageDraw.Draw(canvas)
        y = image.height + pad
        if label is not None:
            correct = best[0][0] == int(label)
            mark = "✓" if correct else "✗"
            text = shorten(f"{mark} ground truth: {class_name(int(label), names)}", font, width - 2 * pad)
            draw.rectangle((0, image.height, width, image.height + headline), fill=GREEN if correct else RED)
            draw.text((pad, image.height + headline // 2), text, fill=PAPER, font=font, anchor="lm")
            y += headline
        for index, name, probability in best:
            color = BLUE if label is None else GREEN if index == int(label) else RED
            box = (pad, y, width - pad - 1, y + row - max(2, text_size // 6))
            middle = (box[1] + box[3]) // 2
            draw.rectangle(box, fill=BAR_BED)
            draw.rectangle((box[0], box[1], box[0] + probability * (box[2] - box[0]), box[3]), fill=_pale(color))
            percent = f"{100 * probability:.1f}%"
            space = box[2] - box[0] - font.getlength(percent) - 3 * pad
            draw.text((box[0] + pad, middle), shorten(name, font, space), fill=INK, font=font, anchor="lm")
            draw.text((box[2] - pad, middle), percent, fill=INK, font=font, anchor="rm")
            y += row
        return canvas

    def record(self, prediction: Any, names: Any, scale: Scale) -> dict[str, Any]:
        return {"predictions": top_records(prediction["probabilities"], names)}

    def columns(self, record: dict[str, Any]) -> list[str]:
        return TOP_COLUMNS

    def rows(self, record: dict[str, Any]) -> list[list[Any]]:
        return [top_cells(record["predictions"])]

    def table(self, samples: Sequence[Sample], names: Sequence[str] | None) -> Table | None:
        rows = []
        for image, prediction, ground_truth in samples:
            if "label" not in ground_truth:
                return None
            index, name, probability = top_classes(prediction["probabilities"], names, 1)[0]
            label = int(ground_truth["label"])
            cells = [to_pil(image), class_name(label, names), name, probability, index == label]
            rows.append([str(ground_truth.get("id", "")), *cells])
        return ["id", "image", "ground truth", "top-1", "probability", "correct"], rows


def top_classes(
    probabilities: Tensor, class_names: Sequence[str] | None, count: int = TOP
) -> list[tuple[int, str, float]]:
    """Return (class, name, probability) of the ``count`` most probable classes, best first."""
    values, indices = probabilities.detach().float().cpu().topk(min(count, len(probabilities)))
    return [(int(i), class_name(int(i), class_names), float(p)) for i, p in zip(indices, values, strict=True)]


def top_records(probabilities: Tensor, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return ``{"label", "class", "probability"}`` of the five most probable classes, best first."""
    return [{"label": i, "class": name, "probability": p} for i, name, p in top_classes(probabilities, class_names)]


def top_cells(items: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the cells of `TOP_COLUMNS` for `top_records`; cells without a class are empty."""
    cells = [cell for item in items for cell in (item["class"], repr(item["probability"]))]
    return [*cells, *[""] * (len(TOP_COLUMNS) - len(cells))]


def _pale(color: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple((value + 255) // 2 for value in color)
