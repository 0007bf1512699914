"""Shared code of style transfer: style images, interpolation weights, padding, metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from errors import UserError
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.style.stylization import (
    normalize_interpolation_weights,
    pad_replicate,
    read_style_image,
    read_styles,
    stylization_metrics,
    to_uint8,
    update_stylization_metrics,
)


def test_style_images_of_any_format_are_read(tmp_path: Path) -> None:
    half = np.zeros((4, 6), np.uint8)
    half[:, 3:] = 200
    rgb = np.repeat(half[..., None], 3, 2)
    Image.fromarray(half.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    clear = np.dstack([rgb, np.full((4, 6), 255, np.uint8)])
    clear[0] = 0
    Image.fromarray(clear).save(tmp_path / "clear.png")
    turned = Image.fromarray(rgb)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tif")
    expected = torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255
    assert torch.equal(read_style_image(str(tmp_path / "sixteen.png"), None), expected)
    assert torch.equal(read_style_image(str(tmp_path / "cmyk.tif"), None), expected)
    found = read_style_image(str(tmp_path / "clear.png"), None)
    assert torch.equal(found[:, :, 1:], expected[:, :, 1:])
    assert (found[:, :, 0] == 1).all()
    assert torch.equal(read_style_image(str(tmp_path / "turned.png"), None), expected.rot90(-1, (2, 3)))
    assert read_style_image(str(tmp_path / "cmyk.tif"), 3).shape == (1, 3, 2, 3)


def test_unreadable_style_images(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("text")
    for name in ("text.jpg", "none.jpg"):
        with pytest.raises(ValueError, match=f"style: expected an image, found .*{name}"):
            read_style_image(str(tmp_path / name), None)


def test_interpolation_weights() -> None:
    assert normalize_interpolation_weights(None, 2) == [0.5, 0.5]
    assert normalize_interpolation_weights([1, 3], 2) == [0.25, 0.75]
    assert normalize_interpolation_weights(None, 0) == []
    for weights in ([1.0], [-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(
            ValueError, match=r"style_interpolation_weights: expected one weight of 0 or more per style \(2\)"
        ):
            normalize_interpolation_weights(weights, 2)


def test_sizes_and_pixels() -> None:
    images = torch.rand(1, 3, 17, 3)
    padded = pad_replicate(images, 8)
    assert padded.shape == (1, 3, 24, 16)
    assert torch.equal(padded[..., :17, :3], images)
    assert torch.equal(padded[0, :, -1, -1], images[0, :, -1, -1])
    assert to_uint8(torch.tensor([-1.0, 0.0, 0.5019, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]
    assert require_equal_size([images[0], images[0]]).shape == (2, 3, 17, 3)
    with pytest.raises(ValueError, match="images of one size, found 3x17, 16x24"):
        require_equal_size([images[0], padded[0]])


def test_style_ratio_is_a_mean_over_images() -> None:
    metrics = stylization_metrics("content", "style")
    for style, content_style in (([1.0, 2.0], [2.0, 2.0]), ([3.0], [30.0])):
        terms = {"content": torch.ones(len(style)), "style": torch.tensor(style)}
        update_stylization_metrics(metrics, terms, torch.tensor(content_style))
    values = {name: value.item() for name, value in metrics.compute().items()}
    expected = {"content": 1, "style": 2, "loss": 3, "style_ratio": (0.5 + 1 + 0.1) / 3}
    assert values == pytest.approx(expected)


def test_a_tiny_style_image_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "tiny.png")
    for size, max_size, found in (((2, 2), None, "2x2"), ((300, 15), None, "300x15"), ((640, 64), 128, "128x13")):
        Image.new("RGB", size).save(path)
        message = f"style: expected an image of at least 16x16 pixels, found {path} with {found}; use a larger image"
        with pytest.raises(UserError, match=f"^{message}$"):
            read_styles([path], max_size)
    Image.new("RGB", (16, 16)).save(path)
    assert read_styles([path], None)[0].shape == (1, 3, 16, 16)
