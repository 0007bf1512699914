"""Class folders: samples, messages for wrong layouts, prediction and options."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.classification.image_folder import ImageFolder
from errors import DatasetError


def plant(root: Path, *names: str) -> str:
    """Write a small image for each name with an image extension, an empty file for other extensions, else a folder."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png", ".JPEG"):
            Image.fromarray(np.full((20, 24, 3), len(name), np.uint8)).save(path)
        elif path.suffix:
            path.touch()
        else:
            path.mkdir(exist_ok=True)
    return str(root)


def folder(root: str | None, **options: Any) -> ImageFolder:
    return ImageFolder(root, **{"image_size": 16, "num_workers": 0, **options})


def test_samples(tmp_path: Path) -> None:
    root = plant(tmp_path, "train/b/1.png", "train/a/2.jpg", "train/a/deep/3.png", "val/b/4.png", "val/a/5.png")
    data = folder(root)
    assert data.class_names == ["a", "b"]
    assert data.num_classes == 2
    train = data.dataset("train")
    assert [(train[i]["id"], train[i]["label"]) for i in range(len(train))] == [
        ("train/a/2.jpg", 0),
        ("train/a/deep/3.png", 0),
        ("train/b/1.png", 1),
    ]
    assert train[0]["image"].shape == (3, 16, 16)
    assert train[0]["image"].dtype == torch.uint8
    batch = next(iter(data.val_dataloader()))
    assert batch["label"].tolist() == [0, 1]
    assert len(pickle.loads(pickle.dumps(train))) == 3


def test_testing_falls_back_to_val(tmp_path: Path) -> None:
    root = plant(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png")
    assert folder(root).dataset("test")[0]["id"] == "val/a/2.png"
    plant(tmp_path, "test/a/3.png", "test/b/3.png")
    assert folder(root).dataset("test")[0]["id"] == "test/a/3.png"
    assert folder(root, test_dir="val").dataset("test")[0]["id"] == "val/a/2.png"


def test_a_tree_that_is_only_evaluated(tmp_path: Path) -> None:
    data = folder(plant(tmp_path, "val/a/1.png", "val/b/1.png"))
    assert data.class_names == ["a", "b"]
    assert len(data.dataset("val")) == 2
    with pytest.raises(DatasetError, match="there is no train/ for train"):
        data.dataset("train")


def test_a_val_with_fewer_classes_keeps_trains_labels(tmp_path: Path) -> None:
    data = folder(plant(tmp_path, "train/a/1.png", "train/b/1.png", "val/b/1.png"))
    with pytest.warns(UserWarning, match=r"val/ has no images of 1 class \(a\)"):
        assert data.dataset("val")[0]["label"] == 1


def test_ignored_files_are_counted(tmp_path: Path) -> None:
    root = plant(tmp_path, "train/a/1.png", "train/a/note.txt", "train/x.jpg", "train/y.jpg", "train/.DS_Store")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(folder(root).dataset("train")) == 1
    lines = [str(warning.message) for warning in caught]
    assert "train/: ignored 2 files (x.jpg, y.jpg) outside the class folders" in lines
    assert "train/: ignored 1 file (train/a/note.txt) without an image extension" in lines


def refusal(data: ImageFolder, split: Any = "train") -> str:
    with pytest.raises(DatasetError) as caught:
        data.dataset(split)
    return str(caught.value)


def test_errors_show_both_trees(tmp_path: Path) -> None:
    root = plant(tmp_path, "images/cats/1.png", "images/dogs/1.png", "labels.csv")
    message = refusal(folder(root))
    expected, found = message.split("\nfound\n")
    assert f"{root}/\n    train/<class>/<image>.jpg\n    val/<class>/<image>.jpg" in expected
    assert found == f"  {root}/\n    images/  cats/, dogs/\n    labels.csv"


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        ((), "train", "there is no folder of any split"),
        (("train/1.png",), "train", "train/ contains no class folders"),
        (("train/a", "train/b"), "train", "train/ contains no images"),
        (("train/a/1.png", "train/b"), "train", "train/ has 1 class folder (b) without images"),
        (("train/a/1.png", "val/a/1.png", "val/z/1.png"), "val", "val/ has 1 class (z) that train/ lacks"),
        (("train/a/1.png",), "val", "there is no val/ for val"),
        (("train/a/1.png", "test/1.png"), "test", "test/ contains no class folders"),
    ],
)
def test_wrong_trees(tmp_path: Path, names: tuple[str, ...], split: str, expected: str) -> None:
    assert expected in refusal(folder(plant(tmp_path, *names)), split)


def test_a_wrong_root(tmp_path: Path) -> None:
    assert "no such folder" in refusal(folder(str(tmp_path / "missing")))
    with pytest.raises(DatasetError, match="root: expected the folder of ImageFolder, found none"):
        _ = folder(None).num_classes
    plant(tmp_path, "cifar/train/a/1.png")
    assert refusal(folder(str(tmp_path))).endswith(f"Did you mean --data.root {tmp_path}/cifar?")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    plant(tmp_path, *(f"{s}/{c}/{i}.jpg" for s in ("train", "val") for c in ("a", "b") for i in range(2)))
    for split in ("train", "val"):
        os.rename(tmp_path / split / "a", os.fsencode(tmp_path / split) + b"/Katz\xe9")
    data = ImageFolder(str(tmp_path), image_size=16, num_workers=0)
    assert data.class_names is not None
    assert data.class_names[0] == "Katz\\xe9", "as text, which YAML, figures and W&B can show"
    dataset, labels = data.dataset("train"), data.labels("train")
    assert labels is not None
    assert [dataset[i]["id"].split("/")[1] for i in np.flatnonzero(labels == 0)] == ["Katz\udce9"] * 2
