"""Recall of proposals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.proposals import proposal_path, write_proposals
from datamodules.synthetic.voc import write_voc
from lightning_modules.detection.rpn import RPN
from lightning_modules.detection.yolo_v2 import YOLOv2


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """A devkit of two validation images, and one proposal per image, the image itself, in ``proposals``."""
    write_voc(str(tmp_path), classes=2, train=1, val=1, size=64)
    for path in (tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages").iterdir():
        boxes = np.array([[0, 0, 64, 64]], np.float32)
        write_proposals(proposal_path(str(tmp_path / "proposals"), f"VOC2007/JPEGImages/{path.name}"), boxes, 2000)
    return tmp_path


def test_both_recalls(run_benchmark: Callable[..., Any], write_checkpoint: Callable[..., Path], devkit: Path) -> None:
    module = RPN(width_multiplier=0.05, anchor_sizes=(16, 32))
    path = write_checkpoint(module, val=["VOC2007/val"], classes=["aeroplane", "bicycle"], image_size=64)
    finished = run_benchmark(
        "proposal_recall", "--ckpt_path", path, "--data.root", devkit, "--data.proposals", devkit / "proposals",
        "--device", "cpu",
    )  # fmt: skip
    methods = ("region proposal network", "Selective Search")
    assert list(finished.ratios()) == [
        f"mean recall of the first {count}, {' / '.join(methods)}" for count in (50, 300, 1000)
    ]
    for name in methods:
        (row,) = re.findall(rf"^{name} ([ \d.]+)$", finished.out, re.M)
        values = [float(value) for value in row.split()]
        assert len(values) == 9
        assert all(0 <= value <= 100 for value in values)


def test_bad_input_is_one_line(
    run_benchmark: Callable[..., Any], write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    data = ("--data.root", tmp_path / "missing", "--data.proposals", "missing")
    message = run_benchmark("proposal_recall", "--ckpt_path", "missing.ckpt", *data).user_error()
    assert message == "missing.ckpt: no such checkpoint"
    path = write_checkpoint(YOLOv2(num_classes=2, width_multiplier=0.05))
    message = run_benchmark("proposal_recall", "--ckpt_path", path, *data).user_error()
    assert "expected a checkpoint of RPN or FasterRCNN, found YOLOv2" in message
    path = write_checkpoint(RPN(width_multiplier=0.05), val=["VOC2007/val"], image_size=64)
    finished = run_benchmark("proposal_recall", "--ckpt_path", path, *data)
    assert finished.status == 2
    assert finished.err.startswith("error: VOCDetection: no image set VOC2007/val\n")  # then the expected layout
