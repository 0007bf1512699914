"""Check a dataset in VOC's layout: objects or masks."""

from __future__ import annotations

import os
from functools import partial
from typing import NamedTuple

import numpy as np

from datamodules.detection.voc import VOCDetection
from datamodules.orientation import Size
from datamodules.segmentation.base import MaskFiles, VOCMaskData
from datamodules.segmentation.masks import count_ids, masks_and_boxes, open_image, read_mask, read_objects
from datamodules.transforms import VOID
from errors import BrokenImageError, DatasetError
from tools.dataset_checks.report import Report, count_range


def check_objects(data: VOCDetection, report: Report) -> None:
    """Count objects per class, and report boxes that are empty or outside the image."""
    report.notes.append(f"{len(data.class_names)} classes")
    for split, found in report.readable_splits(data, data.image_sets, data.missing_image_sets, data.annotations):
        title = " + ".join(data.image_sets[split])
        counts = np.bincount(found.labels, minlength=len(data.class_names))
        report.notes.append(
            f"{title}: {len(found.images)} images, {counts.sum()} objects, "
            f"{count_range(counts, data.class_names)}, {found.difficult.sum()} difficult, "
            f"{(np.diff(found.start) == 0).sum()} images without objects"
        )
        report.add_counts(data.class_names, counts)
        # Data with the default classes may be a part of VOC.
        line = data.untrained_classes(found) if split == "train" else ""
        if line and (data.classes is not None or not counts.any()):
            report.problems.append(f"{title}: {line}")
        report.problems += [f"{title}: {line}" for line in found.warnings()]
        sizes = [found.annotated_size(i) for i in range(len(found.images))]
        report.read_images(title, data.devkit, found.images, annotated_sizes=sizes)


class MaskFacts(NamedTuple):
    """Facts about the masks of one image.

    Attributes:
        counts: int64 (256,), pixels per id, or objects per label.
        size: (height, width) in pixels; zero if the masks cannot be used.
        error: why the masks cannot be used; empty if they can.
    """

    counts: np.ndarray
    size: Size = (0, 0)
    error: str = ""


def read_mask_facts(files: MaskFiles, root: str, num_classes: int, exif_orientation: bool) -> MaskFacts:
    """Read the masks of one image. `Report.read_images` reports an image that cannot be read.

    Args:
        files: paths of the image and its masks, relative to ``root``.
        root: the folder ``VOCdevkit``.
        num_classes: number of class ids, with the background; of object classes, without it, if there are object masks.
        exif_orientation: apply the EXIF orientation of the image where the size of the mask does not tell.
    """
    image, class_mask, object_mask = (os.path.join(root, name) if name else "" for name in files)
    try:
        if object_mask:
            ids, labels_of_ids = read_objects(object_mask, class_mask, num_classes)
            counts = np.bincount(masks_and_boxes(ids, labels_of_ids)[2], minlength=256)
        else:
            ids = read_mask(class_mask, num_classes)
            counts = count_ids(ids)
        encoded = open_image(image, object_mask or class_mask, ids, exif_orientation)
    except (BrokenImageError, DatasetError) as error:
        unreadable_image = isinstance(error, BrokenImageError) and error.path == image
        return MaskFacts(np.zeros(256, np.int64), error="" if unreadable_image else str(error))
    return MaskFacts(counts, (encoded.height, encoded.width))


def check_masks(data: VOCMaskData, report: Report) -> None:
    """Count pixels or objects per class, and report invalid masks."""
    report.notes.append(f"{len(data.class_names)} classes")
    names = data.class_names
    if data.needs_object_masks and data.classes_include_background:
        names = names[1:]  # the background has no objects
    for split, files in report.readable_splits(data, data.image_sets, data.missing_image_sets, data.files):
        title = " + ".join(data.image_sets[split])
        function = partial(
            read_mask_facts, root=data.devkit, num_classes=len(names), exif_orientation=data.exif_orientation
        )
        facts = report.map(function, [files[i] for i in range(len(files))], f"reading masks of {title}")
        report.add_problems([fact.error for fact in facts if fact.error], "invalid masks")
        counts = np.stack([fact.counts for fact in facts])
        totals, images = counts.sum(0), (counts > 0).sum(0)
        if data.needs_object_masks:
            report.notes.append(
                f"{title}: {len(files)} images, {totals.sum()} objects, {count_range(totals[: len(names)], names)}, "
                f"{(counts.sum(1) == 0).sum()} images without objects"
            )
            report.add_counts(names, totals[: len(names)])
            untrained = data.absent_classes(names, totals[: len(names)], "object")
        else:
            untrained = data.untrained_classes(totals)
            fraction = totals / max(1, totals.sum())
            report.notes.append(f"{title}: {len(files)} images, {totals.sum()} pixels, {fraction[VOID]:.2%} void")
            report.notes += [
                f"  {name}: {totals[i]} pixels ({fraction[i]:.2%}) in {images[i]} images"
                for i, name in enumerate(names)
            ]
        # Data with the default classes may be a part of VOC; it contains some of them.
        first_object = 0 if data.needs_object_masks else 1
        is_own = data.classes is not None or not totals[first_object:VOID].any()
        if split == "train" and untrained and is_own and not all(fact.error for fact in facts):
            report.problems.append(f"{title}: {untrained}")
        report.read_images(title, data.devkit, files.images, annotated_sizes=[fact.size for fact in facts])
