"""Content and style images: pairs, folders, and messages for wrong input."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.style.style_images import ImagePair, RandomCropTransform, StyleImages
from datamodules.synthetic.__main__ import write
from datamodules.synthetic.style_images import STYLE_TEXTURES, write_style_images
from errors import DatasetError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("style")
    write("style_images", str(folder), contents=20, styles=7, size=40)
    return folder


def module(root: Any, **options: Any) -> StyleImages:
    return StyleImages(str(root), **{"image_size": 32, "num_workers": 0, "batch_size": 4, "seed": 0, **options})


def pairs(loader: Any, epoch: int, rank: int = 0, world: int = 1) -> dict[str, int]:
    """For each content image a number that identifies its style."""
    loader.training, loader.sampler.epoch, loader.sampler.rank, loader.sampler.world = False, epoch, rank, world
    batches = list(loader)
    return {i: int(s.long().sum()) for batch in batches for i, s in zip(batch["id"], batch["style"], strict=True)}


def test_pairs_are_a_function_of_seed_epoch_and_image(root: Path) -> None:
    one, again, next_epoch = (pairs(module(root).train_dataloader(), epoch) for epoch in (3, 3, 4))
    assert one == again
    assert one != next_epoch
    assert pairs(module(root, seed=1).train_dataloader(), 3) != one
    ranks = [pairs(module(root).train_dataloader(), 3, rank, 2) for rank in (0, 1)]
    assert ranks[0] | ranks[1] == one
    assert pairs(module(root, batch_size=3, num_workers=1).train_dataloader(), 3) == one


def test_contents_are_held_out(root: Path) -> None:
    data = module(root)
    train, val = ({data.dataset(split)[i]["id"] for i in range(len(data.dataset(split)))} for split in ("train", "val"))  # type: ignore[arg-type]
    assert not train & val
    assert len(train | val) == 20
    assert 1 <= len(val) <= 6
    with pytest.warns(UserWarning, match="7 images are too few to hold out some; validation uses them all"):
        assert len(module(root, content=str(root / "style")).dataset("val")) == 7  # type: ignore[arg-type]
    other = module(root, val_content=str(root / "style"), val_style=str(root / "content"))
    assert (len(other.dataset("train")), len(other.dataset("val"))) == (20, 7)  # type: ignore[arg-type]


def test_evaluation_takes_styles_in_turn(root: Path) -> None:
    first, second = (module(root).dataset("val") for _ in range(2))
    for i in range(len(first)):  # type: ignore[arg-type]
        assert torch.equal(first[i]["style"], second[i]["style"])
    assert first[0]["image"].shape == first[0]["style"].shape == (3, 32, 32)
    assert "style" not in module(root, with_style=False).dataset("train")[0]


def test_crops_lie_inside_and_everywhere(tmp_path: Path) -> None:
    """Pixels encode their coordinates: crops of 40 lie anywhere in an image of 80x50 pixels."""
    y, x = np.mgrid[:50, :80]
    cv2.imwrite(str(tmp_path / "a.png"), np.stack([0 * x, y, x], -1).astype(np.uint8))
    random.seed(0)
    corners = set()
    for _ in range(300):
        crop = RandomCropTransform(40, 50)(str(tmp_path / "a.png"))
        assert (crop[0, 0, -1] - crop[0, 0, 0], crop[1, -1, 0] - crop[1, 0, 0]) == (39, 39)
        corners.add((int(crop[0, 0, 0]), int(crop[1, 0, 0])))
    assert {min(x for x, _ in corners), max(x for x, _ in corners)} == {0, 40}
    assert {min(y for _, y in corners), max(y for _, y in corners)} == {0, 10}


def test_any_image_comes_as_rgb(tmp_path: Path) -> None:
    """One pixel, 900x1, transparent, CMYK, palette, animated and 16-bit images."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    folder = tmp_path / "content"
    folder.mkdir()
    pixels.resize((1, 1)).save(folder / "one.png")
    pixels.resize((900, 1)).save(folder / "thin.png")
    pixels.convert("RGBA").save(folder / "transparent.png")
    pixels.convert("CMYK").save(folder / "print.jpg")
    pixels.convert("P").save(folder / "palette.png")
    pixels.save(folder / "film.webp", save_all=True, append_images=[pixels.rotate(90)])
    Image.fromarray(rng.integers(0, 65536, (40, 60), dtype=np.uint16)).save(folder / "deep.png")
    data = module(tmp_path, with_style=False)
    for split in ("train", "val"):
        with pytest.warns(UserWarning, match="too few to hold out") if split == "val" else contextlib.nullcontext():
            dataset = data.dataset(split)  # type: ignore[arg-type]
        for i in range(len(dataset)):  # type: ignore[arg-type]
            assert dataset[i]["image"].shape == (3, 32, 32)
    data = StyleImages(images=str(folder), max_size=50)
    shapes = {Path(d["id"]).name: tuple(d["image"].shape) for d in map(data.dataset("predict").__getitem__, range(7))}
    assert shapes["one.png"] == (3, 1, 1)
    assert shapes["thin.png"] == (3, 1, 50)
    assert shapes["print.jpg"] == (3, 33, 50)


