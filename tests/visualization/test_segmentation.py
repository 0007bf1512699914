"""Overlays, their legend, and the masks that prediction writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from callbacks.prediction_writer import PredictionWriter
from tests.callbacks.tiny import Files, trainer, write_image
from tests.visualization.predictions import MASK_NAMES, Segments, halves
from visualization.samples import Sample
from visualization.segmentation import (
    PALETTE,
    SegmentationView,
    legend,
    overlay_ids,
    resize_ids,
)

GRAY = Image.new("RGB", (120, 80), (128, 128, 128))
VIEW = SegmentationView()


def test_maps_of_ids_are_recognized() -> None:
    assert VIEW.matches(halves(0, 1))
    assert not VIEW.matches(torch.rand(4, 4))
    assert not VIEW.matches(torch.zeros(3, 4, 4, dtype=torch.int64))
    assert not VIEW.matches({"probabilities": torch.rand(3)})


def test_an_overlay_has_the_palettes_colors_and_leaves_the_background() -> None:
    ids = resize_ids(halves(0, 2), GRAY.size)
    named = np.asarray(overlay_ids(GRAY, ids, MASK_NAMES))
    assert (named[:, :60] == 128).all()
    expected = np.rint(0.4 * 128 + 0.6 * PALETTE[2])
    assert (named[:, 60:] == expected).all()
    street = np.asarray(overlay_ids(GRAY, ids, ["sky", "road", "car"]))
    assert (street[:, :60] == np.rint(0.4 * 128)).all()
    void = np.asarray(overlay_ids(GRAY, np.full_like(ids, 255), MASK_NAMES))
    assert np.abs(void - PALETTE[255].astype(int)).max() < 15


def test_the_legend_names_what_is_there() -> None:
    maps = [halves(2, 2).numpy(), halves(0, 255).numpy()]
    assert legend(maps, MASK_NAMES) == [(2, "$cost_$"), (0, "background"), (255, "void")]
    assert legend(maps[:1], None) == [(2, "class 2")]
    many = np.arange(200, dtype=np.uint8).reshape(10, 20)
    tall = VIEW.draw(GRAY, torch.from_numpy(many.astype(np.int64)), {}, None)
    assert tall.width == GRAY.width
    assert tall.height > 10 * GRAY.height


def test_prediction_and_truth_stand_beside_each_other() -> None:
    alone = VIEW.draw(GRAY, halves(0, 1), {}, MASK_NAMES)
    pair = VIEW.draw(GRAY, halves(0, 1), {"original_mask": halves(1, 255, 80, 120)}, MASK_NAMES)
    assert alone.width == GRAY.width
    assert pair.width == 2 * GRAY.width + 4
    row = np.asarray(pair)[60]
    red = np.rint(0.4 * 128 + 0.6 * PALETTE[1])
    assert (row[70] == red).all()
    assert (row[124 + 20] == red).all()
    assert (row[124 + 100] > 180).all()
    trained = VIEW.draw(GRAY, halves(0, 1), {"mask": halves(1, 255)}, MASK_NAMES)
    assert trained.size == pair.size
    sheet = VIEW.tile(GRAY, halves(0, 1), {"original_mask": halves(1, 2)}, MASK_NAMES)
    assert sheet.width == 2 * 384 + 4
    assert VIEW.table([Sample(torch.zeros(3, 4, 4), halves(0, 1), {})], MASK_NAMES) is None


def test_prediction_writes_masks_in_the_pixels_of_the_file(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / "in" / name, (50, 30)) for name in ("a.jpg", "sub/a.jpg", "b.png", "a.jpg.png")]
    run = tmp_path / "run"
    t = trainer(run, callbacks=[PredictionWriter(str(tmp_path / "in"))])
    t.predict(Segments(), DataLoader(Files(paths), batch_size=2), return_predictions=False)  # type: ignore[arg-type]
    records = json.loads((run / "predictions.json").read_text())
    assert [record["file"] for record in records] == [str(path) for path in paths]
    # Of a.jpg as VOC's evaluation server takes it, and no two images share a file.
    assert [record["mask"][6:] for record in records] == ["a.png", "sub/a.png", "b.png.png", "a.jpg.png.png"]
    for record in records:
        with Image.open(run / record["mask"]) as mask:
            assert (mask.mode, mask.size) == ("P", (50, 30))
            ids = np.array(mask)
            assert mask.getpalette()[3:6] == [128, 0, 0]  # type: ignore[index]
        assert (ids[:, :25] == 1).all()
        assert (ids[:, 25:] == 2).all()
        assert record["classes"] == [
            {"label": 1, "class": MASK_NAMES[1], "share": 0.5},
            {"label": 2, "class": MASK_NAMES[2], "share": 0.5},
        ]
        assert Image.open(run / record["annotated"]).width == 50
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert rows[0] == {"file": str(paths[0]), "class": MASK_NAMES[1], "share": "0.5"}
    assert VIEW.record(halves(2, 2), None, (1.0, 1.0)) == {"classes": [{"label": 2, "class": "class 2", "share": 1.0}]}


def test_frames_of_a_video_have_a_mask_each(tmp_path: Path) -> None:
    film = tmp_path / "film.avi"

    class Frames(Files):
        def __getitem__(self, i: int) -> dict[str, Any]:
            frame = torch.full((3, 40, 60), 90, dtype=torch.uint8)
            return {"image": frame[:, ::2, ::2], "id": f"{film}#{i}", "original": frame, "fps": 10.0}

    t = trainer(tmp_path / "run", callbacks=[PredictionWriter(str(film))])
    t.predict(Segments(), DataLoader(Frames([film] * 3), batch_size=2), return_predictions=False)  # type: ignore[arg-type]
    records = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [record["mask"] for record in records] == [f"masks/film.avi#{k}.png" for k in range(3)]
    with Image.open(tmp_path / "run" / "masks" / "film.avi#2.png") as mask:
        assert mask.size == (60, 40)
    assert (tmp_path / "run" / "predictions" / "film.avi.mp4").stat().st_size > 0
