"""Annotated images, JSON and CSV of predictions."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from callbacks.prediction_writer import PredictionWriter, annotated_name, read_original
from tests.callbacks.tiny import Files, Tiny, trainer, write_image

CROP = torch.full((3, 24, 24), 77, dtype=torch.uint8)


def write_images(folder: Path) -> list[Path]:
    names = ["a.jpg", "a.png", "a.png.jpg", "sub/a.jpg", "sub/деер/größe 1.PNG", 'x, "y".webp', "no_suffix.bmp"]
    return [write_image(folder / name) for name in names]


def predict(run: Path, paths: list[Path], folder: Path | None, module: Tiny | None = None) -> None:
    t = trainer(run, callbacks=[PredictionWriter(str(folder) if folder else None)])
    loader = DataLoader(Files(paths), batch_size=2)  # type: ignore[var-annotated]
    t.predict(module or Tiny(), loader, return_predictions=False)


def test_every_image_has_a_copy_a_record_and_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, run = write_images(tmp_path / "in"), tmp_path / "run"
    predict(run, paths, tmp_path / "in")
    records = json.loads((run / "predictions.json").read_text())
    assert [record["file"] for record in records] == [str(path) for path in paths]
    assert len({record["annotated"] for record in records}) == len(paths)
    for record in records:
        copy = Image.open(run / record["annotated"])
        assert copy.format == "JPEG"
        assert copy.height > 30
        assert sum(item["probability"] for item in record["predictions"]) == pytest.approx(1)
        assert record["predictions"][0]["class"] in ("red", "größer", "$cost_$")
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    assert list(rows[0])[:3] == ["file", "class1", "probability1"]
    assert float(rows[0]["probability1"]) == records[0]["predictions"][0]["probability"]
    assert (rows[0]["class4"], rows[0]["probability5"]) == ("", "")
    assert not list(run.glob("*.jsonl"))
    out = capsys.readouterr().out
    assert f"7 images: {run}/predictions.json" in out


def test_a_killed_run_leaves_its_lines(tmp_path: Path) -> None:
    paths, run = write_images(tmp_path / "in"), tmp_path / "run"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        predict(run, paths, tmp_path / "in", Tiny(fail_at=2))
    lines = (run / "predictions.rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == [str(path) for path in paths[:4]]
    assert not (run / "predictions.json").exists()


def test_names_never_meet(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "in")
    names = [annotated_name(str(path), str(tmp_path / "in")).as_posix() for path in paths]
    assert names[:4] == ["a.jpg", "a.png.jpg.jpg", "a.png.jpg", "sub/a.jpg"]
    assert len(set(names)) == len(names)
    outside = annotated_name(str(tmp_path / "in" / ".." / "b.jpg"), str(tmp_path / "in"))
    assert not outside.is_absolute()
    assert ".." not in outside.parts
    assert annotated_name(str(paths[0]), str(paths[0])) == Path("a.jpg")
    assert not annotated_name(str(paths[0]), None).is_absolute()


def test_originals_are_upright_rgb_and_bounded(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    turned = write_image(tmp_path / "turned.jpg", (3000, 1500), exif=exif)
    assert read_original(str(turned), CROP).size == (640, 1280)
    assert read_original(str(turned), CROP, exif_orientation=False).size == (1280, 640)
    for mode in ("RGB", "L"):
        tiff = tmp_path / f"{mode}.tif"
        Image.new(mode, (300, 150)).save(tiff, exif=exif)
        assert read_original(str(tiff), CROP).size == (150, 300)
        assert read_original(str(tiff), CROP, exif_orientation=False).size == (300, 150)
    assert read_original(str(write_image(tmp_path / "small.png", (20, 10))), CROP).size == (20, 10)


def test_odd_and_broken_images(tmp_path: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((10, 20), 40000, dtype=np.uint16)).save(deep)
    figure = read_original(str(deep), CROP)
    assert (figure.mode, figure.size) == ("RGB", (20, 10))
    assert 100 < figure.getpixel((0, 0))[0] < 200
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear)
    assert read_original(str(clear), CROP).mode == "RGB"
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    for name in ("broken.jpg", "missing.jpg"):
        assert read_original(str(tmp_path / name), CROP).getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.skipif(os.name != "posix", reason="file names of any bytes")
def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    paths, run = [write_image(tmp_path / "in" / os.fsdecode(b"caf\xe9.png"))], tmp_path / "run"
    predict(run, paths, tmp_path / "in")
    assert json.loads((run / "predictions.json").read_text())[0]["file"] == str(paths[0])
    assert b"caf\xe9.png" in (run / "predictions.csv").read_bytes()


def test_two_ranks_join_their_parts_in_the_order_of_the_input(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / "in" / f"{i:02d}.png", (8, 8)) for i in range(7)]

    class Shared(Tiny):
        def predict_dataloader(self) -> DataLoader:
            files = Files(paths)
            mine = list(range(self.trainer.global_rank, len(files), self.trainer.world_size))
            return DataLoader(torch.utils.data.Subset(files, mine), batch_size=2)

    t = trainer(
        tmp_path / "run",
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
        callbacks=[PredictionWriter(str(tmp_path / "in"))],
    )
    t.predict(Shared(), return_predictions=False)
    records = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [record["file"] for record in records] == [str(path) for path in paths]
    assert len(list((tmp_path / "run" / "predictions").iterdir())) == 7
    assert not list((tmp_path / "run").glob("*.jsonl"))
