"""VOC detection: coordinates, difficult objects, class lists, downloads and broken datasets."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import datamodules.voc as voc
from datamodules.archives import Archive
from datamodules.detection.voc import VOCDetection, read_annotation
from datamodules.loading import SeededDataset
from datamodules.synthetic.voc import write_voc
from errors import BrokenImageError, DatasetError, UserError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("voc")
    write_voc(str(folder), classes=3, train=4, val=2, size=48)
    return str(folder)


@pytest.fixture
def root(drawn: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "root"))


def module(root: Any, **options: Any) -> VOCDetection:
    return VOCDetection(str(root), **{"image_size": 64, "num_workers": 0, "batch_size": 4, **options})


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def xml(body: str) -> str:
    return f"<annotation><size><width>50</width><height>40</height></size>{body}</annotation>"


def an_object(name: str = "cat", box: tuple = (1, 1, 50, 40), rest: str = "") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{rest}<bndbox>{corners}</bndbox></object>"


# --- annotations ------------------------------------------------------------------------------------------------------


def test_pixels_counted_from_one_become_continuous_boxes(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(
        xml(an_object(box=(1, 1, 50, 40)) + an_object("dog", ("8.5", 2, "9.25", 3), "<difficult>1</difficult>"))
    )
    objects, size = read_annotation(str(path), {"cat": 0, "dog": 1})
    assert objects == [(0, 0, 50, 40, 0, False), (7.5, 1, 9.25, 3, 1, True)]
    assert size == (50, 40)
    path.write_text("<annotation><size><width>many</width></size></annotation>")
    assert read_annotation(str(path), {}) == ([], (0, 0))


def test_a_persons_head_and_hands_are_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    part = "<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part>"
    # The part's box comes first in some files.
    path.write_text(xml(an_object("person", (2, 3, 20, 30), part)))
    assert read_annotation(str(path), {"person": 4})[0] == [(1, 2, 20, 30, 4, False)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", r"a\.xml: expected an annotation in VOC's XML format, found"),
        (
            xml(an_object("unicorn")),
            r"a\.xml: expected object 1 to be one of cat, dog, found 'unicorn'; .*--data.classes",
        ),
        (xml("<object><name>cat</name></object>"), r"a\.xml: expected a box of four numbers for object 1"),
        (xml(an_object(box=("one", 1, 2, 3))), r"a\.xml: expected a box of four numbers for object 1"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message) as caught:
        read_annotation(str(path), {"cat": 0, "dog": 1})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("flag", "expected"), [("", False), (" Unspecified ", False), ("0", False), (" 1\n", True)])
def test_difficult_as_tools_write_it(tmp_path: Path, flag: str, expected: bool) -> None:
    path = tmp_path / "a.xml"
    path.write_text(xml(an_object(rest=f"<difficult>{flag}</difficult>")))
    assert read_annotation(str(path), {"cat": 0})[0][0].difficult is expected
    path.write_text(xml(an_object(rest="<difficult>maybe</difficult>")))
    with pytest.raises(DatasetError, match=r"a\.xml: expected difficult 0 or 1 for object 1, found 'maybe'"):
        read_annotation(str(path), {"cat": 0})


def test_an_xml_of_another_tool_is_not_background(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text("<annotations><image id='0'><box label='cat'/></image></annotations>")
    with pytest.raises(DatasetError, match=r"a\.xml: expected .* the root <annotation>, found the root <annotations>"):
        read_annotation(str(path), {"cat": 0})


# --- the datamodule ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_07_and_12(drawn: str) -> None:
    data = module(drawn)
    assert data.num_classes == 20
    assert data.class_names[:3] == ["aeroplane", "bicycle", "bird"]
    assert len(data.dataset("train")) == 2 * 3 * (4 + 2)  # type: ignore[arg-type]
    assert len(data.dataset("test")) == len(data.dataset("val")) == 6  # type: ignore[arg-type]


def test_a_batch_follows_the_contract(drawn: str) -> None:
    batch = next(iter(module(drawn, photometric="ssd", expand=4.0, iou_crop=True).train_dataloader()))
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].shape == (4, 3, 64, 64)
    assert len(batch["id"]) == len(batch["target"]) == 4
    for target in batch["target"]:
        n = len(target["boxes"])
        assert target["boxes"].dtype == torch.float32
        assert target["boxes"].shape == (n, 4)
        assert target["labels"].dtype == torch.int64
        assert target["difficult"].dtype == torch.bool
        assert len(target["labels"]) == len(target["difficult"]) == n
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"] <= 64).all()


def test_evaluation_yields_the_size_on_disk(drawn: str) -> None:
    data = module(drawn, train=["VOC2007/test"])
    batch = next(iter(data.val_dataloader()))
    for name, size in zip(batch["id"], batch["original_size"].tolist(), strict=True):
        with Image.open(Path(data.devkit, name)) as image:
            assert tuple(size) == (image.height, image.width)


def test_training_shuffles_the_objects_by_seed_epoch_and_sample(drawn: str) -> None:
    data = module(drawn, hflip=0.5, photometric="ssd", jitter=0.2)
    dataset = data.dataset("train")
    i = int(np.diff(dataset.annotations.start).argmax())  # type: ignore[attr-defined]
    seeded = SeededDataset(dataset, seed=3, replace=True)
    samples = [seeded[epoch, i, 0] for epoch in range(40)]
    boxes = [tuple(map(tuple, sample["target"]["boxes"].tolist())) for sample in samples]
    again = SeededDataset(dataset, seed=3, replace=True)[7, i, 0]
    assert tuple(map(tuple, again["target"]["boxes"].tolist())) == boxes[7]
    # Without the shuffle, the order is the file's, and nothing else changes.
    plain = data.dataset("train")
    plain.training = False  # type: ignore[attr-defined]
    unshuffled = [SeededDataset(plain, seed=3, replace=True)[epoch, i, 0] for epoch in range(40)]
    moved = set()
    for shuffled, original in zip(samples, unshuffled, strict=True):
        assert torch.equal(shuffled["image"], original["image"])
        rows, expected = (
            torch.cat([s["target"]["boxes"], s["target"]["labels"][:, None], s["target"]["difficult"][:, None]], 1)
            for s in (shuffled, original)
        )
        assert sorted(rows.tolist()) == sorted(expected.tolist())
        moved.add(rows[0].tolist() != expected[0].tolist())
    assert moved == {False, True}  # the first object is at times another one


def test_images_of_different_sizes_are_a_list(drawn: str) -> None:
    batch = next(iter(module(drawn, image_size=(60, 100)).val_dataloader()))
    assert isinstance(batch["image"], list)
    assert all(min(image.shape[1:]) == 60 for image in batch["image"])


def test_boxes_are_those_of_the_file(drawn: str) -> None:
    data = module(drawn, image_size=1000)
    sample = data.dataset("val")[3]
    path = Path(data.devkit, sample["id"].replace("JPEGImages", "Annotations").replace(".jpg", ".xml"))
    objects, _ = read_annotation(str(path), {name: i for i, name in enumerate(data.class_names)})
    text = path.read_text()
    width, height = (int(text.split(f"<{key}>")[1].split("<")[0]) for key in ("width", "height"))
    expected = np.array([item[:4] for item in objects]) * (1000 / np.array([width, height, width, height]))
    np.testing.assert_allclose(sample["target"]["boxes"].numpy(), expected, rtol=1e-5)
    assert sample["target"]["labels"].tolist() == [item[4] for item in objects]
    assert sample["target"]["difficult"].tolist() == [item[5] for item in objects]


def test_difficult_objects_may_be_left_out_of_training_but_not_of_evaluation(drawn: str) -> None:
    def marks(split: str, **options: Any) -> list[bool]:
        data = module(drawn, hflip=0.0, **options)
        dataset = data.dataset(split)  # type: ignore[arg-type]
        return [mark for i in range(len(dataset)) for mark in dataset[i]["target"]["difficult"].tolist()]  # type: ignore[arg-type]

    assert any(marks("train"))
    without = marks("train", train_difficult=False)
    assert without
    assert not any(without)
    assert marks("test", train_difficult=False) == marks("test")


def test_own_classes(root: Path, tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("bird\naeroplane\nbicycle\n")
    by_file, by_list = module(root, classes=str(names)), module(root, classes=["bird", "aeroplane", "bicycle"])
    assert by_file.class_names == by_list.class_names == ["bird", "aeroplane", "bicycle"]
    assert set(by_file.annotations("train").labels.tolist()) == {0, 1, 2}
    usual = module(root).annotations("train").labels
    assert (np.array([1, 2, 0])[usual] == by_file.annotations("train").labels).all()
    with pytest.raises(DatasetError, match="to be one of bird, found .*; set the classes with --data.classes"):
        module(root, classes=["bird"]).annotations("train")
    names.write_text("bird\nbird\n")
    with pytest.raises(DatasetError, match="classes: expected different names"):
        _ = module(root, classes=str(names)).class_names


@pytest.mark.parametrize("below", ["", "VOCdevkit"])
def test_the_root_may_be_the_devkit_or_its_parent(root: Path, below: str) -> None:
    assert len(module(root / below).dataset("val")) == 6  # type: ignore[arg-type]
    shutil.move(root / "VOCdevkit", root / "other")
    assert len(module(root / "other").dataset("val")) == 6  # type: ignore[arg-type]


def test_predict_reads_a_folder(drawn: str) -> None:
    data = VOCDetection(images=str(Path(drawn, "VOCdevkit", "VOC2007", "JPEGImages")), image_size=32, num_workers=0)
    batch = next(iter(data.predict_dataloader()))
    assert batch["image"].shape[1:] == (3, 32, 32)
    assert batch["id"][0].endswith(".jpg")


def test_boxes_without_area_are_left_out_and_counted(root: Path) -> None:
    path = sorted((root / "VOCdevkit" / "VOC2007" / "Annotations").glob("*.xml"))[0]
    path.write_text(xml(an_object("bird", (5, 5, 4, 9)) + an_object("bird", (5, 5, 5, 5))))
    data = module(root)
    with pytest.warns(UserWarning, match=r"train: ignored 1 object \(VOC2007/Annotations/.*whose box has no area"):
        sample = data.dataset("train")[0]
    assert len(sample["target"]["boxes"]) == 1  # a single pixel is an area


def test_boxes_beyond_the_image_are_clipped_or_ignored_and_counted(root: Path) -> None:
    """The size of the image counts: that of the XML file may be missing or wrong."""
    path = sorted((root / "VOCdevkit" / "VOC2007" / "Annotations").glob("*.xml"))[0]
    with Image.open(root / "VOCdevkit" / "VOC2007" / "JPEGImages" / f"{path.stem}.jpg") as image:
        width, height = image.size
    boxes = [(-3, 5, 20, 30), (5, 5, width + 9, height), (width + 5, 5, width + 9, 9), (51, 2, width, height)]
    for text in (xml(""), "<annotation></annotation>"):
        path.write_text(
            text.replace("</annotation>", "".join(an_object("bird", box) for box in boxes) + "</annotation>")
        )
        with pytest.warns(UserWarning, match="train: ") as caught:
            dataset = module(root, hflip=0.0, image_size=64).dataset("train")
        lines = [str(warning.message) for warning in caught]
        assert any("ignored 1 object" in line and "outside the image" in line for line in lines)
        assert any("clipped the box of 2 objects" in line and path.name in line for line in lines)
        target = dataset[0]["target"]  # type: ignore[index]
        expected = torch.tensor([[0.0, 4, 20, 30], [4, 4, width, height], [50, 1, width, height]])
        order = target["boxes"].sum(1).argsort()  # training shuffles the objects
        scaled = expected * torch.tensor([64 / width, 64 / height] * 2)
        torch.testing.assert_close(target["boxes"][order], scaled)


# --- broken datasets --------------------------------------------------------------------------------------------------


def test_a_missing_root_shows_the_tree_and_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        module(tmp_path / "nowhere").dataset("train")
    text = str(caught.value)
    for part in (
        "expected",
        "JPEGImages/<id>.jpg",
        "found",
        "no such folder",
        "VOCtrainval_06-Nov-2007.tar",
        "MD5 c52e",
    ):
        assert part in text


def test_a_missing_list_names_those_that_are_there(root: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected the list minival.txt, found test, train, trainval, val"):
        module(root, val=["VOC2007/minival"]).dataset("val")
    with pytest.raises(ValueError, match="val: expected image sets like VOC2007/trainval, found test"):
        module(root, val=["test"])


@pytest.mark.parametrize(("folder", "kind"), [("JPEGImages", "an image"), ("Annotations", "an XML file")])
def test_an_id_without_its_file_is_named(root: Path, folder: str, kind: str) -> None:
    first = sorted((root / "VOCdevkit" / "VOC2012" / folder).iterdir())[0]
    first.unlink()
    with pytest.raises(
        DatasetError, match=rf"VOC2012/trainval: expected for each id {kind} .* found none for 1 id \({first.stem}\)"
    ):
        module(root).dataset("train")


def test_a_truncated_image_is_named(root: Path) -> None:
    data = module(root)
    dataset = data.dataset("val")
    path = Path(data.devkit, dataset[0]["id"])
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BrokenImageError, match=path.name):
        dataset[0]
    with pytest.raises(UserError, match=f"{path.name}.*broken_images skip"):
        list(data.val_dataloader())


# --- download ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The synthetic devkit as the archive of VOC2007 trainval on the third host; the second serves another file."""
    hosts = tmp_path / "hosts"
    for name in ("bad", "good"):
        (hosts / name / "voc2007").mkdir(parents=True)
    path = hosts / "good" / "voc2007" / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(Path(drawn, "VOCdevkit", "VOC2007"), "VOCdevkit/VOC2007")
    (hosts / "bad" / "voc2007" / "a.tar").write_text("<html>sorry</html>")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    urls = tuple(f"file://{hosts / name}" for name in ("none", "bad", "good"))
    monkeypatch.setattr(voc, "ARCHIVES", {"VOC2007/trainval": Archive(urls, "voc2007/a.tar", md5)})
    return path


