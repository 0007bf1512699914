"""Places365-Standard: Zhou, Lapedriza, Khosla, Oliva and Torralba, "Places: A 10 Million Image Database for Scene
Recognition", TPAMI 2018. 365 scenes, 1.8 million training images, 50 validation images of each scene."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import numpy as np

from datamodules.base import Split
from datamodules.classification.base import ClassificationData, Listing, list_classes
from datamodules.folders import PackedStrings, compare_to_list, some
from errors import DatasetError

CATEGORIES = "categories_places365.txt"
# The authors' file, which lies in the archive filelist_places365-standard.tar as well, and its MD5.
CATEGORIES_URL = "https://raw.githubusercontent.com/CSAILVision/places365/master/categories_places365.txt"
CATEGORIES_MD5 = "06c963b85866bd0649f97cb43dd16673"


class Places365(ClassificationData):
    """Places365-Standard in either of the two public layouts, whichever is found.

    ::

        standard                                      easy
        categories_places365.txt                      categories_places365.txt (the archive has none: add it)
        places365_train_standard.txt                  places365_standard/train/<class>/<image>.jpg
        places365_val.txt                             places365_standard/val/<class>/<image>.jpg
        data_256_standard/a/airfield/00000001.jpg
        val_256/Places365_val_00000001.jpg

    Labels are those of ``categories_places365.txt`` (``/a/airfield 0``) and never the order of folders: sorted, folders
    "0" to "364" come as 0, 1, 10, ..., and ``desert_sand`` comes after ``desert_road``, while ``/d/desert/sand`` comes
    before it. In the easy layout a class's folder is its category without the letter, where ``/`` is ``-`` (as in the
    archive) or ``_``, or its number. ``train.txt`` and ``val.txt`` beside them are not read.

    The labels of the test images are not public. Testing measures val; ``predict --data.images ROOT/test_256`` labels
    the test images.

    In evaluation ``resize: auto`` does not keep the aspect, as in the authors' code: both sides become 8/7 of
    image_size (256 for 224).

    Args:
        root: the folder that holds the above; of the easy layout also ``places365_standard``. Only prediction can do
            without.
        large: take the images in ``data_large_standard`` and ``val_large``, whose shorter side is 512 or less, in
            place of those of 256x256 pixels.
        **kwargs: see `ClassificationData`.
    """

    keep_aspect = False

    def __init__(self, root: str | None = None, large: bool = False, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.large = large

    @property
    def standard(self) -> bool:
        """Whether the images lie in the standard layout."""
        folders = (f"{part}_{size}" for part in ("data", "val") for size in ("256", "large"))
        names = {name for folder in folders for name in (folder, f"{folder}_standard")}
        return any(os.path.isdir(os.path.join(self.root or "", name)) for name in names)

    @property
    def folder(self) -> str:
        """The folder that holds the splits."""
        inside = os.path.join(self.root or "", "places365_standard")
        return inside if os.path.isdir(inside) and not self.standard else self.root or ""

    @property
    def class_names(self) -> list[str] | None:
        """The scenes in label order, ``apartment building, outdoor``; None when predicting without a root."""
        return None if self.classes is None else [scene_name(category) for category in self.classes]

    def read_classes(self) -> list[str]:
        """The categories in label order, ``/a/airfield``."""
        paths = [os.path.join(folder, CATEGORIES) for folder in (self.root or "", self.folder)]
        there = [path for path in paths if os.path.isfile(path)]
        if not there:
            raise self.refusal(f"there is no {CATEGORIES}, which labels come from")
        if self.large and not self.standard:
            raise self.refusal("there are no large images; the easy layout has none", "train")
        return read_categories(there[0])

    def label_of(self) -> dict[str, int]:
        """The label of a category and of each folder that can only mean it."""
        return {name: labels[0] for name, labels in self._meanings().items() if len(labels) == 1}

    def _meanings(self) -> dict[str, list[int]]:
        meanings: dict[str, set[int]] = defaultdict(set)
        for label, category in enumerate(self.classes or ()):
            plain = category.split("/", 2)[2]
            for name in (category, plain.replace("/", "-"), plain.replace("/", "_"), str(label)):
                meanings[name].add(label)
        return {name: sorted(labels) for name, labels in meanings.items()}

    def title(self, split: Split) -> str:
        training = split == "train"
        if self.standard:
            return "places365_train_standard.txt" if training else "places365_val.txt"
        return "train/" if training else "val/"

    def absent(self, split: Split) -> str:
        parts = (self.title(split), f"{self._pictures(split)}/") if self.standard else (self.title(split),)
        absent = [name for name in parts if not os.path.exists(os.path.join(self.folder, name))]
        return f"there is no {' and no '.join(absent)}" if absent else ""

    def _pictures(self, split: Split) -> str:
        """The standard layout's folder of a split. The training archives unpack without ``_standard``."""
        size = "large" if self.large else "256"
        if split != "train":
            return f"val_{size}"
        plain, renamed = f"data_{size}", f"data_{size}_standard"
        there = [name for name in (renamed, plain) if os.path.isdir(os.path.join(self.folder, name))]
        return there[0] if there else renamed

    def read_listing(self, split: Split) -> Listing:
        if not self.standard:
            return list_classes(self.folder, self.title(split).rstrip("/"))
        classes = self.classes or []
        if self.absent(split):
            return Listing(classes, PackedStrings([]), np.zeros(0, np.int32))
        pictures = self._pictures(split)
        names, labels = self._read_list(os.path.join(self.folder, self.title(split)), pictures)
        missing, unlisted = compare_to_list(self.folder, pictures, names)
        return Listing(classes, PackedStrings(names), labels, missing=missing, unlisted=unlisted)

    def _read_list(self, path: str, pictures: str) -> tuple[list[str], np.ndarray]:
        """The images that a list names, in the folder ``images``, and their labels: int32 (N,).

        Raises:
            DatasetError: a line is not ``image label``, or its label is not that of the category that it lies in.
        """
        label_of = {category: label for label, category in enumerate(self.classes or ())}
        names: list[str] = []
        labels: list[int] = []
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                name, _, label = line.strip().rpartition(" ")
                if not name or not label.isdecimal() or int(label) >= len(label_of):
                    expected = f"an image and a label of 0 to {len(label_of) - 1}"
                    raise DatasetError(f"{path}, line {number}: expected {expected}, found {line.strip()!r}")
                category = name.rpartition("/")[0]
                if category and label_of.get(category) != int(label):
                    expected = f"label {label_of[category]}" if category in label_of else "a known category"
                    raise DatasetError(
                        f"{path}, line {number}: expected {expected} by {CATEGORIES}, found {line.strip()!r}"
                    )
                names.append(f"{pictures}/{name.lstrip('/')}")
                labels.append(int(label))
        return names, np.array(labels, np.int32)

    def problems(self, split: Split) -> list[str]:
        """As ever, and folders that are no category, or may be several."""
        lines = super().problems(split)
        if lines or self.standard:
            return lines
        meanings = self._meanings()
        folders = self.listing(split).classes
        unknown = [name for name in folders if name not in meanings]
        if unknown:
            lines.append(f"{self.title(split)} has {some(unknown, 'folder')} that {CATEGORIES} does not name")
        for name in folders:
            if len(meanings.get(name, ())) > 1:
                several = " or ".join((self.classes or [])[label] for label in meanings[name])
                lines.append(f"{self.title(split)}{name} may be {several}: rename it by its number")
        return lines

    def expected(self) -> str:
        size = "large" if self.large else "256"
        return (
            f"  {self.folder}/\n    {CATEGORIES}\n    places365_train_standard.txt, places365_val.txt\n"
            f"    data_{size}_standard/a/airfield/00000001.jpg\n    val_{size}/Places365_val_00000001.jpg\n"
            f"or\n  {self.folder}/\n    {CATEGORIES}\n    train/<class>/<image>.jpg\n    val/<class>/<image>.jpg"
        )

    def advice(self, split: Split | None) -> str:
        archives = "The archives are at http://places2.csail.mit.edu/download.html."
        if split is None:
            return f"Fetch {CATEGORIES_URL} (MD5 {CATEGORIES_MD5}) and put it in {self.root}. {archives}"
        other = "val_256" if self.large else "val_large"
        if self.standard and os.path.isdir(os.path.join(self.root or "", other)):
            return f"{other}/ is there: --data.large {str(not self.large).lower()} takes images of that size."
        return archives


