"""The drawn dataset: a function of its arguments, learnable, and careful with what lies in its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datamodules.classification.image_folder import ImageFolder
from datamodules.folders import list_images
from datamodules.images import EncodedImage, read_image
from datamodules.synthetic.__main__ import main
from datamodules.synthetic.drawing import CLASSES
from datamodules.synthetic.imagenet import write_imagenet


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))}


def test_the_layout(tmp_path: Path) -> None:
    names = write_imagenet(str(tmp_path), classes=3, train=20, val=5, size=32)
    data = ImageFolder(str(tmp_path), image_size=32)
    assert data.class_names == names == sorted(CLASSES[:3])
    assert data.listing("train").counts.tolist() == [20] * 3
    assert data.listing("val").counts.tolist() == [5] * 3
    pictures = [EncodedImage(path) for path in list_images(str(tmp_path / "train"))]
    assert {min(p.height, p.width) for p in pictures} == {32}
    assert sum(p.mode == "L" for p in pictures) == 3


def test_pictures_are_a_function_of_the_arguments(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_imagenet(str(tmp_path / name), classes=2, train=3, val=2, size=24, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert not set(a.values()) & set(c.values())
    assert len(set(a.values())) == len(a)


def test_mean_colors_do_not_give_the_classes_away(tmp_path: Path) -> None:
    """A network has to learn shapes: the nearest mean color alone stays far from right."""
    write_imagenet(str(tmp_path), classes=4, train=40, val=25, size=32)

    def means(split: str) -> np.ndarray:
        pictures = [read_image(path).mean((0, 1)) for path in list_images(str(tmp_path / split))]
        return np.array(pictures).reshape(4, -1, 3)

    centers = means("train").mean(1)
    distance = ((means("val")[:, :, None] - centers) ** 2).sum(-1)
    assert (distance.argmin(-1) == np.arange(4)[:, None]).mean() < 0.6


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"classes": 1}, "classes: expected 2 to 32, found 1"), ({"size": 4}, "size: expected 16"), ({"val": 0}, "val")],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        write_imagenet(str(tmp_path), **options)


SMALL = ["--classes", "2", "--train", "2", "--val", "1", "--size", "16"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "drawn"
    assert main(["imagenet", str(folder), *SMALL]) == 0
    assert f"wrote {folder}/train: 4 files" in capsys.readouterr().out
    first = contents(folder)
    assert main(["imagenet", str(folder), *SMALL, "--seed", "1"]) == 0, "its own folder it may write anew"
    assert contents(folder).keys() == first.keys()
    assert contents(folder) != first
    assert main(["imagenet", str(folder), "--classes", "1"]) == 2
    assert contents(folder).keys() == first.keys(), "a refused command leaves what was there"
    assert list(tmp_path.glob("**/.synthetic-*")) == []


@pytest.mark.parametrize("layout", ["food101", "imagenet", "places365", "places365_easy"])
def test_every_layout_is_drawn_anew_where_it_was(tmp_path: Path, layout: str) -> None:
    """Files beside the folders too; the same arguments give the same files, others leave nothing of the first."""
    drawn = []
    for classes, seed in (("3", "0"), ("2", "1"), ("2", "1")):
        assert main([layout, str(tmp_path / "x"), *SMALL, "--classes", classes, "--seed", seed]) == 0
        files = {path.relative_to(tmp_path): path for path in sorted((tmp_path / "x").rglob("*")) if path.is_file()}
        drawn.append({str(name): path.read_bytes() for name, path in files.items()})
    assert drawn[1] == drawn[2]
    assert drawn[1].keys() < drawn[0].keys()
    same = {name for name in drawn[1] if drawn[0][name] == drawn[1][name]}
    assert not any(name.endswith((".jpg", ".JPEG")) for name in same)


def test_the_command_touches_nobody_elses_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.txt").write_text("mine")
    assert main(["imagenet", str(tmp_path), *SMALL]) == 2
    assert "expected an empty folder, found train" in capsys.readouterr().err
    for _ in range(2):
        assert main(["imagenet", str(tmp_path), *SMALL, "--force"]) == 0
        assert (tmp_path / "train" / "mine.txt").read_text() == "mine"
    (tmp_path / "file").touch()
    assert main(["imagenet", str(tmp_path / "file"), *SMALL]) == 2
