"""Food-101: Bossard, Guillaumin and Van Gool, "Food-101 - Mining Discriminative Components with Random Forests", ECCV
2014. 101 dishes, 750 training and 250 test images of each."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np

from datamodules.base import Split
from datamodules.classification.base import ClassificationData, Listing
from datamodules.folders import PackedStrings, compare_to_list, some
from errors import DatasetError, UserError

# The archive of the authors, 5 GB, and its MD5 as torchvision's Food101 has it.
ARCHIVE = "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"
MD5 = "85eeb15f3717b99a5da872d97d918f87"


class Food101(ClassificationData):
    """Food-101 as its archive unpacks, split as its ``meta`` says (75,750 and 25,250 images) and never otherwise.

    ::

        food-101/images/<class>/<number>.jpg
        food-101/meta/classes.txt               one class a line; labels are by their sorted names
        food-101/meta/{train,test}.json         {class: ["class/number", ...]}; or .txt, one entry a line

    There is no official validation split. As the field does, validation measures the test images, so the best
    checkpoint is chosen on them; with ``val_fraction`` it is chosen on training images that are held out. The
    training labels are noisy on purpose (wrong classes, intense colors), the test images were verified by hand: a
    held-out part measures lower than the test set.

    Args:
        root: the folder ``food-101``, or the one that it lies in. Only prediction can do without.
        val_fraction: part of each class's training images that is held out for validation, 0 to 1; the same images
            in every run. 0 trains on all of them.
        **kwargs: see `ClassificationData`.
    """

    def __init__(self, root: str | None = None, val_fraction: float = 0.0, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        if not 0 <= val_fraction < 1:
            raise UserError(f"val_fraction: expected 0 to 1, less than 1, found {val_fraction}")
        self.val_fraction = val_fraction

    @property
    def folder(self) -> str:
        """The folder ``food-101``."""
        root = self.root or ""
        inside = os.path.join(root, "food-101")
        return root if os.path.isdir(os.path.join(root, "meta")) or not os.path.isdir(inside) else inside

    @property
    def class_names(self) -> list[str] | None:
        """The dishes in label order, ``apple pie``; None when predicting without a root."""
        return None if self.classes is None else [name.replace("_", " ") for name in self.classes]

    def read_classes(self) -> list[str]:
        for name in ("images", "meta/classes.txt"):
            if not os.path.exists(os.path.join(self.folder, name)):
                raise self.refusal(f"there is no {name}")
        classes = sorted(set(_lines(os.path.join(self.folder, "meta", "classes.txt"))))
        if not classes:
            raise self.refusal("meta/classes.txt names no class")
        return classes

    def title(self, split: Split) -> str:
        if split == "val" and self.val_fraction:
            return f"{self._meta('train')} (held out)"
        return self._meta("train" if split == "train" else "test")

    def absent(self, split: Split) -> str:
        name = self.title(split).removesuffix(" (held out)")
        return "" if os.path.isfile(os.path.join(self.folder, name)) else f"there is no {name}"

    def read_listing(self, split: Split) -> Listing:
        classes = self.classes or []
        if self.absent(split):
            return Listing(classes, PackedStrings([]), np.zeros(0, np.int32))
        training = split == "train" or (split == "val" and self.val_fraction > 0)
        entries = self._entries("train" if training else "test")
        label_of = self.label_of()
        names = [f"images/{entry}.jpg" for entry in entries]
        labels = np.array([label_of[entry.split("/")[0]] for entry in entries], np.int32)
        missing, others = compare_to_list(self.folder, "images", names)
        other = "test" if training else "train"
        known = {f"images/{entry}.jpg" for entry in self._entries(other)}
        unlisted = [name for name in others if name not in known]
        if training and self.val_fraction:
            held = self._held_out(labels)
            chosen = np.flatnonzero(held if split == "val" else ~held)
            names, labels = [names[i] for i in chosen], labels[chosen]
        return Listing(classes, PackedStrings(names), labels, missing=missing, unlisted=unlisted)

    def _held_out(self, labels: np.ndarray) -> np.ndarray:
        """bool (N,): a share of each class, at least one image, drawn with a generator of their own."""
        held = np.zeros(len(labels), bool)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            drawn = np.random.default_rng((101, int(label))).permutation(members)
            held[drawn[: math.ceil(len(members) * self.val_fraction)]] = True
        return held

    def _meta(self, part: str) -> str:
        """Name of the file that lists a part: ``meta/train.json``, or ``.txt`` where only that is there."""
        text = f"meta/{part}.txt"
        return text if os.path.isfile(os.path.join(self.folder, text)) and not self._json(part) else f"meta/{part}.json"

    def _json(self, part: str) -> bool:
        return os.path.isfile(os.path.join(self.folder, "meta", f"{part}.json"))

    def _entries(self, part: str) -> list[str]:
        """The entries of a part, ``class/number``, in the file's order; none where there is no file.

        Raises:
            DatasetError: the file is not as expected, or names a class that classes.txt lacks.
        """
        path = os.path.join(self.folder, self._meta(part))
        if not os.path.isfile(path):
            return []
        if path.endswith(".txt"):
            entries = _lines(path)
        else:
            try:
                with open(path, encoding="utf-8") as file:
                    entries = [entry for group in json.load(file).values() for entry in group]
            except (ValueError, AttributeError, TypeError) as error:
                raise DatasetError(f'{path}: expected {{"class": ["class/number", ...]}}, found {error}') from None
        label_of = self.label_of()
        foreign = [str(entry) for entry in entries if str(entry).split("/")[0] not in label_of]
        if foreign:
            found = some(foreign, "entry", "entries")
            raise DatasetError(f"{path}: expected class/number, of the classes in classes.txt, found {found}")
        return entries

    def expected(self) -> str:
        return (
            f"  {self.folder}/\n    images/<class>/<number>.jpg\n    meta/classes.txt, train.json, test.json (or .txt)"
        )

    def advice(self, split: Split | None) -> str:
        return f"The archive is {ARCHIVE} (MD5 {MD5}): unpack it, and name its folder with --data.root."


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return [line.strip() for line in file if line.strip()]
