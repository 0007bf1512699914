"""Draws a small dataset in PASCAL VOC's layout: several textured shapes an image among clutter, each with its box."""

from __future__ import annotations

import os
from xml.sax.saxutils import escape

import numpy as np

from datamodules.synthetic.drawing import CLASSES, background, check_arguments, clutter, draw_object, save, with_noise
from datamodules.voc import VOC_CLASSES

OBJECTS = 4  # at most, in one image


def write_voc(
    folder: str, classes: int = 4, train: int = 64, val: int = 16, size: int = 64, seed: int = 0
) -> list[str]:
    """Writes ``folder/VOCdevkit/VOC2007`` (train, val, trainval, test) and ``VOC2012`` (train, val, trainval).

    Objects bear the names of VOC's classes, whatever they look like. A class is a shape with a texture and a preferred
    range of hues; an image holds one to four of any classes, little overlapping. One in eight is marked difficult, and
    one in eight lacks the mark. The images are a function of the arguments alone; their sides are ``size`` to 1.5
    times that.

    Args:
        folder: where; it is made if missing, and what was written there before stays.
        classes: number of classes, 2 to 20.
        train, val: images a class in each year's train and val; test has as many as val.
        size: shorter side of the images in pixels, at least 16.
        seed: another seed draws other images of the same classes.

    Returns:
        Names of the classes in VOC's order.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(classes, len(VOC_CLASSES), train, val, size)
    number = 0
    for year, splits in (("VOC2007", ("train", "val", "test")), ("VOC2012", ("train", "val"))):
        top = os.path.join(folder, "VOCdevkit", year)
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            os.makedirs(os.path.join(top, name), exist_ok=True)
        ids: dict[str, list[str]] = {}
        for split in splits:
            ids[split] = []
            for _ in range(classes * (train if split == "train" else val)):
                number += 1
                name = f"{number:06d}" if year == "VOC2007" else f"2012_{number:06d}"
                ids[split].append(name)
                picture, objects, _ = draw_scene(classes, size, np.random.default_rng((seed, number)))
                save(os.path.join(top, "JPEGImages", f"{name}.jpg"), picture)
                with open(os.path.join(top, "Annotations", f"{name}.xml"), "w") as file:
                    file.write(annotation(year, name, picture, objects))
        for split, names in {**ids, "trainval": sorted(ids["train"] + ids["val"])}.items():
            with open(os.path.join(top, "ImageSets", "Main", f"{split}.txt"), "w") as file:
                file.write("\n".join(names) + "\n")
    return list(VOC_CLASSES[:classes])


def draw_scene(
    classes: int, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[str, tuple[int, int, int, int], int]], np.ndarray]:
    """An image, uint8 (H,W,3) RGB, its objects: (class, (xmin, ymin, xmax, ymax) as VOC counts, difficult), and which
    of these each pixel shows: uint8 (H,W), 0 for none, from 1 on in their order."""
    longer = int(size * rng.uniform(1, 1.5))
    height, width = (size, longer) if rng.random() < 0.7 else (longer, size)
    picture = background(height, width, rng)
    for _ in range(rng.integers(3, 8)):
        clutter(picture, rng)
    objects: list[tuple[str, tuple[int, int, int, int], int]] = []
    shown = np.zeros((height, width), np.uint8)
    wanted = int(rng.integers(1, OBJECTS + 1))
    for _ in range(20):
        if len(objects) == wanted:
            break
        label = int(rng.integers(classes))
        radius = size * rng.uniform(0.12, 0.3)
        center = np.array([rng.uniform(0.8 * radius, side - 0.8 * radius) for side in (width, height)])
        drawn, mask = draw_object(picture, CLASSES[label], label / classes, center, radius, rng)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(columns[0]) + 1, int(rows[0]) + 1, int(columns[-1]) + 1, int(rows[-1]) + 1)
        if all(_shared(box, other) < 0.2 for _, other, _ in objects):
            objects.append((VOC_CLASSES[label], box, int(rng.random() < 1 / 8)))
            picture = drawn
            shown[mask > 0] = len(objects)
    return with_noise(picture, rng), objects, shown


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Part of the smaller box that lies in the other."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return max(0, width) * max(0, height) / min(areas)


def annotation(
    year: str, name: str, picture: np.ndarray, objects: list[tuple[str, tuple[int, int, int, int], int]]
) -> str:
    """VOC's XML for one image."""
    lines = [
        f"<annotation>\n\t<folder>{year}</folder>\n\t<filename>{name}.jpg</filename>\n\t<size>"
        f"<width>{picture.shape[1]}</width><height>{picture.shape[0]}</height><depth>3</depth></size>"
    ]
    for i, (label, box, difficult) in enumerate(objects):
        corners = "".join(
            f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        # Some of VOC's annotations have no mark, which means that the object is not difficult.
        mark = "" if not difficult and (len(label) + i) % 8 == 0 else f"<difficult>{difficult}</difficult>"
        lines.append(f"\t<object><name>{escape(label)}</name>{mark}<bndbox>{corners}</bndbox></object>")
    return "\n".join([*lines, "</annotation>\n"])