def scene_name(category: str) -> str:
    """A category as people read it: ``/a/apartment_building/outdoor`` is ``apartment building, outdoor``."""
    return category.split("/", 2)[2].replace("/", ", ").replace("_", " ")


def read_categories(path: str) -> list[str]:
    """The categories in the order of their labels.

    Raises:
        DatasetError: a line is not ``/a/airfield 0``; a category occurs twice; the labels are not 0, 1, 2 and so on,
            each once.
    """
    categories: dict[int, str] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            category, _, label = line.strip().rpartition(" ")
            if not label.isdecimal() or category.count("/") < 2 or category[0] != "/":
                raise DatasetError(f"{path}, line {number}: expected '/a/airfield 0', found {line.strip()[:80]!r}")
            if int(label) in categories:
                twice = f"{categories[int(label)]} and {category}"
                raise DatasetError(f"{path}, line {number}: expected each label once, found {label} for {twice}")
            if category in categories.values():
                raise DatasetError(f"{path}, line {number}: expected each category once, found {category} again")
            categories[int(label)] = category
    if not categories or max(categories) != len(categories) - 1:
        found = f"{len(categories)} labels" + (f" up to {max(categories)}" if categories else "")
        raise DatasetError(f"{path}: expected the labels 0, 1, 2 and so on, found {found}")
    return [categories[label] for label in range(len(categories))]
