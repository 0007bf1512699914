"""Frames per second of the detectors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.synthetic.voc import write_voc
from lightning_modules.detection.rpn import RPN
from lightning_modules.detection.yolo_v2 import YOLOv2

FAST = ("--timed", 1, "--warm_up", 0, "--device", "cpu")


def test_ssd_and_its_peer(run_benchmark: Callable[..., Any]) -> None:
    finished = run_benchmark("detection_fps", "--model", "SSD300", *FAST)
    assert finished.ratios().keys() == {"frames per second, SSD300, untrained / torchvision ssd300_vgg16"}
    rows = re.findall(r"^(?:SSD300, untrained|torchvision ssd300_vgg16) +300 +([\d,]+) ", finished.out, re.M)
    assert rows == ["26,285,486"] * 2


def test_checkpoints(run_benchmark: Callable[..., Any], write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    write_voc(str(tmp_path), classes=2, train=1, val=1, size=48)
    path = write_checkpoint(YOLOv2(num_classes=2, width_multiplier=0.05, compute_coco_ap=False), image_size=64)
    images = tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages"
    ratios = run_benchmark("detection_fps", "--ckpt_path", path, path, "--images", images, *FAST).ratios()
    assert ratios.keys() == {"frames per second, YOLOv2 / YOLOv2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ckpt_path", "missing.ckpt"), "missing.ckpt: no such checkpoint"),
        (("--device", "nowhere"), "device: expected cpu or an available GPU, found nowhere"),
        (("--timed", 0), "timed: expected at least 1, found 0"),
    ],
)
def test_bad_input_is_one_line(run_benchmark: Callable[..., Any], arguments: tuple[object, ...], message: str) -> None:
    assert run_benchmark("detection_fps", *arguments).user_error() == message


def test_images_must_be_square(run_benchmark: Callable[..., Any], write_checkpoint: Callable[..., Path]) -> None:
    path = write_checkpoint(RPN(width_multiplier=0.05), image_size=(600, 1000))
    finished = run_benchmark("detection_fps", "--ckpt_path", path)
    assert "expected a detector of square images, found the size (600, 1000)" in finished.user_error()
