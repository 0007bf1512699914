"""Base of the classification datamodules: one class per image."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from datamodules.base import Split, VisionDataModule
from datamodules.folders import (
    draw_tree,
    is_image,
    list_prediction_images,
    printable_name,
    summarize_names,
    walk_files,
)
from datamodules.image_dataset import ImageDataset, PackedStrings
from datamodules.transforms import EvalTransform, Resize, TrainCrop, TrainTransform
from errors import DatasetError


@dataclass(frozen=True)
class Listing:
    """The files of one split.

    Attributes:
        classes: class names as on disk.
        names: paths of the images relative to the dataset's folder.
        labels: int32 (N,), index of each image's class in ``classes``.
        stray_files: files directly in the split's folder, outside the class folders.
        non_images: files in the class folders without an image extension.
        missing: listed images that do not exist.
        unlisted: images that exist and are not listed.
    """

    classes: list[str]
    names: PackedStrings
    labels: np.ndarray
    stray_files: list[str] = field(default_factory=list)
    non_images: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)

    @property
    def counts(self) -> np.ndarray:
        """Images per class, int64 (C,)."""
        return np.bincount(self.labels, minlength=len(self.classes))


class ClassificationData(VisionDataModule):
    """Base of datasets with one class per image: options, transforms, and checks of the files on disk.

    A subclass implements `read_classes`, `read_listing`, `source_name`, `missing_source` and `expected_layout`.

    Args:
        root: folder of the dataset. Optional for prediction.
        image_size: side of the square images in pixels.
        resize: in evaluation, length of the shorter side before the center crop; [height, width] changes the aspect
            ratio; null does not resize; ``auto`` is 8/7 of image_size (256 for 224), or null with train_crop ``pad``.
            For Places365 ``auto`` sets both sides.
        train_crop: ``random_resized``, ``scale_jitter`` or ``pad``; see `TrainTransform`.
        crop_scale: range of the area of a ``random_resized`` crop, relative to the image.
        resize_range: range of the shorter side for ``scale_jitter``, in pixels.
        padding: zeros that train_crop ``pad`` adds on each side, in pixels.
        hflip: probability of a horizontal flip in training.
        color_jitter: brightness, contrast and saturation are scaled by factors in 1 +- this in training.
        pca_jitter: sigma of AlexNet's color jitter in training (0.1 in the paper).
        eval_crop_size: side of the center crop in evaluation; null uses image_size. For 10-crop testing use the resized
            side.
        images: for prediction, an image or a folder.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the files differ from the expected layout; the message shows both.
        UserError: an argument is out of range.
    """

    keep_aspect = True  # whether ``resize: auto`` keeps the aspect ratio

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 224,
        resize: Resize | Literal["auto"] = "auto",
        train_crop: TrainCrop = "random_resized",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        resize_range: tuple[int, int] = (256, 480),
        padding: int = 4,
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        pca_jitter: float = 0.0,
        eval_crop_size: int | None = None,
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.images = root, images
        self.eval_crop_size = eval_crop_size or image_size
        side = round(image_size * 8 / 7)
        automatic = None if train_crop == "pad" else side if self.keep_aspect else (side, side)
        self.resize = automatic if isinstance(resize, str) else resize
        # Built here, so that wrong options are reported before any file is read.
        self.train_transform = TrainTransform(
            image_size,
            train_crop,
            crop_scale,
            resize_range,
            padding,
            hflip,
            color_jitter,
            pca_jitter,
            self.exif_orientation,
        )
        self.eval_transform = EvalTransform(self.eval_crop_size, self.resize, self.exif_orientation)
        self._listings: dict[str, Listing] = {}

    def read_classes(self) -> list[str]:
        """Read the class names in label order, as on disk."""
        raise NotImplementedError

    def read_listing(self, split: Split) -> Listing:
        """List the files of a split; empty if the split is missing."""
        raise NotImplementedError

    def source_name(self, split: Split) -> str:
        """Return the name of the file or folder that lists the split. Equal names mean equal samples."""
        raise NotImplementedError

    def missing_source(self, split: Split) -> str:
        """Describe what is missing if the split does not exist at all; otherwise return an empty string."""
        raise NotImplementedError

    def expected_layout(self) -> str:
        """Draw the expected files as indented lines."""
        raise NotImplementedError

    def hint(self, split: Split | None) -> str:
        """Tell how to repair a split, or the whole dataset if None; may be empty."""
        return ""

    @property
    def folder(self) -> str:
        """The folder that image names are relative to."""
        return self.root or ""

    @cached_property
    def classes(self) -> list[str] | None:
        """Class names in label order, as on disk; None for prediction without ``root``."""
        if self.root is None:
            if self.images is None:
                raise self.no_root_error()
            return None
        return self.read_classes()

    def listing(self, split: Split) -> Listing:
        """Return the files of a split, read once."""
        name = self.source_name(split)
        if name not in self._listings:
            self._listings[name] = self.read_listing(split)
        return self._listings[name]

    @property
    def class_names(self) -> list[str] | None:
        """Class names in label order, as text; None for prediction without ``root``."""
        return None if self.classes is None else [printable_name(name) for name in self.classes]

    def class_to_label(self) -> dict[str, int]:
        """Return the label of each class name on disk."""
        return {name: i for i, name in enumerate(self.classes or ())}

    def labels(self, split: Split) -> np.ndarray | None:
        """Return each image's label, int64 (N,); -1 for an unknown class folder. None for ``predict``."""
        return None if split == "predict" else self._labels(split)

    def _labels(self, split: Split) -> np.ndarray:
        class_to_label, listing = self.class_to_label(), self.listing(split)
        return np.array([class_to_label.get(name, -1) for name in listing.classes], np.int64)[listing.labels]

    def dataset(self, split: Split) -> ImageDataset:
        """Return the images of a split, without labels for ``predict``.

        Raises:
            DatasetError: see `problems`; for ``predict``, there are no images.
        """
        if split == "predict":
            # Photos are larger than the images of a dataset that is trained without resizing.
            resize = self.resize or self.eval_crop_size
            transform = EvalTransform(self.eval_crop_size, resize, self.exif_orientation)
            return ImageDataset(list_prediction_images(self.images), transform)
        if self.classes is None:
            raise self.no_root_error()
        problems = self.problems(split)
        if problems:
            raise self.layout_error("; ".join(problems), split)
        for line in self.notes(split):
            rank_zero_warn(line)
        split_transform = self.train_transform if split == "train" else self.eval_transform
        return ImageDataset(self.listing(split).names, split_transform, self.folder, self.labels(split))

    def problems(self, split: Split) -> list[str]:
        """Describe what makes a split unusable (missing, empty or incomplete), one line each."""
        if missing := self.missing_source(split):
            return [f"{missing} for {split}"]
        listing, name = self.listing(split), self.source_name(split)
        if listing.missing:
            images = summarize_names(listing.missing, "image")
            return [f"{name} lists {images} not found in {self.folder}; unpack the archive again"]
        return [] if len(listing.names) else [f"{name} contains no images"]

    def notes(self, split: Split) -> list[str]:
        """Describe the irregularities of a usable split, one line each."""
        listing, source, lines = self.listing(split), self.source_name(split), []
        if listing.stray_files:
            lines.append(f"{source}: ignored {summarize_names(listing.stray_files, 'file')} outside the class folders")
        if listing.non_images:
            files = summarize_names(listing.non_images, "file")
            lines.append(f"{source}: ignored {files} without an image extension")
        if listing.unlisted:
            lines.append(f"ignored {summarize_names(listing.unlisted, 'image')} not in any list")
        present = set(np.unique(self._labels(split)).tolist())
        empty = [name for i, name in enumerate(self.classes or ()) if i not in present]
        if empty:
            lines.append(f"{source} has no images of {summarize_names(empty, 'class', 'classes')}")
        return lines

    def layout_error(self, problem: str, split: Split | None = None) -> DatasetError:
        """Return the error for unusable files, with the expected and the found layout.

        The layouts are omitted if a split only lacks images.
        """
        problem = f"{type(self).__name__}: {problem}"
        if split is not None and self.listing(split).missing:
            return DatasetError(problem)
        hint = self.hint(split)
        layouts = f"expected\n{self.expected_layout()}\nfound\n{draw_tree(self.folder)}"
        return DatasetError(f"{problem}\n{layouts}" + (hint and f"\n{hint}"))


def list_classes(root: str, folder: str) -> Listing:
    """List the images in ``root/folder/<class>/``; empty if the folder does not exist."""
    top = os.path.join(root, folder)
    classes: list[str] = []
    stray_files: list[str] = []
    non_images: list[str] = []
    names: list[str] = []
    ends = [0]
    entries: list[os.DirEntry[str]] = []
    if os.path.isdir(top):
        with os.scandir(top) as scan:
            entries = sorted((e for e in scan if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in entries:
        if not entry.is_dir():
            stray_files.append(entry.name)
            continue
        classes.append(entry.name)
        for name in walk_files(entry.path, f"{folder}/{entry.name}"):
            (names if is_image(name) else non_images).append(name)
        ends.append(len(names))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), np.diff(ends))
    return Listing(classes, PackedStrings(names), labels, stray_files, non_images)
