"""Rows of a JPEG: equal to those of the full decoder, and damage within them is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.images import EncodedImage, read_image
from datamodules.jpeg import decode_jpeg_rows
from errors import BrokenImageError


def save(path: Path, pixels: np.ndarray, **options: object) -> str:
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def textured(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    return (np.stack([x, y, x + y], -1) * 180 // (height + width) + noise).astype(np.uint8)


@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"restart_marker_rows": 1}],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 8, 16, 100, 200, 301])
def test_a_crop_near_the_top_is_that_of_the_full_image(tmp_path: Path, options: dict, rows: int) -> None:
    path = save(tmp_path / "x.jpg", textured(301, 203), quality=92, **options)
    image = EncodedImage(path)
    assert np.array_equal(image.crop((0, 0, rows, 203), (rows, 203)), read_image(path)[:rows])
    assert image.warning is None


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_only_the_upper_rows_are_decoded(tmp_path: Path, subsampling: int, factor: int) -> None:
    path = save(tmp_path / "x.jpg", textured(640, 64), quality=92, subsampling=subsampling)
    image = EncodedImage(path)
    rows = decode_jpeg_rows(image.data, 100, 640, 64, factor)
    assert rows is not None
    assert 100 <= factor * len(rows) < 150
    whole = image.decode(min_size=(640 // factor, 64 // factor))
    needed = 100 // factor
    assert np.array_equal(rows[:needed], whole[:needed])


def test_no_rows_are_skipped_where_it_does_not_pay_or_is_not_possible(tmp_path: Path) -> None:
    plain = EncodedImage(save(tmp_path / "x.jpg", textured(64, 64)))
    assert decode_jpeg_rows(plain.data, 60, 64, 64) is None
    progressive = EncodedImage(save(tmp_path / "y.jpg", textured(640, 64), progressive=True))
    assert decode_jpeg_rows(progressive.data, 60, 640, 64) is None


def test_damage_within_a_crop_is_noticed_where_the_rows_below_are_not_decoded(tmp_path: Path) -> None:
    data = Path(save(tmp_path / "whole.jpg", textured(640, 64), quality=92)).read_bytes()
    start = data.find(b"\xff\xda") + 14
    for part in (0.05, 0.3, 0.6, 0.98):
        cut = data[: start + int(part * (len(data) - start))]
        with pytest.raises(BrokenImageError, match="truncated"):
            EncodedImage(write(tmp_path / "x.jpg", cut)).crop((0, 0, 60, 64), (60, 64))
    # An end marker within the first rows ends the image there.
    ended = data[: start + 200] + b"\xff\xd9" + data[start + 202 :]
    image = EncodedImage(write(tmp_path / "y.jpg", ended))
    try:
        image.crop((0, 0, 60, 64), (60, 64))
    except BrokenImageError:
        pass
    else:
        assert image.warning is not None
