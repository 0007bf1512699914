"""Places365: both layouts use the labels of the categories file; messages where that is impossible."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from datamodules.classification.places365 import CATEGORIES, CATEGORIES_URL, Places365, read_categories, scene_name
from datamodules.synthetic.places365 import write_places365
from errors import DatasetError
from lightning_modules.components.networks import build_network
from tools.check import main as check

SCENES = ["/b/bedroom", "/d/desert/sand", "/d/desert_road"]


@pytest.fixture
def standard(tmp_path: Path) -> Path:
    """Three scenes, four training and two validation images each."""
    write_places365(str(tmp_path / "standard"), classes=3, train=4, val=2, size=24)
    return tmp_path / "standard"


@pytest.fixture
def easy(tmp_path: Path) -> Path:
    """The same images in the easy layout."""
    write_places365(str(tmp_path / "easy"), classes=3, train=4, val=2, size=24, easy=True)
    return tmp_path / "easy"


def places(root: Path | str | None, **options: Any) -> Places365:
    return Places365(None if root is None else str(root), **{"image_size": 16, "num_workers": 0, **options})


def labels_of(data: Places365, split: Any) -> list[tuple[str, int]]:
    names, labels = data.dataset(split).names, data.labels(split)
    assert labels is not None
    assert labels.dtype == np.int64
    return [(names[i], int(labels[i])) for i in range(len(names))]


def refusal(data: Places365, split: Any = "train") -> str:
    with pytest.raises(DatasetError) as caught:
        data.dataset(split)
    return str(caught.value)


# --- labels --------------------------------------------------------------------------------------------------------


def test_scene_names() -> None:
    assert scene_name("/a/airfield") == "airfield"
    assert scene_name("/a/apartment_building/outdoor") == "apartment building, outdoor"
    assert scene_name("/u/underwater/ocean_deep") == "underwater, ocean deep"


def test_the_standard_layout(standard: Path) -> None:
    data = places(standard)
    assert data.classes == SCENES
    assert data.class_names == ["bedroom", "desert, sand", "desert road"]
    train = labels_of(data, "train")
    assert len(train) == 12
    assert all(name.startswith(f"data_256_standard{SCENES[label]}/") for name, label in train)
    val = labels_of(data, "val")
    assert val[2:4] == [("val_256/Places365_val_00000003.jpg", 1), ("val_256/Places365_val_00000004.jpg", 1)]
    assert labels_of(data, "test") == val
    sample = data.dataset("val")[3]
    assert (sample["id"], sample["label"]) == ("val_256/Places365_val_00000004.jpg", 1)


def test_the_training_archive_unpacks_without_standard(standard: Path) -> None:
    (standard / "data_256_standard").rename(standard / "data_256")
    assert labels_of(places(standard), "train")[0] == ("data_256/b/bedroom/00000001.jpg", 0)


def test_the_large_images(standard: Path) -> None:
    for name in ("data_256_standard", "val_256"):
        (standard / name).rename(standard / name.replace("256", "large"))
    assert labels_of(places(standard, large=True), "val")[0] == ("val_large/Places365_val_00000001.jpg", 0)
    message = refusal(places(standard))
    assert "there is no data_256_standard/ for train" in message
    assert message.endswith("Use val_large/ with --data.large true.")


@pytest.mark.parametrize("naming", ["archive", "underscores", "numbers"])
def test_the_easy_layout_whatever_folders_are_called(easy: Path, naming: str) -> None:
    """With "_" desert_sand comes behind desert_road, though its label is before; numbers sort as 0, 1, 10, 2."""
    top = easy / "places365_standard"
    names = {"underscores": {"desert-sand": "desert_sand"}, "numbers": {"bedroom": "0", "desert-sand": "1"}}
    for old, new in names.get(naming, {}).items():
        for split in ("train", "val"):
            (top / split / old).rename(top / split / new)
    expected = {"bedroom": 0, "0": 0, "desert-sand": 1, "desert_sand": 1, "1": 1, "desert_road": 2}
    for root in (easy, top):
        shutil.copy(easy / CATEGORIES, root) if root != easy else None
        data = places(root)
        assert data.class_names == ["bedroom", "desert, sand", "desert road"]
        for split in ("train", "val"):
            assert all(expected[name.split("/")[1]] == label for name, label in labels_of(data, split))
    if naming == "underscores":
        folders = sorted(path.name for path in (top / "train").iterdir())
        assert [expected[name] for name in folders] != sorted(expected[name] for name in folders), (
            "no trap in this test"
        )


def test_numbers_are_no_sorted_words(tmp_path: Path) -> None:
    """Twelve classes whose folders are their numbers: the third in sorted order is "10"."""
    (tmp_path / CATEGORIES).write_text("".join(f"/s/scene_{i} {i}\n" for i in range(12)))
    for label in range(12):
        (tmp_path / "train" / str(label)).mkdir(parents=True)
        Image.new("RGB", (24, 24), (label, 0, 0)).save(tmp_path / "train" / str(label) / "1.png")
    dataset = places(tmp_path, crop_scale=(1, 1)).dataset("train")
    assert [dataset[i]["label"] for i in range(12)] == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert all(int(dataset[i]["image"][0].max()) == dataset[i]["label"] for i in range(12))


def test_a_part_of_the_scenes_keeps_its_labels(easy: Path) -> None:
    shutil.rmtree(easy / "places365_standard" / "train" / "bedroom")
    data = places(easy)
    with pytest.warns(UserWarning, match=r"train/ has no images of 1 class \(/b/bedroom\)"):
        assert {label for _, label in labels_of(data, "train")} == {1, 2}
    assert data.num_classes == 3


# --- transforms and network ----------------------------------------------------------------------------------------


def test_evaluation_is_resized_without_regard_to_aspect(standard: Path) -> None:
    """The authors' transform: Resize((256, 256)), CenterCrop(224); for ten crops the 256 pixels."""
    assert Places365(str(standard)).resize == (256, 256)
    path = standard / "val_256" / "Places365_val_00000001.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    Image.fromarray(noise).resize((420, 300), Image.Resampling.BICUBIC).save(path, quality=95)
    with Image.open(path) as image:
        expected = center_crop(resize(pil_to_tensor(image), [64, 64]), [56])
        whole = resize(pil_to_tensor(image), [64, 64])
    image = places(standard, image_size=56).dataset("val")[0]["image"]
    assert (image.int() - expected.int()).abs().float().mean() < 1.5
    ten = places(standard, image_size=56, eval_crop_size=64).dataset("val")[0]["image"]
    assert ten.shape == (3, 64, 64)
    assert (ten.int() - whole.int()).abs().float().mean() < 1.5


