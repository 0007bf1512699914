"""Food-101: the official split, its labels, and messages for wrong layouts and lists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.classification.food101 import MD5, Food101
from datamodules.synthetic.food101 import write_food101
from errors import DatasetError, UserError
from tools.check import main as check

CLASSES = ["caesar_salad", "pizza", "sushi"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three dishes, six training and four test images each."""
    write_food101(str(tmp_path), classes=3, train=6, val=4, size=24)
    return tmp_path


def food(root: Path | str | None, **options: Any) -> Food101:
    return Food101(None if root is None else str(root), **{"image_size": 16, "num_workers": 0, **options})


def ids(data: Food101, split: Any) -> list[str]:
    names = data.dataset(split).names
    return [names[i] for i in range(len(names))]


def refusal(data: Food101, split: Any = "train") -> str:
    with pytest.raises(DatasetError) as caught:
        data.dataset(split)
    return str(caught.value)


def test_the_official_split(root: Path) -> None:
    for folder in (root, root / "food-101"):
        data = food(folder)
        assert data.class_names == ["caesar salad", "pizza", "sushi"]
        assert len(data.dataset("train")) == 18
        assert ids(data, "val") == ids(data, "test")
        assert ids(data, "test")[0] == "images/caesar_salad/200000.jpg"
    meta = json.loads((root / "food-101" / "meta" / "train.json").read_text())
    assert set(ids(data, "train")) == {f"images/{entry}.jpg" for group in meta.values() for entry in group}


def test_labels_are_those_of_the_sorted_classes(root: Path) -> None:
    """In any order of the files, and without opening an image."""
    meta = root / "food-101" / "meta"
    (meta / "classes.txt").write_text("sushi\ncaesar_salad\npizza\n")
    entries = json.loads((meta / "train.json").read_text())
    (meta / "train.json").write_text(json.dumps(dict(reversed(entries.items()))))
    for image in (root / "food-101" / "images").rglob("*.jpg"):
        image.write_bytes(b"")
    data = food(root)
    labels = data.labels("train")
    assert labels is not None
    assert labels.dtype == np.int64
    assert [CLASSES[label] for label in labels] == [name.split("/")[1] for name in ids(data, "train")]
    assert data.labels("predict") is None


def test_files_with_a_mark(root: Path) -> None:
    expected, meta = ids(food(root), "train"), root / "food-101" / "meta"
    for path in meta.iterdir():
        path.write_bytes(path.read_bytes().decode().replace("\n", "\r\n").encode("utf-8-sig"))
    data = food(root)
    assert ids(data, "train") == expected
    assert data.class_names == ["caesar salad", "pizza", "sushi"]


def test_the_text_lists_do_as_well(root: Path) -> None:
    expected = ids(food(root), "train"), ids(food(root), "test")
    for name in ("train.json", "test.json"):
        (root / "food-101" / "meta" / name).unlink()
    data = food(root)
    assert (ids(data, "train"), ids(data, "test")) == expected
    assert data.source_name("train") == "meta/train.txt"


def test_a_sample(root: Path) -> None:
    sample = food(root).dataset("test")[5]
    assert sample["id"] == "images/pizza/200001.jpg"
    assert sample["label"] == 1
    assert sample["image"].shape == (3, 16, 16)
    batch = next(iter(food(root, batch_size=12).val_dataloader()))
    assert batch["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_part_of_train_is_held_out(root: Path) -> None:
    whole, data, again = food(root), food(root, val_fraction=0.3, seed=7), food(root, val_fraction=0.3, seed=8)
    train, val = ids(data, "train"), ids(data, "val")
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(ids(whole, "train"))
    assert val == ids(again, "val"), "the held-out images must not depend on the seed"
    assert np.bincount(data.labels("val")).tolist() == [2, 2, 2]
    assert ids(data, "test") == ids(whole, "test")
    with pytest.raises(ValueError, match="val_fraction: expected 0 or more and less than 1, found 1"):
        food(root, val_fraction=1)


def test_hyperparameters_name_all_arguments(root: Path) -> None:
    parameters = dict(food(root, val_fraction=0.1, batch_size=5).hparams)
    assert {"root", "val_fraction", "image_size", "eval_crop_size", "batch_size"} <= parameters.keys()
    assert (parameters["root"], parameters["val_fraction"], parameters["batch_size"]) == (str(root), 0.1, 5)


def test_balanced_sampling_uses_the_labels(root: Path) -> None:
    meta = root / "food-101" / "meta" / "train.json"
    entries = json.loads(meta.read_text())
    entries["sushi"] = entries["sushi"][:1]
    meta.write_text(json.dumps(entries))
    with pytest.warns(UserWarning, match=r"ignored 5 images \(images/sushi/100001.jpg, .*\) not in any list"):
        loader = food(root, sampling="balanced", batch_size=13).train_dataloader()
    (batch,) = loader
    assert sorted(np.bincount(batch["label"]).tolist()) == [4, 4, 5]


# --- wrong layouts and lists ----------------------------------------------------------------------------


def test_a_missing_root_and_another_tree(root: Path, tmp_path: Path) -> None:
    message = refusal(food(tmp_path / "nowhere"))
    assert "Food101: there is no images\nexpected\n" in message
    assert "nowhere/\n    images/<class>/<number>.jpg\n    meta/classes.txt, train.json, test.json (or .txt)" in message
    assert "nowhere: no such folder" in message
    assert MD5 in message
    (tmp_path / "other" / "train" / "pizza").mkdir(parents=True)
    assert "found\n" + f"  {tmp_path}/other/\n    train/  pizza/" in refusal(food(tmp_path / "other"))
    with pytest.raises(DatasetError, match="root: expected the folder of Food101, found none; set --data.root FOLDER"):
        _ = food(None).num_classes


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("classes.txt", None, "there is no meta/classes.txt"),
        ("classes.txt", "\n", "meta/classes.txt lists no class"),
        ("train", None, "there is no meta/train.json for train"),
        ("train.json", "[1, 2]", 'train.json: expected {"class": ["class/number", ...]}, found'),
        ("train.json", '{"pizza": ["pizza/1"', 'train.json: expected {"class": ["class/number", ...]}, found'),
        ("train.json", '{"soup": ["soup/1", "soup/2"]}', "found 2 entries (soup/1, soup/2)"),
        ("train.json", "{}", "meta/train.json contains no images"),
    ],
)
def test_lists_that_are_not_right(root: Path, name: str, content: str | None, expected: str) -> None:
    for path in (root / "food-101" / "meta").glob(f"{name}*"):
        path.unlink() if content is None else path.write_text(content)
    assert expected in refusal(food(root))


