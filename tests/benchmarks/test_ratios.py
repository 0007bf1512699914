"""The benchmarks of one function against another: each prints a ratio from the same run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.synthetic.imagenet import write_imagenet
from datamodules.synthetic.voc import write_voc


@pytest.mark.parametrize(
    ("name", "arguments", "ratios"),
    [
        ("sliding_window", ["--size", "96", "--window", "48", "--repeats", "1"], 2),
        ("patch_classifier", ["--size", "40", "48", "--patch_size", "32", "--repeats", "1"], 1),
        ("ssd_matching", ["--batch_size", "2", "--objects", "3", "--repeat", "1"], 1),
        ("voc_map", ["--images", "20", "--detections", "10"], 1),
        ("dense_crf", ["--size", "24", "32", "--repeats", "1", "--iterations", "2"], 1),
    ],
)
def test_a_ratio_is_printed(run_benchmark: Callable[..., Any], name: str, arguments: list[str], ratios: int) -> None:
    finished = run_benchmark(name, *arguments)
    assert finished.status == 0, finished.err
    found = [float(number) for number in re.findall(r"ratio[^\d\n]*([\d.]+)", finished.out)]
    assert len(found) >= ratios, finished.out
    assert all(number > 0 for number in found)


def test_the_input_pipeline(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    write_imagenet(str(tmp_path), classes=2, train=2, val=1, size=256)
    finished = run_benchmark("input_pipeline", str(tmp_path), "--repeats", "1")
    assert finished.status == 0, finished.err
    assert len(re.findall(r"^ratio [\d.]+", finished.out, re.M)) >= 2
    assert "skipped: input_pipeline needs" in run_benchmark("input_pipeline", str(tmp_path / "missing")).out


def test_selective_search(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    write_voc(str(tmp_path), classes=2, train=1, val=1, size=48)
    arguments = ["--data.root", str(tmp_path), "--data.classes", "aeroplane", "bicycle"]
    finished = run_benchmark("selective_search", *arguments)
    assert finished.status == 0, finished.err
    assert re.search(r"^ours +", finished.out, re.M)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("selective_search", ["--data.root", "missing"]),
        ("proposal_recall", ["--ckpt_path", "missing.ckpt", "--data.root", "missing", "--data.proposals", "missing"]),
        ("two_stage_speed", ["--images", "missing"]),
        ("detection_fps", ["--ckpt_path", "missing.ckpt"]),
        ("yolo_v2_sizes", ["--ckpt_path", "missing.ckpt", "--data.root", "missing"]),
    ],
)
def test_bad_input_is_one_error(run_benchmark: Callable[..., Any], name: str, arguments: list[str]) -> None:
    finished = run_benchmark(name, *arguments)
    assert finished.status in (1, 2)
    assert finished.err.splitlines()[0].startswith(("error: ", f"{name}: "))
    assert "Traceback" not in finished.err