def test_vgg16_for_365_scenes() -> None:
    with torch.device("meta"):
        network = build_network("vgg16", 365)
    assert sum(parameter.numel() for parameter in network.parameters()) == 135_755_949


# --- trees and lists that are not right ----------------------------------------------------------------------------


def test_the_easy_layout_has_no_large_images(easy: Path) -> None:
    expected = "large: expected the standard layout, found the easy one, which has no large images"
    assert expected in refusal(places(easy, large=True))


def test_a_missing_root_and_another_tree(tmp_path: Path) -> None:
    message = refusal(places(tmp_path / "nowhere"))
    assert f"Places365: there is no {CATEGORIES}, which defines the labels\nexpected\n" in message
    assert "nowhere: no such folder" in message
    assert "data_256_standard/a/airfield/00000001.jpg" in message
    assert "train/<class>/<image>.jpg" in message
    (tmp_path / CATEGORIES).write_text("/b/bedroom 0\n")
    (tmp_path / "images").mkdir()
    message = refusal(places(tmp_path))
    assert "there is no train/ for train" in message
    assert f"found\n  {tmp_path}/\n    {CATEGORIES}\n    images/  (empty)" in message
    assert "http://places2.csail.mit.edu" in message
    with pytest.raises(DatasetError, match="root: expected the folder of Places365, found none; set --data.root"):
        _ = places(None).num_classes


def test_without_the_categories_there_are_no_labels(easy: Path) -> None:
    (easy / CATEGORIES).unlink()
    message = refusal(places(easy))
    assert message.splitlines()[-1].startswith(f"Download {CATEGORIES_URL} (MD5 ")
    assert f" to {easy}. The archives are at http" in message.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "expected the labels 0, 1, 2 and so on, found 0 labels"),
        ("/a/airfield\n", "line 1: expected '/a/airfield 0', found '/a/airfield'"),
        ("/a/airfield 0\nairplane_cabin 1\n", "line 2: expected '/a/airfield 0', found 'airplane_cabin 1'"),
        ("/a/airfield zero\n", "line 1: expected '/a/airfield 0', found '/a/airfield zero'"),
        ("/a/airfield 0\n/b/bar 0\n", "line 2: expected each label once, found 0 for /a/airfield and /b/bar"),
        ("/a/airfield 0\n/a/airfield 1\n", "line 2: expected each category once, found /a/airfield again"),
        ("/a/airfield 0\n/b/bar 2\n", "expected the labels 0, 1, 2 and so on, found 2 labels up to 2"),
        ("<!DOCTYPE html>\n", "line 1: expected '/a/airfield 0', found '<!DOCTYPE html>'"),
    ],
)
def test_categories_that_are_not_right(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / CATEGORIES).write_text(content)
    with pytest.raises(DatasetError) as caught:
        read_categories(str(tmp_path / CATEGORIES))
    assert str(caught.value).startswith(f"{tmp_path / CATEGORIES}")
    assert str(caught.value).endswith(expected)


