"""PASCAL VOC: class names, palette, archives, and the base of datamodules in its directory layout.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, and "The PASCAL Visual Object Classes
Challenge: A Retrospective", IJCV 2015.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from datamodules.archives import Archive
from datamodules.base import Split, VisionDataModule
from datamodules.box_transforms import BoxTransform
from datamodules.folders import (
    IMAGE_EXTENSIONS,
    draw_tree,
    list_prediction_images,
    match_ids,
    require_different_names,
    summarize_names,
)
from datamodules.image_dataset import ImageDataset
from datamodules.images import image_size
from datamodules.text import read_lines, read_text
from datamodules.video import VideoDataset, is_video
from errors import DatasetError, UserError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# The VOC hosts go offline for days at times. The checksums are torchvision's.
_HOSTS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC",
    "http://host.robots.ox.ac.uk/pascal/VOC",
    "https://web.archive.org/web/2020/http://host.robots.ox.ac.uk/pascal/VOC",
)
ARCHIVES = {
    "VOC2007/trainval": Archive(_HOSTS, "voc2007/VOCtrainval_06-Nov-2007.tar", "c52e279531787972c589f7e41ab4ae64"),
    "VOC2007/test": Archive(_HOSTS, "voc2007/VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f"),
    "VOC2012/trainval": Archive(_HOSTS, "voc2012/VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"),
}


def find_archive(image_set: str) -> Archive | None:
    """Return the archive that contains an image set such as ``VOC2007/train``; None for other sets."""
    folder, _, name = image_set.partition("/")
    return ARCHIVES.get(f"{folder}/{'trainval' if name in ('train', 'val') else name}")


def voc_palette() -> np.ndarray:
    """Return VOC's colors of the ids 0 to 255, uint8 (256, 3), RGB (devkit, VOClabelcolormap.m).

    Bits 0, 1, 2 of an id are the highest bits of red, green and blue; bits 3, 4, 5 the next; bits 6 and 7 the third.
    """
    ids, colors = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colors[:, bit % 3] |= ((ids >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colors


class PredictionDataset(ImageDataset):
    """Images for prediction, with their ``original_size``, see the batch contract.

    Args:
        names: paths of the images.
        transform: transforms images without boxes.
    """

    def __init__(self, names: Sequence[str], transform: BoxTransform) -> None:
        super().__init__(names, transform.image_only)
        self.exif_orientation = transform.exif_orientation

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return {**sample, "original_size": torch.tensor(image_size(sample["id"], self.exif_orientation))}


class VOCData(VisionDataModule):
    """Base of datamodules in VOC's layout: the devkit, image sets, class names, downloads and prediction.

    Args:
        root: the folder ``VOCdevkit`` or its parent. Only prediction works without it.
        train: image sets for training, each ``<folder>/<list>``.
        val: image sets for validation.
        test: image sets for testing.
        classes: names in label order, or a file with one name per line; null selects VOC's classes.
        images: for prediction, an image, a folder of images or a video.
        download: download missing archives of VOC2007 and VOC2012.
        **kwargs: see `VisionDataModule`.

    Raises:
        UserError: an image set has another form than ``VOC2007/trainval``.
    """

    #: Subfolder of ``ImageSets`` with the lists of ids.
    image_set_folder = "Main"
    #: Annotation files in the expected tree of an error message.
    annotation_files = "Annotations/<id>.xml"
    default_classes: Sequence[str] = VOC_CLASSES
    predict_transform: BoxTransform

    def __init__(
        self,
        root: str | None = None,
        train: Sequence[str] = ("VOC2007/trainval", "VOC2012/trainval"),
        val: Sequence[str] = ("VOC2007/test",),
        test: Sequence[str] = ("VOC2007/test",),
        classes: list[str] | str | None = None,
        images: str | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.images, self.download, self.classes = root, images, download, classes
        self.image_sets: dict[str, tuple[str, ...]] = {"train": tuple(train), "val": tuple(val), "test": tuple(test)}
        for split, names in self.image_sets.items():
            for name in names:
                if len(name.split("/")) != 2:
                    raise UserError(f"{split}: expected image sets like VOC2007/trainval, found {name}")
        if isinstance(classes, list):
            require_different_names("classes", classes)
        self._reported: set[str] = set()

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        if self.classes is None:
            return list(self.default_classes)
        if isinstance(self.classes, list):
            return self.classes
        if not os.path.isfile(self.classes):
            raise DatasetError(f"classes: expected a list of names or a file of them, found no file {self.classes}")
        names = [line.strip() for line in read_lines(self.classes) if line.strip()]
        require_different_names("classes", names, f" in {self.classes}")
        return names

    @property
    def devkit(self) -> str:
        """The folder that contains ``VOC2007`` and ``VOC2012``."""
        if self.root is None:
            raise DatasetError(f"{type(self).__name__}: expected a dataset, found none; set --data.root FOLDER")
        inside = os.path.join(self.root, "VOCdevkit")
        folders = {name.split("/")[0] for name in self._required_image_sets()}
        is_devkit = os.path.basename(os.path.normpath(self.root)) == "VOCdevkit" or any(
            os.path.isdir(os.path.join(self.root, folder)) for folder in folders
        )
        return self.root if is_devkit and not os.path.isdir(inside) else inside

    def source_name(self, split: Split) -> str | None:
        return ", ".join(self.image_sets.get(split, ())) or None

    def absent_classes(self, names: Sequence[str], counts: np.ndarray, unit: str) -> str:
        """Describe the classes without a training object or pixel, in one line; empty if there are none.

        Args:
            names: C names.
            counts: objects or pixels per class, int64 (C,).
            unit: ``object`` or ``pixel``.
        """
        absent = [name for name, count in zip(names, counts, strict=True) if not count]
        classes = summarize_names(absent, "class", "classes")
        return f"train has no {unit} of {classes}; correct --data.classes or the annotations" if absent else ""

    def prepare_data(self) -> None:
        """Download the archives of missing image sets if ``download`` is set."""
        if not self.download:
            return
        folder = os.path.dirname(os.path.normpath(self.devkit)) or "."
        missing = [name for name in self._required_image_sets() if not os.path.isfile(self._list_path(name))]
        for archive in dict.fromkeys(find_archive(name) for name in missing):
            if archive is not None:
                archive.download(folder)

    def _required_image_sets(self) -> list[str]:
        """Return all image sets whose lists are read."""
        return [name for names in self.image_sets.values() for image_set in names for name in self._lists(image_set)]

    def _lists(self, image_set: str) -> list[str]:
        """Return the image sets whose lists define an image set."""
        return [image_set]

    def _prediction_dataset(self) -> Dataset:
        if self.images is None or not is_video(self.images):
            return PredictionDataset(list_prediction_images(self.images), self.predict_transform)
        if self.trainer is not None and self.trainer.world_size > 1:
            raise DatasetError(
                f"images: expected one process to predict a video, found {self.trainer.world_size}; "
                "set --trainer.devices 1"
            )
        return VideoDataset(self.images, self.predict_transform)

    def _report_eval_size(
        self, split: Split, train_size: int | tuple[int, int] | None, eval_size: int | tuple[int, int] | None
    ) -> None:
        """Print a line if evaluation has another image size than training."""

        def describe(size: int | tuple[int, int] | None) -> str:
            return "as on disk" if size is None else str(size if isinstance(size, int) else list(size))

        sizes = describe(train_size), describe(eval_size)
        if sizes[0] != sizes[1]:
            rank_zero_info(
                f"{split}: image size {sizes[1]}, in training {sizes[0]}; set --data.eval_image_size to change it"
            )

    def _list_path(self, image_set: str) -> str:
        folder, name = image_set.split("/")
        return os.path.join(self.devkit, folder, "ImageSets", self.image_set_folder, f"{name}.txt")

    def missing_image_sets(self, split: str) -> list[str]:
        """Return the image sets of a split whose list does not exist."""
        names = (name for image_set in self.image_sets[split] for name in self._lists(image_set))
        return [name for name in names if not os.path.isfile(self._list_path(name))]

    def _read_ids(self, image_set: str) -> list[str]:
        path = self._list_path(image_set)
        if not os.path.isfile(path):
            raise self._missing_list(image_set)
        return self._match_ids(path, self._image_paths(image_set.split("/")[0]))

    def _match_ids(self, path: str, images: dict[str, list[str]]) -> list[str]:
        """Read a list of ids, see `match_ids`.

        Raises:
            DatasetError: the list is empty, or is not UTF-8 and names files that do not exist.
        """
        ids = match_ids(read_lines(path, file_names=True), images)
        if not ids:
            raise DatasetError(f"{path}: expected one image id per line, found none")
        if any(name not in images for name in ids):
            read_text(path)  # a name in another encoding is not found: say which
        return ids

    def _missing_list(self, image_set: str) -> DatasetError:
        folder, name = image_set.split("/")
        lists = os.path.dirname(self._list_path(image_set))
        if os.path.isdir(lists):
            known = sorted(n.removesuffix(".txt") for n in os.listdir(lists) if n.endswith(".txt") and "_" not in n)
            return DatasetError(f"{lists}: expected the list {name}.txt, found {', '.join(known) or 'none'}")
        expected = (
            f"  {self.devkit}/{folder}/\n    JPEGImages/<id>.jpg\n    {self.annotation_files}\n"
            f"    ImageSets/{self.image_set_folder}/{name}.txt"
        )
        archive = find_archive(image_set)
        advice = f"\nset --data.download true, or {archive.instructions(self.root or '.')}" if archive else ""
        return DatasetError(
            f"{type(self).__name__}: no image set {image_set}\nexpected\n{expected}\n"
            f"found\n{draw_tree(self.root or '')}{advice}"
        )

    def _select_files(
        self, image_set: str, ids: list[str], files: dict[str, dict[str, list[str]]]
    ) -> list[dict[str, str]]:
        """Select the one file of each kind that each id has.

        Args:
            image_set: for the error message.
            ids: the ids.
            files: {kind of file: {id: paths}}.

        Returns:
            {id: path} for each kind.

        Raises:
            DatasetError: an id has no file of a kind, or several.
        """
        for kind, paths in files.items():
            missing = [name for name in ids if name not in paths]
            if missing:
                raise DatasetError(
                    f"{image_set}: expected for each id {kind}, found none for {summarize_names(missing, 'id')}"
                )
            several = [" and ".join(map(os.path.basename, paths[name])) for name in ids if len(paths[name]) > 1]
            if several:
                found = summarize_names(several, "id")
                raise DatasetError(
                    f"{image_set}: expected for each id {kind}, found several for {found}; keep one each"
                )
        return [{name: paths[name][0] for name in ids} for paths in files.values()]

    def _image_paths(self, folder: str) -> dict[str, list[str]]:
        """Return {id: paths of its images relative to the devkit}."""
        return self._paths_by_stem(f"{folder}/JPEGImages", IMAGE_EXTENSIONS)

    def _paths_by_stem(self, folder: str, extensions: tuple[str, ...]) -> dict[str, list[str]]:
        """Return {file name without extension: paths relative to the devkit}. Warn once about other files.

        Args:
            folder: relative to the devkit.
            extensions: of the files, in lower case; files match in any letter case. Hidden files are ignored.
        """
        path = os.path.join(self.devkit, folder)
        names = sorted(os.listdir(path)) if os.path.isdir(path) else []
        paths: defaultdict[str, list[str]] = defaultdict(list)
        others = []
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(extensions):
                paths[os.path.splitext(name)[0]].append(f"{folder}/{name}")
            else:
                others.append(name)
        if others and folder not in self._reported:
            self._reported.add(folder)
            rank_zero_warn(
                f"{path}: expected files that end in {' '.join(extensions)}, ignored {summarize_names(others, 'file')}"
            )
        return dict(paths)
