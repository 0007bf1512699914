"""Photographs with faces: drawings, records and rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from callbacks.prediction_writer import PredictionWriter
from tests.callbacks.tiny import NAMES, Files, Tiny, trainer, write_image
from visualization.classification import ClassificationView
from visualization.drawing import BLUE, RED, to_pil
from visualization.faces import FacesView

VIEW = FacesView()

NONE = {
    "boxes": torch.zeros(0, 4),
    "probabilities": torch.zeros(0, 3),
    "aligned": torch.zeros(0, dtype=torch.bool),
    "eyes": torch.zeros(0, 2, 2),
}
TWO = {
    "boxes": torch.tensor([[10.0, 40.0, 50.0, 80.0], [100.0, 40.0, 160.0, 100.0]]),
    "probabilities": torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]),
    "aligned": torch.tensor([True, False]),
    "eyes": torch.tensor([[[22.0, 55.0], [38.0, 55.0]], [[118.0, 62.0], [142.0, 62.0]]]),
}


def color_at(figure: Image.Image, x: float, y: float) -> Any:
    return figure.getpixel((round(x), round(y)))


@pytest.mark.parametrize("scale", [1, 3])
def test_boxes_are_drawn_where_they_are(scale: int) -> None:
    photograph = Image.new("RGB", (200 * scale, 120 * scale), (9, 9, 9))
    drawn = VIEW.draw(photograph, TWO, {}, NAMES, (200, 120))
    assert drawn.size == photograph.size
    for x1, y1, x2, y2 in (scale * TWO["boxes"]).tolist():
        for x, y in ((x1, (y1 + y2) / 2), (x2, (y1 + y2) / 2), ((x1 + x2) / 2, y2)):
            assert color_at(drawn, x, y) == BLUE
        assert color_at(drawn, (x1 + x2) / 2, (y1 + y2) / 2) == (9, 9, 9)
    assert color_at(drawn, 22 * scale, 55 * scale) == BLUE, "found eyes are marked"
    assert color_at(drawn, 118 * scale, 62 * scale) == (9, 9, 9), "supposed ones are not"
    assert color_at(photograph, 10 * scale, 60 * scale) == (9, 9, 9), "the photograph itself stays"


def test_a_photograph_without_a_face_says_so() -> None:
    photograph = Image.new("RGB", (300, 100), (9, 9, 9))
    drawn = VIEW.draw(photograph, NONE, {}, NAMES, (300, 100))
    assert drawn.height > 100
    assert np.asarray(drawn)[:100].tolist() == np.asarray(photograph).tolist()
    assert ((np.asarray(drawn)[100:] == RED).all(-1)).mean() > 0.5
    record = VIEW.record(NONE, NAMES, (1.0, 1.0))
    assert record == {"faces": [], "remark": "no face found"}
    (row,) = VIEW.rows(record)
    assert row == [0, *[""] * (len(VIEW.columns(record)) - 1)]


def test_gray_faces_are_drawn_as_every_image() -> None:
    face = torch.arange(48, dtype=torch.uint8).expand(1, 48, 48)
    figure = to_pil(face)
    assert (figure.mode, figure.size) == ("RGB", (48, 48))
    assert figure.getpixel((7, 20)) == (7, 7, 7)
    sheet = ClassificationView().tile(figure, {"probabilities": torch.tensor([0.9, 0.1, 0.0])}, {"label": 0}, NAMES)
    assert sheet.width == 256


class FindsFaces(Tiny):
    """A module that detects two faces in every second image."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return [TWO if "face" in name else NONE for name in batch["id"]]


def test_what_predict_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_image(tmp_path / "in" / name, (200, 120)) for name in ("faces.png", "none.png", "more_faces.jpg")]
    t = trainer(tmp_path / "run", callbacks=[PredictionWriter(str(tmp_path / "in"))])
    t.predict(FindsFaces(), DataLoader(Files(paths), batch_size=2), return_predictions=False)  # type: ignore[arg-type,var-annotated]
    records = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [len(record["faces"]) for record in records] == [2, 0, 2]
    assert [record.get("remark") for record in records] == [None, "no face found", None]
    first, second = records[0]["faces"]
    assert (first["box"], first["aligned"], second["aligned"]) == ([10.0, 40.0, 50.0, 80.0], True, False)
    assert [face["predictions"][0]["class"] for face in (first, second)] == [NAMES[0], NAMES[2]]
    with open(tmp_path / "run" / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["file"]).name, row["faces"], row["face"]) for row in rows] == [
        ("faces.png", "2", "1"),
        ("faces.png", "2", "2"),
        ("none.png", "0", ""),
        ("more_faces.jpg", "2", "1"),
        ("more_faces.jpg", "2", "2"),
    ]
    assert (rows[1]["x1"], rows[1]["aligned"], rows[1]["class1"]) == ("100.0", "False", NAMES[2])
    assert rows[2]["class1"] == ""
    assert len(list((tmp_path / "run" / "predictions").iterdir())) == 3
    assert "no face found in 1 of 3 images" in capsys.readouterr().out
