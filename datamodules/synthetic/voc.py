"""Synthetic dataset in the layout of PASCAL VOC detection: several textured shapes per image in front of clutter."""

from __future__ import annotations

import os
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from datamodules.synthetic.drawing import (
    TEXTURED_SHAPES,
    add_noise,
    check_arguments,
    draw_background,
    draw_clutter,
    draw_shape,
    random_shape,
    save_jpeg,
    write_lines,
)
from datamodules.voc import VOC_CLASSES

MAX_OBJECTS = 4  # per image
MAX_OVERLAP = 0.2  # of the smaller of two boxes

Box = tuple[int, int, int, int]  # xmin, ymin, xmax, ymax as in VOC's files: counted from 1, both ends included


class VOCObject(NamedTuple):
    """One annotated object.

    Attributes:
        name: one of `VOC_CLASSES`.
        box: (xmin, ymin, xmax, ymax), counted from 1, both ends included.
        difficult: 1 for difficult, else 0.
    """

    name: str
    box: Box
    difficult: int


def write_voc(
    folder: str, classes: int = 4, train: int = 64, val: int = 16, size: int = 64, seed: int = 0
) -> list[str]:
    """Write ``folder/VOCdevkit/VOC2007`` (train, val, trainval, test) and ``VOC2012`` (train, val, trainval).

    A class is a shape with a texture and a preferred range of hues; it has the name of a class of VOC. An image shows
    one to four objects that overlap little. One object in eight is difficult; for one in eight the flag is missing.
    The images depend only on the arguments.

    Args:
        folder: output folder, created if missing; existing files stay.
        classes: number of classes, 2 to 20.
        train: training images per class and year.
        val: validation images per class and year, and test images per class.
        size: shorter side of the images in pixels, at least 16; the longer one is up to 1.5 times as long.
        seed: another seed draws other images of the same classes.

    Returns:
        Class names in the order of VOC.

    Raises:
        UserError: an argument is out of range.
    """
    check_arguments(classes, len(VOC_CLASSES), train, val, size)
    number = 0
    for year, splits in (("VOC2007", ("train", "val", "test")), ("VOC2012", ("train", "val"))):
        root = os.path.join(folder, "VOCdevkit", year)
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            os.makedirs(os.path.join(root, name), exist_ok=True)
        ids: dict[str, list[str]] = {}
        for split in splits:
            ids[split] = []
            for _ in range(classes * (train if split == "train" else val)):
                number += 1
                name = f"{number:06d}" if year == "VOC2007" else f"2012_{number:06d}"
                ids[split].append(name)
                image, objects, _ = draw_voc_scene(classes, size, np.random.default_rng((seed, number)))
                save_jpeg(os.path.join(root, "JPEGImages", f"{name}.jpg"), image)
                with open(os.path.join(root, "Annotations", f"{name}.xml"), "w") as file:
                    file.write(annotation_xml(year, name, image, objects))
        for split, names in {**ids, "trainval": sorted(ids["train"] + ids["val"])}.items():
            write_lines(os.path.join(root, "ImageSets", "Main", f"{split}.txt"), names)
    return list(VOC_CLASSES[:classes])


def draw_voc_scene(classes: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[VOCObject], np.ndarray]:
    """Draw an image of several objects.

    Args:
        classes: number of classes to choose from.
        size: shorter side in pixels.
        rng: source of all randomness.

    Returns:
        RGB image, uint8 (H, W, 3); N objects; object ids, uint8 (H, W), 0 for background and 1 to N for the objects.
    """
    height, width = random_shape(size, rng)
    image = draw_background(height, width, rng)
    for _ in range(rng.integers(3, 8)):
        draw_clutter(image, rng)
    objects: list[VOCObject] = []
    object_ids = np.zeros((height, width), np.uint8)
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    for _ in range(20):
        if len(objects) == count:
            break
        label = int(rng.integers(classes))
        radius = size * rng.uniform(0.12, 0.3)
        center = np.array([rng.uniform(0.8 * radius, side - 0.8 * radius) for side in (width, height)])
        drawn, mask = draw_shape(image, TEXTURED_SHAPES[label], label / classes, center, radius, rng)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(columns[0]) + 1, int(rows[0]) + 1, int(columns[-1]) + 1, int(rows[-1]) + 1)
        if all(_overlap_fraction(box, other.box) < MAX_OVERLAP for other in objects):
            objects.append(VOCObject(VOC_CLASSES[label], box, int(rng.random() < 1 / 8)))
            image = drawn
            object_ids[mask > 0] = len(objects)
    return add_noise(image, rng), objects, object_ids


def _overlap_fraction(a: Box, b: Box) -> float:
    """Return the intersection of two boxes relative to the area of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return max(0, width) * max(0, height) / min(areas)


def annotation_xml(year: str, name: str, image: np.ndarray, objects: list[VOCObject]) -> str:
    """Return the annotation file of an image."""
    lines = [
        f"<annotation>\n\t<folder>{year}</folder>\n\t<filename>{name}.jpg</filename>\n\t<size>"
        f"<width>{image.shape[1]}</width><height>{image.shape[0]}</height><depth>3</depth></size>"
    ]
    for i, (label, box, difficult) in enumerate(objects):
        sides = "".join(
            f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        # Some objects of VOC have no flag, which means that they are not difficult.
        flag = "" if not difficult and (len(label) + i) % 8 == 0 else f"<difficult>{difficult}</difficult>"
        lines.append(f"\t<object><name>{escape(label)}</name>{flag}<bndbox>{sides}</bndbox></object>")
    return "\n".join([*lines, "</annotation>\n"])
