"""The check finds planted problems, and none in a valid dataset."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.classification.image_folder import ImageFolder
from datamodules.detection.voc import VOCDetection
from datamodules.pose.mpii import MPII
from datamodules.segmentation.instance_crops import VOCInstanceCrops
from datamodules.segmentation.masks import read_ids
from datamodules.segmentation.voc_instance import VOCInstance
from datamodules.segmentation.voc_semantic import VOCSegmentation
from datamodules.synthetic.imagenet import write_imagenet
from datamodules.synthetic.mpii import write_mpii
from datamodules.synthetic.style_images import write_style_images
from datamodules.synthetic.voc import write_voc
from datamodules.synthetic.voc_segmentation import write_voc_segmentation
from tests.command import ROOT
from tools.check import check, main
from tools.color_masks import main as color_masks


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_imagenet(str(tmp_path), classes=2, train=6, val=3, size=16)
    return tmp_path


def test_a_valid_dataset(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", "ImageFolder", "--data.root", str(root), "--workers", "2"]) == 0
    report = capsys.readouterr().out
    assert "train/: 12 images, 6 per class" in report
    assert "val/: 6 images" in report
    assert report.endswith("no problems\n")


def test_planted_problems(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = root / "train" / "striped_disk", root / "val" / "striped_disk"
    images = sorted(train.iterdir())
    shutil.copy(images[0], val / "copy.JPEG")
    shutil.copy(images[1], root / "train" / "plain_square" / "contrary.JPEG")
    shutil.copy(images[2], train / "repeated.JPEG")
    images[3].write_bytes(images[3].read_bytes()[:350])
    images[4].write_bytes(b"")
    Image.fromarray(np.zeros((9, 30, 3), np.uint8)).convert("CMYK").save(train / "cmyk.jpg")
    (root / "val" / "unknown").mkdir()
    assert main(["--data", "ImageNet", "--data.root", str(root), "--workers", "1"]) == 1
    report = capsys.readouterr().out
    problems = [line for line in report.splitlines() if line.startswith("PROBLEM ")]
    assert len(problems) == 5
    assert report.endswith("5 problems\n")
    for expected in (
        "val/ has 1 class (unknown) that train/ lacks",
        "train/striped_disk/striped_disk_00003.JPEG: truncated",
        "train/striped_disk/striped_disk_00004.JPEG: empty file",
        "the same image in several splits: train/striped_disk/striped_disk_00000.JPEG, val/striped_disk/copy.JPEG",
        "the same image in several classes: train/plain_square/contrary.JPEG, train/striped_disk/striped_disk_00001",
    ):
        assert expected in "\n".join(problems)
    assert "CMYK 1" in report
    assert "1 image repeats another of their class and split" in report


def test_many_problems_are_counted_not_listed(root: Path) -> None:
    for i in range(50):
        (root / "train" / "plain_square" / f"empty{i}.jpg").touch()
    problems = check(ImageFolder(str(root), image_size=16)).problems
    assert len(problems) == 21
    assert problems[-1] == "50 unreadable images in total, 30 not shown"


def test_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", "ImageFolder", "--data.root", str(tmp_path)]) == 2
    assert "there is no folder of any split" in capsys.readouterr().err
    assert main(["--data", "ImageFolder", "--data.hflip", "2"]) == 2
    assert capsys.readouterr().err == "error: hflip: expected a probability, found 2.0\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "ImagNet"], "error: --data: expected a datamodule, found ImagNet; did you mean ImageNet?\n"),
        (["--data", "FER2013"], "error: --data: expected a class that this command supports, found FER2013\n"),
        (
            ["--data", "ImageNet", "--data.rot", "x"],
            "error: ImageNet: expected one of its options, found rot; did you mean root?\n",
        ),
    ],
)
def test_typos(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == expected


def test_objects_are_counted_and_what_is_wrong_with_them_named(tmp_path: Path) -> None:
    write_voc(str(tmp_path), classes=2, train=3, val=2, size=32)
    devkit = tmp_path / "VOCdevkit" / "VOC2007"
    options = {"root": str(tmp_path), "classes": ["aeroplane", "bicycle"], "train": ["VOC2007/train"]}
    report = check(VOCDetection(**options, val=["VOC2007/val"], test=["VOC2007/val"]))  # type: ignore[arg-type]
    assert report.problems == []
    objects = sum(path.read_text().count("<object>") for path in devkit.glob("Annotations/*.xml"))
    counted = [int(line.split()[1]) for line in report.notes if line.startswith(("  aeroplane:", "  bicycle:"))]
    lists = [(devkit / "ImageSets" / "Main" / f"{name}.txt").read_text().split() for name in ("train", "val")]
    listed = sum(
        (devkit / "Annotations" / f"{name}.xml").read_text().count("<object>") for name in [*lists[0], *lists[1]]
    )
    assert sum(counted) == listed < objects
    assert any("6 images" in line and "0 images without objects" in line for line in report.notes)

    first, second = lists[0][:2]
    (devkit / "JPEGImages" / f"{first}.jpg").write_bytes(b"no image")
    text = (devkit / "Annotations" / f"{second}.xml").read_text()
    (devkit / "Annotations" / f"{second}.xml").write_text(re.sub("<xmin>[0-9]+", "<xmin>900", text, count=1))
    shutil.copy(devkit / "JPEGImages" / f"{lists[0][2]}.jpg", devkit / "JPEGImages" / f"{lists[1][0]}.jpg")
    problems = check(VOCDetection(**options, val=["VOC2007/val"], test=["VOC2007/val"])).problems  # type: ignore[arg-type]
    assert any(f"{second}.xml) whose box has no area" in line for line in problems)
    assert any(f"{first}.jpg:" in line for line in problems)
    assert any(line.startswith("the same image in several splits") for line in problems)
    assert any(f"1 annotation (VOC2007/Annotations/{lists[1][0]}.xml: " in line for line in problems)  # that copy's
    assert len(problems) == 4
    absent = check(VOCDetection(**options, val=["VOC2007/dev"], test=["VOC2007/dev"])).problems  # type: ignore[arg-type]
    assert sum("expected the list dev.txt" in line for line in absent) == 1


def test_pixels_and_objects_are_counted_and_wrong_masks_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_voc_segmentation(str(tmp_path), classes=3, train=4, val=4, size=32)
    top = tmp_path / "VOCdevkit" / "VOC2012"
    report = check(VOCSegmentation(str(tmp_path)))
    assert report.problems == []
    train, val = ((top / f"ImageSets/Segmentation/{name}.txt").read_text().split() for name in ("train", "val"))
    masks = [np.array(Image.open(top / f"SegmentationClass/{name}.png")) for name in train]
    pixels, images = sum(int((mask == 2).sum()) for mask in masks), sum(bool((mask == 2).any()) for mask in masks)
    assert any(line.startswith(f"  bicycle: {pixels} pixels") and f"in {images} " in line for line in report.notes)
    objects = [np.array(Image.open(top / f"SegmentationObject/{name}.png")) for name in train]
    count = sum(len(np.setdiff1d(np.unique(mask), (0, 255))) for mask in objects)
    notes = check(VOCInstance(str(tmp_path))).notes
    assert any(line.startswith(f"VOC2012/train: 12 images, {count} objects") for line in notes)
    bicycles = sum(
        len(np.setdiff1d(np.unique(ids[mask == 2]), (0, 255))) for ids, mask in zip(objects, masks, strict=True)
    )
    assert f"  bicycle: {bicycles}" in notes
    # The classes of VOCInstanceCrops start with the background, which has no objects.
    assert check(VOCInstanceCrops(str(tmp_path))).notes[1:] == notes[1:]

    shutil.copy(top / f"JPEGImages/{train[0]}.jpg", top / f"JPEGImages/{val[0]}.jpg")
    shutil.copy(top / f"SegmentationClass/{train[0]}.png", top / f"SegmentationClass/{val[0]}.png")
    Image.open(top / f"SegmentationClass/{train[1]}.png").convert("RGB").save(top / f"SegmentationClass/{train[1]}.png")
    (top / f"SegmentationClass/{train[2]}.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(top / f"SegmentationClass/{train[3]}.png")
    Image.fromarray(np.full_like(masks[4], 99)).save(top / f"SegmentationClass/{train[4]}.png")
    (top / f"JPEGImages/{train[5]}.jpg").write_bytes(b"nothing")
    assert main(["--data", "VOCSegmentation", "--data.root", str(tmp_path), "--workers", "2"]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM ")]
    assert len(problems) == 6
    for i, expected in enumerate(
        (
            "the same image in several splits",
            "found RGB",
            "no readable image",
            "found 6x5",
            "found id 99",
            "not an image",
        )
    ):
        assert any(expected in line and train[i] in line for line in problems), expected


def test_people_and_their_joints_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mpii(str(tmp_path), train=5, val=3, size=32)
    assert main(["--data", "MPII", "--data.root", str(tmp_path), "--workers", "1"]) == 0
    report = capsys.readouterr().out
    people = MPII(str(tmp_path)).people("train")
    assert f"train: {len(people.images)} images, {len(people)} people, {people.labeled.sum()} labeled joints" in report
    assert f"  left_wrist: {people.labeled[:, 15].sum()}\n" in report
    assert "test: " not in report, "what is the same is examined once"

    path = tmp_path / "annot" / "train.json"
    path.parent.mkdir()
    joints = [[5.0 + k, 9.0] for k in range(16)]
    person = {"image": "000000001.jpg", "center": [9, 9], "scale": 0.1, "joints": joints, "joints_vis": [1] * 16}
    far = {**person, "image": "000000002.jpg", "joints": [[900.0, 5.0], [0.2, 5.0], *joints[2:]]}
    path.write_text(json.dumps([person, far]))
    (tmp_path / "annot" / "valid.json").write_text(json.dumps([{**person, "image": "gone.jpg"}]))
    (tmp_path / "mpii_human_pose_v1_u12_1.mat").unlink()
    with pytest.warns(UserWarning, match="no head boxes"):
        report_of = check(MPII(str(tmp_path)))
    assert "  2 joints of 1 people lie outside the image" in report_of.notes
    assert any("kept 1 person (images/000000002.jpg#0) with a joint more than" in line for line in report_of.notes)
    assert report_of.problems == ["images/gone.jpg: No such file or directory"]


def test_contents_and_styles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_style_images(str(tmp_path), contents=12, styles=3, size=16)
    arguments = ["--data", "StyleImages", "--data.root", str(tmp_path), "--workers", "1"]
    assert main(arguments) == 0
    counts = [int(n) for n in re.findall(r"^content images for \w+: (\d+) images", capsys.readouterr().out, re.M)]
    assert sum(counts) == 12
    (tmp_path / "style" / "text.jpg").write_text("text")
    shutil.copy(tmp_path / "content" / "000.jpg", tmp_path / "style" / "stolen.jpg")
    assert main(arguments) == 1
    report = capsys.readouterr().out
    assert "style images: 5 images" in report
    assert re.search(r"PROBLEM .*text.jpg: not an image", report)
    assert "stolen.jpg" in report


def test_binary_masks_of_255_are_a_problem(tmp_path: Path) -> None:
    """255 is void, so nothing but the background would be trained."""
    write_voc_segmentation(str(tmp_path), classes=2, train=2, val=2, size=32)
    folder = tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    options: dict[str, Any] = {"root": str(tmp_path), "classes": ["background", "polyp"]}
    for path in folder.iterdir():
        ids = np.array(Image.open(path))
        Image.fromarray(np.where(ids > 0, 255, 0).astype(np.uint8)).save(path)
    advice = r"All masks have ids 0 and 255 only, and 255 is void\. .*tools.color_masks .*'1 255 255 255'"
    (problem,) = check(VOCSegmentation(**options)).problems
    assert re.search(rf"^VOC2012/train: train has no pixel of 1 class \(polyp\).*{advice}", problem)
    with pytest.warns(UserWarning, match=rf"train has no pixel of 1 class \(polyp\).*{advice}"):
        VOCSegmentation(**options).dataset("train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VOCSegmentation(**options).dataset("val")
    # The remedy of the message.
    colors = tmp_path / "colors.txt"
    colors.write_text("0 0 0 0\n1 255 255 255\n")
    assert color_masks([str(folder), str(tmp_path / "ids"), "--colors", str(colors)]) == 0
    shutil.rmtree(folder)
    (tmp_path / "ids").rename(folder)
    assert check(VOCSegmentation(**options)).problems == []


def test_a_class_without_a_training_object_is_a_problem(tmp_path: Path) -> None:
    write_voc(str(tmp_path), classes=2, train=3, val=2, size=32)
    options: dict[str, Any] = {
        "root": str(tmp_path), "train": ["VOC2007/train"], "val": ["VOC2007/val"], "test": ["VOC2007/val"],
        "classes": ["aeroplane", "bicycle", "kite"],
    }  # fmt: skip
    line = "train has no object of 1 class (kite); correct --data.classes or the annotations"
    assert check(VOCDetection(**options)).problems == [f"VOC2007/train: {line}"]
    with pytest.warns(UserWarning, match=re.escape(line)):
        VOCDetection(**options).dataset("train")


def test_masks_are_read_until_all_classes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 200 masks, so that the start of a run on a large set takes no time; the line says how many."""
    write_voc_segmentation(str(tmp_path), classes=2, train=4, val=1, size=32)
    monkeypatch.setattr("datamodules.segmentation.base.MAX_MASKS_AT_START", 3)
    read = []
    monkeypatch.setattr("datamodules.segmentation.base.read_ids", lambda path: read.append(path) or read_ids(path))
    VOCSegmentation(str(tmp_path), classes=["background"]).dataset("train")
    assert len(read) == 1
    with pytest.warns(
        UserWarning, match=r"of 2 classes \(aeroplane, kite\).*\(in 3 of 8 masks; python -m tools.check reads all"
    ):
        VOCSegmentation(str(tmp_path), classes=["background", "aeroplane", "bicycle", "kite"]).dataset("train")
    assert len(read) == 4


