"""Reading, checking and writing masks of class and object ids."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image
from scipy.io import loadmat

from datamodules.transforms import VOID
from datamodules.voc import voc_palette
from errors import BrokenImageError, DatasetError


def read_ids(path: str) -> np.ndarray:
    """A mask's ids, uint8 (H,W): the indices of a PNG with a palette, the values of a gray one, or SBD's ``.mat``.

    Raises:
        BrokenImageError: the file is missing, damaged, or not of SBD's structure.
        DatasetError: the mask is in colors; the message says how to convert it.
    """
    if path.endswith(".mat"):
        return _sbd_matrix(path)[0]
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.array(image)
    except Exception as error:  # Pillow raises SyntaxError, struct.error and more on broken files
        raise BrokenImageError(path, f"no mask ({error})") from None
    if mode not in ("P", "L"):
        raise DatasetError(
            f"{path}: expected a mask of class ids, 8 bits a pixel (PNG with a palette, or gray), found {mode}: "
            "python -m tools.color_masks turns masks in VOC's or other colors into ids"
        )
    return ids


def _sbd_matrix(path: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids (H,W) uint8, the objects' classes (N,)) of one of SBD's files, GTcls or GTinst."""
    try:
        content = loadmat(path)
        truth = (content["GTinst"] if "GTinst" in content else content["GTcls"])[0]
        categories = truth["Categories"][0] if "GTinst" in content else np.zeros(0)
        return np.ascontiguousarray(truth["Segmentation"][0], np.uint8), categories.astype(np.int64).ravel()
    except Exception as error:  # scipy raises whatever a damaged file leads it to
        raise BrokenImageError(path, f"expected SBD's GTcls or GTinst, found {error or type(error).__name__}") from None


def read_mask(path: str, classes: int, size: tuple[int, int]) -> np.ndarray:
    """A mask of class ids, checked: uint8 (H,W).

    Args:
        path: see `read_ids`.
        classes: number of classes; ids are 0 to that, and `VOID`.
        size: (height, width) of its image.

    Raises:
        DatasetError: an id beyond the classes, another size than the image, or what `read_ids` raises.
    """
    ids = read_ids(path)
    _check_size(path, ids, size)
    found = np.flatnonzero(count_ids(ids)[classes:VOID])
    if len(found):
        raise DatasetError(
            f"{path}: found id {classes + found[0]}, expected 0 to {classes - 1} or {VOID} (void) with {classes} "
            "classes: give the classes by --data.classes"
        )
    return ids


def _check_size(path: str, ids: np.ndarray, size: tuple[int, int]) -> None:
    if ids.shape != size:
        raise DatasetError(
            f"{path}: expected a mask of its image's size {size[1]}x{size[0]}, found {ids.shape[1]}x{ids.shape[0]}: "
            "masks are drawn on the image as it is stored"
        )


def count_ids(ids: np.ndarray) -> np.ndarray:
    """How many pixels have each id: int64 (256,) for uint8 (H,W)."""
    return cv2.calcHist([ids], [0], None, [256], [0, 256]).ravel().astype(np.int64)


def read_objects(path: str, class_path: str, classes: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Which object each pixel belongs to, uint8 (H,W), and the objects' labels, int64 (256,): -1 for ids of no object.

    Of VOC an object's class is the one that SegmentationClass has under it, by most of its pixels; SBD names it.

    Args:
        path: in SegmentationObject: ids from 1 on, 0 where there is no object, and `VOID`; or SBD's in ``inst``.
        class_path: the mask of its classes, unused for SBD.
        classes: number of classes; label k is the class with the id k + 1.
        size: (height, width) of the image.

    Raises:
        BrokenImageError: a file is damaged, or an object has no class.
        DatasetError: see `read_mask`.
    """
    if path.endswith(".mat"):
        ids, categories = _sbd_matrix(path)
        _check_size(path, ids, size)
        labels = np.full(256, -1, np.int64)
        labels[1 : len(categories) + 1] = categories[:VOID] - 1
        beyond = categories[(categories < 1) | (categories > classes)]
        if len(beyond):
            raise DatasetError(
                f"{path}: found an object of class {beyond[0]}, expected 1 to {classes}: "
                "give the classes by --data.classes"
            )
    else:
        ids, under = read_mask(path, VOID, size), read_mask(class_path, classes + 1, size)
        pairs = np.bincount(ids.ravel() * np.int64(256) + under.ravel(), minlength=1 << 16).reshape(256, 256)
        pairs[:, [0, VOID]] = 0
        labels = np.where(pairs.any(1), pairs.argmax(1) - 1, -1)
        labels[[0, VOID]] = -1
    without = np.setdiff1d(np.flatnonzero((count_ids(ids) > 0) & (labels < 0)), (0, VOID))
    if len(without):
        raise BrokenImageError(path, f"object {without[0]} has no class: see {class_path}")
    return ids, labels


def masks_and_boxes(ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The objects of an image that have a pixel, in the order of their ids.

    Args:
        ids: uint8 (H,W), see `read_objects`.
        labels: int64 (256,), see `read_objects`.

    Returns:
        Their masks, uint8 (N,H,W) of 0 and 1; the boxes round these, float32 (N,4) xyxy in pixels, continuous: an
        object of one pixel is one wide; their labels, int64 (N,).
    """
    there = np.flatnonzero((count_ids(ids) > 0) & (labels >= 0))
    masks = ids == there[:, None, None]
    rows, columns = masks.any(2), masks.any(1)
    boxes = [
        columns.argmax(1),
        rows.argmax(1),
        columns.shape[1] - columns[:, ::-1].argmax(1),
        rows.shape[1] - rows[:, ::-1].argmax(1),
    ]
    return masks.astype(np.uint8), np.stack(boxes, 1).astype(np.float32), labels[there]


def save_ids(path: str, ids: np.ndarray) -> None:
    """Writes uint8 (H,W) as VOC does: a PNG whose palette has VOC's colors."""
    image = Image.fromarray(ids)
    image.putpalette(voc_palette().tobytes())
    image.save(path)
