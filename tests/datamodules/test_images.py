"""Every kind of image file is read as the right RGB values, or refused in one line with the file and the reason."""

from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from datamodules.images import EncodedImage, image_size, read_image
from errors import BrokenImageError

Y, X = np.mgrid[0:40, 0:60]
RGB = np.stack([X * 4, Y * 6, (X + Y) * 2], axis=-1).astype(np.uint8)
GRAY = RGB[..., 0]
GRAY_RGB = np.repeat(GRAY[..., None], 3, axis=2)
ALPHA = np.where(X < 20, 0, 255).astype(np.uint8)
ON_WHITE = np.where(X[..., None] < 20, 255, RGB).astype(np.uint8)


def jpeg() -> bytes:
    return simplejpeg.encode_jpeg(RGB, 95, "RGB", "444")


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> str:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return str(path)


def assert_pixels(path: str, expected: np.ndarray, tolerance: int = 0) -> None:
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance
    assert image_size(path) == expected.shape[:2]


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "ppm"])
def test_lossless_rgb(tmp_path: Path, extension: str) -> None:
    assert_pixels(save(tmp_path / f"x.{extension}", RGB), RGB)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
def test_jpeg(tmp_path: Path, options: dict) -> None:
    assert_pixels(save(tmp_path / "x.jpg", RGB, quality=97, **options), RGB, 8)


def test_gray(tmp_path: Path) -> None:
    assert_pixels(save(tmp_path / "x.png", GRAY), GRAY_RGB)
    assert_pixels(save(tmp_path / "x.jpg", GRAY, quality=97), GRAY_RGB, 3)


def test_one_bit(tmp_path: Path) -> None:
    assert_pixels(save(tmp_path / "x.png", GRAY > 100), np.where(GRAY_RGB > 100, 255, 0).astype(np.uint8))


def test_palette(tmp_path: Path) -> None:
    image = Image.fromarray(RGB // 64 * 64).quantize(256, dither=Image.Dither.NONE)
    image.save(tmp_path / "x.png")
    assert_pixels(str(tmp_path / "x.png"), np.asarray(image.convert("RGB")))


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    assert_pixels(save(tmp_path / "rgba.png", np.dstack([RGB, ALPHA])), ON_WHITE)
    gray = np.where(X[..., None] < 20, 255, GRAY_RGB).astype(np.uint8)
    assert_pixels(save(tmp_path / "la.png", np.dstack([GRAY_RGB, ALPHA]), "LA"), gray, 1)


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.where(X < 20, 1, 0).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.save(tmp_path / "x.png", transparency=1)
    expected = np.where(X[..., None] < 20, 255, [10, 20, 30]).astype(np.uint8)
    assert_pixels(str(tmp_path / "x.png"), expected)


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path, extension: str) -> None:
    values = (X * 1000 + Y).astype(np.uint16)
    path = str(tmp_path / f"x.{extension}")
    cv2.imwrite(path, values)
    assert_pixels(path, np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2), 1)


def test_16_bit_rgb(tmp_path: Path) -> None:
    path = str(tmp_path / "x.png")
    cv2.imwrite(path, np.ascontiguousarray(RGB[..., ::-1].astype(np.uint16) * 257))
    assert_pixels(path, RGB, 1)


def test_float_pixels_are_0_to_1_or_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.tif", (GRAY / 255).astype(np.float32))
    assert_pixels(path, GRAY_RGB)
    with pytest.raises(BrokenImageError, match=r": pixels of mode F: expected 0\.\.1, found 0\.\.236"):
        read_image(save(tmp_path / "y.tif", GRAY.astype(np.float32)))


def test_cmyk_and_ycck_as_adobe_writes_them(tmp_path: Path) -> None:
    assert_pixels(save(tmp_path / "cmyk.jpg", RGB, "CMYK", quality=97), RGB, 4)
    inverted = np.ascontiguousarray(np.dstack([RGB, np.full_like(GRAY, 255)]))  # 255 - C, 255 - M, 255 - Y, 255 - K
    data = simplejpeg.encode_jpeg(inverted, 97, "CMYK", "444")
    assert simplejpeg.decode_jpeg_header(data)[2] == "YCCK"
    assert_pixels(write(tmp_path / "ycck.jpg", data), RGB, 5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_on_demand_only(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.jpg", RGB, exif=exif, quality=95)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    np.testing.assert_array_equal(read_image(path, exif_orientation=True), turned)
    image = EncodedImage(path, exif_orientation=True)
    assert (image.height, image.width) == turned.shape[:2]
    part = image.crop((4, 6, 20, 16), (20, 16))
    np.testing.assert_array_equal(part, turned[4:24, 6:22])
    assert read_image(path, exif_orientation=False).shape == RGB.shape


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 9)])
def test_tiny_and_thin_images(tmp_path: Path, shape: tuple[int, int]) -> None:
    for extension in ("jpg", "png"):
        path = save(tmp_path / f"x.{extension}", np.full((*shape, 3), 90, np.uint8))
        assert_pixels(path, np.full((*shape, 3), 90, np.uint8), 1)
        image = EncodedImage(path)
        for size in ((1, 1), (4, 8), (16, 16)):
            part = image.crop((0, 0, *shape), size)
            assert part.shape == (*size, 3)
            assert np.abs(part.astype(int) - 90).max() <= 1


