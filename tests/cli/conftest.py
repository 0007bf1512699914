"""Fixtures with generated datasets and a trained checkpoint, for the tests of train.py's commands."""

from __future__ import annotations

from pathlib import Path

import pytest

import cli.parser
from datamodules.synthetic.fer2013 import write_fer2013
from datamodules.synthetic.food101 import write_food101
from datamodules.synthetic.imagenet import write_imagenet
from datamodules.synthetic.places365 import write_places365
from datamodules.synthetic.voc import write_voc
from datamodules.synthetic.yummly import write_yummly
from tests.command import QUICK, TINY
from tests.lightning_modules.detection.test_resume import write_random_proposals


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight training and four validation images."""
    folder = tmp_path_factory.mktemp("data")
    write_imagenet(str(folder), classes=3, train=8, val=4, size=32)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.parser.run(
            ["fit", *TINY, *QUICK, "--data.root", str(data), "--trainer.max_epochs", "2", "--experiment", "tiny"]
        )
    (run,) = (folder / "runs" / "tiny").iterdir()
    return run


@pytest.fixture(scope="session")
def roots(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A root for each datamodule that a config names."""
    roots = {"ImageFolder": data, "ImageNet": data}
    for name, write in (("Food101", write_food101), ("Places365", write_places365)):
        roots[name] = tmp_path_factory.mktemp(name)
        write(str(roots[name]), classes=3, train=4, val=2, size=32)
    roots["FER2013"] = tmp_path_factory.mktemp("FER2013")
    write_fer2013(str(roots["FER2013"]), train=4, val=2)
    roots["Yummly28K"] = tmp_path_factory.mktemp("Yummly28K")
    write_yummly(str(roots["Yummly28K"]), classes=3, train=10, val=4, size=32)
    return roots


@pytest.fixture(scope="session")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC2007 and VOC2012, 12 training and 6 validation images each, of the classes that BCCD's configs name."""
    folder = tmp_path_factory.mktemp("VOC")
    names = write_voc(str(folder), classes=3, train=4, val=2, size=64)
    for path in folder.rglob("*.xml"):
        text = path.read_text()
        for name, cell in zip(names, ("WBC", "RBC", "Platelets"), strict=True):
            text = text.replace(f"<name>{name}</name>", f"<name>{cell}</name>")
        path.write_text(text)
    return folder / "VOCdevkit"


@pytest.fixture(scope="session")
def proposals(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("proposals"))
    write_random_proposals(devkit, folder)
    return folder
