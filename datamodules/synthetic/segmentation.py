"""Draws a small dataset in the layouts of VOC's segmentation and of SBD: the scenes of `write_voc`, each with masks."""

from __future__ import annotations

import os

import cv2
import numpy as np
from scipy.io import savemat

from datamodules.segmentation.masks import save_ids
from datamodules.synthetic.drawing import check_arguments, save
from datamodules.synthetic.voc import draw_scene
from datamodules.transforms import VOID
from datamodules.voc import VOC_CLASSES


def write_voc_segmentation(
    folder: str, classes: int = 4, train: int = 48, val: int = 12, size: int = 64, seed: int = 0
) -> list[str]:
    """Writes ``folder/VOCdevkit/VOC2012`` (train, val, trainval) and ``folder/benchmark_RELEASE``, which is SBD.

    Scenes are those of `write_voc`; a border of void, at size 64 a pixel to each side of an object's edge, is in VOC's
    masks and missing from SBD's, as in the released data. SBD's train and val are half as large as VOC's; a half of
    SBD's train is in VOC's train too, a half of its val in VOC's val, the rest is its own.

    Args:
        folder: where; it is made if missing, and what was written there before stays.
        classes: number of classes, 2 to 20.
        train, val: images a class in VOC's train and val.
        size: shorter side of the images in pixels, at least 16.
        seed: another seed draws other images of the same classes.

    Returns:
        Names of the classes in VOC's order, the background left out.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(classes, len(VOC_CLASSES), train, val, size)
    voc, sbd = os.path.join(folder, "VOCdevkit", "VOC2012"), os.path.join(folder, "benchmark_RELEASE", "dataset")
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        os.makedirs(os.path.join(voc, name), exist_ok=True)
    for name in ("img", "cls", "inst"):
        os.makedirs(os.path.join(sbd, name), exist_ok=True)
    counts = {"train": classes * train, "val": classes * val}
    lists: dict[str, list[str]] = {}
    number = 0
    for split, count in counts.items():
        # The first quarter is in both, the last ones in SBD alone.
        shared = count // 4
        names = [f"2012_{number + i + 1:06d}" for i in range(count + shared)]
        lists[f"VOC {split}"], lists[f"SBD {split}"] = names[:count], [*names[:shared], *names[count:]]
        for i, name in enumerate(names):
            number += 1
            picture, objects, shown = draw_scene(classes, size, np.random.default_rng((seed, number)))
            labels = np.array([VOC_CLASSES.index(label) + 1 for label, _, _ in objects], np.uint8)
            if i < count:
                save(os.path.join(voc, "JPEGImages", f"{name}.jpg"), picture)
                border = void_border(shown, max(1, size // 100))
                for kind, ids in (("Class", np.append(np.uint8(0), labels)[shown]), ("Object", shown)):
                    path = os.path.join(voc, f"Segmentation{kind}", f"{name}.png")
                    save_ids(path, np.where(border, np.uint8(VOID), ids))
            if i < shared or i >= count:
                save(os.path.join(sbd, "img", f"{name}.jpg"), picture)
                write_sbd(sbd, name, shown, labels)
    lists["VOC trainval"] = sorted(lists["VOC train"] + lists["VOC val"])
    for title, names in lists.items():
        kind, split = title.split()
        top = sbd if kind == "SBD" else os.path.join(voc, "ImageSets", "Segmentation")
        with open(os.path.join(top, f"{split}.txt"), "w") as file:
            file.write("\n".join(names) + "\n")
    return list(VOC_CLASSES[:classes])


def void_border(shown: np.ndarray, width: int) -> np.ndarray:
    """Whether a pixel lies within ``width`` of another object's: bool (H,W) for uint8 (H,W); no object vanishes."""
    kernel = np.ones((2 * width + 1,) * 2, np.uint8)
    border = cv2.morphologyEx(shown, cv2.MORPH_GRADIENT, kernel) > 0
    for i in range(1, int(shown.max()) + 1):
        mine = shown == i
        if mine.any() and not (mine & ~border).any():
            border &= ~mine
    return border


def write_sbd(folder: str, name: str, shown: np.ndarray, labels: np.ndarray) -> None:
    """Writes ``cls/<name>.mat`` and ``inst/<name>.mat`` as SBD has them, its boundaries left out.

    Args:
        folder: SBD's ``dataset``.
        name: of the image.
        shown: which object each pixel shows, uint8 (H,W), 0 for none.
        labels: uint8 (N,), the objects' classes from 1 on.
    """
    categories = np.unique(labels)[:, None]
    classes = {"Segmentation": np.append(np.uint8(0), labels)[shown], "CategoriesPresent": categories}
    objects = {"Segmentation": shown, "Categories": labels[:, None]}
    savemat(os.path.join(folder, "cls", f"{name}.mat"), {"GTcls": classes}, do_compression=True)
    savemat(os.path.join(folder, "inst", f"{name}.mat"), {"GTinst": objects}, do_compression=True)
