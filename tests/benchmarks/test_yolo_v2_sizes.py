"""The table of YOLOv2 at several image sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.synthetic.voc import write_voc
from lightning_modules.detection.rpn import RPN
from lightning_modules.detection.yolo_v2 import YOLOv2


def test_the_table_of_sizes(
    run_benchmark: Callable[..., Any], write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    write_voc(str(tmp_path), classes=3, train=1, val=1, size=48)
    anchors = [(0.5, 0.6), (1.5, 1.0), (2.0, 2.5)]
    path = write_checkpoint(YOLOv2(num_classes=3, width_multiplier=0.05, anchors=anchors, compute_coco_ap=False))

    def run(*arguments: object, classes: tuple[str, ...] = ("aeroplane", "bicycle", "bird")) -> Any:
        return run_benchmark(
            "yolo_v2_sizes", "--ckpt_path", path, "--data.root", tmp_path, "--data.val", "VOC2007/val",
            "--data.classes", *classes, "--device", "cpu", "--warm_up", 1, "--timed", 2, *arguments,
        )  # fmt: skip

    finished = run("--sizes", 64, 288)
    assert finished.ratios().keys() == {"frames per second, 64 / 288 pixels"}
    *_, small, large, _ = finished.out.splitlines()
    measured, paper = small.split("|")
    assert measured.split()[0] == "64"
    assert all(float(number) >= 0 for number in measured.split())
    assert paper.split() == ["-", "-"]
    assert large.split("|")[1].split() == ["69.0", "91"]
    assert "multiples of 32 pixels, found 100x100" in run("--sizes", 100).user_error()
    message = run("--sizes", 64, classes=("aeroplane", "bicycle")).user_error()
    assert message == "data.classes: expected the checkpoint's 3 classes, found 2"


def test_the_checkpoint_must_be_of_yolo_v2(
    run_benchmark: Callable[..., Any], write_checkpoint: Callable[..., Path]
) -> None:
    path = write_checkpoint(RPN(width_multiplier=0.05))
    message = run_benchmark("yolo_v2_sizes", "--ckpt_path", path, "--data.root", "missing").user_error()
    assert message == f"{path}: expected a checkpoint of YOLOv2, found RPN"