def planted_voc(tmp_path: Path) -> Path:
    write_voc(str(tmp_path), classes=2, train=3, val=2, size=32)
    return tmp_path / "VOCdevkit" / "VOC2007"


OWN = ["--data", "VOCDetection", "--data.classes", "[aeroplane,bicycle]", "--workers", "1"]


def test_the_default_test_set_is_not_demanded_of_a_dataset_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = planted_voc(tmp_path)
    (top / "ImageSets" / "Main" / "test.txt").unlink()
    given = ["--data.root", str(tmp_path), "--data.train", "[VOC2007/train]"]
    assert main([*OWN, *given, "--data.val", "[VOC2007/val]"]) == 0
    report = capsys.readouterr().out
    assert "test: VOC2007/test (the default) not present; set --data.test if you need it\n" in report
    assert "VOC2007/val: 4 images" in report
    assert main([*OWN, *given]) == 0
    assert "val, test: VOC2007/test (the default) not present" in capsys.readouterr().out
    # What the user names must exist, and so must the defaults if nothing is named.
    assert main([*OWN, *given, "--data.val", "[VOC2007/dev]"]) == 1
    assert "PROBLEM" in capsys.readouterr().out
    assert main([*OWN, "--data.root", str(tmp_path)]) == 1
    assert "VOC2007/test" not in capsys.readouterr().out.split("PROBLEM")[0]


