"""Files of proposals, and proposals in the batches of a detection dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.detection.voc import VOCDetection
from datamodules.proposals import overlaps_any, read_image_proposals, read_proposals, write_proposals
from datamodules.synthetic.voc import write_voc
from errors import DatasetError

SETS = ["VOC2007/train", "VOC2007/val"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("voc")
    write_voc(str(folder), classes=2, train=3, val=1, size=48)
    return str(folder)


def files(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file())


def data(root: str, **options: Any) -> VOCDetection:
    return VOCDetection(
        root,
        **{
            "train": SETS[:1],
            "val": SETS[1:],
            "image_size": 64,
            "num_workers": 0,
            "batch_size": 3,
            "seed": 1,
            **options,
        },
    )


@pytest.mark.parametrize("count", [0, 1, 2000])
def test_what_is_written_is_read(tmp_path: Path, count: int) -> None:
    boxes = np.random.default_rng(0).uniform(0, 500, (count, 4)).astype(np.float32)
    path = tmp_path / "VOC2007" / "JPEGImages" / "a.jpg.boxes"
    write_proposals(str(path), boxes, top_n=2000)
    found, top = read_proposals(str(path))
    np.testing.assert_array_equal(found, boxes)
    assert (found.dtype, found.shape, top) == (np.float32, (count, 4), 2000)
    assert found.flags.writeable  # else torch warns
    assert files(tmp_path) == [path]
    np.testing.assert_array_equal(read_image_proposals(str(tmp_path), "VOC2007/JPEGImages/a.jpg"), boxes)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.boxes"
    write_proposals(str(path), np.zeros((1, 4)), 5)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_proposals(str(path), np.ones((2, 4)), 5)
    assert files(tmp_path) == [path]
    assert read_proposals(str(path))[0].tolist() == [[0, 0, 0, 0]]


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda data: b"", "found 0 bytes"),
        (lambda data: data[:-1], "found 47 bytes of boxes instead of 48"),
        (lambda data: data + b"x", "found 49 bytes of boxes instead of 48"),
        (lambda data: flip(data, 30), "found a wrong checksum"),
        (lambda data: flip(data, 8), "found a wrong checksum"),
        (lambda data: b"<html>" + data[6:], "found a file that begins with b'<html>1"),
    ],
    ids=["empty", "truncated", "longer", "a bit of a box", "a bit of the header", "foreign"],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any, found: str) -> None:
    path = tmp_path / "a.boxes"
    write_proposals(str(path), np.ones((3, 4), np.float32), 5)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        DatasetError, match=rf"a\.boxes: expected the proposals of an image, {found}.*tools\.proposals"
    ) as e:
        read_proposals(str(path))
    assert "\n" not in str(e.value)


def test_overlaps_any() -> None:
    objects = np.float32([[0, 0, 10, 10], [20, 20, 30, 30]])
    assert overlaps_any(objects, np.float32([[0, 0, 5, 10], [20, 20, 24, 30]])).tolist() == [True, False]
    assert overlaps_any(objects, np.zeros((0, 4), np.float32)).tolist() == [False, False]
    assert overlaps_any(objects[:0], objects).tolist() == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hflip": 1.0},
        {"image_size": (60, 100)},
        {"expand": 4.0, "photometric": "ssd"},
        {"iou_crop": True, "hflip": 0.5},
        {"jitter": 0.2, "train_difficult": False},
    ],
    ids=str,
)
def test_proposals_are_moved_as_boxes_are_and_change_nothing_else(drawn: str, tmp_path: Path, options: dict) -> None:
    """The objects and one more box serve as proposals: they are transformed like the objects."""
    module = data(drawn, **options)
    annotations = module.annotations("train")
    for i in range(len(annotations.images)):
        mine = slice(annotations.start[i], annotations.start[i + 1])
        kept = (
            annotations.boxes[mine] if module.train_difficult else annotations.boxes[mine][~annotations.difficult[mine]]
        )
        write_proposals(str(tmp_path / f"{annotations.images[i]}.boxes"), np.concatenate([kept, kept[:1]]), 2000)
    given = list(data(drawn, proposals=str(tmp_path), **options).train_dataloader())
    for batch, usual in zip(given, module.train_dataloader(), strict=True):
        assert isinstance(batch["proposals"], list)
        assert "proposals" not in usual
        for proposals, target, expected in zip(batch["proposals"], batch["target"], usual["target"], strict=True):
            assert proposals.dtype == torch.float32
            n = len(target["boxes"])
            assert n <= len(proposals) <= n + 1
            # The objects are in random order, the proposals are not.
            assert sorted(proposals[:n].tolist()) == sorted(target["boxes"].tolist())
            for key in expected:
                torch.testing.assert_close(target[key], expected[key], rtol=0, atol=0)
        for image, expected in zip(batch["image"], usual["image"], strict=True):
            assert torch.equal(image, expected)
