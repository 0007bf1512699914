"""MaskTransform: images and masks are resized, scaled, cropped and flipped together."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest

from datamodules.transforms import FILL_COLOR, VOID, MaskTransform
from datamodules.voc import voc_palette


def colored(ids: np.ndarray) -> np.ndarray:
    return voc_palette()[ids]


def blocks(height: int = 40, width: int = 56) -> np.ndarray:
    """Return blocks with the ids 1 to 12."""
    ids = np.zeros((height, width), np.uint8)
    for i in range(12):
        ids[i // 4 * height // 3 : (i // 4 + 1) * height // 3, i % 4 * width // 4 : (i % 4 + 1) * width // 4] = i + 1
    return ids


def draw(transform: MaskTransform, seed: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return transform(colored(ids), ids)


@pytest.mark.parametrize("scale", [(0.5, 0.5), (2.0, 2.0), (0.5, 2.0), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("crop", [None, 32, 96])
def test_image_and_mask_stay_aligned(scale: tuple[float, float], crop: int | None) -> None:
    transform = MaskTransform(crop_size=crop, scale=scale, hflip=0.5)
    ids = blocks()
    for seed in range(20):
        pixels, mask = draw(transform, seed, ids)
        assert pixels.shape[:2] == mask.shape
        if crop is not None:
            assert mask.shape == (crop, crop)
        # Except at borders, where colors are interpolated, each pixel has the color of its id.
        edged = cv2.copyMakeBorder(mask[2:-2, 2:-2], 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=254)
        inner = (cv2.erode(edged, np.ones((5, 5))) == cv2.dilate(edged, np.ones((5, 5)))) & (edged != 254)
        expected = np.where((mask == VOID)[..., None], FILL_COLOR, colored(mask))
        assert np.abs(pixels.astype(int) - expected)[inner].max() <= 1
        assert set(np.unique(mask)) <= {*range(1, 13), VOID}


def test_pixels_beyond_the_image_are_void() -> None:
    ids = np.full((30, 20), 7, np.uint8)
    positions = set()
    for seed in range(20):
        pixels, mask = draw(MaskTransform(crop_size=64, hflip=0.5), seed, ids)
        assert set(np.unique(mask)) == {7, VOID}
        assert (mask == 7).sum() == ids.size
        assert (pixels[mask == VOID] == FILL_COLOR).all()
        positions.add(tuple(np.argwhere(mask == 7)[0]))
    assert len(positions) > 5


def test_ids_are_taken_from_the_nearest_pixel_between_centers() -> None:
    """At half the size, ids are not shifted by half a pixel relative to the image."""
    ids = np.tile(np.arange(64, dtype=np.uint8), (8, 1))
    pixels, mask = MaskTransform(image_size=(4, 1000))(np.repeat(ids[..., None], 3, 2), ids)
    assert mask.shape == (4, 32)
    assert np.abs(pixels[..., 0].astype(float) - mask).mean() <= 0.5
    up = MaskTransform(image_size=(16, 1000))(np.repeat(ids[..., None], 3, 2), ids)[1]
    assert (up == np.repeat(np.repeat(ids, 2, 0), 2, 1)).all()


def test_a_flip_and_colors() -> None:
    ids = blocks()
    flipped = draw(MaskTransform(hflip=1.0), 0, ids)
    assert (flipped[1] == ids[:, ::-1]).all()
    assert (flipped[0] == colored(ids)[:, ::-1]).all()
    pixels, mask = draw(MaskTransform(color_jitter=0.5), 0, ids)
    assert (mask == ids).all()
    assert (pixels != colored(ids)).any()
    assert (MaskTransform()(colored(ids), ids)[0] == colored(ids)).all()


def test_factors_spread_over_the_range() -> None:
    sizes = [draw(MaskTransform(scale=(0.5, 2.0)), seed, blocks())[1].shape[1] / 56 for seed in range(200)]
    assert 0.49 < min(sizes) < 0.6
    assert 1.9 < max(sizes) < 2.01
    assert 1.15 < float(np.mean(sizes)) < 1.35
