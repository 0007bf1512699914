"""Options, prediction and listings that all classification datamodules share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.classification.base import list_classes
from datamodules.classification.image_folder import ImageFolder
from errors import DatasetError


def folder(**options: object) -> ImageFolder:
    return ImageFolder(None, **{"image_size": 16, "num_workers": 0, **options})  # type: ignore[arg-type]


def test_list_classes(tmp_path: Path) -> None:
    for name in ("val/b/2.png", "val/a/deep/1.png", "val/a/note.txt", "val/x.jpg", "val/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listing = list_classes(str(tmp_path), "val")
    assert listing.classes == ["a", "b"]
    assert [listing.names[i] for i in range(2)] == ["val/a/deep/1.png", "val/b/2.png"]
    assert (listing.labels.tolist(), listing.counts.tolist()) == ([0, 1], [1, 1])
    assert (listing.stray_files, listing.non_images) == (["x.jpg"], ["val/a/note.txt"])
    assert list_classes(str(tmp_path), "test").classes == []


# --- prediction -------------------------------------------------------------------------------------------------------


def test_predict(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png"):
        Image.new("RGB", (24, 20)).save(tmp_path / name)
    images = str(tmp_path)
    data = folder(images=images)
    assert data.class_names is None
    (batch,) = data.predict_dataloader()
    assert batch["id"] == [f"{images}/b.png", f"{images}/sub/a.png"]
    assert set(batch) == {"image", "id"}
    assert folder(images=f"{images}/b.png").dataset("predict")[0]["id"] == f"{images}/b.png"


def test_predict_orients_and_resizes_a_photo(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], 64, axis=1).repeat(3, axis=2)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif)
    image = folder(images=str(tmp_path), train_crop="pad").dataset("predict")[0]["image"]
    assert image.shape == (3, 16, 16)
    assert image[0, 0, 8] > 230
    assert image[0, -1, 8] < 25


def test_predict_without_images(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="^images: expected an image or a folder to predict, found none"):
        folder().dataset("predict")
    with pytest.raises(DatasetError, match="found nothing there"):
        folder(images=str(tmp_path / "x")).dataset("predict")


# --- options ----------------------------------------------------------------------------------------------------------


def test_the_resized_side() -> None:
    assert ImageFolder(image_size=224).resize == 256
    assert ImageFolder(image_size=299).resize == 342
    assert ImageFolder(image_size=32, train_crop="pad").resize is None
    assert ImageFolder(image_size=224, resize=(256, 256)).resize == (256, 256)
    assert ImageFolder(image_size=224, eval_crop_size=256).eval_transform.crop_size == 256


def test_options_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="hflip: expected a probability, found 2"):
        ImageFolder("/nowhere", hflip=2)
    with pytest.raises(ValueError, match=r"eval_crop_size: expected 1 to resize \(64\), found 224"):
        ImageFolder("/nowhere", resize=64)


def test_hyperparameters_are_plain() -> None:
    parameters = dict(ImageFolder("x", batch_size=5).hparams)
    assert (parameters["root"], parameters["batch_size"]) == ("x", 5)
    plain = (int, float, str, tuple, type(None))
    assert all(isinstance(value, plain) for value in parameters.values())
