"""The dense CRF, fused and against a peer in another Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = ("--size", 24, 32, "--classes", 3, "--repeats", 1, "--iterations", 2)
FUSED = {f"seconds, mean_field / lattice_mean_field, {name}" for name in ("texture", "noise")}
# An imitation of the peer's interface; it returns zeros.
PEER = """
import numpy as np
CONST_KERNEL = NORMALIZE_AFTER = 0
class DenseCRF2D:
    def __init__(self, width, height, classes): self.shape = classes, width * height
    def setUnaryEnergy(self, unary): assert unary.shape == self.shape
    def addPairwiseGaussian(self, *arguments): pass
    addPairwiseBilateral = addPairwiseGaussian
    def inference(self, iterations): return np.zeros(self.shape, np.float32)
"""


def test_ratios_are_printed(run_benchmark: Callable[..., Any]) -> None:
    ratios = run_benchmark("dense_crf", *TINY).ratios()
    assert ratios.keys() == FUSED
    assert min(ratios.values()) > 0


def test_a_peer(run_benchmark: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pydensecrf"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "densecrf.py").write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finished = run_benchmark("dense_crf", *TINY, "--peer", sys.executable)
    assert finished.ratios().keys() == FUSED | {f"seconds, pydensecrf2 / ours, {name}" for name in ("texture", "noise")}
    assert finished.out.count("largest difference") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peer", "missing"), "peer: expected a Python with pydensecrf2, found missing: "),
        (("--image", "missing.jpg"), "missing.jpg: "),
        (("--repeats", 0), "repeats: expected at least 1, found 0"),
    ],
)
def test_bad_input_is_one_line(run_benchmark: Callable[..., Any], arguments: tuple[object, ...], message: str) -> None:
    assert run_benchmark("dense_crf", *TINY, *arguments).user_error().startswith(message)
