"""The command that computes, continues and repairs proposals."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from datamodules.images import read_image
from datamodules.proposals import read_image_proposals, read_proposals
from datamodules.synthetic.voc import write_voc
from errors import DatasetError, UserError
from tests.datamodules.test_orientation import module as detection_module
from tests.datamodules.test_orientation import write_masks
from tests.datamodules.test_orientation import write_voc as write_detection
from tests.datamodules.test_proposals import SETS, data, files
from tools import proposals as command
from tools.proposals import compute, main


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("voc")
    write_voc(str(folder), classes=2, train=3, val=1, size=48)
    return str(folder)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the search by random boxes; the list collects the width of each image."""
    widths: list[int] = []

    def make_up(image: np.ndarray, top: int | None = None) -> np.ndarray:
        widths.append(image.shape[1])
        rng = np.random.default_rng(int(image.sum()))
        corners = rng.uniform(0, 40, (30, 2))
        return np.concatenate([corners, corners + rng.uniform(1, 8, (30, 2))], 1).astype(np.float32)[:top]

    monkeypatch.setattr(command, "selective_search", make_up)
    return widths


def run(root: str, out: Path, *more: str) -> int:
    return main(["--root", root, "--sets", *SETS, "--out", str(out), "--workers", "1", *more])


# --- command ----------------------------------------------------------------------------------------------------------


