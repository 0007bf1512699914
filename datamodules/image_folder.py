"""Classification datasets whose folders are the classes: root/{train,val,test}/<class>/<picture>."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.images import DatasetError, is_image, list_images, walk_files
from datamodules.transforms import EvalTransform, Resize, TrainCrop, TrainTransform


class PackedStrings:
    """An immutable list of strings in two arrays.

    A list of a million str objects is copied into every loader process, page by page, as reference counts are
    touched; an array has one count for all.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


@dataclass(frozen=True)
class Listing:
    """What lies in one split's folder.

    Attributes:
        classes: names of the class folders, sorted.
        names: paths of the pictures relative to the root, class by class.
        labels: int32 (N,), each picture's index in ``classes``.
        loose: files directly in the split's folder, which have no class.
        foreign: files in the class folders that are not pictures.
    """

    classes: list[str]
    names: PackedStrings
    labels: np.ndarray
    loose: list[str]
    foreign: list[str]

    @property
    def counts(self) -> np.ndarray:
        """int64 (C,): pictures a class."""
        return np.bincount(self.labels, minlength=len(self.classes))


class FolderDataset(Dataset):
    """Pictures with their class: ``{"image": uint8 (3,H,W), "label": int, "id": path relative to the root}``.

    Args:
        root: folder that the names are relative to.
        names: the pictures.
        labels: one a picture; None leaves ``label`` out.
        transform: path to tensor.

    Raises:
        BrokenImageError: when indexed, the picture cannot be read.
    """

    def __init__(
        self,
        root: str,
        names: PackedStrings,
        labels: np.ndarray | None,
        transform: TrainTransform | EvalTransform,
    ) -> None:
        self.root, self.names, self.labels, self.transform = root, names, labels, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        sample: dict[str, Any] = {"image": self.transform(os.path.join(self.root, name)), "id": name}
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        return sample