def test_a_set_for_evaluation_alone(root: Path) -> None:
    for path in (root / "food-101" / "meta").glob("train*"):
        path.unlink()
    with pytest.warns(UserWarning, match="ignored 18 images"):
        assert len(food(root).dataset("test")) == 12


def test_missing_images_are_counted_in_one_line(root: Path) -> None:
    for number in (100001, 100004):
        (root / "food-101" / "images" / "pizza" / f"{number}.jpg").unlink()
    expected = (
        "Food101: meta/train.json lists 2 images (images/pizza/100001.jpg, images/pizza/100004.jpg) not found in "
        f"{root}/food-101; unpack the archive again"
    )
    assert refusal(food(root)) == expected
    assert len(food(root).dataset("test")) == 12


def test_unlisted_images_are_ignored_and_counted(root: Path) -> None:
    images = root / "food-101" / "images"
    shutil.copy(images / "pizza" / "100001.jpg", images / "pizza" / "7.jpg")
    with pytest.warns(UserWarning, match=r"ignored 1 image \(images/pizza/7.jpg\) not in any list"):
        assert len(food(root).dataset("train")) == 18


def test_a_class_without_training_images_is_reported(root: Path) -> None:
    (root / "food-101" / "meta" / "classes.txt").write_text("apple_pie\ncaesar_salad\npizza\nsushi\n")
    with pytest.warns(UserWarning, match=r"meta/train.json has no images of 1 class \(apple_pie\)"):
        assert food(root).dataset("train")[0]["label"] == 1


def test_the_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = root / "food-101" / "images"
    assert check(["--data", "Food101", "--data.root", str(root), "--workers", "1"]) == 0
    report = capsys.readouterr().out
    assert "meta/train.json: 18 images, 6 per class" in report
    assert "meta/test.json: 12 images, 4 per class" in report
    shutil.copy(images / "pizza" / "100001.jpg", images / "pizza" / "200001.jpg")
    (images / "pizza" / "100002.jpg").write_bytes((images / "pizza" / "100002.jpg").read_bytes()[:300])
    (images / "sushi" / "200003.jpg").unlink()
    assert check(["--data", "Food101", "--data.root", str(root), "--workers", "1"]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM ")]
    assert "the same image in several splits" in "\n".join(problems)
    assert "images/pizza/100002.jpg: truncated" in "\n".join(problems)
    assert "meta/test.json lists 1 image (images/sushi/200003.jpg)" in "\n".join(problems)


# --- images of other kinds ---------------------------------------------------------------------------------------


def test_a_truncated_image(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reported and counted; training uses the next image, evaluation stops unless told to skip."""
    images = root / "food-101" / "images" / "pizza"
    for name in ("100002.jpg", "200002.jpg"):
        (images / name).write_bytes((images / name).read_bytes()[:400])
    batches = list(food(root, batch_size=6).train_dataloader())
    assert sum(len(batch["label"]) for batch in batches) == 18
    line = capsys.readouterr().err
    assert "skipped, 1 so far: " in line
    assert "pizza/100002.jpg: truncated" in line
    with pytest.raises(UserError, match=r"pizza/200002.jpg: truncated .*--data.broken_images skip"):
        list(food(root).val_dataloader())
    (batch,) = food(root, broken_images="skip").val_dataloader()
    assert len(batch["label"]) == 11
    assert "pizza/200002.jpg: truncated" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["CMYK", "gray", "16 bit", "RGBA"])
def test_other_kinds_of_images_are_read_right(root: Path, kind: str) -> None:
    """Food-101 and the web have files named .jpg of other formats: the content decides."""
    path = root / "food-101" / "images" / "caesar_salad" / "200000.jpg"
    rgb = np.empty((24, 24, 3), np.uint8)
    rgb[:] = (200, 120, 40)
    expected = [200, 120, 40]
    if kind == "CMYK":
        Image.fromarray(rgb).convert("CMYK").save(path, quality=95)
    elif kind == "gray":
        Image.fromarray(rgb[..., 1]).save(path, quality=95)
        expected = [120] * 3
    elif kind == "16 bit":
        path.write_bytes(cv2.imencode(".png", np.full((24, 24), 120 * 257, np.uint16))[1].tobytes())
        expected = [120] * 3
    else:
        half = np.dstack([rgb, np.full((24, 24), 51, np.uint8)])  # a fifth of the color on white
        Image.fromarray(half).save(path, format="PNG")
        expected = [244, 228, 212]
    image = food(root).dataset("test")[0]["image"]
    np.testing.assert_allclose(image.float().mean((1, 2)).numpy(), expected, atol=3)


# --- prediction ----------------------------------------------------------------------------------------------------


def test_predict_needs_no_root(root: Path) -> None:
    data = food(None, images=str(root / "food-101" / "images" / "pizza"))
    assert data.class_names is None
    assert set(data.dataset("predict")[0]) == {"image", "id"}