def test_a_text_named_jpg_is_skipped_and_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_style_images(str(tmp_path), contents=3, styles=2, size=40)
    (tmp_path / "content" / "aaa.jpg").write_text("no image")
    whole = (tmp_path / "content" / "000.jpg").read_bytes()
    (tmp_path / "content" / "000.jpg").write_bytes(whole[: len(whole) // 2])
    found = pairs(module(tmp_path, broken_images="skip").train_dataloader(), 0)
    assert len(found) == 2
    lines = capsys.readouterr().err
    assert "skipped, 2 so far" in lines
    assert "aaa.jpg" in lines
    assert "000.jpg" in lines


def test_the_pair(root: Path) -> None:
    content, style = (sorted((root / name).iterdir())[0] for name in ("content", "style"))
    data = ImagePair(str(content), str(style), image_size=30, style_size=20, steps=5)
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    assert max(batches[0]["image"].shape[2:]) == 30
    assert batches[0]["style"].shape == (1, 3, 20, 20)
    assert all(torch.equal(batches[0]["image"], batch["image"]) for batch in batches)
    assert len(data.val_dataloader()) == 1
    assert "style" not in next(iter(ImagePair(str(content)).train_dataloader()))


def test_bad_input(tmp_path: Path, root: Path) -> None:
    with pytest.raises(DatasetError, match="root: expected a folder with content/ and style/, found none"):
        StyleImages().dataset("train")
    with pytest.raises(DatasetError, match="/style: expected a folder of images, found nothing there"):
        module(tmp_path).dataset("train")
    with pytest.raises(DatasetError, match="content: expected an image, found none; set --data.content IMAGE"):
        ImagePair().dataset("train")
    for options, message in (
        ({"image_size": 0}, "image_size: expected 1 to resize"),
        ({"image_size": 64, "resize": 32}, r"image_size: expected 1 to resize \(32\), found 64"),
        ({"max_size": 0}, "max_size: expected 1 or more, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            module(root, **options)
    for options, message in (
        ({"steps": 0}, "steps: expected 1 or more, found 0"),
        ({"style_size": 0}, "style_size: expected 1 or more, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ImagePair("a.jpg", **options)


def test_textures_of_many_kinds(tmp_path: Path) -> None:
    kinds = write_style_images(str(tmp_path), contents=1, styles=6, size=32)
    assert kinds == list(STYLE_TEXTURES)
    images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "style").iterdir())]
    assert all(image.shape == (32, 32, 3) for image in images)
    assert all(image.std() > 10 for image in images)


def test_names_that_are_not_utf8(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    for folder in ("content", "style"):
        first = sorted((tmp_path / "root" / folder).iterdir())[0]
        os.rename(first, os.fsencode(first.parent) + b"/caf\xe9.jpg")
    data = module(tmp_path / "root")
    ids = {data.dataset(split)[i]["id"] for split in ("train", "val") for i in range(len(data.dataset(split)))}  # type: ignore[arg-type]
    assert str(tmp_path / "root" / "content" / "caf\udce9.jpg") in ids
    assert len(ids) == 20
