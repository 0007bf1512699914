"""Tiles and fonts."""

from __future__ import annotations

import numpy as np
from PIL import Image

from visualization.drawing import fit_square


def test_fit_keeps_the_shape() -> None:
    square = fit_square(Image.new("RGB", (200, 100), (1, 2, 3)), 64)
    assert square.size == (64, 64)
    assert int((np.asarray(square) == (1, 2, 3)).all(axis=-1).sum()) == 64 * 32
