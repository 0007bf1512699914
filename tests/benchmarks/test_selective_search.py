"""Selective Search on generated images, without its peer and with an imitation of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest

from datamodules.synthetic.voc import write_voc


@pytest.fixture
def arguments(tmp_path: Path) -> tuple[object, ...]:
    write_voc(str(tmp_path), classes=2, train=1, val=1, size=48)
    return "--data.root", tmp_path, "--data.classes", "aeroplane", "bicycle", "--images", 1


def test_without_the_peer(run_benchmark: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    finished = run_benchmark("selective_search", *arguments)
    assert finished.status == 0, finished.err
    assert re.search(r"^ours +\d+ +[\d.]+ +[\d.]+$", finished.out, re.M)
    assert "no ratio: this OpenCV has no cv2.ximgproc" in finished.out


def test_with_the_peer(
    run_benchmark: Callable[..., Any], arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = MagicMock()
    search.process.side_effect = lambda: np.array([[0, 0, 500, 500], [0, 0, 10, 10]])  # x, y, width, height
    segmentation = MagicMock()
    segmentation.createSelectiveSearchSegmentation.return_value = search
    monkeypatch.setattr(cv2, "ximgproc", SimpleNamespace(segmentation=segmentation), raising=False)
    finished = run_benchmark("selective_search", *arguments)
    names = ("OpenCV, R-CNN's parameters", "OpenCV, fast")
    assert list(finished.ratios()) == [f"seconds, ours / {name}" for name in names]
    # R-CNN's minimum size removes the second box.
    for name, boxes in zip(names, (1, 2), strict=True):
        assert re.search(rf"^{name} +{boxes} ", finished.out, re.M)
    assert search.addGraphSegmentation.call_count == 2


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    finished = run_benchmark("selective_search", "--data.root", "missing")
    assert finished.status == 2
    assert finished.err.startswith("error: VOCDetection: no image set VOC2007/val\n")  # then the expected layout
    message = run_benchmark("selective_search", "--data.root", "missing", "--top_n", 0).user_error()
    assert message == "top_n: expected at least 1, found 0"
