"""The table of YOLOv2 at several image sizes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from datamodules.synthetic.voc import write_voc
from lightning_modules.detection.yolo_v2 import YOLOv2


def test_the_table_of_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_voc(str(tmp_path), classes=3, train=1, val=1, size=48)
    anchors = [(0.5, 0.6), (1.5, 1.0), (2.0, 2.5)]
    module = YOLOv2(num_classes=3, width_multiplier=0.05, anchors=anchors, compute_coco_ap=False)
    path = tmp_path / "best.ckpt"
    checkpoint = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": "2.6",
    }
    torch.save(checkpoint, path)

    def run(*sizes: str) -> object:
        monkeypatch.setattr(sys, "argv", [
            "yolo_v2_sizes", "--ckpt_path", str(path), "--data.root", str(tmp_path), "--data.val", "VOC2007/val",
            "--data.classes", "aeroplane", "bicycle", "bird", "--device", "cpu", "--warm_up", "1", "--timed", "2",
            "--sizes", *sizes,
        ])  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("benchmarks.yolo_v2_sizes", run_name="__main__")
        return stop.value.code

    assert run("64", "288") == 0
    *_, small, large = capsys.readouterr().out.splitlines()
    measured, paper = small.split("|")
    assert measured.split()[0] == "64"
    assert all(float(number) >= 0 for number in measured.split())
    assert paper.split() == ["-", "-"]
    assert large.split("|")[1].split() == ["69.0", "91"]
    assert run("100") == 1
    assert "multiples of 32 pixels, found 100x100" in capsys.readouterr().err
