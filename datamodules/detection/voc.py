"""PASCAL VOC detection, and custom datasets in its layout."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset

from datamodules.base import Split
from datamodules.box_transforms import BoxTransform, Photometric
from datamodules.folders import PackedStrings, some
from datamodules.images import image_size
from datamodules.proposals import check_proposals, read_proposals
from datamodules.voc import VOCTree
from errors import DatasetError


@dataclass(frozen=True)
class Annotations:
    """The objects of all images of a set, image after image.

    Attributes:
        images: paths of the images relative to the devkit.
        boxes: float32 (T,4) xyxy: continuous, from (0, 0) at the image's upper left corner; what VOC writes as pixels
            xmin to xmax, both included and counted from 1, is xmin - 1 to xmax.
        labels: int64 (T,).
        difficult: bool (T,).
        start: int64 (N+1,): image i has the objects start[i] to start[i+1].
        flat: XML files of the boxes that were left out since they have no area.
        outside: the same of those that were left out since they lie outside of their image.
        clipped: the same of those that reach beyond it and were clipped.
    """

    images: PackedStrings
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    start: np.ndarray
    flat: list[str]
    outside: list[str]
    clipped: list[str]

    def remarks(self) -> list[str]:
        """What was left out or changed, a line each, with a file."""
        kinds = (
            (self.flat, "left out {} whose box has no area"),
            (self.outside, "left out {} whose box lies outside of the image"),
            (self.clipped, "clipped the box of {} that reaches beyond the image"),
        )
        return [what.format(some(files, "object")) for files, what in kinds if files]


Object = tuple[float, float, float, float, int, bool]  # left, top, right, bottom, label, difficult


def read_annotation(path: str, label_of: dict[str, int]) -> tuple[list[Object], tuple[float, float]]:
    """The objects of one XML file, and the (width, height) that it says its image has; (0, 0) where it does not.

    Parts of objects (a person's head and hands) are no objects. ``difficult`` may be missing: then it is not.

    Raises:
        DatasetError: the file is not XML, an object has no name or box, or its class is not among those given.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise DatasetError(f"{path}: expected an annotation in VOC's XML, found {error}") from None
    objects = []
    for number, item in enumerate(root.findall("object"), start=1):
        name = (item.findtext("name") or "").strip()
        if name not in label_of:
            raise DatasetError(
                f"{path}: object {number} is a {name!r}, expected one of {', '.join(label_of)}: "
                "give the classes by --data.classes"
            )
        try:
            xmin, ymin, xmax, ymax = (
                float(item.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")
            )
            difficult = bool(int(item.findtext("difficult") or 0))
        except ValueError as error:
            raise DatasetError(f"{path}: object {number} has no whole box ({error})") from None
        objects.append((xmin - 1, ymin - 1, xmax, ymax, label_of[name], difficult))
    try:
        return objects, (float(root.findtext("size/width", "")), float(root.findtext("size/height", "")))
    except ValueError:
        return objects, (0.0, 0.0)


class VOCDataset(Dataset):
    """Images with their objects, see the batch contract; ``target`` is left out where there are no annotations.

    Args:
        root: folder that the paths are relative to.
        annotations: the objects.
        transform: image and boxes to tensors.
        difficult: keep objects that are marked difficult.
        proposals: a folder that `datamodules.proposals` wrote: each image's are moved as its boxes are.
    """

    def __init__(
        self,
        root: str,
        annotations: Annotations,
        transform: BoxTransform,
        difficult: bool = True,
        proposals: str | None = None,
    ) -> None:
        self.root, self.annotations, self.transform, self.difficult = root, annotations, transform, difficult
        self.proposals = proposals

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        a = self.annotations
        mine = np.arange(a.start[index], a.start[index + 1])
        if not self.difficult:
            mine = mine[~a.difficult[mine]]
        name, boxes = a.images[index], a.boxes[mine]
        if self.proposals is not None:
            boxes = np.concatenate([boxes, read_proposals(self.proposals, name)])
        image, boxes, kept = self.transform(os.path.join(self.root, name), boxes, len(mine))
        objects = int(np.searchsorted(kept, len(mine)))
        kept = kept[:objects]
        target = {
            "boxes": torch.from_numpy(boxes[:objects]),
            "labels": torch.from_numpy(a.labels[mine[kept]]),
            "difficult": torch.from_numpy(a.difficult[mine[kept]]),
        }
        sample = {"image": image, "target": target, "id": name}
        return sample if self.proposals is None else {**sample, "proposals": torch.from_numpy(boxes[objects:])}


class VOCDetection(VOCTree):
    """VOC2007, VOC2012, both, or a set of one's own in the same layout::

        VOCdevkit/VOC2007/JPEGImages/<id>.jpg
        VOCdevkit/VOC2007/Annotations/<id>.xml
        VOCdevkit/VOC2007/ImageSets/Main/{train,val,trainval,test}.txt    one id a line

    The defaults are the papers': trained on 07+12 (16,551 images), validated and tested on VOC2007's test set
    (4,952), so that the best checkpoint is chosen on the test set, as the papers did; ``train: [VOC2007/train]`` and
    ``val: [VOC2007/val]`` keep them apart.

    Args:
        root: the folder ``VOCdevkit``, or the one that it lies in. Only prediction can do without.
        train, val, test: image sets, each ``<folder>/<name of the list>``.
        classes: names in label order, or a file with one a line; None for VOC's twenty.
        image_size: side in pixels of the square that images are warped to (YOLO 448, SSD 300); or [shorter, longest],
            which keeps the aspect (Faster R-CNN: [600, 1000]) and gives lists of images of different sizes.
        eval_image_size: the same for validation, test and prediction; None for ``image_size``.
        photometric, expand, iou_crop, jitter, hflip: training augmentation, see `BoxTransform`.
        train_difficult: train on difficult objects too (SSD does, the R-CNN family does not).
        proposals: folder of boxes that may hold objects, for Fast R-CNN: ``python -m tools.proposals`` writes it.
            Prediction has none.
        images: for prediction, a folder of images, one image, or a video (of which all frames are predicted).
        download: fetch what is missing of VOC2007 and VOC2012.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the tree or an annotation is not as described.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        root: str | None = None,
        train: Sequence[str] = ("VOC2007/trainval", "VOC2012/trainval"),
        val: Sequence[str] = ("VOC2007/test",),
        test: Sequence[str] = ("VOC2007/test",),
        classes: list[str] | str | None = None,
        image_size: int | tuple[int, int] = 300,
        eval_image_size: int | tuple[int, int] | None = None,
        photometric: Photometric = "none",
        expand: float = 1.0,
        iou_crop: bool = False,
        jitter: float = 0.0,
        hflip: float = 0.5,
        train_difficult: bool = True,
        proposals: str | None = None,
        images: str | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        sets = {"train": train, "val": val, "test": test}
        super().__init__(root=root, sets=sets, classes=classes, images=images, download=download, **kwargs)
        self.train_difficult, self.proposals = train_difficult, proposals
        self.train_transform = BoxTransform(image_size, photometric, expand, iou_crop, jitter, hflip)
        self.eval_transform = BoxTransform(image_size if eval_image_size is None else eval_image_size)
        self.predict_transform = BoxTransform(self.eval_transform.size, exif_orientation=True)

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return self._to_predict()
        annotations = self.annotations(split)
        for line in annotations.remarks():
            rank_zero_warn(f"{split}: {line}")
        if self.proposals is not None:
            names = [annotations.images[i] for i in range(len(annotations.images))]
            check_proposals(self.proposals, names, f"{self._options()} --sets {' '.join(self.sets[split])}")
        training = split == "train"
        transform = self.train_transform if training else self.eval_transform
        difficult = self.train_difficult or not training
        return VOCDataset(self.devkit, annotations, transform, difficult, self.proposals)

    def _options(self) -> str:
        """What the commands that read this dataset need to be told."""
        classes = self.given_classes if isinstance(self.given_classes, list) else [self.given_classes or ""]
        return f"--root {self.root}" + (f" --classes {' '.join(classes)}" if self.given_classes else "")

    def annotations(self, split: Split) -> Annotations:
        """All objects of a split's image sets, in the order of the lists.

        Raises:
            DatasetError: a list, an image or an annotation is missing, or an annotation is not as expected.
        """
        label_of = {name: i for i, name in enumerate(self.class_names)}
        images: list[str] = []
        objects: list[Object] = []
        start = [0]
        flat: list[str] = []
        outside: list[str] = []
        clipped: list[str] = []
        for image_set in self.sets[split]:
            folder = image_set.split("/")[0]
            ids, pictures = self._ids(image_set), self._pictures(folder)
            annotated = self._stems(f"{folder}/Annotations")
            self._check_ids(image_set, ids, {"image in JPEGImages": pictures, "XML file in Annotations": annotated})
            for name in ids:
                images.append(pictures[name])
                path = os.path.join(self.devkit, annotated[name])
                found, (width, height) = read_annotation(path, label_of)
                if any(item[0] < 0 or item[1] < 0 or item[2] > width or item[3] > height for item in found):
                    # Many files have no size, or a wrong one: the image knows.
                    height, width = image_size(os.path.join(self.devkit, pictures[name]))
                for left, top, right, bottom, label, difficult in found:
                    inner = max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)
                    if not (right > left and bottom > top):
                        flat.append(annotated[name])
                    elif not (inner[2] > inner[0] and inner[3] > inner[1]):
                        outside.append(annotated[name])
                    else:
                        if inner != (left, top, right, bottom):
                            clipped.append(annotated[name])
                        objects.append((*inner, label, difficult))
                start.append(len(objects))
        return Annotations(
            PackedStrings(images),
            np.array([item[:4] for item in objects], np.float32).reshape(-1, 4),
            np.array([item[4] for item in objects], np.int64),
            np.array([item[5] for item in objects], bool),
            np.array(start),
            flat,
            outside,
            clipped,
        )
