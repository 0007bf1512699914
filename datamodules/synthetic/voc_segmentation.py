"""Synthetic dataset in the layouts of VOC segmentation and SBD: scenes of textured shapes with masks."""

from __future__ import annotations

import os

import cv2
import numpy as np
from scipy.io import savemat

from datamodules.segmentation.masks import save_ids
from datamodules.synthetic.drawing import check_arguments, save_jpeg, write_lines
from datamodules.synthetic.voc import draw_voc_scene
from datamodules.transforms import VOID
from datamodules.voc import VOC_CLASSES


def write_voc_segmentation(
    folder: str, classes: int = 4, train: int = 48, val: int = 12, size: int = 64, seed: int = 0
) -> list[str]:
    """Write ``folder/VOCdevkit/VOC2012`` (train, val, trainval) and ``folder/benchmark_RELEASE``, which is SBD.

    As in the released data, object boundaries are void in VOC and not in SBD. The void border is one pixel wide on
    either side for ``size`` below 200. SBD's train and val are half as large as VOC's; half of their images are in the
    same split of VOC, the others only in SBD. The images depend only on the arguments.

    Args:
        folder: output folder, created if missing; existing files stay.
        classes: number of classes, 2 to 20.
        train: images per class in VOC's train.
        val: images per class in VOC's val.
        size: shorter side of the images in pixels, at least 16; the longer one is up to 1.5 times as long.
        seed: another seed draws other images of the same classes.

    Returns:
        Class names in the order of VOC, without the background.

    Raises:
        UserError: an argument is out of range.
    """
    check_arguments(classes, len(VOC_CLASSES), train, val, size)
    voc, sbd = os.path.join(folder, "VOCdevkit", "VOC2012"), os.path.join(folder, "benchmark_RELEASE", "dataset")
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        os.makedirs(os.path.join(voc, name), exist_ok=True)
    for name in ("img", "cls", "inst"):
        os.makedirs(os.path.join(sbd, name), exist_ok=True)
    voc_lists: dict[str, list[str]] = {}
    number = 0
    for split, count in (("train", classes * train), ("val", classes * val)):
        num_shared = count // 4
        names = [f"2012_{number + i + 1:06d}" for i in range(count + num_shared)]
        voc_lists[split] = names[:count]
        write_lines(os.path.join(sbd, f"{split}.txt"), [*names[:num_shared], *names[count:]])
        for i, name in enumerate(names):
            number += 1
            image, objects, object_ids = draw_voc_scene(classes, size, np.random.default_rng((seed, number)))
            labels = np.array([VOC_CLASSES.index(item.name) + 1 for item in objects], np.uint8)
            if i < count:
                save_jpeg(os.path.join(voc, "JPEGImages", f"{name}.jpg"), image)
                border = void_border(object_ids, max(1, size // 100))
                for kind, ids in (("Class", np.append(np.uint8(0), labels)[object_ids]), ("Object", object_ids)):
                    path = os.path.join(voc, f"Segmentation{kind}", f"{name}.png")
                    save_ids(path, np.where(border, np.uint8(VOID), ids))
            if i < num_shared or i >= count:
                save_jpeg(os.path.join(sbd, "img", f"{name}.jpg"), image)
                write_sbd_masks(sbd, name, object_ids, labels)
    for split, names in {**voc_lists, "trainval": sorted(voc_lists["train"] + voc_lists["val"])}.items():
        write_lines(os.path.join(voc, "ImageSets", "Segmentation", f"{split}.txt"), names)
    return list(VOC_CLASSES[:classes])


def void_border(object_ids: np.ndarray, width: int) -> np.ndarray:
    """Find the pixels within ``width`` of another object or the background.

    An object that would consist of border pixels only has no border.

    Args:
        object_ids: uint8 (H, W), 0 for background.
        width: in pixels.

    Returns:
        Border mask, bool (H, W).
    """
    kernel = np.ones((2 * width + 1,) * 2, np.uint8)
    border = cv2.morphologyEx(object_ids, cv2.MORPH_GRADIENT, kernel) > 0
    for i in range(1, int(object_ids.max()) + 1):
        mask = object_ids == i
        if mask.any() and not (mask & ~border).any():
            border &= ~mask
    return border


def write_sbd_masks(folder: str, name: str, object_ids: np.ndarray, labels: np.ndarray) -> None:
    """Write ``cls/<name>.mat`` and ``inst/<name>.mat`` in SBD's format, without its boundaries.

    Args:
        folder: SBD's ``dataset``.
        name: name of the image.
        object_ids: uint8 (H, W), 0 for background and 1 to N for the objects.
        labels: classes of the N objects, uint8 (N,), from 1.
    """
    categories = np.unique(labels)[:, None]
    classes = {"Segmentation": np.append(np.uint8(0), labels)[object_ids], "CategoriesPresent": categories}
    objects = {"Segmentation": object_ids, "Categories": labels[:, None]}
    savemat(os.path.join(folder, "cls", f"{name}.mat"), {"GTcls": classes}, do_compression=True)
    savemat(os.path.join(folder, "inst", f"{name}.mat"), {"GTinst": objects}, do_compression=True)
