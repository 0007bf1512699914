"""Views of attribute predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from visualization.classification import classification_record, top_classes
from visualization.drawing import (
    GREEN,
    INK,
    PAPER,
    RED,
    class_name,
    load_font,
    shorten,
)

NOTHING = "\N{EN DASH}"


def is_attributes(prediction: Any) -> bool:
    """Whether it is ``{"attributes": {name: probabilities (C,)}}``, with or without ``"ingredients": (V,)``."""
    return isinstance(prediction, dict) and "attributes" in prediction


def draw_attributes(
    image: Image.Image,
    prediction: dict[str, Any],
    truth: dict[str, Any],
    class_names: Mapping[str, Sequence[str]] | None,
) -> Image.Image:
    """The image, below it a line for each attribute: its name, the truth after GT, the prediction after PD.

    A right prediction is green, a wrong one red, one without a truth black; a missing truth is a dash. The probability
    takes the truth's place where there are no labels at all. Ingredients have a line for GT and one for PD. The image
    keeps its size, the text is scaled to it.

    Args:
        image: RGB.
        prediction: see `is_attributes`.
        truth: ``labels`` {name: int, negative where missing} and ``ingredients`` uint8 (V,) of 0, 1 and 255 (missing),
            or nothing.
        class_names: {name: C names, "ingredients": V names}; None shows the numbers.
    """
    width = max(image.width, 256)
    size = max(11, min(28, round(width / 25)))
    font, pad, row = load_font(size), round(size * 0.5), round(size * 1.5)
    columns = (pad, round(width * 0.3), round(width * 0.65), width)
    lines = []
    for name, (best, index) in attribute_choices(prediction, truth, class_names).items():
        _, chosen, probability = best
        cells = [(columns[0], columns[1], name.capitalize(), INK)]
        if "labels" in truth:
            color = INK if index is None else GREEN if best[0] == index else RED
            label = NOTHING if index is None else class_name(index, (class_names or {}).get(name))
            cells += [(columns[1], columns[2], f"GT: {label}", INK), (columns[2], columns[3], f"PD: {chosen}", color)]
        else:
            cells.append((columns[1], columns[3], f"PD: {chosen} {100 * probability:.0f}%", INK))
        lines.append(cells)
    if "ingredients" in prediction:
        listed = [("PD", [name for name, _ in likely_ingredients(prediction["ingredients"], class_names)])]
        if "ingredients" in truth:
            listed.insert(0, ("GT", true_ingredients(truth["ingredients"], class_names)))
        for k, (word, names) in enumerate(listed):
            title = [] if k else [(columns[0], columns[1], "Ingredients", INK)]
            lines.append([*title, (columns[1], columns[3], f"{word}: {', '.join(names) or NOTHING}", INK)])
    canvas = Image.new("RGB", (width, image.height + row * len(lines) + 2 * pad), PAPER)
    canvas.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for k, line in enumerate(lines):
        y = image.height + pad + k * row + row // 2
        for left, right, text, color in line:
            draw.text((left, y), shorten(text, font, right - left - pad), fill=color, font=font, anchor="lm")
    return canvas


def attribute_choices(
    prediction: dict[str, Any], truth: dict[str, Any], class_names: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[tuple[int, str, float], int | None]]:
    """{attribute: ((class, name, probability) of the most probable one, true class or None where missing)}."""
    choices = {}
    for name, probabilities in prediction["attributes"].items():
        label = int(truth.get("labels", {}).get(name, -1))
        best = top_classes(probabilities, (class_names or {}).get(name), 1)[0]
        choices[name] = best, label if label >= 0 else None
    return choices


def likely_ingredients(
    probabilities: Tensor, class_names: Mapping[str, Sequence[str]] | None
) -> list[tuple[str, float]]:
    """(name, probability) of those from 0.5 on, the most probable first."""
    ranked = top_classes(probabilities, (class_names or {}).get("ingredients"), len(probabilities))
    return [(name, probability) for _, name, probability in ranked if probability >= 0.5]


def true_ingredients(present: Tensor, class_names: Mapping[str, Sequence[str]] | None) -> list[str]:
    """Names of those that are marked 1 in (V,)."""
    return [class_name(i, (class_names or {}).get("ingredients")) for i in (present == 1).nonzero().flatten().tolist()]


def attributes_record(prediction: dict[str, Any], class_names: Mapping[str, Sequence[str]] | None) -> dict[str, Any]:
    """``attributes``: {name: its five most probable classes}; ``ingredients`` from a probability of 0.5 on."""
    names = class_names or {}
    attributes = prediction["attributes"].items()
    record: dict[str, Any] = {"attributes": {k: classification_record(p, names.get(k)) for k, p in attributes}}
    if "ingredients" in prediction:
        likely = likely_ingredients(prediction["ingredients"], class_names)
        record["ingredients"] = [{"name": name, "probability": probability} for name, probability in likely]
    return record


def attribute_row(record: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """The columns of predictions.csv, the file's name left out, and an image's row under them."""
    columns, cells = [], []
    for name, items in record["attributes"].items():
        columns += [name, f"{name}_probability"]
        cells += [items[0]["class"], repr(items[0]["probability"])]
    if "ingredients" in record:
        columns.append("ingredients")
        cells.append(", ".join(item["name"] for item in record["ingredients"]))
    return columns, cells
