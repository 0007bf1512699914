"""The synthetic dataset in the layout of ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datamodules.classification.image_folder import ImageFolder
from datamodules.folders import list_images
from datamodules.images import EncodedImage, read_image
from datamodules.synthetic.drawing import TEXTURED_SHAPES
from datamodules.synthetic.imagenet import write_imagenet
from errors import UserError


def test_the_layout(tmp_path: Path) -> None:
    names = write_imagenet(str(tmp_path), classes=3, train=20, val=5, size=32)
    data = ImageFolder(str(tmp_path), image_size=32)
    assert data.class_names == names == sorted(TEXTURED_SHAPES[:3])
    assert data.listing("train").counts.tolist() == [20] * 3
    assert data.listing("val").counts.tolist() == [5] * 3
    images = [EncodedImage(path) for path in list_images(str(tmp_path / "train"))]
    assert {min(image.height, image.width) for image in images} == {32}
    assert sum(image.mode == "L" for image in images) == 3


def test_images_depend_only_on_the_arguments(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_imagenet(str(tmp_path / name), classes=2, train=3, val=2, size=24, seed=seed)
    a, b, c = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.JPEG")}
        for name in "abc"
    )
    assert a == b
    assert a.keys() == c.keys()
    assert not set(a.values()) & set(c.values())
    assert len(set(a.values())) == len(a)


def test_mean_colors_do_not_reveal_the_classes(tmp_path: Path) -> None:
    """The nearest mean color is a weak classifier, so a network has to learn shapes."""
    write_imagenet(str(tmp_path), classes=4, train=40, val=25, size=32)

    def means(split: str) -> np.ndarray:
        colors = [read_image(path).mean((0, 1)) for path in list_images(str(tmp_path / split))]
        return np.array(colors).reshape(4, -1, 3)

    centers = means("train").mean(1)
    distance = ((means("val")[:, :, None] - centers) ** 2).sum(-1)
    assert (distance.argmin(-1) == np.arange(4)[:, None]).mean() < 0.6


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"classes": 1}, "classes: expected 2 to 32, found 1"), ({"size": 4}, "size: expected 16"), ({"val": 0}, "val")],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        write_imagenet(str(tmp_path), **options)
