"""What painters share: styles of any kind of file, mixtures, sizes, what is left of a style."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.style.painting import (
    enlarged,
    painting_metrics,
    read_style,
    score_paintings,
    shares_of,
    to_pixels,
)


def test_styles_of_any_kind_are_read_right(tmp_path: Path) -> None:
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
    assert torch.equal(read_style(str(tmp_path / "sixteen.png"), None), expected)
    assert torch.equal(read_style(str(tmp_path / "cmyk.tif"), None), expected)
    found = read_style(str(tmp_path / "clear.png"), None)
    assert torch.equal(found[:, :, 1:], expected[:, :, 1:])
    assert (found[:, :, 0] == 1).all()
    assert torch.equal(read_style(str(tmp_path / "turned.png"), None), expected.rot90(-1, (2, 3)))
    assert read_style(str(tmp_path / "cmyk.tif"), 3).shape == (1, 3, 2, 3)


def test_what_is_no_style(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("text")
    for name in ("text.jpg", "none.jpg"):
        with pytest.raises(ValueError, match=f"style: expected an image, found .*{name}"):
            read_style(str(tmp_path / name), None)


def test_shares() -> None:
    assert shares_of(["a", "b"], None) == [0.5, 0.5]
    assert shares_of(["a", "b"], [1, 3]) == [0.25, 0.75]
    assert shares_of([], None) == []
    for mix in ([1.0], [-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="mix: expected one number of 0 or more a style, 2, found"):
            shares_of(["a", "b"], mix)


def test_sizes_and_pixels() -> None:
    images = torch.rand(1, 3, 17, 3)
    large = enlarged(images, 8)
    assert large.shape == (1, 3, 24, 16)
    assert torch.equal(large[..., :17, :3], images)
    assert torch.equal(large[0, :, -1, -1], images[0, :, -1, -1])
    assert to_pixels(torch.tensor([-1.0, 0.0, 0.5019, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]
    assert require_equal_size([images[0], images[0]]).shape == (2, 3, 17, 3)
    with pytest.raises(ValueError, match="images of one size, found several"):
        require_equal_size([images[0], large[0]])


def test_what_is_left_of_a_style_is_a_mean_over_pictures() -> None:
    metrics = painting_metrics("content", "style")
    for style, unchanged in (([1.0, 2.0], [2.0, 2.0]), ([3.0], [30.0])):
        terms = {"content": torch.ones(len(style)), "style": torch.tensor(style)}
        score_paintings(metrics, terms, torch.tensor(unchanged))
    values = {name: value.item() for name, value in metrics.compute().items()}
    expected = {"content": 1, "style": 2, "loss": 3, "style_ratio": (0.5 + 1 + 0.1) / 3}
    assert values == pytest.approx(expected)
