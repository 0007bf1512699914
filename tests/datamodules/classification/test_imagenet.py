"""ImageNet: class names, subsets, and hints for the layouts of its archives."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.classification.imagenet import KNOWN_WNIDS, ImageNet, imagenet_class_names, is_ilsvrc, make_unique
from errors import DatasetError


def plant(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def error(data: ImageNet, split: str) -> str:
    with pytest.raises(DatasetError) as caught:
        data.dataset(split)  # type: ignore[arg-type]
    return str(caught.value)


def test_imagenet_names() -> None:
    names = imagenet_class_names()
    assert len(set(names)) == 1000
    assert [names[i] for i in (0, 207, 388, 985, 999)] == [
        "tench",
        "golden retriever",
        "giant panda",
        "daisy",
        "toilet tissue",
    ]
    assert make_unique(["crane", "b", "crane"]) == ["crane (0)", "b", "crane (2)"]
    assert ImageNet(images="x").class_names == names


def test_the_1000_wnids_are_recognized() -> None:
    wnids = [KNOWN_WNIDS.get(i, f"n{i:08d}") for i in range(1000)]
    assert is_ilsvrc(wnids)
    assert not is_ilsvrc(wnids[:-1])
    assert not is_ilsvrc([f"n{i:08d}" for i in range(1000)])


def test_a_part_of_imagenet_is_named_by_wnid(tmp_path: Path) -> None:
    root = plant(tmp_path, "train/n01440764/a.JPEG", "train/n02123045/a.JPEG")
    assert ImageNet(root).class_names == ["n01440764", "n02123045"]


def test_imagenet_as_the_archives_unpack_it(tmp_path: Path) -> None:
    root = plant(tmp_path, "train/n01440764/a.JPEG", "val/ILSVRC2012_val_00000001.JPEG")
    assert "Move each image into the folder of its wnid" in error(ImageNet(root), "val")
    plant(tmp_path / "other", "train/n01440764.tar")
    assert "Unpack the archives" in error(ImageNet(str(tmp_path / "other")), "train")