class ImageFolder(VisionDataModule):
    """Any tree ``root/{train,val,test}/<class>/<picture>``; classes are labelled in the order of their sorted names.

    Folders below a class's folder are read too. Where there is no test folder, testing uses val. A tree may lack train
    if it is only evaluated.

    Args:
        root: the dataset's folder. Only prediction can do without.
        image_size: side of the square pictures in pixels.
        resize: in evaluation, the shorter side before the centre is cut out; [height, width] does not keep the aspect
            (Places365); null leaves pictures as they are; ``auto`` is 8/7 of image_size (256 for 224), or null with
            train_crop pad.
        train_crop: ``random_resized``, ``scale_jitter`` or ``pad``; see `TrainTransform`.
        crop_scale: smallest and largest area of a random_resized crop, as a part of the picture's.
        resize_range: shortest and longest shorter side for scale_jitter, in pixels.
        pad: zeros that train_crop pad adds on each side, in pixels.
        hflip: probability of a horizontal flip in training.
        color_jitter: brightness, contrast and saturation change by factors in 1 +- this in training.
        pca_jitter: sigma of AlexNet's colour jitter in training (.1 in the paper).
        eval_crop: side of the evaluated centre; image_size where null. Ten-crop testing takes the resized side.
        train_dir, val_dir, test_dir: names of the splits' folders.
        images: for prediction, a folder of pictures or one picture; they are turned as their camera says.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the tree is not as described; the message shows what was expected and what was found.
        ValueError: an argument is out of its range.
    """

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
        train_dir: str = "train",
        val_dir: str = "val",
        test_dir: str = "test",
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Not logged: a name that the model has too (image_size) would make the loggers refuse both. The frame is given,
        # since Lightning would look for it and leave a cycle of frames, which keeps the caller's loaders alive.
        self.save_hyperparameters(logger=False, frame=inspect.currentframe())
        self.root, self.images = root, images
        self.folders = {"train": train_dir, "val": val_dir, "test": test_dir}
        self.eval_crop = eval_crop or image_size
        automatic = None if train_crop == "pad" else round(image_size * 8 / 7)
        self.resize = automatic if isinstance(resize, str) else resize
        # Built here, so that a wrong value is named before anything is read.
        self.train_transform = TrainTransform(
            image_size, train_crop, crop_scale, resize_range, pad, hflip, color_jitter, pca_jitter
        )
        self.eval_transform = EvalTransform(self.eval_crop, self.resize)
        self._listings: dict[str, Listing] = {}

    @cached_property
    def class_folders(self) -> list[str] | None:
        """Names of the class folders, sorted: those of train, or of val where there is no train. None without root."""
        if self.root is None:
            if self.images is None:
                raise DatasetError(f"{type(self).__name__}: no dataset given: --data.root FOLDER")
            return None
        for folder in dict.fromkeys(self.folders.values()):
            if os.path.isdir(os.path.join(self.root, folder)):
                with os.scandir(os.path.join(self.root, folder)) as scan:
                    names = sorted(e.name for e in scan if not e.name.startswith(".") and e.is_dir())
                if not names:
                    raise self.wrong_tree(f"{folder}/ holds no class folders", folder)
                return names
        raise self.wrong_tree("none of the splits' folders is there", "")

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in label order; None when predicting without a root."""
        return self.class_folders

    def dataset(self, split: Split) -> FolderDataset:
        """The pictures of one split. See `FolderDataset`; for ``predict`` there are no labels.

        Raises:
            DatasetError: see `problems`; for ``predict``, there are no pictures.
        """
        if split == "predict":
            return self._predicted()
        problems = self.problems(split)
        if problems:
            raise self.wrong_tree("; ".join(problems), self.folder(split))
        for line in self.oddities(split):
            rank_zero_warn(line)
        assert self.root is not None
        transform = self.train_transform if split == "train" else self.eval_transform
        return FolderDataset(self.root, self.listing(split).names, self.labels(split), transform)

    def labels(self, split: Split) -> np.ndarray | None:
        """int64 (N,): each picture's index in ``class_names``, -1 for a folder that is none of them."""
        if split == "predict":
            return None
        indices = {name: i for i, name in enumerate(self.class_folders or ())}
        listing = self.listing(split)
        return np.array([indices.get(name, -1) for name in listing.classes], np.int64)[listing.labels]

    def _predicted(self) -> FolderDataset:
        if self.images is None:
            raise DatasetError("predict needs pictures: --data.images FOLDER")
        paths = [self.images] if os.path.isfile(self.images) else list_images(self.images)
        # A user's photograph is larger than the pictures of a dataset that is trained as it is.
        transform = EvalTransform(self.eval_crop, self.resize or self.eval_crop, exif_orientation=True)
        return FolderDataset("", PackedStrings(paths), None, transform)

    def folder(self, split: Split) -> str:
        """Name of the split's folder; test's is val's where there is none."""
        name = self.folders[split]
        if split == "test" and not os.path.isdir(os.path.join(self.root or "", name)):
            return self.folders["val"]
        return name

    def listing(self, split: Split) -> Listing:
        """What lies in the split's folder, read once; empty if there is no such folder."""
        name = self.folder(split)
        if name not in self._listings:
            self._listings[name] = _list(self.root or "", name)
        return self._listings[name]

    def problems(self, split: Split) -> list[str]:
        """What keeps a split from being used, one line each: no pictures, empty or unknown classes."""
        folder, listing, classes = self.folder(split), self.listing(split), self.class_folders
        if not os.path.isdir(os.path.join(self.root or "", folder)):
            return [f"there is no {folder}/ for {split}"]
        if not listing.classes:
            return [f"{folder}/ holds no class folders"]
        if not len(listing.names):
            return [f"{folder}/ holds no pictures"]
        lines = []
        unknown = sorted(set(listing.classes) - set(classes or ()))
        if unknown:
            lines.append(f"{folder}/ has {_some(unknown, 'class', 'classes')} that {self.folders['train']}/ lacks")
        empty = [name for name, count in zip(listing.classes, listing.counts, strict=True) if not count]
        if empty and split == "train":
            lines.append(f"{folder}/ has {_some(empty, 'class folder', 'class folders')} without pictures")
        return lines

    def oddities(self, split: Split) -> list[str]:
        """What a user should know of a split that can be used, one line each."""
        folder, listing, classes = self.folder(split), self.listing(split), self.class_folders
        lines = []
        if listing.loose:
            lines.append(f"{folder}/: left out {_some(listing.loose, 'file')} that lie in no class folder")
        if listing.foreign:
            kinds = _some(listing.foreign, "file")
            lines.append(f"{folder}/: left out {kinds} that are not pictures by their extension")
        filled = {name for name, count in zip(listing.classes, listing.counts, strict=True) if count}
        missing = [name for name in classes or () if name not in filled]
        if missing and split != "train":
            lines.append(f"{folder}/ has no pictures of {_some(missing, 'class', 'classes')}")
        return lines

    def wrong_tree(self, problem: str, folder: str) -> DatasetError:
        """An error that shows the tree that was expected beside the one that was found."""
        train, val = self.folders["train"], self.folders["val"]
        root = self.root or ""
        expected = f"  {root}/\n    {train}/<class>/<picture>.jpg\n    {val}/<class>/<picture>.jpg"
        advice = self.advice(folder)
        return DatasetError(
            f"{type(self).__name__}: {problem}\nexpected\n{expected}\nfound\n{_tree(root)}" + (advice and f"\n{advice}")
        )

    def advice(self, folder: str) -> str:
        """What to do about a split's folder that is not as expected, or nothing."""
        root = self.root or ""
        if not folder and os.path.isdir(root):
            for name in sorted(os.listdir(root)):
                if os.path.isdir(os.path.join(root, name, self.folders["train"])):
                    return f"Did you mean --data.root {os.path.join(root, name)}?"
        return ""


def _list(root: str, folder: str) -> Listing:
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


def _some(names: list[str], one: str, many: str = "") -> str:
    """How many there are, and the first of them."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {one if len(names) == 1 else many or one + 's'} ({shown})"


def _tree(root: str) -> str:
    """Two levels of a folder, a few entries each."""
    if not os.path.isdir(root):
        there = "a file, not a folder" if os.path.exists(root) else "no such folder"
        return f"  {root}: {there}"
    lines = [f"  {root}/"]
    names = _visible(root)
    for name in names[:8]:
        path = os.path.join(root, name)
        if not os.path.isdir(path):
            lines.append(f"    {name}")
            continue
        inner = _visible(path)
        shown = [x + "/" if os.path.isdir(os.path.join(path, x)) else x for x in inner[:3]]
        more = f", ... ({len(inner)} in all)" if len(inner) > 3 else ""
        lines.append(f"    {name}/  {', '.join(shown) or '(empty)'}{more}")
    if len(names) > 8:
        lines.append(f"    ... ({len(names)} in all)")
    return "\n".join(lines if names else [*lines, "    (empty)"])


def _visible(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