def test_the_command_goes_on_where_it_was_stopped_and_repairs(
    drawn: str, tmp_path: Path, searched: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "boxes"
    assert run(drawn, out) == 0
    first = {path: path.read_bytes() for path in files(out)}
    assert len(first) == 8
    assert "8 images, 30.0 boxes per image, recall " in capsys.readouterr().out
    gone, damaged, *whole = first
    gone.unlink()
    damaged.write_bytes(first[damaged][:-5])
    stamps = {path: path.stat().st_mtime_ns for path in whole}
    assert run(drawn, out) == 0
    output = capsys.readouterr()
    assert "8 images, 6 already have proposals" in output.out
    assert f"recomputing: {damaged}: expected the proposals of an image" in output.err
    assert {path: path.read_bytes() for path in files(out)} == first
    assert {path: path.stat().st_mtime_ns for path in whole} == stamps


def test_another_number_of_boxes_is_computed_anew(
    drawn: str, tmp_path: Path, searched: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "boxes"
    run(drawn, out)
    assert run(drawn, out, "--top_n", "7") == 0
    output = capsys.readouterr()
    assert "expected at most 7 boxes, found a file of at most 2000" in output.err
    assert "8 images, 7.0 boxes per image" in output.out
    assert len(searched) == 16


def test_ctrl_c_keeps_what_is_done(
    drawn: str, tmp_path: Path, searched: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, made_up = tmp_path / "boxes", command.selective_search

    def press(image: np.ndarray, top: int | None = None) -> np.ndarray:
        if len(searched) == 3:
            raise KeyboardInterrupt
        return made_up(image, top)

    monkeypatch.setattr(command, "selective_search", press)
    assert run(drawn, out) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(files(out)) == 3
    monkeypatch.setattr(command, "selective_search", made_up)
    assert run(drawn, out) == 0
    assert len(searched) == len(files(out)) == 8


def test_photographs_of_a_turned_camera_are_searched_as_they_were_annotated(
    tmp_path: Path, searched: list[int]
) -> None:
    """Stored with a width of 64; the annotation tells for boxes and masks, the option where there is no size."""
    write_masks(tmp_path, 6, as_stored=False)
    masks = ["--root", str(tmp_path), "--sets", "VOC2012/train", "--workers", "1", "--masks"]
    assert main([*masks, "--out", str(tmp_path / "masks")]) == 0
    write_detection(tmp_path, 6)
    boxes = ["--root", str(tmp_path), "--sets", "VOC2007/train", "--workers", "1", "--classes", "nut"]
    assert main([*boxes, "--out", str(tmp_path / "upright")]) == 0
    write_detection(tmp_path, 6, size=(48, 64))
    assert main([*boxes, "--out", str(tmp_path / "stored")]) == 0
    write_detection(tmp_path, 6, size=None)
    assert main([*boxes, "--out", str(tmp_path / "applied")]) == 0
    assert main([*boxes, "--out", str(tmp_path / "ignored"), "--exif_orientation", "false"]) == 0
    assert searched == [48, 48, 64, 48, 64]
    data = detection_module(tmp_path, proposals=str(tmp_path / "nowhere"), exif_orientation=False)
    with pytest.raises(DatasetError, match="--sets VOC2007/train --exif_orientation false"):
        data.dataset("train")


def test_a_broken_image_is_named_and_the_others_are_done(
    drawn: str, tmp_path: Path, searched: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    image = sorted((root / "VOCdevkit" / "VOC2007" / "JPEGImages").iterdir())[0]
    image.write_bytes(image.read_bytes()[:700])
    assert run(str(root), tmp_path / "boxes") == 1
    output = capsys.readouterr()
    assert f"no proposals: {image}: truncated image" in output.err
    assert "7 images, 30.0 boxes per image" in output.out
    assert len(files(tmp_path / "boxes")) == 7


def test_a_worker_that_is_killed_is_told_of(drawn: str, tmp_path: Path) -> None:
    image = os.path.join(drawn, "VOCdevkit", "VOC2007", "JPEGImages", "000001.jpg")
    results = compute(
        [(partial(read_image, image), str(tmp_path / f"{i}.boxes"), 20) for i in range(50)], num_workers=2
    )
    assert next(results) is None
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(UserError, match="found one that was killed.*run the command again"):
        list(results)
    assert 1 <= len(files(tmp_path)) < 50
    for path in tmp_path.glob("*.boxes"):
        assert read_proposals(str(path))[0].shape == (20, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top_n", "0"], "top_n: expected at least 1, found 0"),
        (["--workers", "0"], "workers: expected at least 1, found 0"),
        (["--classes", "unicorn"], "to be one of unicorn"),
        (["--sets", "VOC2007/minival"], "expected the list minival.txt"),
    ],
)
def test_what_is_wrong_is_one_line(
    drawn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(drawn, tmp_path / "boxes", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_real_search_and_its_figure(drawn: str, tmp_path: Path) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    (root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "one.txt").write_text("000001\n")
    out, figure = tmp_path / "boxes", tmp_path / "growth.png"
    assert run(str(root), out, "--sets", "VOC2007/one", "--top_n", "40", "--figure", str(figure)) == 0
    boxes = read_image_proposals(str(out), "VOC2007/JPEGImages/000001.jpg")
    assert boxes.shape == (40, 4)
    assert figure.read_bytes()[:4] == b"\x89PNG"


# --- batches ----------------------------------------------------------------------------------------------------------


def test_an_image_without_proposals_names_the_command_that_computes_them(
    drawn: str, tmp_path: Path, searched: list[int]
) -> None:
    out = tmp_path / "boxes"
    names = ["aeroplane", "bicycle", "bird"]
    module = data(drawn, proposals=str(out), classes=names)
    with pytest.raises(
        DatasetError, match=r"a file for each of 2 images, .*boxes has none for 2 images \(VOC2007"
    ) as error:
        module.dataset("val")
    words = shlex.split(str(error.value).rpartition(": ")[2])
    assert words[:3] == ["python", "-m", "tools.proposals"]
    assert main([*words[3:], "--workers", "1"]) == 0
    batch = next(iter(module.val_dataloader()))
    assert [len(proposals) for proposals in batch["proposals"]] == [30, 30]
    with pytest.raises(DatasetError, match="expected a file for each of 6 images"):
        module.dataset("train")
    files(out)[0].write_bytes(b"")
    with pytest.raises(DatasetError, match="found 0 bytes"):
        list(module.val_dataloader())
