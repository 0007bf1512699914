"""Panels of stylized images, and their records."""

from __future__ import annotations

import torch
from PIL import Image

from visualization.style import StyleView

VIEW = StyleView()
IMAGE = Image.new("RGB", (40, 20), (10, 20, 30))
STYLIZED = {"stylized": torch.full((3, 20, 40), 200, dtype=torch.uint8), "random": torch.tensor(True)}


def test_panels_are_content_style_and_stylized() -> None:
    alone = VIEW.draw(IMAGE, STYLIZED, {}, None)
    assert alone.width == 2 * 40 + 4
    style = torch.full((3, 30, 30), 90, dtype=torch.uint8)
    drawn = VIEW.draw(IMAGE, STYLIZED, {"style": style}, None)
    assert drawn.width == 40 + 20 + 40 + 2 * 4  # the style image is scaled to the height of the content image
    assert [drawn.getpixel((x, drawn.height - 2)) for x in (1, 45, 70)] == [(10, 20, 30), (90,) * 3, (200,) * 3]


def test_annotated_images_are_the_stylized_ones() -> None:
    annotated = VIEW.annotate(IMAGE, STYLIZED, None, IMAGE.size, (1.0, 1.0))
    assert (annotated.size, annotated.getpixel((0, 0))) == ((40, 20), (200, 200, 200))


def test_a_record_has_the_size_and_names_random_features() -> None:
    record = VIEW.record(STYLIZED, None, (1.0, 1.0))
    assert record == {"stylized": [40, 20], "random_features": True}
    assert dict(zip(VIEW.columns(record), VIEW.rows(record)[0], strict=True)) == {
        "width": 40,
        "height": 20,
        "random_features": True,
    }
