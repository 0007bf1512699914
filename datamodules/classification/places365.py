"""Places365-Standard: 365 scenes, 1.8 million training images, 50 validation images per scene.

Zhou, Lapedriza, Khosla, Oliva and Torralba, "Places: A 10 Million Image Database for Scene Recognition", TPAMI 2018.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import numpy as np

from datamodules.base import Split
from datamodules.classification.base import ClassificationData, Listing, list_classes
from datamodules.folders import compare_to_list, summarize_names
from datamodules.image_dataset import PackedStrings
from datamodules.text import read_lines
from errors import DatasetError

CATEGORIES = "categories_places365.txt"
# The authors' file and its MD5. It is also in the archive filelist_places365-standard.tar.
CATEGORIES_URL = "https://raw.githubusercontent.com/CSAILVision/places365/master/categories_places365.txt"
CATEGORIES_MD5 = "06c963b85866bd0649f97cb43dd16673"


class Places365(ClassificationData):
    """Places365-Standard in either of its two public layouts, whichever exists.

    ::

        standard                                      easy
        categories_places365.txt                      categories_places365.txt (not in the archive: add it)
        places365_train_standard.txt                  places365_standard/train/<class>/<image>.jpg
        places365_val.txt                             places365_standard/val/<class>/<image>.jpg
        data_256_standard/a/airfield/00000001.jpg
        val_256/Places365_val_00000001.jpg

    Labels come from ``categories_places365.txt`` (``/a/airfield 0``), never from the order of folders. Sorted folders
    "0" to "364" start with 0, 1, 10, and ``desert_sand`` follows ``desert_road``, while ``/d/desert/sand`` precedes
    ``/d/desert_road``. In the easy layout a class folder is the category without its letter, with ``-`` (as in the
    archive) or ``_`` for ``/``, or the label. ``train.txt`` and ``val.txt`` next to the folders are not read.

    The test labels are not public: testing uses val. ``predict --data.images ROOT/test_256`` predicts the test images.

    In evaluation, ``resize: auto`` changes the aspect ratio, as in the authors' code: both sides become 8/7 of
    image_size (256 for 224).

    Args:
        root: the folder that contains the above; for the easy layout also ``places365_standard``. Optional for
            prediction.
        large: use the images in ``data_large_standard`` and ``val_large``, whose shorter side is at most 512, instead
            of those of 256x256 pixels.
        **kwargs: see `ClassificationData`.
    """

    keep_aspect = False

    def __init__(self, root: str | None = None, large: bool = False, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.large = large

    @property
    def standard(self) -> bool:
        """Whether the dataset has the standard layout."""
        folders = (f"{part}_{size}" for part in ("data", "val") for size in ("256", "large"))
        names = {name for folder in folders for name in (folder, f"{folder}_standard")}
        return any(os.path.isdir(os.path.join(self.root or "", name)) for name in names)

    @property
    def folder(self) -> str:
        """The folder that contains the splits."""
        inside = os.path.join(self.root or "", "places365_standard")
        return inside if os.path.isdir(inside) and not self.standard else self.root or ""

    @property
    def class_names(self) -> list[str] | None:
        """The scenes in label order, ``apartment building, outdoor``; None for prediction without ``root``."""
        return None if self.classes is None else [scene_name(category) for category in self.classes]

    def read_classes(self) -> list[str]:
        """Read the categories in label order, ``/a/airfield``."""
        paths = [os.path.join(folder, CATEGORIES) for folder in (self.root or "", self.folder)]
        existing = [path for path in paths if os.path.isfile(path)]
        if not existing:
            raise self.layout_error(f"there is no {CATEGORIES}, which defines the labels")
        if self.large and not self.standard:
            raise self.layout_error(
                "large: expected the standard layout, found the easy one, which has no large images", "train"
            )
        return read_categories(existing[0])

    def class_to_label(self) -> dict[str, int]:
        """Return the label of each category and of each folder name that stands for one category only."""
        return {name: labels[0] for name, labels in self._meanings().items() if len(labels) == 1}

    def _meanings(self) -> dict[str, list[int]]:
        """Return the labels that each category or folder name may stand for."""
        meanings: dict[str, set[int]] = defaultdict(set)
        for label, category in enumerate(self.classes or ()):
            plain = category.split("/", 2)[2]
            for name in (category, plain.replace("/", "-"), plain.replace("/", "_"), str(label)):
                meanings[name].add(label)
        return {name: sorted(labels) for name, labels in meanings.items()}

    def source_name(self, split: Split) -> str:
        training = split == "train"
        if self.standard:
            return "places365_train_standard.txt" if training else "places365_val.txt"
        return "train/" if training else "val/"

    def missing_source(self, split: Split) -> str:
        source = self.source_name(split)
        parts = (source, f"{self._image_folder(split)}/") if self.standard else (source,)
        missing = [name for name in parts if not os.path.exists(os.path.join(self.folder, name))]
        return f"there is no {' and no '.join(missing)}" if missing else ""

    def _image_folder(self, split: Split) -> str:
        """Return the standard layout's folder of a split. The training archives unpack without ``_standard``."""
        size = "large" if self.large else "256"
        if split != "train":
            return f"val_{size}"
        plain, renamed = f"data_{size}", f"data_{size}_standard"
        existing = [name for name in (renamed, plain) if os.path.isdir(os.path.join(self.folder, name))]
        return existing[0] if existing else renamed

    def read_listing(self, split: Split) -> Listing:
        if not self.standard:
            return list_classes(self.folder, self.source_name(split).rstrip("/"))
        classes = self.classes or []
        if self.missing_source(split):
            return Listing(classes, PackedStrings([]), np.zeros(0, np.int32))
        folder = self._image_folder(split)
        names, labels = self._read_list(os.path.join(self.folder, self.source_name(split)), folder)
        missing, unlisted = compare_to_list(self.folder, folder, names)
        return Listing(classes, PackedStrings(names), labels, missing=missing, unlisted=unlisted)

    def _read_list(self, path: str, folder: str) -> tuple[list[str], np.ndarray]:
        """Read the listed images, each prefixed with ``folder``, and their labels, int32 (N,).

        Raises:
            DatasetError: a line is not ``image label``, or the label is not that of the image's category.
        """
        label_of = {category: label for label, category in enumerate(self.classes or ())}
        names: list[str] = []
        labels: list[int] = []
        for number, line in enumerate(read_lines(path, file_names=True), start=1):
            if not line.strip():
                continue
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
            names.append(f"{folder}/{name.lstrip('/')}")
            labels.append(int(label))
        return names, np.array(labels, np.int32)

    def problems(self, split: Split) -> list[str]:
        """See `ClassificationData`; also folders that stand for no category, or for several."""
        lines = super().problems(split)
        if lines or self.standard:
            return lines
        meanings, source = self._meanings(), self.source_name(split)
        folders = self.listing(split).classes
        unknown = [name for name in folders if name not in meanings]
        if unknown:
            lines.append(f"{source} has {summarize_names(unknown, 'folder')} that {CATEGORIES} does not list")
        for name in folders:
            if len(meanings.get(name, ())) > 1:
                several = " or ".join((self.classes or [])[label] for label in meanings[name])
                lines.append(f"{source}{name} may be {several}; rename it to its label")
        return lines

    def expected_layout(self) -> str:
        size = "large" if self.large else "256"
        return (
            f"  {self.folder}/\n    {CATEGORIES}\n    places365_train_standard.txt, places365_val.txt\n"
            f"    data_{size}_standard/a/airfield/00000001.jpg\n    val_{size}/Places365_val_00000001.jpg\n"
            f"or\n  {self.folder}/\n    {CATEGORIES}\n    train/<class>/<image>.jpg\n    val/<class>/<image>.jpg"
        )

    def hint(self, split: Split | None) -> str:
        archives = "The archives are at http://places2.csail.mit.edu/download.html."
        if split is None:
            return f"Download {CATEGORIES_URL} (MD5 {CATEGORIES_MD5}) to {self.root}. {archives}"
        other = "val_256" if self.large else "val_large"
        if self.standard and os.path.isdir(os.path.join(self.root or "", other)):
            return f"Use {other}/ with --data.large {str(not self.large).lower()}."
        return archives


def scene_name(category: str) -> str:
    """Format a category: ``/a/apartment_building/outdoor`` becomes ``apartment building, outdoor``."""
    return category.split("/", 2)[2].replace("/", ", ").replace("_", " ")


def read_categories(path: str) -> list[str]:
    """Read the categories in the order of their labels.

    Raises:
        DatasetError: a line is not ``/a/airfield 0``, a category or label occurs twice, or the labels are not 0, 1,
            2 and so on.
    """
    categories: dict[int, str] = {}
    for number, line in enumerate(read_lines(path), start=1):
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
