"""DeconvNet's crops of objects and proposals: their masks, boxes and random numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from datamodules.loading import SeededDataset
from datamodules.proposals import proposal_path, read_image_proposals, write_proposals
from datamodules.segmentation.instance_crops import (
    InstanceCropDataset,
    VOCInstanceCrops,
    add_context,
    crop_with_padding,
    single_object_mask,
)
from datamodules.segmentation.masks import read_ids, save_ids
from datamodules.segmentation.voc_instance import VOCInstance
from datamodules.synthetic.voc_segmentation import write_voc_segmentation
from datamodules.transforms import FILL_COLOR, VOID, MaskTransform
from errors import DatasetError
from tools import proposals as command
from tools.proposals import main

CLASSES = ["background", "aeroplane", "bicycle", "bird"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_segmentation(str(folder), classes=3, train=4, val=2, size=48)
    return folder


def crops(root: Path, **options: Any) -> VOCInstanceCrops:
    small = {"classes": CLASSES, "image_size": 40, "crop_size": 32, "num_workers": 0, "batch_size": 4, "seed": 0}
    return VOCInstanceCrops(str(root), **{**small, **options})


def write_boxes(folder: Path, name: str, boxes: np.ndarray) -> None:
    write_proposals(proposal_path(str(folder), name), boxes.astype(np.float32), 2000)


# --- crops ------------------------------------------------------------------------------------------------------------


def test_a_box_with_context() -> None:
    assert add_context(np.array([10.0, 20.0, 110.0, 70.0])) == (0, 15, 120, 75)
    assert add_context(np.array([0.0, 0.0, 50.0, 50.0])) == (-5, -5, 55, 55)
    left, top, right, bottom = add_context(np.array([3.0, 3.0, 3.1, 3.1]))
    assert (right - left, bottom - top) == (1, 1)


def test_a_crop_beyond_the_image() -> None:
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    found = crop_with_padding(image, (-1, 1, 4, 6), FILL_COLOR)
    assert found.shape == (5, 5, 3)
    assert (found[:3, 1:] == image[1:, :4]).all()
    assert (found[3:] == FILL_COLOR).all()
    assert (found[:, 0] == FILL_COLOR).all()
    mask = crop_with_padding(image[..., 0], (3, -2, 7, 2), VOID)
    assert (mask == [[255] * 4, [255] * 4, [9, 12, 255, 255], [24, 27, 255, 255]]).all()


def test_all_but_the_object_is_background() -> None:
    ids = np.array([[0, 1, 2], [2, 255, 1]], np.uint8)
    assert single_object_mask((ids == 2).astype(np.uint8), 4, ids == 255).tolist() == [[0, 0, 5], [5, 255, 0]]


# --- stages -----------------------------------------------------------------------------------------------------------


def test_the_first_stage_shows_each_object_by_itself(drawn: Path) -> None:
    """Every crop is the enlarged box of an object, with the class of that object only."""
    dataset = crops(drawn).dataset("train")
    assert isinstance(dataset, InstanceCropDataset)
    dataset.transform = MaskTransform()  # keeps the crop
    reference = VOCInstance(str(drawn), classes=CLASSES[1:], hflip=0).dataset("train")
    seeded = SeededDataset(dataset, 0, True)
    drawn_objects = 0
    for index in range(len(dataset)):
        target = reference[index]["target"]
        boxes = [add_context(box) for box in target["boxes"].numpy()]
        found = set()
        for epoch in range(12):
            sample = seeded[epoch, index, 0]
            crop = sample["mask"].numpy()
            hits = []
            for k, box in enumerate(boxes):
                label = int(target["labels"][k]) + 1
                own = crop_with_padding(target["masks"][k].numpy() * np.uint8(label), box, VOID)
                if own.shape == crop.shape and ((crop == own) | (crop == VOID)).all() and (crop == label).any():
                    hits.append(k)
            assert hits
            assert set(np.unique(crop)) <= {0, VOID, *(int(target["labels"][k]) + 1 for k in hits)}
            found.update(hits)
        drawn_objects += len(found)
    objects = sum(len(reference[i]["target"]["labels"]) for i in range(len(dataset)))
    assert drawn_objects > 0.9 * objects


def test_the_second_stage_shows_proposals_that_overlap_an_object(drawn: Path, tmp_path: Path) -> None:
    reference = VOCInstance(str(drawn), classes=CLASSES[1:], hflip=0).dataset("train")
    rng = np.random.default_rng(0)
    near: dict[str, set[tuple[int, int, int, int]]] = {}
    for index in range(len(reference)):  # type: ignore[arg-type]
        sample = reference[index]
        boxes = sample["target"]["boxes"].numpy()
        corners = rng.uniform(0, 40, (30, 2))
        jittered = np.repeat(boxes, 3, 0) + rng.uniform(-4, 4, (3 * len(boxes), 4))
        anywhere = np.concatenate([corners, corners + rng.uniform(4, 12, (30, 2))], 1)
        proposals = np.concatenate([jittered, anywhere]).astype(np.float32) if index else anywhere[:1] * 0 + 1
        write_boxes(tmp_path, sample["id"], proposals)
        overlap = box_iou(torch.from_numpy(proposals.astype(np.float32)), torch.from_numpy(boxes))
        kept = proposals[(overlap >= 0.5).any(1).numpy()]
        near[sample["id"]] = {add_context(box) for box in (kept if len(kept) else boxes)}
    dataset = crops(drawn, crops="proposals", proposals=str(tmp_path)).dataset("train")
    assert isinstance(dataset, InstanceCropDataset)
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def remember(pixels: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append((pixels, mask))
        return pixels, mask

    dataset.transform = remember  # type: ignore[assignment]
    seeded = SeededDataset(dataset, 0, True)
    several = 0
    for index in range(len(dataset)):
        name = reference[index]["id"]
        files = dataset.files[index]
        ids = read_ids(str(drawn / "VOCdevkit" / files.class_mask))
        for epoch in range(6):
            seeded[epoch, index, 0]
            _, mask = seen[-1]
            # All classes count: the mask is a crop of the image's mask.
            assert any(
                (m := crop_with_padding(ids, box, VOID)).shape == mask.shape and (m == mask).all() for box in near[name]
            )
            several += len(set(np.unique(mask)) - {0, VOID}) > 1
    assert several > 0


def test_an_image_without_objects_is_used_as_a_whole(drawn: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    name = (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").read_text().split()[0]
    for kind in ("Class", "Object"):
        path = root / "VOCdevkit/VOC2012" / f"Segmentation{kind}" / f"{name}.png"
        save_ids(str(path), np.zeros_like(read_ids(str(path))))
    dataset = crops(root).dataset("train")
    sample = SeededDataset(dataset, 0, True)[0, 0, 0]
    assert sample["mask"].shape == (32, 32)
    assert set(sample["mask"].unique().tolist()) <= {0, VOID}


def test_crops_depend_on_seed_epoch_and_index_alone(drawn: Path) -> None:
    def batch(seed: int, epoch: int, order: list[int]) -> dict[int, torch.Tensor]:
        dataset = SeededDataset(crops(drawn).dataset("train"), seed, True)
        return {i: dataset[epoch, i, 0]["image"] for i in order}

    first, again = batch(0, 1, [0, 1, 2, 3, 4]), batch(0, 1, [4, 2, 0, 3, 1])
    assert all(torch.equal(first[i], again[i]) for i in first)
    assert first[0].shape == (3, 32, 32)
    assert first[0].dtype == torch.uint8
    others = batch(0, 2, [0, 1, 2, 3, 4]), batch(1, 1, [0, 1, 2, 3, 4])
    for other in others:
        assert sum(torch.equal(first[i], other[i]) for i in first) < 2


def test_batches_of_both_stages_and_of_evaluation(drawn: Path, tmp_path: Path) -> None:
    data = crops(drawn)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["mask"].shape == (4, 32, 32)
    assert batch["mask"].dtype == torch.int64
    assert "proposals" not in next(iter(data.val_dataloader()))
    reference = VOCInstance(str(drawn), classes=CLASSES[1:]).dataset("val")
    for i in range(len(reference)):  # type: ignore[arg-type]
        write_boxes(tmp_path, reference[i]["id"], np.array([[1.0, 2.0, 30.0, 40.0 + i]]))
    # The first stage needs no proposals of its training images.
    data = crops(drawn, proposals=str(tmp_path))
    assert "proposals" not in next(iter(data.train_dataloader()))
    evaluated = next(iter(data.val_dataloader()))
    assert [len(p) for p in evaluated["proposals"]] == [1] * 4
    assert evaluated["proposals"][2].tolist() == [[1, 2, 30, 42]]
    assert "mask" not in evaluated
    pairs = zip(evaluated["image"], evaluated["original_mask"], strict=True)
    assert all(image.shape[1:] == mask.shape for image, mask in pairs)


# --- errors and tools ------------------------------------------------------------------------------------------------


def test_the_command_that_makes_the_proposals(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It covers images of VOC and SBD and writes only to the output folder."""
    monkeypatch.setattr(command, "selective_search", lambda image, top: np.array([[0, 0, 9, 9]], np.float32))
    out = tmp_path / "a" / "proposals"
    options = ["--masks", "--root", str(drawn), "--out", str(out), "--workers", "1"]
    assert main([*options, "--sets", "SBD/trainaug", "VOC2012/val"]) == 0
    assert "already" in capsys.readouterr().out
    data = crops(drawn, train=["SBD/trainaug"], crops="proposals", proposals=str(out))
    listed = [data.files("train").images, data.files("val").images]
    names = [images[i] for images in listed for i in range(len(images))]
    assert any("benchmark_RELEASE" in name for name in names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert len(list(out.rglob("*.boxes"))) == len(set(names))
    assert read_image_proposals(str(out), names[-1]).tolist() == [[0, 0, 9, 9]]
    assert len(next(iter(data.train_dataloader()))["id"]) == 4
    assert main([*options, "--sets", "VOC2012/none"]) == 2


def test_bad_arguments_and_missing_proposals(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match="for the second stage, found none; set --data.proposals FOLDER after .*--masks --root "
    ):
        crops(drawn, crops="proposals").dataset("train")
    with pytest.raises(
        DatasetError, match="expected a file for each of 12 images.*--masks --root .*--sets VOC2012/train --out"
    ):
        crops(drawn, crops="proposals", proposals=str(tmp_path)).dataset("train")
    with pytest.raises(DatasetError, match="--sets VOC2012/val"):
        crops(drawn, proposals=str(tmp_path)).dataset("val")
    with pytest.raises(ValueError, match="crops: expected objects or proposals, found boxes"):
        crops(drawn, crops="boxes")
    with pytest.raises(ValueError, match=r"crop_size: expected at most image_size \(40\), found 50"):
        crops(drawn, crop_size=50)