def test_categories_in_any_order(tmp_path: Path) -> None:
    (tmp_path / CATEGORIES).write_text("/b/bar 1\n\n/a/airfield 0\n")
    assert read_categories(str(tmp_path / CATEGORIES)) == ["/a/airfield", "/b/bar"]


def test_a_folder_that_is_no_category(easy: Path) -> None:
    top = easy / "places365_standard"
    (top / "train" / "bedroom").rename(top / "train" / "bedrom")
    assert f"train/ has 1 folder (bedrom) that {CATEGORIES} does not list" in refusal(places(easy))


def test_a_folder_that_may_be_two_categories(easy: Path) -> None:
    (easy / CATEGORIES).write_text("/b/bedroom 0\n/d/desert/road 1\n/d/desert/sand 2\n/d/desert_road 3\n")
    message = refusal(places(easy))
    assert "train/desert_road may be /d/desert/road or /d/desert_road; rename it to its label" in message
    labels = places(easy).labels("train")
    assert labels is not None
    assert set(labels.tolist()) == {0, 2, -1}, "a guess was made"
    for split in ("train", "val"):
        (easy / "places365_standard" / split / "desert_road").rename(easy / "places365_standard" / split / "3")
    with pytest.warns(UserWarning, match="no images of 1 class"):
        assert {label for _, label in labels_of(places(easy), "train")} == {0, 2, 3}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/b/bedroom/00000001.jpg", "line 1: expected an image and a label of 0 to 2, found"),
        ("/b/bedroom/00000001.jpg 3", "line 1: expected an image and a label of 0 to 2, found"),
        ("/b/bedroom/00000001.jpg 1", f"line 1: expected label 0 by {CATEGORIES}, found '/b/bedroom/00000001.jpg 1'"),
        ("/b/bath/00000001.jpg 1", f"line 1: expected a known category by {CATEGORIES}, found '/b/bath/"),
    ],
)
def test_lists_that_are_not_right(standard: Path, line: str, expected: str) -> None:
    (standard / "places365_train_standard.txt").write_text(f"{line}\n")
    assert expected in refusal(places(standard))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_with_a_mark_and_blank_lines(standard: Path, encoding: str) -> None:
    expected = {split: labels_of(places(standard), split) for split in ("train", "val")}
    for name in (CATEGORIES, "places365_train_standard.txt", "places365_val.txt"):
        lines = (standard / name).read_text().split("\n")
        (standard / name).write_bytes("\r\n".join([*lines, "", " "]).encode(encoding))
    assert {split: labels_of(places(standard), split) for split in ("train", "val")} == expected
    (standard / CATEGORIES).write_bytes("/b/caf\xe9 0".encode("latin-1"))
    assert f"{CATEGORIES}: expected UTF-8 text, found byte 0xe9 in line 1" in refusal(places(standard))


def test_missing_and_unlisted_images(standard: Path) -> None:
    val = standard / "val_256"
    shutil.copy(val / "Places365_val_00000001.jpg", val / "extra.jpg")
    with pytest.warns(UserWarning, match=r"ignored 1 image \(val_256/extra.jpg\) not in any list"):
        assert len(places(standard).dataset("val")) == 6
    (val / "Places365_val_00000002.jpg").unlink()
    assert refusal(places(standard), "val") == (
        "Places365: places365_val.txt lists 1 image (val_256/Places365_val_00000002.jpg) not found in "
        f"{standard}; unpack the archive again"
    )


def test_an_absent_list(standard: Path) -> None:
    (standard / "places365_train_standard.txt").unlink()
    assert "there is no places365_train_standard.txt for train" in refusal(places(standard))
    assert len(places(standard).dataset("val")) == 6


def test_the_check(standard: Path, easy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(["--data", "Places365", "--data.root", str(standard), "--workers", "1"]) == 0
    report = capsys.readouterr().out
    assert "places365_train_standard.txt: 12 images, 4 per class" in report
    assert "  /d/desert/sand: 4" in report
    (easy / "places365_standard" / "train" / "attic").mkdir()
    assert check(["--data", "Places365", "--data.root", str(easy), "--workers", "1"]) == 1
    assert f"PROBLEM train/ has 1 folder (attic) that {CATEGORIES} does not list" in capsys.readouterr().out


def test_the_unlabeled_test_images_are_predicted(standard: Path) -> None:
    data = places(None, images=str(standard / "test_256"))
    assert data.class_names is None
    dataset = data.dataset("predict")
    assert len(dataset) == 4
    assert set(dataset[0]) == {"image", "id"}
