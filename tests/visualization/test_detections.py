"""Boxes on images: right, false and missed ones, the grid of YOLO, and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.average_precision import AveragePrecision
from callbacks.class_tables import format_table
from callbacks.metrics_file import MetricsFile
from lightning_modules.components.average_precision import VOCMeanAP
from tests.callbacks.tiny import NAMES, Tiny, loader, trainer
from visualization.detections import (
    MISSED,
    DetectionView,
    count_detections,
    match_detections,
)
from visualization.drawing import GREEN, INK, PAPER, RED
from visualization.plots import plot_precision_recall
from visualization.samples import Sample
from visualization.yolo_grid import YOLOGridView, draw_grid

GREY = Image.new("RGB", (200, 100), (128, 128, 128))
# On the left an object of class 0 that is found twice, in the middle one of class 1 that is taken for class 2, on the
# right a difficult one that is missed. What was found has a scale of half the image's pixels.
TRUTH = {
    "target": {
        "boxes": torch.tensor([[5.0, 10, 25, 40], [40, 10, 60, 40], [75, 10, 95, 40]]),
        "labels": torch.tensor([0, 1, 1]),
        "difficult": torch.tensor([False, False, True]),
    },
    "id": "cells.jpg",
}
PREDICTION: dict[str, Any] = {
    "boxes": torch.tensor([[5.0, 11, 25, 41], [6, 10, 26, 40], [40, 10, 60, 40], [0, 0, 99, 49]]),
    "scores": torch.tensor([0.9, 0.8, 0.7, 0.1]),
    "labels": torch.tensor([0, 0, 2, 1]),
}
SIZE = (100, 50)
VIEW = DetectionView()


def colors(picture: Image.Image, row: int) -> set[tuple[int, ...]]:
    return {tuple(int(v) for v in pixel) for pixel in np.asarray(picture)[row]}


def test_each_object_is_found_once_and_by_its_class() -> None:
    assert match_detections(PREDICTION["boxes"], [0, 0, 2, 1], TRUTH["target"]) == [0, None, None, None]
    assert count_detections(PREDICTION, TRUTH["target"]) == (2, 1, 2)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert match_detections(PREDICTION["boxes"], [0, 0, 2, 1], nothing) == [None] * 4
    assert count_detections(PREDICTION, nothing) == (0, 0, 3)


def test_boxes_are_drawn_at_the_pictures_size() -> None:
    drawn = VIEW.draw(GREY, PREDICTION, TRUTH, NAMES, SIZE)
    assert drawn.width == GREY.width
    assert drawn.height > GREY.height
    assert colors(drawn, 75) >= {GREEN, RED, MISSED}
    columns = np.asarray(drawn)[75]
    missed = np.flatnonzero((columns == MISSED).all(1))
    assert {int(missed.min()), int(missed.max())} <= {150, 190}  # the difficult one alone is left to be missed
    assert (columns[:10] == 128).all()
    wrong_alone = {**PREDICTION, "boxes": PREDICTION["boxes"][2:], "scores": PREDICTION["scores"][2:]}
    wrong_alone["labels"] = PREDICTION["labels"][2:]
    assert GREEN not in colors(VIEW.draw(GREY, wrong_alone, TRUTH, NAMES, SIZE), 75)


def test_without_truth_a_class_has_its_color() -> None:
    drawn = VIEW.draw(GREY, PREDICTION, {}, None, SIZE)
    assert not colors(drawn, 75) & {GREEN, RED, MISSED}
    empty = {key: value[:0] for key, value in PREDICTION.items()}
    assert VIEW.draw(GREY, empty, {}, None, SIZE).size == drawn.size


def test_the_grid_shows_the_responsible_box() -> None:
    boxes = torch.zeros(2, 2, 2, 4)
    boxes[0, 0, 0], boxes[0, 0, 1] = torch.tensor([0.0, 0, 90, 10]), torch.tensor([10.0, 5, 40, 20])
    cells = {"boxes": boxes, "confidence": torch.zeros(2, 2, 2), "classes": torch.rand(2, 2, 3)}
    cells["confidence"][0, 0] = torch.tensor([0.0, 0.4])
    truth = {"target": {"boxes": torch.tensor([[10.0, 5, 38, 20]]), "labels": torch.tensor([0])}}
    drawn = draw_grid(GREY, {"cells": cells}, truth, SIZE)
    assert MISSED in colors(drawn, 1)  # the frame of the cell that holds the center
    assert PAPER in colors(drawn.crop((20, 10, 81, 40)), 10)  # the second box, at the image's scale
    assert MISSED not in colors(draw_grid(GREY, {"cells": cells}, {}, SIZE), 1)
    assert INK in colors(draw_grid(GREY, {"cells": cells}, {}, SIZE), 25)


def test_a_sheet_has_the_grid_beside_the_boxes() -> None:
    image = GREY.resize(SIZE)
    plain = VIEW.tile(image, PREDICTION, TRUTH, NAMES)
    cells = {"boxes": torch.rand(2, 2, 1, 4), "confidence": torch.rand(2, 2, 1), "classes": torch.rand(2, 2, 3)}
    pair = YOLOGridView().tile(image, {**PREDICTION, "cells": cells}, TRUTH, NAMES)
    assert pair.width > 1.9 * plain.width
    columns, rows = VIEW.table([Sample(torch.zeros(3, 50, 100, dtype=torch.uint8), PREDICTION, TRUTH)], NAMES)
    assert dict(zip(columns, rows[0], strict=True))["found"] == 1


def test_records_are_in_the_pictures_pixels() -> None:
    assert VIEW.matches(PREDICTION)
    record = VIEW.record(PREDICTION, NAMES, (2.0, 3.0))
    assert record["detections"][0]["box"] == [10, 33, 50, 123]
    assert [item["class"] for item in record["detections"]] == [NAMES[0], NAMES[0], NAMES[2], NAMES[1]]
    assert len(VIEW.rows(record)) == 4
    assert VIEW.rows(record)[1][:3] == [4, 2, NAMES[0]]
    json.dumps(record)
    nothing = VIEW.record({key: value[:0] for key, value in PREDICTION.items()}, NAMES, (1.0, 1.0))
    assert nothing["remark"] == "nothing found"
    assert VIEW.rows(nothing)[0][0] == 0


class Detected(Tiny):
    """Whose validation leaves average precisions."""

    def on_validation_epoch_end(self) -> None:
        metric = VOCMeanAP(3)
        # The third class has no object.
        metric.update([PREDICTION], [TRUTH["target"]])
        self.epoch_results["val"] = {key: value for key, value in metric.compute().items() if value.ndim}


def test_average_precisions_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t = trainer(tmp_path, callbacks=[AveragePrecision()], logger=[MetricsFile(tmp_path)])
    t.fit(Detected(), loader(), loader())
    assert "no object" not in capsys.readouterr().out
    assert list((tmp_path / "figures").glob("val_precision_recall_step=*.png"))
    lines = (tmp_path / "per_class_ap_val.csv").read_text().splitlines()
    assert lines[0] == "class,objects,detections,ap"
    assert lines[1].startswith("red,1,2,1.0")
    assert lines[3].endswith("0,1,")
    trainer(tmp_path, callbacks=[AveragePrecision()]).validate(Detected(), loader(), verbose=False)
    out = capsys.readouterr().out
    assert "no object" in out
    assert "1.0000" in out


def test_curves_of_many_classes() -> None:
    metric = VOCMeanAP(40)
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(40, 1)
    labels = torch.arange(40)
    metric.update([{"boxes": boxes, "scores": torch.rand(40), "labels": labels}], [{"boxes": boxes, "labels": labels}])
    results = metric.compute()
    rows = AveragePrecision().rows(results, None)
    assert len(rows) == 40
    assert format_table(rows).count("1.0000") == 40
    assert plot_precision_recall(results["precision"], results["ap"], None, "$title$").width == 900
