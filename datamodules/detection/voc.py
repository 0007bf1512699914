"""PASCAL VOC detection and custom datasets in its layout."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset

from datamodules.base import Split
from datamodules.box_transforms import BoxTransform, Photometric
from datamodules.folders import summarize_names
from datamodules.image_dataset import PackedStrings
from datamodules.images import read_header
from datamodules.orientation import Size
from datamodules.proposals import read_image_proposals, require_proposals
from datamodules.text import read_xml
from datamodules.voc import VOCData
from errors import BrokenImageError, DatasetError

_ADVICE = "restore the annotated images: boxes are not rescaled"

# Values of ``difficult`` that tools write, in lower case.
_FLAGS = {"0": False, "1": True, "": False, "unspecified": False, "false": False, "true": True}

# --- annotations ----------------------------------------------------------------------------------------------------


class AnnotatedObject(NamedTuple):
    """One object of an XML file.

    VOC counts pixels from 1 and includes both ends. Here a box is continuous, with (0, 0) at the upper left corner of
    the image: VOC's ``xmin`` and ``xmax`` become ``xmin - 1`` and ``xmax``.
    """

    left: float
    top: float
    right: float
    bottom: float
    label: int
    difficult: bool


def read_annotation(path: str, label_of: dict[str, int]) -> tuple[list[AnnotatedObject], tuple[float, float]]:
    """Read one XML file.

    Parts of objects (head, hands and feet of a person) are ignored. A missing, empty or unspecified ``difficult`` means
    no.

    Args:
        path: the file.
        label_of: {class name: label}.

    Returns:
        The objects, and the (width, height) of the image according to the file; (0, 0) if it gives no positive size.

    Raises:
        DatasetError: the file is not XML in VOC's format (see `read_xml`), an object has no box, its class is unknown,
            or ``difficult`` is neither 0 nor 1.
    """
    root = read_xml(path, "annotation", "an annotation in VOC's XML format")
    objects = []
    for number, item in enumerate(root.findall("object"), start=1):
        name = (item.findtext("name") or "").strip()
        if name not in label_of:
            raise DatasetError(
                f"{path}: expected object {number} to be one of {', '.join(label_of)}, found {name!r}; "
                "set the classes with --data.classes"
            )
        try:
            xmin, ymin, xmax, ymax = (
                float(item.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")
            )
        except ValueError as error:
            raise DatasetError(f"{path}: expected a box of four numbers for object {number}, found {error}") from None
        flag = (item.findtext("difficult") or "").strip()
        if flag.lower() not in _FLAGS:
            raise DatasetError(f"{path}: expected difficult 0 or 1 for object {number}, found {flag!r}")
        objects.append(AnnotatedObject(xmin - 1, ymin - 1, xmax, ymax, label_of[name], _FLAGS[flag.lower()]))
    try:
        width, height = float(root.findtext("size/width", "")), float(root.findtext("size/height", ""))
    except ValueError:
        return objects, (0.0, 0.0)
    given = 1 <= width < 2**31 and 1 <= height < 2**31  # some tools write 0
    return objects, (width, height) if given else (0.0, 0.0)


@dataclass(frozen=True)
class DetectionAnnotations:
    """The objects of all images of a split, in the order of the images.

    Attributes:
        images: paths of the N images relative to the devkit.
        boxes: float32 (T, 4), xyxy in pixels, continuous.
        labels: int64 (T,).
        difficult: bool (T,).
        start: int64 (N + 1,); image i has the objects start[i] to start[i + 1].
        sizes: int64 (N, 2), (height, width) of each image in pixels, in the orientation that its boxes refer to; zero
            if the image cannot be read.
        annotated_sizes: int64 (N, 2), (height, width) that the XML file of each image gives; zero if it gives none.
        wrong_size: XML file and both sizes of each image whose annotated size is neither that of the upright image nor
            that of the stored one.
        empty: XML file of each box that was ignored because it has no area.
        outside: XML file of each box that was ignored because it lies outside the image.
        clipped: XML file of each box that was clipped to the image.
    """

    images: PackedStrings
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    start: np.ndarray
    sizes: np.ndarray
    annotated_sizes: np.ndarray
    wrong_size: list[str]
    empty: list[str]
    outside: list[str]
    clipped: list[str]

    def annotated_size(self, index: int) -> Size | None:
        """Return the (height, width) that the XML file of an image gives; None if it gives none."""
        height, width = self.annotated_sizes[index].tolist()
        return (height, width) if height else None

    def warnings(self) -> list[str]:
        """Return one line for each kind: annotations of another size, boxes that were ignored or clipped."""
        kinds = (
            (self.wrong_size, "annotation", "expected the size of the image in {}, found another; " + _ADVICE),
            (self.empty, "object", "ignored {} whose box has no area"),
            (self.outside, "object", "ignored {} whose box lies outside the image"),
            (self.clipped, "object", "clipped the box of {} to the image"),
        )
        return [line.format(summarize_names(files, noun)) for files, noun, line in kinds if files]


# --- dataset --------------------------------------------------------------------------------------------------------


class VOCDetectionDataset(Dataset):
    """Images with their objects; see the batch contract.

    Args:
        root: folder that the paths are relative to.
        annotations: the objects.
        transform: transforms images and boxes.
        keep_difficult: keep objects that are marked difficult.
        proposals: folder of proposals, which are transformed like the boxes; None for none.
        training: shuffle the objects of an image, as darknet does (src/data.c: randomize_boxes): YOLO keeps one of
            several objects in a cell, so they take turns.
    """

    def __init__(
        self,
        root: str,
        annotations: DetectionAnnotations,
        transform: BoxTransform,
        keep_difficult: bool = True,
        proposals: str | None = None,
        training: bool = False,
    ) -> None:
        self.root, self.annotations, self.transform = root, annotations, transform
        self.keep_difficult, self.proposals, self.training = keep_difficult, proposals, training

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        a = self.annotations
        objects = np.arange(a.start[index], a.start[index + 1])
        if not self.keep_difficult:
            objects = objects[~a.difficult[objects]]
        name, boxes = a.images[index], a.boxes[objects]
        if self.proposals is not None:
            boxes = np.concatenate([boxes, read_image_proposals(self.proposals, name)])
        path = os.path.join(self.root, name)
        image, boxes, kept = self.transform(path, boxes, len(objects), a.annotated_size(index))
        num_objects = int(np.searchsorted(kept, len(objects)))
        # The last random numbers of the sample: its augmentation does not depend on the number of objects.
        order = np.random.permutation(num_objects) if self.training else np.arange(num_objects)
        objects = objects[kept[order]]
        target = {
            "boxes": torch.from_numpy(boxes[order]),
            "labels": torch.from_numpy(a.labels[objects]),
            "difficult": torch.from_numpy(a.difficult[objects]),
        }
        original_size = torch.from_numpy(a.sizes[index])
        sample = {"image": image, "target": target, "original_size": original_size, "id": name}
        return sample if self.proposals is None else {**sample, "proposals": torch.from_numpy(boxes[num_objects:])}


# --- datamodule -----------------------------------------------------------------------------------------------------


class VOCDetection(VOCData):
    """VOC2007, VOC2012, both, or a custom dataset in the same layout::

        VOCdevkit/VOC2007/JPEGImages/<id>.jpg
        VOCdevkit/VOC2007/Annotations/<id>.xml
        VOCdevkit/VOC2007/ImageSets/Main/{train,val,trainval,test}.txt    one id per line

    The defaults are the papers': train on 07+12 trainval (16,551 images), validate and test on VOC2007 test (4,952).
    The best checkpoint is therefore selected on the test set, as in the papers. Use ``train: [VOC2007/train]`` and
    ``val: [VOC2007/val]`` to avoid that.

    Args:
        root: the folder ``VOCdevkit`` or its parent. Only prediction works without it.
        image_size: side in pixels of the square that images are warped to (YOLO 448, SSD 300); or [shorter, longest],
            which keeps the aspect ratio (Faster R-CNN: [600, 1000]) and gives lists of images of different sizes.
        eval_image_size: image size in validation, test and prediction; null uses ``image_size``.
        photometric: color augmentation in training, see `BoxTransform`.
        expand: largest factor of SSD's zoom-out in training, see `BoxTransform`; 1 disables it.
        iou_crop: use SSD's random crops in training, see `BoxTransform`.
        jitter: largest relative shift of each side of the training crop (YOLO), see `BoxTransform`.
        hflip: probability of a horizontal flip in training.
        train_difficult: train on difficult objects too. The authors of R-CNN, Fast R-CNN and SSD do, those of Faster
            R-CNN and YOLO do not: there a proposal, anchor or cell on a difficult object is background.
        proposals: folder of region proposals for R-CNN and Fast R-CNN, written by ``python -m tools.proposals``;
            not used in prediction.
        **kwargs: see `VOCData`.

    Raises:
        UserError: an option is out of range, or the dataset differs from the layout.
    """

    def __init__(
        self,
        root: str | None = None,
        image_size: int | tuple[int, int] = 300,
        eval_image_size: int | tuple[int, int] | None = None,
        photometric: Photometric = "none",
        expand: float = 1.0,
        iou_crop: bool = False,
        jitter: float = 0.0,
        hflip: float = 0.5,
        train_difficult: bool = True,
        proposals: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.train_difficult, self.proposals = train_difficult, proposals
        self.train_transform = BoxTransform(
            image_size, photometric, expand, iou_crop, jitter, hflip, self.exif_orientation
        )
        eval_size = image_size if eval_image_size is None else eval_image_size
        self.eval_transform = BoxTransform(eval_size, exif_orientation=self.exif_orientation)
        self.predict_transform = self.eval_transform

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return self._prediction_dataset()
        if split != "train":
            self._report_eval_size(split, self.train_transform.image_size, self.eval_transform.image_size)
        annotations = self.annotations(split)
        for line in annotations.warnings():
            rank_zero_warn(f"{split}: {line}")
        if self.proposals is not None:
            names = [annotations.images[i] for i in range(len(annotations.images))]
            require_proposals(self.proposals, names, self._proposal_options(split))
        training = split == "train"
        if training and (line := self.untrained_classes(annotations)):
            rank_zero_warn(line)
        transform = self.train_transform if training else self.eval_transform
        keep_difficult = self.train_difficult or not training
        return VOCDetectionDataset(self.devkit, annotations, transform, keep_difficult, self.proposals, training)

    def untrained_classes(self, annotations: DetectionAnnotations) -> str:
        """Describe the classes without an object that is trained on, see `VOCData.absent_classes`."""
        labels = annotations.labels[~annotations.difficult | self.train_difficult]
        counts = np.bincount(labels, minlength=len(self.class_names))
        return self.absent_classes(self.class_names, counts, "object")

    def _proposal_options(self, split: Split) -> str:
        """Return the options of ``python -m tools.proposals`` for this dataset."""
        classes = self.classes if isinstance(self.classes, list) else [self.classes or ""]
        given = f" --classes {' '.join(classes)}" if self.classes else ""
        stored = "" if self.exif_orientation else " --exif_orientation false"
        return f"--root {self.root}{given} --sets {' '.join(self.image_sets[split])}{stored}"

    def annotations(self, split: Split) -> DetectionAnnotations:
        """Read the objects of a split's image sets, in the order of the lists, and the header of each image.

        Boxes are clipped to the image in the orientation that the annotated size fits, see `ImageHeader.is_upright`.

        Raises:
            DatasetError: a list, an image or an annotation is missing, or an annotation is invalid.
        """
        label_of = {name: i for i, name in enumerate(self.class_names)}
        images: list[str] = []
        objects: list[AnnotatedObject] = []
        start = [0]
        sizes: list[Size] = []
        annotated_sizes: list[Size] = []
        wrong_size: list[str] = []
        empty: list[str] = []
        outside: list[str] = []
        clipped: list[str] = []
        for image_set in self.image_sets[split]:
            folder = image_set.split("/")[0]
            ids = self._read_ids(image_set)
            files = {
                "an image in JPEGImages": self._image_paths(folder),
                "an XML file in Annotations": self._paths_by_stem(f"{folder}/Annotations", (".xml",)),
            }
            image_paths, xml_paths = self._select_files(image_set, ids, files)
            for name in ids:
                images.append(image_paths[name])
                xml = xml_paths[name]
                found, (width, height) = read_annotation(os.path.join(self.devkit, xml), label_of)
                annotated_size = (round(height), round(width)) if width else None
                size = self._image_size(image_paths[name], annotated_size)
                sizes.append(size or (0, 0))
                annotated_sizes.append(annotated_size or (0, 0))
                if size is not None and annotated_size not in (None, size):
                    wrong_size.append(f"{xml}: {width:g}x{height:g}, image {size[1]}x{size[0]}")
                height, width = size or (math.inf, math.inf)
                for item in found:
                    left, top = max(item.left, 0.0), max(item.top, 0.0)
                    right, bottom = min(item.right, width), min(item.bottom, height)
                    if not (item.right > item.left and item.bottom > item.top):
                        empty.append(xml)
                    elif not (right > left and bottom > top):
                        outside.append(xml)
                    else:
                        if (left, top, right, bottom) != item[:4]:
                            clipped.append(xml)
                        objects.append(AnnotatedObject(left, top, right, bottom, item.label, item.difficult))
                start.append(len(objects))
        return DetectionAnnotations(
            PackedStrings(images),
            np.array([item[:4] for item in objects], np.float32).reshape(-1, 4),
            np.array([item.label for item in objects], np.int64),
            np.array([item.difficult for item in objects], bool),
            np.array(start),
            np.array(sizes, np.int64).reshape(-1, 2),
            np.array(annotated_sizes, np.int64).reshape(-1, 2),
            wrong_size,
            empty,
            outside,
            clipped,
        )

    def _image_size(self, image: str, annotated_size: Size | None) -> tuple[int, int] | None:
        """Return (height, width) of an image as its annotation sees it; None if the image cannot be read."""
        try:
            header = read_header(os.path.join(self.devkit, image))
        except BrokenImageError:  # the loader counts and reports it
            return None
        return header.size(header.is_upright(annotated_size, self.exif_orientation))