# --- reduced decoding -------------------------------------------------------------------------------------------------


def smooth(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).uniform(0, 255, (7, 9, 3))
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(50, 60), (99, 101), (120, 160), (200, 250)])
@pytest.mark.parametrize("box", [(0, 0, 403, 601), (13, 37, 311, 415), (1, 3, 400, 333)])
def test_a_reduced_crop_is_the_full_crop_resized(tmp_path: Path, size: tuple, box: tuple) -> None:
    path = save(tmp_path / "x.jpg", smooth(403, 601), quality=97)
    top, left, height, width = box
    full = read_image(path)[top : top + height, left : left + width]
    expected = cv2.resize(full, size[::-1], interpolation=cv2.INTER_AREA)
    difference = np.abs(EncodedImage(path).crop(box, size).astype(int) - expected)
    assert difference.mean() < 2
    assert np.percentile(difference, 99) < 8


def test_decode_min_size(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", smooth(403, 601))
    assert EncodedImage(path).decode(min_size=(100, 100)).shape == (101, 151, 3)
    assert EncodedImage(path).decode(min_size=(102, 100)).shape == (202, 301, 3)
    assert EncodedImage(path).decode(min_size=(900, 900)).shape == (403, 601, 3)


# --- damage -----------------------------------------------------------------------------------------------------------


def broken(path: str) -> str:
    with pytest.raises(BrokenImageError) as caught:
        read_image(path)
    line = str(caught.value)
    assert line.startswith(path)
    assert "\n" not in line
    assert caught.value.path == path
    return caught.value.reason


@pytest.mark.parametrize("part", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_truncated(tmp_path: Path, part: float, extension: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    data = Path(save(tmp_path / f"whole.{extension}", noise)).read_bytes()
    assert "truncated" in broken(write(tmp_path / f"x.{extension}", data[: int(len(data) * part)]))


def test_a_truncated_jpeg_is_found_when_a_crop_is_read(tmp_path: Path) -> None:
    data = Path(save(tmp_path / "whole.jpg", smooth(400, 600))).read_bytes()
    with pytest.raises(BrokenImageError, match="truncated"):
        EncodedImage(write(tmp_path / "x.jpg", data[: len(data) // 2])).crop((0, 0, 400, 600), (50, 50))


def test_bytes_after_the_image_are_accepted(tmp_path: Path) -> None:
    assert_pixels(write(tmp_path / "x.jpg", jpeg() + b"\0" * 20), RGB, 4)


def test_files_that_are_not_images(tmp_path: Path) -> None:
    assert broken(write(tmp_path / "a.jpg", b"")) == "empty file (0 bytes)"
    assert "not an image" in broken(write(tmp_path / "b.jpg", b"<html>404</html>"))
    assert "not an image" in broken(write(tmp_path / "c.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"))
    (tmp_path / "d.jpg").mkdir()
    assert "directory" in broken(str(tmp_path / "d.jpg"))
    assert "No such file" in broken(str(tmp_path / "e.jpg"))


def test_an_absurdly_large_image(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    assert "too large" in broken(write(tmp_path / "x.png", png))
    data = jpeg()
    at = data.find(b"\xff\xc0") + 5
    assert "too large" in broken(
        write(tmp_path / "x.jpg", data[:at] + struct.pack(">HH", 65000, 65000) + data[at + 4 :])
    )


def test_the_error_survives_pickling_and_a_workers_traceback() -> None:
    error = BrokenImageError("a/b c.jpg", "truncated\nimage: x")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.reason, str(copy)) == ("a/b c.jpg", "truncated image: x", str(error))
    text = f"Caught BrokenImageError in worker 0.\nTraceback:\n  ...\nerrors.BrokenImageError: {error}\n"
    assert str(BrokenImageError(text)) == str(error)
