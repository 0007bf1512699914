"""Masks of VOC and SBD: ids, palettes, objects and their boxes."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from datamodules.segmentation.masks import masks_and_boxes, read_ids, read_mask, read_objects, save_ids
from datamodules.voc import voc_palette
from errors import BrokenImageError, DatasetError


def test_the_palette_is_vocs() -> None:
    """VOC's first and last colors, as its documentation prints them."""
    colors = voc_palette()
    assert colors.shape == (256, 3)
    assert colors[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    assert len(np.unique(colors, axis=0)) == 256


def test_a_palettes_indices_are_the_ids(tmp_path: Path) -> None:
    """Conversion to gray and OpenCV's color reader return other numbers."""
    ids = np.array([[0, 1, 2], [15, 20, 255]], np.uint8)
    path = str(tmp_path / "mask.png")
    save_ids(path, ids)
    assert (read_ids(path) == ids).all()
    assert (read_mask(path, 21) == ids).all()
    assert (np.array(Image.open(path).convert("L")) != ids).any()
    gray = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
    assert gray is not None
    assert (gray != ids).any()
    Image.fromarray(ids).save(path)  # no palette: gray values are ids too
    assert (read_ids(path) == ids).all()


def test_sbds_structures(tmp_path: Path) -> None:
    objects = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    for name, fields in (
        ("GTcls", {"Segmentation": np.array([[0, 9, 9], [4, 4, 0]], np.uint8)}),
        ("GTinst", {"Segmentation": objects, "Categories": np.array([[9], [4]], np.uint8)}),
    ):
        savemat(tmp_path / f"{name}.mat", {name: fields})
    assert read_ids(str(tmp_path / "GTcls.mat")).tolist() == [[0, 9, 9], [4, 4, 0]]
    ids, labels = read_objects(str(tmp_path / "GTinst.mat"), "", 20)
    assert (ids == objects).all()
    assert labels[:4].tolist() == [-1, 8, 3, -1]
    with pytest.raises(DatasetError, match=r"GTinst.mat: expected objects of the classes 1 to 5, found class 9"):
        read_objects(str(tmp_path / "GTinst.mat"), "", 5)
    (tmp_path / "broken.mat").write_bytes(b"no mat")
    with pytest.raises(BrokenImageError, match="expected SBD's GTcls or GTinst"):
        read_ids(str(tmp_path / "broken.mat"))


def test_an_objects_class_is_that_of_most_of_its_pixels(tmp_path: Path) -> None:
    objects = np.array([[1, 1, 1, 255], [7, 7, 0, 0]], np.uint8)
    classes = np.array([[3, 3, 2, 255], [1, 255, 0, 0]], np.uint8)
    paths = [str(tmp_path / name) for name in ("objects.png", "classes.png")]
    for path, ids in zip(paths, (objects, classes), strict=True):
        save_ids(path, ids)
    ids, labels = read_objects(*paths, 20)
    assert (labels[1], labels[7], labels[0], labels[255]) == (2, 0, -1, -1)
    masks, boxes, found = masks_and_boxes(ids, labels)
    assert found.tolist() == [2, 0]
    assert masks.tolist() == [[[1, 1, 1, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 0, 0]]]
    assert boxes.tolist() == [[0, 0, 3, 1], [0, 1, 2, 2]]
    save_ids(paths[1], np.where(classes == 1, 0, classes).astype(np.uint8))
    with pytest.raises(
        BrokenImageError,
        match=r"objects.png: expected a class for each object, found none for object 7 in .*classes.png",
    ):
        read_objects(*paths, 20)


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
