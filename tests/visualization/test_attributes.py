"""Attributes below images, in a table, as JSON and CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.prediction_writer import PredictionWriter, merge_parts
from tests.callbacks.tiny import trainer, write_image
from visualization.attributes import AttributesView, attribute_choices
from visualization.drawing import GREEN, RED
from visualization.samples import samples_of

VIEW = AttributesView()

NAMES = {"cuisine": ["Greek", "Thai"], "taste": ["Sour", "Sweet", "Salty"], "ingredients": ["salt", "rice", "egg"]}
PREDICTION = {
    "attributes": {"cuisine": torch.tensor([0.1, 0.9]), "taste": torch.tensor([0.2, 0.5, 0.3])},
    "ingredients": torch.tensor([0.5, 0.2, 0.8]),
}


def ground_truth(cuisine: int, taste: int, ingredients: list[int] | None = None) -> dict[str, Any]:
    labels = {"cuisine": torch.tensor(cuisine), "taste": torch.tensor(taste)}
    return {"labels": labels, "ingredients": torch.tensor(ingredients or [1, 0, 0], dtype=torch.uint8), "id": "a"}


def strips(figure: Image.Image, height: int) -> list[np.ndarray]:
    """Return the lines below the image, uint8 (H, W, 3) each."""
    pixels = np.asarray(figure)[height:]
    inked = (pixels < 200).any((1, 2))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inked, [False]]).astype(int)))
    return [pixels[a:b] for a, b in edges.reshape(-1, 2)]


def has(strip: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((strip == color).all(-1).sum() > 5)


@pytest.mark.parametrize(
    ("labels", "colors"),
    [((1, 1), [GREEN, GREEN]), ((0, 1), [RED, GREEN]), ((1, 2), [GREEN, RED]), ((-100, 0), [None, RED])],
)
def test_wrong_lines_are_red(labels: tuple[int, int], colors: list[tuple[int, int, int] | None]) -> None:
    image = Image.new("RGB", (384, 384), (90, 90, 90))
    figure = VIEW.draw(image, PREDICTION, ground_truth(*labels), NAMES)
    assert np.asarray(figure)[:384].tolist() == np.asarray(image).tolist()
    lines = strips(figure, 384)
    assert len(lines) == 4, "two attributes, and the ingredients' GT and PD"
    for line, color in zip(lines, [*colors, None, None], strict=True):
        assert (has(line, GREEN), has(line, RED)) == (color == GREEN, color == RED)


def test_prediction_shows_no_ground_truth() -> None:
    figure = VIEW.draw(Image.new("RGB", (256, 100), (90, 90, 90)), PREDICTION, {"id": "a"}, NAMES)
    lines = strips(figure, 100)
    assert len(lines) == 3
    assert not any(has(line, GREEN) or has(line, RED) for line in lines)


@pytest.mark.parametrize("names", [None, {"cuisine": ["größer" * 60, "\x00"]}, NAMES])
def test_no_name_breaks_the_drawing(names: Any) -> None:
    for shape in ((20, 300), (1280, 40)):
        figure = VIEW.draw(Image.new("RGB", shape), PREDICTION, ground_truth(1, -100, [255, 255, 255]), names)
        assert figure.width == max(256, shape[0])
    without = {"attributes": PREDICTION["attributes"]}
    assert len(strips(VIEW.draw(Image.new("RGB", (300, 10)), without, ground_truth(1, 1), names), 10)) == 2
    assert VIEW.tile(Image.new("RGB", (30, 20)), PREDICTION, ground_truth(0, 0), names).width == 384


def test_choices_of_a_batch() -> None:
    batch = {
        "image": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        "labels": {"cuisine": torch.tensor([0, -100]), "taste": torch.tensor([1, 2])},
        "ingredients": torch.tensor([[1, 1, 0], [255, 255, 255]], dtype=torch.uint8),
        "id": ["a", "b"],
    }
    outputs = {
        "attributes": {name: p.expand(2, -1) for name, p in PREDICTION["attributes"].items()},  # type: ignore[attr-defined]
        "ingredients": torch.stack([torch.tensor([0.5, 0.2, 0.8])] * 2),
    }
    samples = samples_of(outputs, batch, 2)
    assert attribute_choices(samples[1][1], samples[1][2], NAMES) == {
        "cuisine": ((1, "Thai", pytest.approx(0.9)), None),
        "taste": ((1, "Sweet", 0.5), 2),
    }
    columns, rows = VIEW.table(samples, NAMES)
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    first, second = ({key: row[key] for key in row if key != "image"} for row in table)
    assert first == {
        "id": "a", "cuisine label": "Greek", "cuisine predicted": "Thai", "cuisine probability": pytest.approx(0.9),
        "cuisine correct": False, "taste label": "Sweet", "taste predicted": "Sweet", "taste probability": 0.5,
        "taste correct": True, "ingredients label": "salt, rice", "ingredients predicted": "egg, salt",
    }  # fmt: skip
    assert (second["cuisine label"], second["cuisine correct"], second["taste correct"]) == (None, None, False)
    assert second["ingredients label"] == ""


def test_records_and_rows(tmp_path: Path) -> None:
    record = VIEW.record(PREDICTION, NAMES, (1.0, 1.0))
    assert record == {
        "attributes": {
            "cuisine": [
                {"label": 1, "class": "Thai", "probability": pytest.approx(0.9)},
                {"label": 0, "class": "Greek", "probability": pytest.approx(0.1)},
            ],
            "taste": [
                {"label": 1, "class": "Sweet", "probability": 0.5},
                {"label": 2, "class": "Salty", "probability": pytest.approx(0.3)},
                {"label": 0, "class": "Sour", "probability": pytest.approx(0.2)},
            ],
        },
        "ingredients": [{"name": "egg", "probability": pytest.approx(0.8)}, {"name": "salt", "probability": 0.5}],
    }
    lines = [json.dumps({"file": name, "annotated": name} | record) for name in ("a.jpg", "b.jpg")]
    (tmp_path / "predictions.rank0.jsonl").write_text("\n".join(lines) + "\n")
    merge_parts(tmp_path, 1)
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["a.jpg", "b.jpg"]
    assert list(rows[0])[1:] == ["cuisine", "cuisine_probability", "taste", "taste_probability", "ingredients"]
    assert (rows[0]["cuisine"], float(rows[0]["taste_probability"]), rows[0]["ingredients"]) == (
        "Thai",
        0.5,
        "egg, salt",
    )
    assert [line["file"] for line in json.loads((tmp_path / "predictions.json").read_text())] == ["a.jpg", "b.jpg"]


def test_the_writer_draws_them(tmp_path: Path) -> None:
    path = write_image(tmp_path / "in" / "a.jpg")
    writer = PredictionWriter(str(tmp_path / "in"))
    t = trainer(tmp_path / "run")
    module: Any = type("Module", (), {"class_names": NAMES})()
    outputs = {
        "attributes": {name: p[None] for name, p in PREDICTION["attributes"].items()},  # type: ignore[attr-defined]
        "ingredients": torch.tensor([[0.5, 0.2, 0.8]]),
    }
    batch = {"image": torch.zeros(1, 3, 24, 24, dtype=torch.uint8), "id": [str(path)]}
    writer.on_predict_start(t, module)
    writer.on_predict_batch_end(t, module, outputs, batch, 0)
    writer.on_predict_end(t, module)
    (record,) = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert record["attributes"]["taste"][0]["class"] == "Sweet"
    copy, original = Image.open(tmp_path / "run" / record["annotated"]), Image.open(path)
    assert copy.height > original.height
