"""Base of the classification datamodules: one class per image."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from datamodules.base import Split, VisionDataModule
from datamodules.folders import FolderDataset, PackedStrings, some, tree
from datamodules.images import is_image, predicted_images, walk_files
from datamodules.transforms import EvalTransform, Resize, TrainCrop, TrainTransform
from errors import DatasetError


@dataclass(frozen=True)
class Listing:
    """What one split holds.

    Attributes:
        classes: names of the classes, as they are on disk.
        names: paths of the images relative to the dataset's folder.
        labels: int32 (N,), each image's index in ``classes``.
        loose: files directly in the split's folder, which have no class.
        foreign: files in the class folders that are not images.
        missing: images that the split's list names and that are not there.
        unlisted: images that are there and that no list names.
    """

    classes: list[str]
    names: PackedStrings
    labels: np.ndarray
    loose: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)

    @property
    def counts(self) -> np.ndarray:
        """int64 (C,): images a class."""
        return np.bincount(self.labels, minlength=len(self.classes))


class ClassificationData(VisionDataModule):
    """Base of datasets with one class an image: how images are read, and what is said of a tree that is not right.

    A subclass defines `read_classes`, `read_listing`, `absent`, `title` and `expected`.

    Args:
        root: the dataset's folder. Only prediction can do without.
        image_size: side of the square images in pixels.
        resize: in evaluation, the shorter side before the center is cut out; [height, width] does not keep the aspect;
            null leaves images as they are; ``auto`` is 8/7 of image_size (256 for 224), or null with train_crop pad.
            Places365 takes ``auto`` for both sides.
        train_crop: ``random_resized``, ``scale_jitter`` or ``pad``; see `TrainTransform`.
        crop_scale: smallest and largest area of a random_resized crop, as a part of the image's.
        resize_range: shortest and longest shorter side for scale_jitter, in pixels.
        pad: zeros that train_crop pad adds on each side, in pixels.
        hflip: probability of a horizontal flip in training.
        color_jitter: brightness, contrast and saturation change by factors in 1 +- this in training.
        pca_jitter: sigma of AlexNet's color jitter in training (0.1 in the paper).
        eval_crop: side of the evaluated center; image_size where null. Ten-crop testing takes the resized side.
        images: for prediction, a folder of images or one image; they are turned as their camera says.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the tree is not as described; the message shows what was expected and what was found.
        ValueError: an argument is out of its range.
    """

    keep_aspect = True  # what ``resize: auto`` does

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 224,
        resize: Resize | Literal["auto"] = "auto",
        train_crop: TrainCrop = "random_resized",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        resize_range: tuple[int, int] = (256, 480),
        pad: int = 4,
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        pca_jitter: float = 0.0,
        eval_crop: int | None = None,
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # A subclass's own arguments are among them. Not logged: a name that the model has too (image_size) would make
        # the loggers refuse both. The frame is given, since Lightning would look for it and leave a cycle of frames,
        # which keeps the caller's loaders alive.
        self.root, self.images = root, images
        self.eval_crop = eval_crop or image_size
        side = round(image_size * 8 / 7)
        automatic = None if train_crop == "pad" else side if self.keep_aspect else (side, side)
        self.resize = automatic if isinstance(resize, str) else resize
        # Built here, so that a wrong value is named before anything is read.
        self.train_transform = TrainTransform(
            image_size, train_crop, crop_scale, resize_range, pad, hflip, color_jitter, pca_jitter
        )
        self.eval_transform = EvalTransform(self.eval_crop, self.resize)
        self._listings: dict[str, Listing] = {}

    def read_classes(self) -> list[str]:
        """The classes in label order, named as on disk."""
        raise NotImplementedError

    def read_listing(self, split: Split) -> Listing:
        """What the split holds; empty if it is absent."""
        raise NotImplementedError

    def absent(self, split: Split) -> str:
        """What is not there, of a split that is not there at all; else nothing."""
        raise NotImplementedError

    def title(self, split: Split) -> str:
        """What messages call that which the split is read from. Splits of one title are the same."""
        raise NotImplementedError

    def expected(self) -> str:
        """The tree as it should be, drawn on indented lines."""
        raise NotImplementedError

    def advice(self, split: Split | None) -> str:
        """What to do about a split, or about the whole tree, that is not as expected; or nothing."""
        return ""

    @property
    def folder(self) -> str:
        """The folder that images are named relative to."""
        return self.root or ""

    @cached_property
    def classes(self) -> list[str] | None:
        """The classes in label order, named as on disk. None when predicting without a root."""
        if self.root is None:
            if self.images is None:
                raise self._no_root()
            return None
        return self.read_classes()

    def _no_root(self) -> DatasetError:
        return DatasetError(f"{type(self).__name__}: no dataset given: --data.root FOLDER")

    def listing(self, split: Split) -> Listing:
        """What the split holds, read once."""
        title = self.title(split)
        if title not in self._listings:
            self._listings[title] = self.read_listing(split)
        return self._listings[title]

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in label order; None when predicting without a root."""
        return self.classes

    def label_of(self) -> dict[str, int]:
        """The label that belongs to a class's name on disk."""
        return {name: i for i, name in enumerate(self.classes or ())}

    def labels(self, split: Split) -> np.ndarray | None:
        """int64 (N,): each image's index in ``class_names``, -1 for a folder that is none of them."""
        return None if split == "predict" else self._labels(split)

    def _labels(self, split: Split) -> np.ndarray:
        label_of, listing = self.label_of(), self.listing(split)
        return np.array([label_of.get(name, -1) for name in listing.classes], np.int64)[listing.labels]

    def dataset(self, split: Split) -> FolderDataset:
        """The images of one split. See `FolderDataset`; for ``predict`` there are no labels.

        Raises:
            DatasetError: see `problems`; for ``predict``, there are no images.
        """
        if split == "predict":
            return self._predicted()
        if self.classes is None:
            raise self._no_root()
        problems = self.problems(split)
        if problems:
            raise self.refusal("; ".join(problems), split)
        for line in self.oddities(split):
            rank_zero_warn(line)
        transform = self.train_transform if split == "train" else self.eval_transform
        return FolderDataset(self.folder, self.listing(split).names, self.labels(split), transform)

    def _predicted(self) -> FolderDataset:
        paths = predicted_images(self.images)
        # A user's photograph is larger than the images of a dataset that is trained as it is.
        transform = EvalTransform(self.eval_crop, self.resize or self.eval_crop, exif_orientation=True)
        return FolderDataset("", PackedStrings(paths), None, transform)

    def problems(self, split: Split) -> list[str]:
        """What keeps a split from being used, one line each: it is absent, empty or incomplete."""
        if absent := self.absent(split):
            return [f"{absent} for {split}"]
        listing = self.listing(split)
        if listing.missing:
            pictures = some(listing.missing, "picture")
            return [f"{self.title(split)} names {pictures} not in {self.folder}: unpack the archive once more"]
        return [] if len(listing.names) else [f"{self.title(split)} holds no images"]

    def oddities(self, split: Split) -> list[str]:
        """What a user should know of a split that can be used, one line each."""
        listing, title, lines = self.listing(split), self.title(split), []
        if listing.loose:
            lines.append(f"{title}: left out {some(listing.loose, 'file')} that lie in no class folder")
        if listing.foreign:
            kinds = some(listing.foreign, "file")
            lines.append(f"{title}: left out {kinds} that are not images by their extension")
        if listing.unlisted:
            lines.append(f"left out {some(listing.unlisted, 'picture')} that no list names")
        present = set(np.unique(self._labels(split)).tolist())
        without = [name for i, name in enumerate(self.classes or ()) if i not in present]
        if without:
            lines.append(f"{title} has no images of {some(without, 'class', 'classes')}")
        return lines

    def refusal(self, problem: str, split: Split | None = None) -> DatasetError:
        """The error for a tree that cannot be used: what was expected, drawn beside what was found.

        Of a split that merely lacks images the problem's line says all.
        """
        problem = f"{type(self).__name__}: {problem}"
        if split is not None and self.listing(split).missing:
            return DatasetError(problem)
        advice = self.advice(split)
        drawn = f"expected\n{self.expected()}\nfound\n{tree(self.folder)}"
        return DatasetError(f"{problem}\n{drawn}" + (advice and f"\n{advice}"))


def list_classes(root: str, folder: str) -> Listing:
    """What lies in ``root/folder/<class>/``; empty if there is no such folder."""
    top = os.path.join(root, folder)
    classes: list[str] = []
    loose: list[str] = []
    foreign: list[str] = []
    names: list[str] = []
    ends = [0]
    entries: list[os.DirEntry[str]] = []
    if os.path.isdir(top):
        with os.scandir(top) as scan:
            entries = sorted((e for e in scan if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in entries:
        if not entry.is_dir():
            loose.append(entry.name)
            continue
        classes.append(entry.name)
        for name in walk_files(entry.path, f"{folder}/{entry.name}"):
            (names if is_image(name) else foreign).append(name)
        ends.append(len(names))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), np.diff(ends))
    return Listing(classes, PackedStrings(names), labels, loose, foreign)
