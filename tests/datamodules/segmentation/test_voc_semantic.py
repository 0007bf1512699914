"""Semantic segmentation: batches, augmentation, prediction and invalid masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.loading import ResumingLoader, SeededDataset
from datamodules.segmentation.masks import save_ids
from datamodules.segmentation.voc_semantic import VOCSegmentation
from errors import DatasetError
from tests.datamodules.segmentation.conftest import ids_of, mask_path


def semantic(root: Any, **options: Any) -> VOCSegmentation:
    return VOCSegmentation(str(root), **{"crop_size": 40, "num_workers": 0, "batch_size": 4, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size: expected 1 or more, found 0"),
        ({"scale": (2.0, 1.0)}, "scale: expected 0 < smallest <= largest"),
        ({"image_size": 0}, "image_size: expected 1 or more"),
        ({"hflip": 2.0}, "hflip: expected a probability"),
        ({"color_jitter": -1.0}, "color_jitter: expected 0 to 1"),
        ({"train": ["train"]}, "train: expected image sets like VOC2007/trainval, found train"),
        ({"classes": ["x"] * 300}, "classes: expected 1 to 254 names, found 300"),
    ],
)
def test_arguments_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VOCSegmentation(**options)


def test_a_batch_follows_the_contract(drawn: Path) -> None:
    data = semantic(drawn)
    assert data.num_classes == 21
    assert data.class_names[:2] == ["background", "aeroplane"]
    batch = next(iter(data.train_dataloader()))
    assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (4, 3, 40, 40))
    assert (batch["mask"].dtype, batch["mask"].shape) == (torch.int64, (4, 40, 40))
    assert {0, 255} < set(batch["mask"].unique().tolist()) <= {0, 1, 2, 3, 255}
    assert "original_mask" not in batch
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch["image"], list)
    assert isinstance(batch["original_mask"], list)
    for image, mask in zip(batch["image"], batch["original_mask"], strict=True):
        assert mask.dtype == torch.int64
        assert mask.shape == image.shape[1:]
    assert set(batch) == {"image", "original_mask", "id"}
    sample = data.dataset("val")[0]
    stored = np.array(Image.open(mask_path(drawn, Path(sample["id"]).stem)))
    assert (sample["original_mask"].numpy() == stored).all()


def test_masks_are_not_resized_in_evaluation(drawn: Path) -> None:
    batch = next(iter(semantic(drawn, eval_image_size=32).val_dataloader()))
    whole = next(iter(semantic(drawn).val_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    for small, own in zip(batch["original_mask"], whole["original_mask"], strict=True):
        assert torch.equal(small, own)
    kept = next(iter(semantic(drawn, eval_image_size=(24, 1000)).val_dataloader()))["image"]
    assert all(min(image.shape[1:]) == 24 for image in kept)


def test_training_on_full_images(drawn: Path) -> None:
    batch = next(iter(semantic(drawn, crop_size=None, scale=(1.0, 1.0)).train_dataloader()))
    assert isinstance(batch["mask"], list)
    assert [mask.shape for mask in batch["mask"]] == [image.shape[1:] for image in batch["image"]]
    warped = next(iter(semantic(drawn, image_size=30, crop_size=28, scale=(1.0, 1.0)).train_dataloader()))
    assert warped["mask"].shape == (4, 28, 28)
    assert (warped["mask"] != 255).float().mean() > 0.7


def test_augmentation_is_a_function_of_seed_epoch_and_index(drawn: Path) -> None:
    def sample(seed: int, epoch: int, index: int, warm: int = 0) -> dict[str, Any]:
        dataset = SeededDataset(semantic(drawn, color_jitter=0.3).dataset("train"), seed, replace=True)
        for i in range(warm):
            dataset[(0, i, 0)]
        return dataset[(epoch, index, 0)]

    first = sample(1, 2, 3)
    again = sample(1, 2, 3, warm=3)
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["mask"], again["mask"])
    assert not torch.equal(first["mask"], sample(1, 3, 3)["mask"])
    assert not torch.equal(first["mask"], sample(2, 2, 3)["mask"])


def test_custom_classes_count_from_id_0(drawn: Path, tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("road\ncar\ntree\nsky\n")
    data = semantic(drawn, classes=str(names))
    assert data.class_names == ["road", "car", "tree", "sky"]
    assert next(iter(data.val_dataloader()))["original_mask"]


def test_predict_returns_images_at_their_original_size(drawn: Path) -> None:
    images = str(drawn / "VOCdevkit/VOC2012/JPEGImages")
    batch = next(iter(VOCSegmentation(images=images, num_workers=0, batch_size=4).predict_dataloader()))
    for image, path in zip(batch["image"], batch["id"], strict=True):
        with Image.open(path) as stored:
            assert stored.size == (image.shape[2], image.shape[1])
    small = VOCSegmentation(images=images, num_workers=0, batch_size=4, eval_image_size=20)
    assert next(iter(small.predict_dataloader()))["image"].shape == (4, 3, 20, 20)


def test_a_mask_of_another_size(root: Path) -> None:
    name = ids_of(root, "train")[0]
    path = mask_path(root, name)
    with Image.open(path) as mask:
        width, height = mask.size
    save_ids(str(path), np.zeros((height, width - 3), np.uint8))
    with pytest.raises(DatasetError) as caught:
        semantic(root).dataset("train")[0]
    text = str(caught.value)
    assert f"{name}.png: expected a mask of its image's size {width}x{height}, found {width - 3}x{height}" in text
    assert "\n" not in text


def test_an_id_beyond_the_classes(root: Path) -> None:
    name = ids_of(root, "train")[0]
    ids = np.array(Image.open(mask_path(root, name)))
    ids[0, 0] = 30
    save_ids(str(mask_path(root, name)), ids)
    with pytest.raises(DatasetError, match=rf"{name}.png: expected ids 0 to 20 or 255 \(void\), found id 30"):
        semantic(root).dataset("train")[0]


@pytest.mark.parametrize(("workers", "split"), [(0, "val"), (1, "train")])
def test_a_wrong_mask_stops_a_loader_in_one_line(root: Path, workers: int, split: str) -> None:
    """A worker reports it too, although its exception would arrive as the text of a traceback."""
    for name in ids_of(root, split):
        save_ids(str(mask_path(root, name)), np.zeros((5, 5), np.uint8))
    loader: ResumingLoader = getattr(semantic(root, num_workers=workers), f"{split}_dataloader")()
    with pytest.raises(DatasetError, match="expected a mask of its image's size") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)


def test_a_damaged_mask_is_replaced_in_training_and_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = mask_path(root, ids_of(root, "train")[0])
    path.write_bytes(path.read_bytes()[:60])
    batches = list(semantic(root).train_dataloader())
    assert sum(len(batch["id"]) for batch in batches) == 12
    assert f"skipped, 1 so far: {path}" in capsys.readouterr().err


def test_a_crop_of_void_alone_is_a_sample(root: Path) -> None:
    for name in ids_of(root, "train"):
        ids = np.array(Image.open(mask_path(root, name)))
        save_ids(str(mask_path(root, name)), np.full_like(ids, 255))
    batch = next(iter(semantic(root).train_dataloader()))
    assert (batch["mask"] == 255).all()
