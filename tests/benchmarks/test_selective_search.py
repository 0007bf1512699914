"""Selective Search on generated images, without its peer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.synthetic.voc import write_voc


def test_a_line_per_method(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    write_voc(str(tmp_path), classes=2, train=1, val=1, size=48)
    arguments = ["--data.root", str(tmp_path), "--data.classes", "aeroplane", "bicycle"]
    finished = run_benchmark("selective_search", *arguments)
    assert finished.status == 0, finished.err
    assert re.search(r"^ours +", finished.out, re.M)


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    assert run_benchmark("selective_search", "--data.root", "missing").is_user_error("selective_search")