def test_a_wrong_option_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted_voc(tmp_path)
    options = ["--data.root", str(tmp_path), "--workers", "1"]
    for data, wrong, message in (
        ("VOCDetection", ["--data.classes", "[cat,cat]"], "classes: expected different names, found 1 name (cat)"),
        ("VOCSegmentation", ["--data.classes", "[cat,cat]"], "classes: expected different names, found 1 name (cat)"),
        ("ImageFolder", ["--data.batch_size", "0"], "batch_size: expected at least 1, found 0"),
        ("LSP", ["--data.train", "[a:b]"], "train: expected sets like"),
    ):
        assert main(["--data", data, *wrong, *options]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_every_failure_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = planted_voc(tmp_path)
    options = [*OWN, "--data.root", str(tmp_path), "--data.train", "[VOC2007/train]", "--data.val", "[VOC2007/val]"]
    options += ["--data.test", "[VOC2007/val]"]
    name = (top / "ImageSets/Main/train.txt").read_text().split()[0]
    xml = top / "Annotations" / f"{name}.xml"
    text = xml.read_text()
    for content, message in (
        ('<?xml version="1.0" encoding="ANSI"?><annotation/>', "expected an encoding that Python knows, found ANSI"),
        ("<annotations/>", "found the root <annotations>"),
        ("", "found invalid XML (no element found"),
    ):
        xml.write_text(content)
        assert main(options) == 1
        problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
        assert len(problems) == 1
        assert f"{name}.xml: " in problems[0]
        assert message in problems[0]
    # An unreadable image whose box must be compared to it.
    xml.write_text(re.sub("<xmax>[0-9]+", "<xmax>900", text))
    (top / "JPEGImages" / f"{name}.jpg").write_text("no image")
    assert main(options) == 1
    assert re.search(rf"PROBLEM .*{name}.jpg: not an image", capsys.readouterr().out)


def test_names_that_are_not_utf8_are_printed(root: Path) -> None:
    for split in ("train", "val"):
        os.rename(root / split / "striped_disk", os.fsencode(root / split) + b"/Katz\xe9")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "tools.check", "--data", "ImageFolder", "--data.root", str(root), "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert b"  Katz\\udce9: 6\n" in done.stdout
