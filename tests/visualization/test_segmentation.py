"""Overlays, their legend, the table of classes, and the masks that prediction leaves on disk."""

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

from callbacks.class_iou import ClassIoU
from callbacks.class_tables import format_table
from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.figures import Figures
from callbacks.prediction_writer import PredictionWriter
from lightning_modules.segmentation.metrics import segmentation_metrics
from tests.callbacks.tiny import Files, Tiny, loader, trainer, write_image
from visualization.detections import DetectionView
from visualization.drawing import class_color
from visualization.instance_masks import InstanceMaskView, overlay_masks
from visualization.plots import plot_class_iou
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
NAMES = ["background", "größer", "$cost_$"]


def halves(left: int, right: int, height: int = 40, width: int = 60) -> torch.Tensor:
    ids = torch.full((height, width), left)
    ids[:, width // 2 :] = right
    return ids


def test_maps_of_ids_are_recognized() -> None:
    assert VIEW.matches(halves(0, 1))
    assert not VIEW.matches(torch.rand(4, 4))
    assert not VIEW.matches(torch.zeros(3, 4, 4, dtype=torch.int64))
    assert not VIEW.matches({"probabilities": torch.rand(3)})


def test_an_overlay_has_the_palettes_colors_and_leaves_the_background() -> None:
    ids = resize_ids(halves(0, 2), GRAY.size)
    named = np.asarray(overlay_ids(GRAY, ids, NAMES))
    assert (named[:, :60] == 128).all()
    expected = np.rint(0.4 * 128 + 0.6 * PALETTE[2])
    assert (named[:, 60:] == expected).all()
    street = np.asarray(overlay_ids(GRAY, ids, ["sky", "road", "car"]))
    assert (street[:, :60] == np.rint(0.4 * 128)).all()
    void = np.asarray(overlay_ids(GRAY, np.full_like(ids, 255), NAMES))
    assert np.abs(void - PALETTE[255].astype(int)).max() < 15


def test_the_legend_names_what_is_there() -> None:
    maps = [halves(2, 2).numpy(), halves(0, 255).numpy()]
    assert legend(maps, NAMES) == [(2, "$cost_$"), (0, "background"), (255, "void")]
    assert legend(maps[:1], None) == [(2, "class 2")]
    many = np.arange(200, dtype=np.uint8).reshape(10, 20)
    tall = VIEW.draw(GRAY, torch.from_numpy(many.astype(np.int64)), {}, None)
    assert tall.width == GRAY.width
    assert tall.height > 10 * GRAY.height


def test_prediction_and_truth_stand_beside_each_other() -> None:
    alone = VIEW.draw(GRAY, halves(0, 1), {}, NAMES)
    pair = VIEW.draw(GRAY, halves(0, 1), {"original_mask": halves(1, 255, 80, 120)}, NAMES)
    assert alone.width == GRAY.width
    assert pair.width == 2 * GRAY.width + 4
    row = np.asarray(pair)[60]
    red = np.rint(0.4 * 128 + 0.6 * PALETTE[1])
    assert (row[70] == red).all()
    assert (row[124 + 20] == red).all()
    assert (row[124 + 100] > 180).all()
    trained = VIEW.draw(GRAY, halves(0, 1), {"mask": halves(1, 255)}, NAMES)
    assert trained.size == pair.size
    sheet = VIEW.tile(GRAY, halves(0, 1), {"original_mask": halves(1, 2)}, NAMES)
    assert sheet.width == 2 * 384 + 4
    assert VIEW.table([Sample(torch.zeros(3, 4, 4), halves(0, 1), {})], NAMES) is None


class Segments(Tiny):
    """Gives the left half of each image class 1, the right half class 2; a third class does not occur."""

    def __init__(self) -> None:
        super().__init__([*NAMES, "absent"])

    def _maps(self, batch: dict[str, Any]) -> list[torch.Tensor]:
        return [halves(1, 2, *image.shape[1:]) for image in batch["image"]]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self._maps(batch)

    test_step = predict_step = validation_step

    def on_validation_epoch_end(self) -> None:
        metrics = segmentation_metrics(4)
        metrics.update([halves(1, 2)], [halves(1, 0)])
        self.epoch_results["val"] = {key: value for key, value in metrics.compute().items() if value.ndim}


def test_the_classes_are_written_drawn_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [ClassIoU(), ConfusionMatrix(), Figures(count=4)]
    trainer(tmp_path, callbacks=callbacks).fit(Segments(), loader(), loader())
    assert "accuracy" not in capsys.readouterr().out
    with open(tmp_path / "per_class_iou_val.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [*NAMES, "absent"]
    assert [row["iou"] for row in rows] == ["0.0", "1.0", "0.0", ""]
    assert [row["pixels"] for row in rows] == ["1200", "1200", "0", "0"]
    assert [row["accuracy"] for row in rows] == ["0.0", "1.0", "", ""]
    for name in ("val_iou_step", "val_confusion_step", "val_step"):
        assert list((tmp_path / "figures").glob(f"{name}=*.png")), name
    assert (tmp_path / "per_class_val.csv").exists()
    trainer(tmp_path, callbacks=[ClassIoU()]).validate(Segments(), loader(), verbose=False)
    assert "absent" in capsys.readouterr().out
    with pytest.raises(ValueError, match="keep >= 2"):
        ClassIoU(keep=1)


def test_bars_of_many_classes() -> None:
    iou = torch.linspace(0, 1, 100)
    iou[3] = torch.nan
    picture = plot_class_iou(iou, None, "$title$")
    assert picture.height < 2200
    rows = ClassIoU().rows({"iou": iou, "confusion_matrix": torch.eye(100, dtype=torch.int64)}, None)
    assert format_table(rows).count("\n") == 100
    assert plot_class_iou(torch.full((3,), torch.nan), NAMES, "nothing").width == 840


def test_prediction_writes_masks_in_the_pictures_own_pixels(tmp_path: Path) -> None:
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
            {"label": 1, "class": NAMES[1], "share": 0.5},
            {"label": 2, "class": NAMES[2], "share": 0.5},
        ]
        assert Image.open(run / record["annotated"]).width == 50
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert rows[0] == {"file": str(paths[0]), "class": NAMES[1], "share": "0.5"}
    assert VIEW.record(halves(2, 2), None, (1.0, 1.0)) == {"classes": [{"label": 2, "class": "class 2", "share": 1.0}]}


def objects() -> dict[str, torch.Tensor]:
    """Two objects that share a column, the best first, and one that is too faint to be drawn."""
    masks = torch.zeros(3, 40, 60, dtype=torch.bool)
    masks[0, 10:30, 5:20], masks[1, 10:30, 19:40], masks[2] = True, True, True
    boxes = torch.tensor([[5.0, 10, 20, 30], [19, 10, 40, 30], [0, 0, 60, 40]])
    return {"boxes": boxes, "scores": torch.tensor([0.9, 0.5, 0.1]), "labels": torch.tensor([1, 1, 0]), "masks": masks}


def test_masks_of_objects_have_a_color_each() -> None:
    prediction = objects()
    drawn = np.asarray(overlay_masks(GRAY, prediction["masks"][:2]))
    for i, x in ((0, 20), (1, 60)):
        assert np.abs(drawn[40, x].astype(int) - (128 + np.array(class_color(i)).astype(int)) / 2).max() <= 2
    assert (drawn[70] == 128).all()
    assert np.abs(drawn[40, 38].astype(int) - drawn[40, 20]).max() == 0  # the best one lies on top
    boxed = InstanceMaskView().draw(GRAY, prediction, {}, NAMES, (60, 40))
    plain = DetectionView().draw(GRAY, {k: v for k, v in prediction.items() if k != "masks"}, {}, NAMES, (60, 40))
    assert (np.asarray(boxed)[40, 20] != np.asarray(plain)[40, 20]).any()
    assert (np.asarray(boxed)[78, 5] == 128).all()


def test_masks_of_objects_are_stored_by_rank() -> None:
    ids = InstanceMaskView().mask(objects())
    assert (ids[20, 19], ids[20, 20], ids[0, 0]) == (1, 2, 0)
    boxes_only = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    assert DetectionView().mask(boxes_only) is None
    kept = InstanceMaskView().reduce(objects())
    assert len(kept["masks"]) == len(kept["scores"]) == 2
    assert VIEW.reduce(halves(0, 1)).shape == (40, 60)


class Objects(Segments):
    """Finds the same two objects in each image."""

    def _maps(self, batch: dict[str, Any]) -> list[Any]:
        return [objects() for _ in batch["image"]]


def test_prediction_of_objects_has_boxes_and_masks(tmp_path: Path) -> None:
    path = write_image(tmp_path / "in" / "a.jpg", (120, 80))

    class Wide(Files):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"image": torch.full((3, 40, 60), 90, dtype=torch.uint8), "id": str(self.paths[i])}

    t = trainer(tmp_path / "run", callbacks=[PredictionWriter(str(tmp_path / "in"))])
    t.predict(Objects(), DataLoader(Wide([path])), return_predictions=False)  # type: ignore[arg-type]
    (record,) = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert record["detections"][1]["box"] == [38, 20, 80, 60]
    with Image.open(tmp_path / "run" / record["mask"]) as mask:
        assert mask.size == (120, 80)
        assert np.unique(np.array(mask)).tolist() == [0, 1, 2]
    assert "masks" not in record


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
