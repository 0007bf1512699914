"""Read, check and write masks of class ids and object ids.

A mask of VOC is a PNG whose palette indices are the ids. A reader that converts it to RGB or gray loses them. Id 255 is
void: neither trained on nor evaluated.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image
from scipy.io import loadmat

from datamodules.images import EncodedImage
from datamodules.transforms import VOID
from datamodules.voc import voc_palette
from errors import BrokenImageError, DatasetError


def read_ids(path: str) -> np.ndarray:
    """Read the ids of a mask, uint8 (H, W).

    Args:
        path: a PNG with a palette (indices are ids), a grayscale image (values are ids), or a ``.mat`` file of SBD.

    Raises:
        BrokenImageError: the file is missing, damaged, or a ``.mat`` of another structure than SBD's.
        DatasetError: the mask is a color image.
    """
    if path.endswith(".mat"):
        return _read_sbd(path)[0]
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.array(image)
    except Exception as error:  # Pillow raises SyntaxError, struct.error and more on damaged files
        raise BrokenImageError(path, f"expected a mask, found no readable image ({error})") from None
    if mode not in ("P", "L"):
        raise DatasetError(
            f"{path}: expected a mask of class ids with 8 bits per pixel (palette or grayscale), found {mode}; "
            "convert color masks with python -m tools.color_masks"
        )
    return ids


def _read_sbd(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a GTcls or GTinst file: ids, uint8 (H, W), and the class of each object, int64 (N,)."""
    try:
        content = loadmat(path)
        struct = (content["GTinst"] if "GTinst" in content else content["GTcls"])[0]
        categories = struct["Categories"][0] if "GTinst" in content else np.zeros(0)
        return np.ascontiguousarray(struct["Segmentation"][0], np.uint8), categories.astype(np.int64).ravel()
    except Exception as error:  # SciPy raises exceptions of many types on damaged files
        raise BrokenImageError(path, f"expected SBD's GTcls or GTinst, found {error or type(error).__name__}") from None


def read_mask(path: str, num_classes: int) -> np.ndarray:
    """Read a mask of class ids and check it.

    Args:
        path: see `read_ids`.
        num_classes: number of classes; valid ids are 0 to ``num_classes - 1`` and 255 (void).

    Returns:
        Class ids, uint8 (H, W).

    Raises:
        BrokenImageError: see `read_ids`.
        DatasetError: an id is out of range, or the mask is a color image.
    """
    ids = read_ids(path)
    unknown = np.flatnonzero(count_ids(ids)[num_classes:VOID])
    if len(unknown):
        raise DatasetError(
            f"{path}: expected ids 0 to {num_classes - 1} or {VOID} (void), found id {num_classes + unknown[0]}; "
            "set the classes with --data.classes"
        )
    return ids


def open_image(path: str, mask_path: str, ids: np.ndarray, exif_orientation: bool) -> EncodedImage:
    """Open the image of a mask, in the orientation in which it has the mask's size.

    Args:
        path: the image.
        mask_path: the mask, for the error message.
        ids: the mask, uint8 (H, W).
        exif_orientation: apply the EXIF orientation where sizes do not tell.

    Raises:
        BrokenImageError: see `EncodedImage`.
        DatasetError: the mask differs in size from the image in both orientations.
    """
    height, width = ids.shape
    image = EncodedImage(path, exif_orientation, annotated_size=(height, width))
    if (image.height, image.width) != (height, width):
        stored = f"{image.header.width}x{image.header.height}"
        turned = f" or {image.header.height}x{image.header.width}" if image.header.orientation >= 5 else ""
        raise DatasetError(
            f"{mask_path}: expected a mask of its image's size {stored}{turned}, found {width}x{height}; annotate the "
            "image at its full size"
        )
    return image


def require_equal_sizes(path: str, ids: np.ndarray, other_path: str, other_ids: np.ndarray) -> None:
    """Raise a DatasetError if two masks of an image, uint8 (H, W), differ in size."""
    if ids.shape != other_ids.shape:
        (height, width), (other_height, other_width) = ids.shape, other_ids.shape
        raise DatasetError(
            f"{path}: expected the size {other_width}x{other_height} of {other_path}, found {width}x{height}"
        )


def count_ids(ids: np.ndarray) -> np.ndarray:
    """Count the pixels of each id, int64 (256,), in a mask, uint8 (H, W)."""
    return cv2.calcHist([ids], [0], None, [256], [0, 256]).ravel().astype(np.int64)


def read_objects(path: str, class_path: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a mask of object ids and the class of each object.

    The class of an object of VOC is the most frequent class id of its pixels in SegmentationClass. SBD stores it.

    Args:
        path: mask in SegmentationObject (object ids from 1, 0 = background, 255 = void) or file in SBD's ``inst``.
        class_path: mask of class ids; not used for SBD.
        num_classes: number of classes, without the background; label k is class id k + 1.

    Returns:
        Object ids, uint8 (H, W), and the label of each id, int64 (256,), -1 for ids that are not objects.

    Raises:
        BrokenImageError: a file is damaged, or an object has no class.
        DatasetError: see `read_mask`; also for masks of different sizes.
    """
    if path.endswith(".mat"):
        ids, categories = _read_sbd(path)
        labels = np.full(256, -1, np.int64)
        labels[1 : len(categories) + 1] = categories[:VOID] - 1
        unknown = categories[(categories < 1) | (categories > num_classes)]
        if len(unknown):
            raise DatasetError(
                f"{path}: expected objects of the classes 1 to {num_classes}, found class {unknown[0]}; "
                "set the classes with --data.classes"
            )
    else:
        ids, class_ids = read_mask(path, VOID), read_mask(class_path, num_classes + 1)
        require_equal_sizes(path, ids, class_path, class_ids)
        pairs = np.bincount(ids.ravel() * np.int64(256) + class_ids.ravel(), minlength=1 << 16).reshape(256, 256)
        pairs[:, [0, VOID]] = 0
        labels = np.where(pairs.any(1), pairs.argmax(1) - 1, -1)
        labels[[0, VOID]] = -1
    unlabeled = np.setdiff1d(np.flatnonzero((count_ids(ids) > 0) & (labels < 0)), (0, VOID))
    if len(unlabeled):
        raise BrokenImageError(
            path, f"expected a class for each object, found none for object {unlabeled[0]} in {class_path}"
        )
    return ids, labels


def masks_and_boxes(ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Convert object ids to one mask, box and label per object that has a pixel, in the order of the ids.

    Args:
        ids: object ids, uint8 (H, W), see `read_objects`.
        labels: label of each id, int64 (256,), see `read_objects`.

    Returns:
        Binary masks, uint8 (N, H, W); their boxes, float32 (N, 4), xyxy in pixels, continuous (one pixel has width 1);
        their labels, int64 (N,).
    """
    present = np.flatnonzero((count_ids(ids) > 0) & (labels >= 0))
    masks = ids == present[:, None, None]
    rows, columns = masks.any(2), masks.any(1)
    boxes = [
        columns.argmax(1),
        rows.argmax(1),
        columns.shape[1] - columns[:, ::-1].argmax(1),
        rows.shape[1] - rows[:, ::-1].argmax(1),
    ]
    return masks.astype(np.uint8), np.stack(boxes, 1).astype(np.float32), labels[present]


def save_ids(path: str, ids: np.ndarray) -> None:
    """Write ids, uint8 (H, W), as a PNG with VOC's palette."""
    image = Image.fromarray(ids)
    image.putpalette(voc_palette().tobytes())
    image.save(path)
