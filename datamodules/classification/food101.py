"""Food-101: 101 dishes with 750 training and 250 test images each.

Bossard, Guillaumin and Van Gool, "Food-101 - Mining Discriminative Components with Random Forests", ECCV 2014.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from datamodules.base import Split
from datamodules.classification.base import ClassificationData, Listing
from datamodules.folders import compare_to_list, printable_name, summarize_names
from datamodules.image_dataset import PackedStrings
from datamodules.text import load_json, read_lines
from errors import DatasetError, UserError

# The authors' archive (5 GB) and its MD5, as in torchvision's Food101.
ARCHIVE = "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"
MD5 = "85eeb15f3717b99a5da872d97d918f87"


class Food101(ClassificationData):
    """Food-101 as unpacked from its archive, with the official split of ``meta`` (75,750 and 25,250 images).

    ::

        food-101/images/<class>/<number>.jpg
        food-101/meta/classes.txt               one class per line; labels follow the sorted names
        food-101/meta/{train,test}.json         {class: ["class/number", ...]}; or .txt, one entry per line

    There is no official validation split. As is common, validation uses the test images, so the best checkpoint is
    chosen on them; with ``val_fraction`` it is chosen on held-out training images. The training labels are noisy on
    purpose (wrong classes, intense colors) and the test images were verified by hand: a held-out part scores lower
    than the test set.

    Args:
        root: the folder ``food-101`` or its parent. Optional for prediction.
        val_fraction: fraction of each class's training images to hold out for validation, 0 to 1; the same images in
            every run. 0 trains on all of them.
        **kwargs: see `ClassificationData`.
    """

    def __init__(self, root: str | None = None, val_fraction: float = 0.0, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        if not 0 <= val_fraction < 1:
            raise UserError(f"val_fraction: expected 0 or more and less than 1, found {val_fraction}")
        self.val_fraction = val_fraction

    @property
    def folder(self) -> str:
        """The folder ``food-101``."""
        root = self.root or ""
        inside = os.path.join(root, "food-101")
        return root if os.path.isdir(os.path.join(root, "meta")) or not os.path.isdir(inside) else inside

    @property
    def class_names(self) -> list[str] | None:
        """The dishes in label order, ``apple pie``; None for prediction without ``root``."""
        return None if self.classes is None else [printable_name(name).replace("_", " ") for name in self.classes]

    def read_classes(self) -> list[str]:
        for name in ("images", "meta/classes.txt"):
            if not os.path.exists(os.path.join(self.folder, name)):
                raise self.layout_error(f"there is no {name}")
        classes = sorted(set(_lines(os.path.join(self.folder, "meta", "classes.txt"))))
        if not classes:
            raise self.layout_error("meta/classes.txt lists no class")
        return classes

    def source_name(self, split: Split) -> str:
        if split == "val" and self.val_fraction:
            return f"{self._meta('train')} (held out)"
        return self._meta("train" if split == "train" else "test")

    def missing_source(self, split: Split) -> str:
        name = self.source_name(split).removesuffix(" (held out)")
        return "" if os.path.isfile(os.path.join(self.folder, name)) else f"there is no {name}"

    def read_listing(self, split: Split) -> Listing:
        classes = self.classes or []
        if self.missing_source(split):
            return Listing(classes, PackedStrings([]), np.zeros(0, np.int32))
        training = split == "train" or (split == "val" and self.val_fraction > 0)
        entries = self._entries("train" if training else "test")
        class_to_label = self.class_to_label()
        names = [f"images/{entry}.jpg" for entry in entries]
        labels = np.array([class_to_label[entry.split("/")[0]] for entry in entries], np.int32)
        missing, not_in_list = compare_to_list(self.folder, "images", names)
        other = "test" if training else "train"
        known = {f"images/{entry}.jpg" for entry in self._entries(other)}
        unlisted = [name for name in not_in_list if name not in known]
        if training and self.val_fraction:
            held_out = self._held_out(labels)
            selected = np.flatnonzero(held_out if split == "val" else ~held_out)
            names, labels = [names[i] for i in selected], labels[selected]
        return Listing(classes, PackedStrings(names), labels, missing=missing, unlisted=unlisted)

    def _held_out(self, labels: np.ndarray) -> np.ndarray:
        """Select ``val_fraction`` of each class, at least one image, with a fixed seed: bool (N,)."""
        held_out = np.zeros(len(labels), bool)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            order = np.random.default_rng((101, int(label))).permutation(members)
            held_out[order[: math.ceil(len(members) * self.val_fraction)]] = True
        return held_out

    def _meta(self, part: str) -> str:
        """Return the file that lists a part: ``meta/train.json``, or ``.txt`` if only that exists."""
        text = f"meta/{part}.txt"
        return text if os.path.isfile(os.path.join(self.folder, text)) and not self._json(part) else f"meta/{part}.json"

    def _json(self, part: str) -> bool:
        return os.path.isfile(os.path.join(self.folder, "meta", f"{part}.json"))

    def _entries(self, part: str) -> list[str]:
        """Read the entries ``class/number`` of a part in file order; empty if the file does not exist.

        Raises:
            DatasetError: the file has another format or lists a class that classes.txt lacks.
        """
        path = os.path.join(self.folder, self._meta(part))
        if not os.path.isfile(path):
            return []
        if path.endswith(".txt"):
            entries = _lines(path)
        else:
            expected = '{"class": ["class/number", ...]}'
            content = load_json(path, expected)
            try:
                entries = [entry for group in content.values() for entry in group]
            except (AttributeError, TypeError) as error:
                raise DatasetError(f"{path}: expected {expected}, found {error}") from None
        class_to_label = self.class_to_label()
        unknown = [str(entry) for entry in entries if str(entry).split("/")[0] not in class_to_label]
        if unknown:
            found = summarize_names(unknown, "entry", "entries")
            raise DatasetError(f"{path}: expected class/number with a class of classes.txt, found {found}")
        return entries

    def expected_layout(self) -> str:
        return (
            f"  {self.folder}/\n    images/<class>/<number>.jpg\n    meta/classes.txt, train.json, test.json (or .txt)"
        )

    def hint(self, split: Split | None) -> str:
        return f"Unpack {ARCHIVE} (MD5 {MD5}) and set --data.root to its folder."


def _lines(path: str) -> list[str]:
    return [line.strip() for line in read_lines(path, file_names=True) if line.strip()]