def test_download_tries_the_hosts_in_turn_and_checks_the_sum(archive: Path, tmp_path: Path) -> None:
    root = tmp_path / "new"
    data = module(root, train=["VOC2007/train"], val=["VOC2007/val"], test=["VOC2007/val"], download=True)
    data.prepare_data()
    assert len(data.dataset("train")) == 12  # type: ignore[arg-type]
    assert not list(root.glob("*.part"))
    data.prepare_data()  # nothing is missing, nothing is fetched


def test_where_no_host_helps_the_message_says_what_to_do(archive: Path, tmp_path: Path) -> None:
    archive.unlink()
    root = tmp_path / "new"
    with pytest.raises(UserError) as caught:
        module(root, train=["VOC2007/train"], val=["VOC2007/val"], test=["VOC2007/val"], download=True).prepare_data()
    text = str(caught.value)
    assert "wrong MD5 checksum" in text
    assert f"unpack it in {root}: tar -xf a.tar -C {root}" in text


# --- names and lists --------------------------------------------------------------------------------------------------


def plant(root: Path, names: list[str], text: str = "") -> VOCDetection:
    """Write one image and XML file per name, each with its own box, and a list: ``text``, or one name per line."""
    top = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (top / folder).mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", (50, 40)).save(top / "JPEGImages" / f"{name}.jpg")
        (top / "Annotations" / f"{name}.xml").write_text(xml(an_object(box=(i + 1, 1, 50, 40))))
    list_file = top / "ImageSets" / "Main" / "train.txt"
    list_file.write_bytes(os.fsencode(text or "\n".join(names)))
    return module(root, train=["VOC2007/train"], classes=["cat"])


