"""Crops of people: affine maps and pixels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from datamodules.pose.crops import apply_affine, crop_matrix, scale_channels, warp
from tests.datamodules.pose.spots import center_of_mass, spots


def test_a_square_becomes_pixels_edge_to_edge() -> None:
    """x -> (x + 0.5) S / s - 0.5 relative to the first pixel of the square."""
    matrix = crop_matrix((19.5, 29.5), 40, 10)  # covers the pixels 0..39 and 10..49 exactly
    x, y = np.random.default_rng(0).uniform(-20, 60, (2, 200))
    moved = apply_affine(np.stack([x, y], 1), matrix)
    np.testing.assert_allclose(moved[:, 0], (x + 0.5) * 10 / 40 - 0.5)
    np.testing.assert_allclose(moved[:, 1], (y - 10 + 0.5) * 10 / 40 - 0.5)
    np.testing.assert_allclose(apply_affine(np.array([19.5, 29.5]), crop_matrix((19.5, 29.5), 7.7, 31, 40)), 15)


def test_a_flip_mirrors_the_crop_and_a_turn_is_clockwise() -> None:
    points = np.random.default_rng(1).uniform(0, 50, (100, 2))
    plain, flipped = (apply_affine(points, crop_matrix((20, 30), 40, 64, 25, flip)) for flip in (False, True))
    np.testing.assert_allclose(flipped[:, 0], 63 - plain[:, 0])
    np.testing.assert_allclose(flipped[:, 1], plain[:, 1])
    above = apply_affine(np.array([20, 20]), crop_matrix((20, 30), 40, 40, 90))
    np.testing.assert_allclose(above, [29.5, 19.5], atol=1e-9)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("reduction", [0.4, 1, 1.9, 2.1, 3.3, 5, 9.7])
def test_pixels_lie_where_the_coordinates_say(tmp_path: Path, suffix: str, reduction: float) -> None:
    """At every reduction; from two on, a JPEG is decoded at a reduced size."""
    points = np.array([[410.0, 300.3], [211.4, 405.0], [333.3, 222.2]])
    spots(tmp_path / f"a{suffix}", points, (611, 613), max(5, 2.5 * reduction))
    size = round(430 / reduction)
    matrix = crop_matrix((310, 320), 430, size, angle=17, flip=True)
    image = torch.from_numpy(warp(str(tmp_path / f"a{suffix}"), matrix, size)).permute(2, 0, 1)
    for at in torch.from_numpy(apply_affine(points, matrix)):
        found = center_of_mass(image, at, int(max(5, 8 / reduction + 3)))
        np.testing.assert_allclose(found, at.numpy(), atol=0.06 if reduction >= 1 else 0.15)


def test_nothing_aliases_where_the_crop_is_much_smaller(tmp_path: Path) -> None:
    board = (np.indices((800, 800)).sum(0) % 2 * 255).astype(np.uint8)
    for suffix in (".png", ".jpg"):
        cv2.imwrite(str(tmp_path / f"a{suffix}"), board)
        crop = warp(str(tmp_path / f"a{suffix}"), crop_matrix((400, 400), 600, 80), 80)
        assert abs(crop.astype(float) - 127.5).max() < 8


def test_pixels_beyond_the_image_are_black(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((20, 20, 3), 200, np.uint8))
    crop = warp(str(tmp_path / "a.png"), crop_matrix((0, 9.5), 20, 20), 20)
    assert (crop[:, :9] == 0).all()
    assert (crop[:, 11:] == 200).all()


def test_channels_get_factors_of_their_own() -> None:
    np.random.seed(0)
    pixels = np.full((2, 2, 3), 100, np.uint8)
    drawn = np.array([scale_channels(pixels, 0.4)[0, 0] for _ in range(500)])
    assert drawn.min() < 64
    assert drawn.max() > 136
    assert drawn.min() >= 60
    assert drawn.max() <= 140
    assert abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.2
    assert (scale_channels(np.full((1, 1, 3), 250, np.uint8), 1.0) >= 0).all()
