"""Drawn faces and photographs of people."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.classification.fer2013 import EMOTIONS
from datamodules.synthetic.fer2013 import draw_face, draw_photograph


def draw_faces(count: int = 6) -> torch.Tensor:
    """Return gray faces, uint8 (count, 1, 48, 48)."""
    drawn = [draw_face(EMOTIONS[i % 7], np.random.default_rng(i)) for i in range(count)]
    return torch.from_numpy(np.stack(drawn))[:, None]


@pytest.fixture(scope="session")
def photographs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return images with one to three faces, and their eye centers."""
    drawn = []
    for i in range(6):
        drawn.append(draw_photograph([EMOTIONS[(i + j) % 7] for j in range(1 + i % 3)], np.random.default_rng(i)))
    return drawn