def test_random_file_names_are_read_back(tmp_path: Path) -> None:
    """Seeded: names of any characters but line breaks, in a list in their order."""
    rng = random.Random(3)
    characters = "ab01 .-_()[]{}'\"%#~&;,é猫𝄞\u2028\x0b\x85\udce9"
    names = list(dict.fromkeys("n" + "".join(rng.choices(characters, k=rng.randrange(9))) for _ in range(60)))
    rng.shuffle(names)
    data = plant(tmp_path, names)
    found = data.annotations("train")
    assert [found.images[i] for i in range(len(names))] == [f"VOC2007/JPEGImages/{name}.jpg" for name in names]
    assert found.boxes[:, 0].tolist() == list(range(len(names)))


def test_names_with_blanks_are_different_images(tmp_path: Path) -> None:
    names = ["p000", "p000 (1)", "p000 (2)"]
    found = plant(tmp_path, names, "p000 (2)\r\np000\r\n\r\np000 (1)  -1\r\n").annotations("train")
    assert [Path(found.images[i]).stem for i in range(3)] == ["p000 (2)", "p000", "p000 (1)"]
    with pytest.raises(DatasetError, match=r"found none for 1 id \(p000 \(3\)\)"):
        plant(tmp_path / "b", names, "p000\np000 (3)\n").annotations("train")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_and_class_files_with_a_mark(tmp_path: Path, encoding: str) -> None:
    data = plant(tmp_path, ["a", "b"])
    list_file = tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/train.txt"
    list_file.write_bytes("a\r\nb\r\n".encode(encoding))
    (tmp_path / "classes.txt").write_bytes("cat\r\nhünd\r\n".encode(encoding))
    data = module(tmp_path, train=["VOC2007/train"], classes=str(tmp_path / "classes.txt"))
    assert data.class_names == ["cat", "hünd"]
    assert len(data.annotations("train").images) == 2


