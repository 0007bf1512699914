"""A synthetic dataset in the layouts of VOC and SBD."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from datamodules.synthetic.voc_segmentation import write_voc_segmentation


@pytest.fixture(scope="package")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_segmentation(str(folder), classes=3, train=4, val=4, size=48)
    return folder


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "root"))


def ids_of(root: Path, split: str) -> list[str]:
    return (root / f"VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt").read_text().split()


def mask_path(root: Path, name: str, kind: str = "Class") -> Path:
    return root / "VOCdevkit" / "VOC2012" / f"Segmentation{kind}" / f"{name}.png"
