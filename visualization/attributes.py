"""View of attribute predictions: ``{"attributes": {name: float (C,)}}``, optionally ``"ingredients": float (V,)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from visualization.base import PredictionView, Scale, Size, Table
from visualization.classification import top_classes, top_records
from visualization.drawing import GREEN, INK, PAPER, RED, class_name, font_size, load_font, shorten, to_pil
from visualization.samples import Sample

MISSING = "\N{EN DASH}"
Names = Mapping[str, Sequence[str]] | None


class AttributesView(PredictionView):
    """One line per attribute below the image: its name, the label after GT, the predicted class after PD.

    The predicted class is green if correct, red if wrong, black if the label is missing; a missing label is a dash.
    Without labels the line shows the probability. Ingredients have a line for GT and one for PD. The image keeps its
    size; the text is scaled to it.

    The ground truth is ``labels`` ``{name: int}``, negative if missing, and ``ingredients`` uint8 (V,) of 0, 1 and 255
    (missing). ``names`` is ``{name: C names, "ingredients": V names}``.
    """

    key = "attributes"
    square_tiles = True

    def matches(self, prediction: Any) -> bool:
        return isinstance(prediction, dict) and "attributes" in prediction

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        width = max(image.width, 256)
        text_size = font_size(width / 25)
        font, pad, row = load_font(text_size), round(text_size * 0.5), round(text_size * 1.5)
        columns = (pad, round(width * 0.3), round(width * 0.65), width)
        lines = []
        for name, (best, index) in attribute_choices(prediction, ground_truth, names).items():
            _, predicted, probability = best
            cells = [(columns[0], columns[1], name.capitalize(), INK)]
            if "labels" in ground_truth:
                color = INK if index is None else GREEN if best[0] == index else RED
                label = MISSING if index is None else class_name(index, (names or {}).get(name))
                cells.append((columns[1], columns[2], f"GT: {label}", INK))
                cells.append((columns[2], columns[3], f"PD: {predicted}", color))
            else:
                cells.append((columns[1], columns[3], f"PD: {predicted} {100 * probability:.0f}%", INK))
            lines.append(cells)
        if "ingredients" in prediction:
            listed = [("PD", [name for name, _ in likely_ingredients(prediction["ingredients"], names)])]
            if "ingredients" in ground_truth:
                listed.insert(0, ("GT", true_ingredients(ground_truth["ingredients"], names)))
            for k, (word, ingredients) in enumerate(listed):
                title = [] if k else [(columns[0], columns[1], "Ingredients", INK)]
                lines.append([*title, (columns[1], columns[3], f"{word}: {', '.join(ingredients) or MISSING}", INK)])
        canvas = Image.new("RGB", (width, image.height + row * len(lines) + 2 * pad), PAPER)
        canvas.paste(image, ((width - image.width) // 2, 0))
        draw = ImageDraw.Draw(canvas)
        for k, line in enumerate(lines):
            y = image.height + pad + k * row + row // 2
            for left, right, text, color in line:
                draw.text((left, y), shorten(text, font, right - left - pad), fill=color, font=font, anchor="lm")
        return canvas

    def record(self, prediction: dict[str, Any], names: Names, scale: Scale) -> dict[str, Any]:
        """Return the five most probable classes per attribute, and ingredients with a probability of at least 0.5."""
        attributes = prediction["attributes"].items()
        record: dict[str, Any] = {"attributes": {k: top_records(p, (names or {}).get(k)) for k, p in attributes}}
        if "ingredients" in prediction:
            likely = likely_ingredients(prediction["ingredients"], names)
            record["ingredients"] = [{"name": name, "probability": probability} for name, probability in likely]
        return record

    def columns(self, record: dict[str, Any]) -> list[str]:
        columns = [column for name in record["attributes"] for column in (name, f"{name}_probability")]
        return [*columns, "ingredients"] if "ingredients" in record else columns

    def rows(self, record: dict[str, Any]) -> list[list[Any]]:
        cells = [
            cell for top in record["attributes"].values() for cell in (top[0]["class"], repr(top[0]["probability"]))
        ]
        if "ingredients" in record:
            cells.append(", ".join(item["name"] for item in record["ingredients"]))
        return [cells]

    def table(self, samples: Sequence[Sample], names: Names) -> Table:
        columns = ["id", "image"]
        for name in samples[0].prediction["attributes"]:
            columns += [f"{name} label", f"{name} predicted", f"{name} probability", f"{name} correct"]
        if with_ingredients := "ingredients" in samples[0].prediction:
            columns += ["ingredients label", "ingredients predicted"]
        rows = []
        for image, prediction, ground_truth in samples:
            cells: list[Any] = [str(ground_truth.get("id", "")), to_pil(image)]
            choices = attribute_choices(prediction, ground_truth, names)
            for name, ((predicted, text, probability), label) in choices.items():
                true_class = None if label is None else class_name(label, (names or {}).get(name))
                cells += [true_class, text, probability, None if label is None else predicted == label]
            if with_ingredients:
                present = ground_truth.get("ingredients")
                cells.append(None if present is None else ", ".join(true_ingredients(present, names)))
                cells.append(", ".join(name for name, _ in likely_ingredients(prediction["ingredients"], names)))
            rows.append(cells)
        return columns, rows


def attribute_choices(
    prediction: dict[str, Any], ground_truth: dict[str, Any], names: Names
) -> dict[str, tuple[tuple[int, str, float], int | None]]:
    """Return ``{attribute: ((class, name, probability) of the most probable class, label or None if missing)}``."""
    choices = {}
    for name, probabilities in prediction["attributes"].items():
        label = int(ground_truth.get("labels", {}).get(name, -1))
        best = top_classes(probabilities, (names or {}).get(name), 1)[0]
        choices[name] = best, label if label >= 0 else None
    return choices


def likely_ingredients(probabilities: Tensor, names: Names) -> list[tuple[str, float]]:
    """Return (name, probability) of the ingredients with a probability of at least 0.5, best first."""
    ranked = top_classes(probabilities, (names or {}).get("ingredients"), len(probabilities))
    return [(name, probability) for _, name, probability in ranked if probability >= 0.5]


def true_ingredients(present: Tensor, names: Names) -> list[str]:
    """Return the names of the ingredients that are 1 in uint8 (V,)."""
    return [class_name(i, (names or {}).get("ingredients")) for i in (present == 1).nonzero().flatten().tolist()]
