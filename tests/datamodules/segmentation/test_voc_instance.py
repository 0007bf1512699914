"""Instance segmentation: masks, boxes and labels are transformed together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.segmentation.masks import save_ids
from datamodules.segmentation.voc_instance import VOCInstance
from errors import DatasetError
from tests.datamodules.segmentation.conftest import ids_of, mask_path


def instance(root: Any, **options: Any) -> VOCInstance:
    return VOCInstance(str(root), **{"num_workers": 0, "batch_size": 4, **options})


@pytest.mark.parametrize("train", ["VOC2012/train", "SBD/train"])
def test_instances_follow_the_contract(drawn: Path, train: str) -> None:
    data = instance(drawn, train=[train], image_size=(64, 100))
    assert data.num_classes == 20
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        for image, target in zip(batch["image"], batch["target"], strict=True):
            n = len(target["boxes"])
            assert n > 0
            assert (target["boxes"].dtype, target["boxes"].shape) == (torch.float32, (n, 4))
            assert (target["labels"].dtype, target["labels"].shape) == (torch.int64, (n,))
            assert (target["masks"].dtype, target["masks"].shape) == (torch.uint8, (n, *image.shape[1:]))
            assert target["difficult"].dtype == torch.bool
            assert not target["difficult"].any()
            assert set(target["masks"].unique().tolist()) <= {0, 1}
            assert set(target["labels"].tolist()) <= {0, 1, 2}
            assert target["masks"].sum(0).max() == 1
            for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
                assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
                assert all(edge.any() for edge in (mask[y1], mask[y2 - 1], mask[:, x1], mask[:, x2 - 1]))


def test_masks_boxes_and_labels_move_together(drawn: Path) -> None:
    plain, flipped = instance(drawn, hflip=0.0).dataset("train"), instance(drawn, hflip=1.0).dataset("train")
    for i in range(len(plain)):  # type: ignore[arg-type]
        a, b = plain[i], flipped[i]
        assert torch.equal(a["image"], b["image"].flip(2))
        assert torch.equal(a["target"]["masks"], b["target"]["masks"].flip(2))
        assert torch.equal(a["target"]["labels"], b["target"]["labels"])
        width = a["image"].shape[2]
        assert torch.equal(a["target"]["boxes"][:, [0, 2]], width - b["target"]["boxes"][:, [2, 0]])
        classes = torch.from_numpy(np.array(Image.open(mask_path(drawn, Path(a["id"]).stem))).astype(np.int64))
        for mask, label in zip(a["target"]["masks"], a["target"]["labels"], strict=True):
            assert classes[mask.bool()].mode().values == label + 1


def test_an_object_that_vanishes_goes_with_its_label(root: Path) -> None:
    """The first of three objects is a single pixel, which vanishes at a quarter of the size."""
    name = ids_of(root, "train")[0]
    with Image.open(mask_path(root, name)) as mask:
        shape = mask.size[::-1]
    objects, classes = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    objects[1, 1], classes[1, 1] = 1, 3
    objects[8:20, 8:20], classes[8:20, 8:20] = 2, 1
    objects[24:40, 20:40], classes[24:40, 20:40] = 3, 2
    save_ids(str(mask_path(root, name, "Object")), objects)
    save_ids(str(mask_path(root, name)), classes)
    whole = instance(root, hflip=0.0).dataset("train")[0]["target"]
    small = instance(root, hflip=0.0, image_size=(12, 100)).dataset("train")[0]["target"]
    assert whole["labels"].tolist() == [2, 0, 1]
    assert small["labels"].tolist() == [0, 1]
    assert (small["boxes"] - whole["boxes"][1:] / 4).abs().max() <= 1


def test_an_object_mask_of_another_size(root: Path) -> None:
    name = ids_of(root, "train")[0]
    with Image.open(mask_path(root, name)) as mask:
        width, height = mask.size
    save_ids(str(mask_path(root, name, "Object")), np.zeros((height + 1, width), np.uint8))
    with pytest.raises(DatasetError, match=rf"SegmentationObject/{name}.png: .*found {width}x{height + 1}"):
        instance(root).dataset("train")[0]


def test_evaluation_has_the_size_of_training(drawn: Path) -> None:
    """The metrics' objects keep the size on disk."""
    data = instance(drawn, image_size=(64, 100), hflip=0.0)
    train, val = data.dataset("train")[0], data.dataset("val")[0]
    assert min(train["image"].shape[1:]) == min(val["image"].shape[1:]) == 64
    assert "original_target" not in train
    with Image.open(mask_path(drawn, Path(val["id"]).stem, "Object")) as mask:
        ids = np.array(mask)
    original = val["original_target"]
    objects = [i for i in np.unique(ids) if i not in (0, 255)]
    assert torch.equal(original["masks"], torch.from_numpy(np.stack([ids == i for i in objects])).byte())
    assert torch.equal(original["labels"], val["target"]["labels"])
    scale = torch.tensor([val["image"].shape[2] / ids.shape[1], val["image"].shape[1] / ids.shape[0]] * 2)
    assert (original["boxes"] * scale - val["target"]["boxes"]).abs().max() <= 1


def test_an_object_that_vanishes_stays_in_the_metrics(root: Path) -> None:
    name = ids_of(root, "val")[0]
    with Image.open(mask_path(root, name)) as mask:
        shape = mask.size[::-1]
    objects, classes = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    objects[1, 1], classes[1, 1] = 1, 3
    save_ids(str(mask_path(root, name, "Object")), objects)
    save_ids(str(mask_path(root, name)), classes)
    sample = instance(root, image_size=(12, 100)).dataset("val")[0]
    assert sample["target"]["labels"].tolist() == []
    assert sample["original_target"]["labels"].tolist() == [2]
    assert sample["original_target"]["boxes"].tolist() == [[1, 1, 2, 2]]


def test_predict_has_the_size_of_training(drawn: Path) -> None:
    images = str(drawn / "VOCdevkit/VOC2012/JPEGImages")
    for options, expected in (({"image_size": 30}, (30, 30)), ({"image_size": 30, "eval_image_size": 20}, (20, 20))):
        data = VOCInstance(images=images, num_workers=0, batch_size=1, **options)  # type: ignore[arg-type]
        assert next(iter(data.predict_dataloader()))["image"].shape[2:] == expected


def test_another_size_in_evaluation_is_reported(drawn: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        instance(drawn, image_size=(64, 100), eval_image_size=(64, 100)).dataset("val")
    assert "image size" not in caplog.text
    with caplog.at_level("INFO"):
        instance(drawn, image_size=(64, 100), eval_image_size=80).dataset("val")
    expected = "val: image size 80, in training [64, 100]; set --data.eval_image_size to change it"
    assert [record.message for record in caplog.records].count(expected) == 1