def test_a_list_in_another_encoding_is_named(tmp_path: Path) -> None:
    data = plant(tmp_path, ["a", "café"])
    list_file = tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/train.txt"
    list_file.write_bytes("a\ncafé\n".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"train\.txt: expected UTF-8 text, found byte 0xe9 in line 2"):
        data.annotations("train")


def test_stray_files_are_ignored_and_counted_once(tmp_path: Path) -> None:
    data = plant(tmp_path, ["a", "b"])
    folder = tmp_path / "VOCdevkit/VOC2007/Annotations"
    for name in ("a.xml~", "a.xml.bak", "b.txt", "Thumbs.db", ".DS_Store", "._a.xml"):
        (folder / name).write_text("junk")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert data.annotations("train").boxes.tolist() == [[0, 0, 50, 40], [1, 0, 50, 40]]
    lines = [str(warning.message) for warning in caught]
    assert lines == [
        f"{folder}: expected files that end in .xml, ignored 4 files (Thumbs.db, a.xml.bak, a.xml~, b.txt)"
    ]


def test_two_images_of_one_id_are_refused_if_it_is_listed(tmp_path: Path) -> None:
    data = plant(tmp_path, ["a", "b"], "a\n")
    folder = tmp_path / "VOCdevkit/VOC2007/JPEGImages"
    shutil.copy(folder / "b.jpg", folder / "b.png")
    assert len(data.annotations("train").images) == 1
    shutil.copy(folder / "a.jpg", folder / "a.png")
    with pytest.raises(
        DatasetError,
        match=r"^VOC2007/train: expected for each id an image in JPEGImages, found several for 1 id "
        r"\(a.jpg and a.png\); keep one each$",
    ):
        data.annotations("train")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dog", "cat"], r"classes: expected different names, found 1 name \(cat\) more than once"),
        (["cat", " "], "classes: expected names of classes, found an empty one"),
        ([], "classes: expected names of classes, found none"),
    ],
)
def test_class_lists(tmp_path: Path, classes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(tmp_path, classes=classes)
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    if "found an empty one" not in message:  # blank lines of a file are ignored
        with pytest.raises(UserError, match=f"{message} in .*classes.txt"):
            _ = module(tmp_path, classes=str(tmp_path / "classes.txt")).class_names
