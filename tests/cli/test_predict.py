"""``train.py predict`` from a checkpoint alone: images, videos, faces and attributes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import cli.parser
from datamodules.classification.fer2013 import EMOTIONS
from datamodules.segmentation.voc_semantic import VOCSegmentation
from datamodules.synthetic.voc_segmentation import write_voc_segmentation
from datamodules.voc import VOC_CLASSES
from lightning_modules.detection.yolo_v2 import YOLOv2Network
from tests.command import CELLS, QUICK, ROOT, TINY, refusal
from tests.datamodules.test_video import write_video
from tests.lightning_modules.detection.test_darknet19 import write_weights


def test_predict_needs_only_the_checkpoint(trained: Path, data: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / "alone.ckpt")
    cli.parser.run(
        ["predict", *QUICK, "--ckpt_path", "alone.ckpt", "--data.root", "null", "--data.images", str(data / "val")]
    )
    (run,) = Path("runs").glob("*/*_predict")
    assert (run / "predictions.json").is_file()
    assert len((run / "predictions.csv").read_text().splitlines()) == 1 + 12
    assert "disk" in (run / "predictions.csv").read_text()


def test_detections_of_pictures_and_of_a_video(
    devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint alone; boxes lie in the images' own pixels."""
    cli.parser.run([
        "fit", "--model", "YOLOv1", "--model.grid_size", "2", "--model.input_size", "128",
        "--model.width_multiplier", "0.05", "--model.hidden_units", "16", "--model.batch_norm", "true",
        "--data", "VOCDetection", "--data.image_size", "128",
        "--data.root", str(devkit), *CELLS, *QUICK, "--trainer.max_epochs", "2", "--experiment", "cells",
    ])  # fmt: skip
    (best,) = Path("runs/cells").glob("*/checkpoints/best.ckpt")
    shutil.copy(best, tmp_path / "alone.ckpt")
    pictures = devkit / "VOC2007" / "JPEGImages"
    # No cell is sure of itself after six steps: everything is taken.
    alone = ["predict", *QUICK, "--ckpt_path", "alone.ckpt", "--data.root", "null", "--model.score_threshold", "-1"]
    cli.parser.run([*alone, "--data.images", str(pictures), "--experiment", "pictures"])
    (run,) = Path("runs/pictures").glob("*_predict")
    records = json.loads((run / "predictions.json").read_text())
    assert [record["file"] for record in records] == sorted(str(path) for path in pictures.iterdir())
    found = [(item, record["file"]) for record in records for item in record["detections"]]
    assert {item["class"] for item, _ in found} <= {"WBC", "RBC", "Platelets"}
    corners = torch.tensor([item["box"][2:] for item, _ in found])
    sizes = torch.tensor([Image.open(path).size for _, path in found])
    assert (corners <= sizes + 0.1).all()
    assert (corners > 128).any() or sizes.max() <= 128
    assert len(list((run / "predictions").iterdir())) == len(records)

    write_video(tmp_path / "film.avi", frames=5)
    cli.parser.run([*alone, "--data.images", "film.avi", "--experiment", "film"])
    (run,) = Path("runs/film").glob("*_predict")
    records = json.loads((run / "predictions.json").read_text())
    assert [record["file"] for record in records] == [f"film.avi#{k}" for k in range(5)]
    capture = cv2.VideoCapture(str(run / records[0]["annotated"]))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (5, 10)
    assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 48
    capsys.readouterr()
    assert "expected a video, found nothing there" in refusal([*alone, "--data.images", "nowhere.mp4"], capsys)


def test_predict_turns_photographs_as_the_training_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The option comes from the checkpoint; a predicted mask fits its photograph as training reads it."""
    write_voc_segmentation(str(tmp_path), classes=2, train=2, val=1, size=32)
    devkit = tmp_path / "VOCdevkit" / "VOC2012"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(next(devkit.glob("JPEGImages/*.jpg"))).resize((96, 72)).save("turned.jpg", exif=exif)
    sets = {split: ["VOC2012/train"] for split in ("train", "val", "test")}
    for option, size in (("false", (96, 72)), ("true", (72, 96))):
        cli.parser.run([
            "fit", "--model", "EncoderDecoder", "--model.channels", "[4, 4]", "--data", "VOCSegmentation", *QUICK,
            "--data.root", str(tmp_path), "--data.classes", "[background, aeroplane, bicycle]",
            "--data.crop_size", "32", "--data.batch_size", "2", "--data.exif_orientation", option,
            "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--experiment", f"fit_{option}",
        ])  # fmt: skip
        (best,) = Path(f"runs/fit_{option}").glob("*/checkpoints/best.ckpt")
        shutil.copy(best, "alone.ckpt")
        capsys.readouterr()
        alone = ["predict", *QUICK, "--ckpt_path", "alone.ckpt", "--data.root", "null", "--data.images", "turned.jpg"]
        cli.parser.run([*alone, "--experiment", f"turned_{option}"])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "EXIF" in line]
        assert line.startswith(f"EXIF orientation: {'applied' if option == 'true' else 'ignored'} where ")
        (run,) = Path(f"runs/turned_{option}").iterdir()
        (record,) = json.loads((run / "predictions.json").read_text())
        assert Image.open(run / record["mask"]).size == size
        assert Image.open(run / record["annotated"]).width == size[0]  # its height includes a caption
        # The photograph and its predicted mask become training data.
        shutil.copy("turned.jpg", devkit / "JPEGImages")
        shutil.copy(run / record["mask"], devkit / "SegmentationClass" / "turned.png")
        (devkit / "ImageSets" / "Segmentation" / "train.txt").write_text("turned\n")
        for reading in (True, False):
            data = VOCSegmentation(str(tmp_path), **sets, exif_orientation=reading)  # type: ignore[arg-type]
            assert data.dataset("val")[0]["image"].shape == (3, size[1], size[0])


def test_darknet_weights_predict_vocs_classes(devkit: Path, tmp_path: Path) -> None:
    write_weights(YOLOv2Network(20, width_multiplier=0.05), tmp_path / "voc.weights", np.random.default_rng(0))
    cli.parser.run([
        "predict", "--model", "YOLOv2", "--model.width_multiplier", "0.05", "--model.weights", "voc.weights",
        "--data", "VOCDetection", "--data.image_size", "96", "--data.images", str(devkit / "VOC2007" / "JPEGImages"),
        *QUICK, "--experiment", "darknet",
    ])  # fmt: skip
    (run,) = Path("runs/darknet").glob("*_predict")
    records = json.loads((run / "predictions.json").read_text())
    found = {item["class"] for record in records for item in record["detections"]}
    assert found
    assert found <= set(VOC_CLASSES)


def test_predict_finds_the_faces_of_photographs(roots: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A model that was trained on gray faces is given photographs of two people, of one and of none."""
    config = str(ROOT / "configs" / "classification" / "mini_xception_fer2013.yaml")
    data = roots["FER2013"]
    cli.parser.run([
        "fit", "--config", config, *QUICK, "--data.root", str(data), "--trainer.max_epochs", "1",
        "--trainer.limit_train_batches", "1", "--trainer.num_sanity_val_steps", "0",
    ])  # fmt: skip
    (best,) = Path("runs/mini_xception_fer2013").glob("*/checkpoints/best.ckpt")
    assert list(best.parent.parent.glob("figures/val_step=*.png"))
    cli.parser.run(["predict", *QUICK, "--ckpt_path", str(best), "--data.images", str(data / "photographs")])
    (run,) = Path("runs/mini_xception_fer2013").glob("*_predict")
    records = json.loads((run / "predictions.json").read_text())
    assert [len(record["faces"]) for record in records] == [0, 0, 1, 1, 2, 2]
    assert all(face["aligned"] for record in records for face in record["faces"])
    assert records[-1]["faces"][0]["predictions"][0]["class"] in EMOTIONS
    assert "no face found in 2 of 6 images" in capsys.readouterr().out


