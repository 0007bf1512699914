"""Masks of VOC and SBD: ids, void, joint augmentation, the set built from both, and what can be wrong with them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

import datamodules.segmentation.voc as segmentation
from datamodules.loading import ResumingLoader, SeededDataset, collate
from datamodules.segmentation.masks import masks_and_boxes, read_ids, read_mask, read_objects, save_ids
from datamodules.segmentation.voc import VOCInstance, VOCSegmentation
from datamodules.synthetic.segmentation import write_voc_segmentation
from datamodules.transforms import FILL, VOID, MaskTransform
from datamodules.voc import voc_palette
from errors import BrokenImageError, DatasetError
from tools.color_masks import main, read_colors, to_ids


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_segmentation(str(folder), classes=3, train=4, val=4, size=48)
    return folder


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "root"))


def semantic(root: Any, **options: Any) -> VOCSegmentation:
    return VOCSegmentation(str(root), **{"crop_size": 40, "num_workers": 0, "batch_size": 4, **options})


def instance(root: Any, **options: Any) -> VOCInstance:
    return VOCInstance(str(root), **{"num_workers": 0, "batch_size": 4, **options})


def ids_of(root: Path, split: str) -> list[str]:
    return (root / f"VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt").read_text().split()


def mask_path(root: Path, name: str, kind: str = "Class") -> Path:
    return root / "VOCdevkit" / "VOC2012" / f"Segmentation{kind}" / f"{name}.png"


# --- masks ------------------------------------------------------------------------------------------------------------


def test_the_palette_is_vocs() -> None:
    """VOC's first and last colors, as its documentation prints them."""
    colors = voc_palette()
    assert colors.shape == (256, 3)
    assert colors[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    assert len(np.unique(colors, axis=0)) == 256


def test_a_palettes_indices_are_the_ids(tmp_path: Path) -> None:
    """Where a conversion to gray, or OpenCV's reader of colors, gives other numbers."""
    ids = np.array([[0, 1, 2], [15, 20, 255]], np.uint8)
    path = str(tmp_path / "mask.png")
    save_ids(path, ids)
    assert (read_ids(path) == ids).all()
    assert (read_mask(path, 21, (2, 3)) == ids).all()
    assert (np.array(Image.open(path).convert("L")) != ids).any()
    gray = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
    assert gray is not None
    assert (gray != ids).any()
    Image.fromarray(ids).save(path)  # no palette: gray values are ids too
    assert (read_ids(path) == ids).all()


def test_sbds_structures(tmp_path: Path) -> None:
    shown = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    for name, fields in (
        ("GTcls", {"Segmentation": np.array([[0, 9, 9], [4, 4, 0]], np.uint8)}),
        ("GTinst", {"Segmentation": shown, "Categories": np.array([[9], [4]], np.uint8)}),
    ):
        savemat(tmp_path / f"{name}.mat", {name: fields})
    assert read_ids(str(tmp_path / "GTcls.mat")).tolist() == [[0, 9, 9], [4, 4, 0]]
    ids, labels = read_objects(str(tmp_path / "GTinst.mat"), "", 20, (2, 3))
    assert (ids == shown).all()
    assert labels[:4].tolist() == [-1, 8, 3, -1]
    with pytest.raises(DatasetError, match=r"GTinst.mat: found an object of class 9, expected 1 to 5"):
        read_objects(str(tmp_path / "GTinst.mat"), "", 5, (2, 3))
    (tmp_path / "broken.mat").write_bytes(b"no mat")
    with pytest.raises(BrokenImageError, match="expected SBD's GTcls or GTinst"):
        read_ids(str(tmp_path / "broken.mat"))


def test_an_objects_class_is_that_of_most_of_its_pixels(tmp_path: Path) -> None:
    objects = np.array([[1, 1, 1, 255], [7, 7, 0, 0]], np.uint8)
    classes = np.array([[3, 3, 2, 255], [1, 255, 0, 0]], np.uint8)
    paths = [str(tmp_path / name) for name in ("objects.png", "classes.png")]
    for path, ids in zip(paths, (objects, classes), strict=True):
        save_ids(path, ids)
    ids, labels = read_objects(*paths, 20, (2, 4))  # type: ignore[call-arg]
    assert (labels[1], labels[7], labels[0], labels[255]) == (2, 0, -1, -1)
    masks, boxes, found = masks_and_boxes(ids, labels)
    assert found.tolist() == [2, 0]
    assert masks.tolist() == [[[1, 1, 1, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 0, 0]]]
    assert boxes.tolist() == [[0, 0, 3, 1], [0, 1, 2, 2]]
    save_ids(paths[1], np.where(classes == 1, 0, classes).astype(np.uint8))
    with pytest.raises(BrokenImageError, match=r"objects.png: object 7 has no class: see .*classes.png"):
        read_objects(*paths, 20, (2, 4))  # type: ignore[call-arg]


def test_boxes_are_the_extremes_of_random_masks() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(256) - 1
    for _ in range(50):
        ids = rng.integers(0, 9, (7, 11)).astype(np.uint8) * (rng.random((7, 11)) < 0.3)
        masks, boxes, found = masks_and_boxes(ids.astype(np.uint8), labels)
        assert found.tolist() == [i - 1 for i in range(1, 9) if (ids == i).any()]
        for mask, box, label in zip(masks, boxes, found, strict=True):
            y, x = np.nonzero(ids == label + 1)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert (mask == (ids == label + 1)).all()


# --- joint augmentation -----------------------------------------------------------------------------------------------


def colored(ids: np.ndarray) -> np.ndarray:
    return voc_palette()[ids]


def blocks(height: int = 40, width: int = 56) -> np.ndarray:
    """Ids 1 to 12 in blocks of which none is like another."""
    ids = np.zeros((height, width), np.uint8)
    for i in range(12):
        ids[i // 4 * height // 3 : (i // 4 + 1) * height // 3, i % 4 * width // 4 : (i % 4 + 1) * width // 4] = i + 1
    return ids


def draw(transform: MaskTransform, seed: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return transform(colored(ids), ids)


@pytest.mark.parametrize("scale", [(0.5, 0.5), (2.0, 2.0), (0.5, 2.0), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("crop", [None, 32, 96])
def test_the_mask_stays_on_the_picture(scale: tuple[float, float], crop: int | None) -> None:
    transform = MaskTransform(crop=crop, scale=scale, hflip=0.5)
    ids = blocks()
    for seed in range(20):
        pixels, mask = draw(transform, seed, ids)
        assert pixels.shape[:2] == mask.shape
        if crop is not None:
            assert mask.shape == (crop, crop)
        # Away from the borders between two blocks, where colors are interpolated, each pixel has its id's color.
        edged = cv2.copyMakeBorder(mask[2:-2, 2:-2], 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=254)
        inner = (cv2.erode(edged, np.ones((5, 5))) == cv2.dilate(edged, np.ones((5, 5)))) & (edged != 254)
        wanted = np.where((mask == VOID)[..., None], FILL, colored(mask))
        assert np.abs(pixels.astype(int) - wanted)[inner].max() <= 1
        assert set(np.unique(mask)) <= {*range(1, 13), VOID}


def test_what_lies_beyond_is_void_and_never_a_class() -> None:
    ids = np.full((30, 20), 7, np.uint8)
    places = set()
    for seed in range(20):
        pixels, mask = draw(MaskTransform(crop=64, hflip=0.5), seed, ids)
        assert set(np.unique(mask)) == {7, VOID}
        assert (mask == 7).sum() == ids.size
        assert (pixels[mask == VOID] == FILL).all()
        places.add(tuple(np.argwhere(mask == 7)[0]))
    assert len(places) > 5


def test_ids_are_taken_from_the_nearest_pixel_between_centers() -> None:
    """A half of the size: the mean of the ids' columns is where the pixels' is, not half a pixel to the left."""
    ids = np.tile(np.arange(64, dtype=np.uint8), (8, 1))
    pixels, mask = MaskTransform(size=(4, 1000))(np.repeat(ids[..., None], 3, 2), ids)
    assert mask.shape == (4, 32)
    assert np.abs(pixels[..., 0].astype(float) - mask).mean() <= 0.5
    up = MaskTransform(size=(16, 1000))(np.repeat(ids[..., None], 3, 2), ids)[1]
    assert (up == np.repeat(np.repeat(ids, 2, 0), 2, 1)).all()


def test_a_flip_and_colors() -> None:
    ids = blocks()
    flipped = draw(MaskTransform(hflip=1.0), 0, ids)
    assert (flipped[1] == ids[:, ::-1]).all()
    assert (flipped[0] == colored(ids)[:, ::-1]).all()
    pixels, mask = draw(MaskTransform(color_jitter=0.5), 0, ids)
    assert (mask == ids).all()
    assert (pixels != colored(ids)).any()
    assert (MaskTransform()(colored(ids), ids)[0] == colored(ids)).all()


def test_factors_spread_over_the_range() -> None:
    sizes = [draw(MaskTransform(scale=(0.5, 2.0)), seed, blocks())[1].shape[1] / 56 for seed in range(200)]
    assert 0.49 < min(sizes) < 0.6
    assert 1.9 < max(sizes) < 2.01
    assert 1.15 < float(np.mean(sizes)) < 1.35


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


# --- batches ----------------------------------------------------------------------------------------------------------


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


def test_the_truth_is_not_resized_in_evaluation(drawn: Path) -> None:
    batch = next(iter(semantic(drawn, eval_size=32).val_dataloader()))
    whole = next(iter(semantic(drawn).val_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    for small, own in zip(batch["original_mask"], whole["original_mask"], strict=True):
        assert torch.equal(small, own)
    kept = next(iter(semantic(drawn, eval_size=(24, 1000)).val_dataloader()))["image"]
    assert all(min(image.shape[1:]) == 24 for image in kept)


def test_whole_pictures_train_too(drawn: Path) -> None:
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


@pytest.mark.parametrize("option", ["", "VOCdevkit"])
def test_sbd_lies_beside_the_devkit_or_is_named(root: Path, option: str, tmp_path: Path) -> None:
    def names(data: VOCSegmentation) -> set[str]:
        return {Path(data.dataset("train")[i]["id"]).stem for i in range(len(data.dataset("train")))}  # type: ignore[arg-type]

    listed = set((root / "benchmark_RELEASE/dataset/train.txt").read_text().split())
    assert names(semantic(root / option, train=["SBD/train"])) == listed
    moved = shutil.move(root / "benchmark_RELEASE", tmp_path / "elsewhere")
    assert names(semantic(root / option, train=["SBD/train"], sbd=str(moved))) == listed


def test_sbds_masks_are_vocs_without_the_border(drawn: Path) -> None:
    own, sbd = semantic(drawn).dataset("val"), semantic(drawn, val=["SBD/val"]).dataset("val")
    by_name = {Path(sbd[i]["id"]).stem: sbd[i] for i in range(len(sbd))}  # type: ignore[arg-type]
    compared = 0
    for i in range(len(own)):  # type: ignore[arg-type]
        other = by_name.get(Path(own[i]["id"]).stem)
        if other is not None:
            a, b = own[i]["original_mask"], other["original_mask"]
            assert (b != 255).all()
            assert torch.equal(a[a != 255], b[a != 255])
            compared += 1
    assert compared == 3


def test_trainaug_is_the_union_without_val_and_prefers_vocs_masks(
    drawn: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = semantic(drawn, train=["SBD/trainaug"], crop_size=None, scale=(1.0, 1.0), hflip=0.0)
    with caplog.at_level("INFO"):
        files = data.files("train")
    listed = {
        name: set((drawn / f"benchmark_RELEASE/dataset/{name}.txt").read_text().split()) for name in ("train", "val")
    }
    train, val = set(ids_of(drawn, "train")), set(ids_of(drawn, "val"))
    stems = [Path(files[i].picture).stem for i in range(len(files))]
    assert len(set(stems)) == len(stems)
    assert set(stems) == (listed["train"] | listed["val"] | train) - val
    assert listed["val"] & val
    assert all((Path(files[i].classes).suffix == ".png") == (stems[i] in train) for i in range(len(files)))
    others = len(stems) - len(train)
    assert f"{len(stems)} images, {len(train)} of them with VOC's masks and {others} with SBD's" in caplog.text
    dataset = data.dataset("train")
    assert (dataset[0]["mask"] == 255).any()
    assert (dataset[len(stems) - 1]["mask"] != 255).all()


def test_trainaug_of_the_release_must_have_10582_pictures(root: Path) -> None:
    """Lists as long as the released ones, of which one lacks a line."""
    lists = root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    names = [f"{i:06d}" for i in range(13000)]
    (lists / "train.txt").write_text("\n".join(names[:1464]))
    (lists / "val.txt").write_text("\n".join(names[1464 : 1464 + 1449]))
    # 1,349 of VOC's train, 888 of its val and 9,118 others are the 11,355 of SBD.
    everything = [*names[:1349], *names[1464 : 1464 + 888], *names[3000 : 3000 + 9118]]
    assert len(everything) == 8498 + 2857
    sbd = root / "benchmark_RELEASE" / "dataset"
    (sbd / "train.txt").write_text("\n".join(everything[:8498]))
    (sbd / "val.txt").write_text("\n".join(everything[8498:]))
    data = semantic(root, train=["SBD/trainaug"])
    with pytest.raises(DatasetError, match="without an image in JPEGImages"):
        data.files("train")  # the count is right, the images are not there
    (sbd / "val.txt").write_text("\n".join(everything[8498:-1]))
    with pytest.raises(DatasetError, match="expected 10,582 images, found 10,581 images, 1,464 of them with VOC"):
        data.files("train")


def test_predict_gives_pictures_at_their_own_size(drawn: Path) -> None:
    images = str(drawn / "VOCdevkit/VOC2012/JPEGImages")
    batch = next(iter(VOCSegmentation(images=images, num_workers=0, batch_size=4).predict_dataloader()))
    for image, path in zip(batch["image"], batch["id"], strict=True):
        with Image.open(path) as picture:
            assert picture.size == (image.shape[2], image.shape[1])
    small = VOCSegmentation(images=images, num_workers=0, batch_size=4, eval_size=20)
    assert next(iter(small.predict_dataloader()))["image"].shape == (4, 3, 20, 20)


# --- instances --------------------------------------------------------------------------------------------------------


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
    """The first of three objects is a single pixel; at a quarter of the size nothing is left of it."""
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


# --- what can be wrong ------------------------------------------------------------------------------------------------


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
    save_ids(str(mask_path(root, name, "Object")), np.zeros((height + 1, width), np.uint8))
    with pytest.raises(DatasetError, match=rf"SegmentationObject/{name}.png: .*found {width}x{height + 1}"):
        instance(root).dataset("train")[0]


def test_a_mask_in_colors_says_how_to_convert_it_and_the_command_does(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = ids_of(root, "train")[0]
    path = mask_path(root, name)
    ids = np.array(Image.open(path))
    colored_masks = tmp_path / "colored"
    colored_masks.mkdir()
    Image.open(path).convert("RGB").save(colored_masks / path.name)
    shutil.copy(colored_masks / path.name, path)
    with pytest.raises(DatasetError, match=r"found RGB: python -m tools.color_masks .* into ids"):
        semantic(root).dataset("train")[0]
    assert main([str(colored_masks), str(path.parent)]) == 0
    assert (np.array(Image.open(path)) == ids).all()
    assert semantic(root).dataset("train")[0]["mask"].shape == (40, 40)
    capsys.readouterr()
    assert main([str(colored_masks), str(colored_masks)]) == 2
    assert "expected another folder" in capsys.readouterr().err


def test_colors_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "colors.txt", tmp_path / "in"
    folder.mkdir()
    file.write_text("0 128 128 128\n1 128 0 0\n255 0 0 0\n")
    pixels = np.array([[[128, 128, 128], [0, 0, 0], [128, 0, 0]]], np.uint8)
    assert to_ids(pixels, read_colors(str(file))).tolist() == [[0, 255, 1]]
    pixels[0, 1] = 9
    Image.fromarray(pixels).save(folder / "a.png")
    assert main([str(folder), str(tmp_path / "out"), "--colors", str(file)]) == 2
    assert "a.png: the pixel at x 1, y 0 has the color [9, 9, 9], which has no id" in capsys.readouterr().err
    file.write_text("0 128 128 128\n1 300 0 0\n")
    with pytest.raises(DatasetError, match="line 2: expected id red green blue, 0 to 255, found 1 300 0 0"):
        read_colors(str(file))


def test_an_id_beyond_the_classes(root: Path) -> None:
    name = ids_of(root, "train")[0]
    ids = np.array(Image.open(mask_path(root, name)))
    ids[0, 0] = 30
    save_ids(str(mask_path(root, name)), ids)
    with pytest.raises(DatasetError, match=rf"{name}.png: found id 30, expected 0 to 20 or 255 \(void\) with 21 class"):
        semantic(root).dataset("train")[0]


@pytest.mark.parametrize(("workers", "split"), [(0, "val"), (1, "train")])
def test_a_wrong_mask_stops_a_loader_in_one_line(root: Path, workers: int, split: str) -> None:
    """Also in a worker, whose own exception would be lost in the text of its traceback."""
    for name in ids_of(root, split):
        save_ids(str(mask_path(root, name)), np.zeros((5, 5), np.uint8))
    loader: ResumingLoader = getattr(semantic(root, num_workers=workers), f"{split}_dataloader")()
    with pytest.raises(DatasetError, match="expected a mask of its image's size") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(root: Path) -> None:
    first, second = ids_of(root, "train")[:2]
    mask_path(root, first, "Object").unlink()
    with pytest.raises(DatasetError, match=rf"train names 1 id \({first}\) without a mask in SegmentationObject"):
        instance(root).dataset("train")
    mask_path(root, first).unlink()
    with pytest.raises(DatasetError, match=rf"train names 1 id \({first}\) without a mask in SegmentationClass"):
        semantic(root).dataset("train")
    (root / "VOCdevkit/VOC2012/JPEGImages" / f"{second}.jpg").unlink()
    with pytest.raises(DatasetError, match=rf"train names 1 id \({second}\) without an image in JPEGImages"):
        semantic(root).dataset("train")
    with pytest.raises(DatasetError, match=r"no list dev.txt in .*Segmentation: there are train, trainval, val"):
        semantic(root, val=["VOC2012/dev"]).dataset("val")
    with pytest.raises(DatasetError, match=r"no list dev.txt in .*dataset: there are train, val, trainaug"):
        semantic(root, val=["SBD/dev"]).dataset("val")
    stem = (root / "benchmark_RELEASE/dataset/train.txt").read_text().split()[0]
    (root / f"benchmark_RELEASE/dataset/cls/{stem}.mat").unlink()
    with pytest.raises(DatasetError, match=rf"SBD/train names 1 id \({stem}\) without a file in .*cls"):
        semantic(root, train=["SBD/train"]).dataset("train")


def test_a_missing_tree_says_what_to_fetch(tmp_path: Path, root: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        semantic(tmp_path / "nowhere").dataset("train")
    text = str(caught.value)
    for part in (
        "SegmentationClass/<id>.png",
        "ImageSets/Segmentation/train.txt",
        "VOCtrainval_11-May-2012.tar",
        "MD5",
    ):
        assert part in text
    shutil.rmtree(root / "benchmark_RELEASE")
    with pytest.raises(DatasetError) as caught:
        semantic(root, train=["SBD/trainaug"]).dataset("train")
    text = str(caught.value)
    for part in ("cls/<id>.mat", "no such folder", "benchmark.tgz", "MD5 82b4d87ceb2ed10f6038a1cba92111cb"):
        assert part in text
    assert f"unpack it in {root}: tar -xf benchmark.tgz -C {root}" in text


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


def test_sbd_is_downloaded_where_it_is_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import tarfile

    path = tmp_path / "host" / "benchmark.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root / "benchmark_RELEASE", "benchmark_RELEASE")
    monkeypatch.setattr(segmentation, "SBD_HOSTS", (f"file://{tmp_path}/none", f"file://{tmp_path}/host"))
    monkeypatch.setattr(segmentation, "SBD_ARCHIVE", ("benchmark.tgz", hashlib.md5(path.read_bytes()).hexdigest()))
    shutil.rmtree(root / "benchmark_RELEASE")
    data = semantic(root, train=["SBD/train"], download=True)
    data.prepare_data()
    assert len(data.dataset("train")) == 6  # type: ignore[arg-type]
    fetched = []
    monkeypatch.setattr("datamodules.voc.download", lambda archive, folder: fetched.append(archive[0]))
    shutil.rmtree(root / "VOCdevkit")
    sets = {"train": ["SBD/trainaug"], "val": ["SBD/val"], "test": ["SBD/val"]}
    semantic(root, **sets, download=True).prepare_data()
    assert fetched == ["voc2012/VOCtrainval_11-May-2012.tar"]


# --- the writer -------------------------------------------------------------------------------------------------------


def test_the_writer_draws_what_the_real_sets_have(drawn: Path, tmp_path: Path) -> None:
    name = ids_of(drawn, "train")[0]
    with Image.open(mask_path(drawn, name)) as mask:
        assert mask.mode == "P"
        assert mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]  # type: ignore[index]
        classes = np.array(mask)
    objects = np.array(Image.open(mask_path(drawn, name, "Object")))
    assert ((classes == 255) == (objects == 255)).all()
    assert ((classes == 0) == (objects == 0)).all()
    assert (classes == 255).any()
    truth = loadmat(drawn / f"benchmark_RELEASE/dataset/inst/{name}.mat")["GTinst"][0]
    assert truth["Categories"][0].shape == (objects[objects < 255].max(), 1)
    write_voc_segmentation(str(tmp_path), classes=3, train=4, val=4, size=48)
    again = mask_path(tmp_path, name)
    assert again.read_bytes() == mask_path(drawn, name).read_bytes()


def test_collate_hands_a_refusal_on() -> None:
    assert collate([{"id": "a"}, {"refused": "why"}]) == {"refused": "why"}