def test_attributes_are_predicted_from_the_checkpoint_alone(
    roots: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names of attributes, classes and ingredients come from the data in training, from the checkpoint after it."""
    cli.parser.run([
        "fit", "--model", "AttributeClassifier", "--model.backbone", "resnet20_cifar", "--model.base_channels", "2",
        "--model.channels", "4", "--data", "Yummly28K", "--data.image_size", "16", "--data.vocabulary_size", "5",
        *QUICK, "--data.root", str(roots["Yummly28K"]), "--trainer.max_epochs", "1", "--experiment", "attributes",
    ])  # fmt: skip
    (best,) = Path("runs/attributes").glob("*/checkpoints/best.ckpt")
    assert list(best.parent.parent.glob("figures/val_step=*.png"))
    shutil.copy(best, tmp_path / "alone.ckpt")
    pictures = str(roots["Yummly28K"] / "Yummly28K" / "images27638")
    cli.parser.run(["predict", *QUICK, "--ckpt_path", "alone.ckpt", "--data.root", "null", "--data.images", pictures])
    (run,) = Path("runs").glob("*/*_predict")
    records = json.loads((run / "predictions.json").read_text())
    assert len(records) == 42
    assert {name: len(items) for name, items in records[0]["attributes"].items()} == {
        "cuisine": 3, "course": 4, "taste": 5,
    }  # fmt: skip
    assert {item["class"] for item in records[0]["attributes"]["cuisine"]} == {"American", "Chinese", "Mexican"}
    assert all(set(record) == {"file", "annotated", "attributes", "ingredients"} for record in records)
    line = refusal(
        [
            "fit",
            "--model",
            "AttributeClassifier",
            "--data",
            "ImageFolder",
            "--data.root",
            str(roots["ImageFolder"]),
            *QUICK,
        ],
        capsys,
    )
    assert "attributes: expected one or more" in line
    line = refusal(["fit", *TINY, "--data", "Yummly28K", "--data.root", str(roots["Yummly28K"]), *QUICK], capsys)
    assert "num_classes: expected 1 or more, found 0" in line


def test_names_that_are_not_utf8(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder, a class and an image of an old zip: training, evaluation and prediction from the checkpoint work."""
    root = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.copytree(data, root)
    for split in ("train", "val"):
        first = sorted(Path(root, split).iterdir())[0]
        os.rename(first, os.fsencode(first.parent) + b"/Katz\xe9")
    cli.parser.run(["fit", *TINY, *QUICK, "--data.root", root, "--trainer.max_epochs", "1", "--experiment", "names"])
    (best,) = Path("runs/names").glob("*/checkpoints/best.ckpt")
    cli.parser.run(["validate", *QUICK, "--ckpt_path", str(best)])
    images = os.fsdecode(os.fsencode(Path(root, "val")) + b"/Katz\xe9")
    shutil.copy(best, tmp_path / "alone.ckpt")
    for checkpoint in (str(best), "alone.ckpt"):
        experiment = Path(checkpoint).stem
        cli.parser.run([
            "predict", *QUICK, "--ckpt_path", checkpoint, "--data.images", images, "--experiment", experiment,
        ])  # fmt: skip
        (run,) = Path("runs", experiment).glob("*_predict")
        records = json.loads((run / "predictions.json").read_text())
        assert [record["file"] for record in records] == sorted(os.path.join(images, n) for n in os.listdir(images))
        assert "Katz\\xe9" in (run / "predictions.csv").read_text(errors="surrogateescape")
    printed = capfd.readouterr()
    assert "skipped" not in printed.out + printed.err
