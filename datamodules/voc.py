"""PASCAL VOC (Everingham et al. 2010, 2015) and everything annotated in its layout: the tree, and detection."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch.utils.data import Dataset
from torchvision.datasets.utils import check_md5

from datamodules.base import VisionDataModule
from datamodules.box_transforms import BoxTransform
from datamodules.folders import PackedStrings, some, tree
from datamodules.images import is_image, predicted_images
from datamodules.video import VideoDataset, is_video
from errors import DatasetError, UserError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def voc_palette() -> np.ndarray:
    """VOC's colors of the ids 0 to 255, uint8 (256,3) RGB (VOClabelcolormap.m).

    Bits 0, 1, 2 of an id are the highest ones of red, green and blue, bits 3, 4, 5 the next, bits 6 and 7 the third.
    """
    ids, colors = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colors[:, bit % 3] |= ((ids >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colors


# --- download -----------------------------------------------------------------------------------------------------

# The hosts are down for days at times, so there are several; the MD5 sums are those that torchvision checks.
HOSTS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC",
    "http://host.robots.ox.ac.uk/pascal/VOC",
    "https://web.archive.org/web/2020/http://host.robots.ox.ac.uk/pascal/VOC",
)
ARCHIVES = {
    "VOC2007/trainval": ("voc2007/VOCtrainval_06-Nov-2007.tar", "c52e279531787972c589f7e41ab4ae64"),
    "VOC2007/test": ("voc2007/VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f"),
    "VOC2012/trainval": ("voc2012/VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"),
}
PARTS = {"train": "trainval", "val": "trainval", "trainval": "trainval", "test": "test"}


def archive_of(image_set: str) -> tuple[str, str] | None:
    """(path below the hosts, MD5) of the archive that holds ``VOC2007/train`` and the like; None for other sets."""
    folder, _, name = image_set.partition("/")
    return ARCHIVES.get(f"{folder}/{PARTS.get(name, name)}")


def how_to_fetch(archive: tuple[str, str], folder: str, hosts: Sequence[str] | None = None) -> str:
    """The line that says what to fetch and where to put it; ``hosts`` are VOC's where None."""
    path, md5 = archive
    return (
        f"fetch {' or '.join(f'{host}/{path}' for host in hosts or HOSTS)} (MD5 {md5}) and unpack it in {folder}: "
        f"tar -xf {os.path.basename(path)} -C {folder}"
    )


def download(archive: tuple[str, str], folder: str, hosts: Sequence[str] | None = None) -> None:
    """Fetches an archive from the first host that has it, checks it, and unpacks it in ``folder``.

    A file that is there already and whose sum is right is not fetched again. ``hosts`` are VOC's where None.

    Raises:
        RuntimeError: no host gives the right file; the message says what to fetch and where to put it.
    """
    path, md5 = archive
    target = os.path.join(folder, os.path.basename(path))
    os.makedirs(folder, exist_ok=True)
    failures = []
    for host in (hosts or HOSTS) if not (os.path.isfile(target) and check_md5(target, md5)) else ():
        rank_zero_info(f"fetching {host}/{path}")
        try:
            torch.hub.download_url_to_file(f"{host}/{path}", target + ".part")
        except OSError as error:
            failures.append(f"{host}: {error}")
            continue
        if check_md5(target + ".part", md5):
            os.replace(target + ".part", target)
            break
        failures.append(f"{host}: another file than expected, by its MD5 sum")
        os.unlink(target + ".part")
    if not os.path.isfile(target):
        raise UserError(f"no download ({'; '.join(failures)}): {how_to_fetch(archive, folder, hosts)}")
    # Pythons before 3.11.4 know no filters; what is unpacked has the right MD5 sum.
    options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(target) as tar:
        tar.extractall(folder, **options)


# --- annotations --------------------------------------------------------------------------------------------------


# --- datamodule ---------------------------------------------------------------------------------------------------


class VOCTree(VisionDataModule):
    """What all datasets in VOC's layout share: where the devkit lies, lists of images, classes, what to fetch.

    Args:
        root: the folder ``VOCdevkit``, or the one that it lies in. Only prediction can do without.
        sets: the image sets of train, val and test, each ``<folder>/<name of the list>``.
        classes: names in label order, or a file with one a line; None for VOC's.
        images: for prediction, a folder of images, one image, or a video (of which all frames are predicted).
        download: fetch what is missing of VOC2007 and VOC2012.
        **kwargs: see `VisionDataModule`.

    Raises:
        ValueError: an image set is not named like VOC2007/trainval.
    """

    #: The folder of lists in ImageSets, that of what is annotated, and how its files are drawn in the expected tree.
    lists = "Main"
    annotated = "Annotations/<id>.xml"
    voc_classes: Sequence[str] = VOC_CLASSES
    predict_transform: BoxTransform

    def __init__(
        self,
        root: str | None,
        sets: dict[str, Sequence[str]],
        classes: list[str] | str | None,
        images: str | None,
        download: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.images, self.download, self.given_classes = root, images, download, classes
        self.sets: dict[str, tuple[str, ...]] = {split: tuple(names) for split, names in sets.items()}
        for split, names in self.sets.items():
            for name in names:
                if len(name.split("/")) != 2:
                    raise UserError(f"{split}: expected image sets like VOC2007/trainval, found {name}")

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        if self.given_classes is None:
            return list(self.voc_classes)
        if isinstance(self.given_classes, list):
            return self.given_classes
        try:
            with open(self.given_classes, encoding="utf-8") as file:
                names = [line.strip() for line in file if line.strip()]
        except OSError as error:
            raise DatasetError(f"classes: expected a list of names or a file of them, found {error}") from None
        if len(set(names)) != len(names) or not names:
            raise DatasetError(
                f"classes: expected different names, one a line, found {len(names)} in {self.given_classes}"
            )
        return names

    @property
    def devkit(self) -> str:
        """The folder that holds VOC2007 and the like."""
        if self.root is None:
            raise DatasetError(f"{type(self).__name__}: no dataset given: --data.root FOLDER")
        inside = os.path.join(self.root, "VOCdevkit")
        folders = {name.split("/")[0] for name in self._image_sets()}
        here = any(os.path.isdir(os.path.join(self.root, folder)) for folder in folders)
        named = os.path.basename(os.path.normpath(self.root)) == "VOCdevkit"
        return self.root if (here or named) and not os.path.isdir(inside) else inside

    def prepare_data(self) -> None:
        """With ``download``, fetches the archives of those image sets that are not there."""
        if not self.download:
            return
        folder = os.path.dirname(os.path.normpath(self.devkit)) or "."
        wanted = [name for name in self._image_sets() if not os.path.isfile(self._list_of(name))]
        for archive in dict.fromkeys(archive_of(name) for name in wanted):
            if archive is not None:
                download(archive, folder)

    def _image_sets(self) -> list[str]:
        """All whose lists are read."""
        return [name for names in self.sets.values() for name in names]

    def _to_predict(self) -> Dataset:
        if self.images is None or not is_video(self.images):
            return PictureDataset(predicted_images(self.images), self.predict_transform)
        if self.trainer is not None and self.trainer.world_size > 1:
            raise DatasetError(
                f"{self.images}: one process predicts a video, found {self.trainer.world_size}: --trainer.devices 1"
            )
        return VideoDataset(self.images, self.predict_transform)

    def _list_of(self, image_set: str) -> str:
        folder, name = image_set.split("/")
        return os.path.join(self.devkit, folder, "ImageSets", self.lists, f"{name}.txt")

    def _ids(self, image_set: str) -> list[str]:
        path = self._list_of(image_set)
        try:
            with open(path, encoding="utf-8") as file:
                # A class's own list ("aeroplane_train.txt") has a second column.
                ids = [line.split()[0] for line in file if line.strip()]
        except OSError:
            raise self._refusal(image_set) from None
        if not ids:
            raise DatasetError(f"{type(self).__name__}: {path} names no image")
        return ids

    def _refusal(self, image_set: str) -> DatasetError:
        folder, name = image_set.split("/")
        lists, title = os.path.join(self.devkit, folder, "ImageSets", self.lists), type(self).__name__
        if os.path.isdir(lists):
            known = sorted(n.removesuffix(".txt") for n in os.listdir(lists) if n.endswith(".txt") and "_" not in n)
            return DatasetError(f"{title}: no list {name}.txt in {lists}: there are {', '.join(known) or 'none'}")
        expected = (
            f"  {self.devkit}/{folder}/\n    JPEGImages/<id>.jpg\n    {self.annotated}\n"
            f"    ImageSets/{self.lists}/{name}.txt"
        )
        archive = archive_of(image_set)
        advice = f"\n--data.download true, or {how_to_fetch(archive, self.root or '.')}" if archive else ""
        return DatasetError(
            f"{title}: no image set {image_set}\nexpected\n{expected}\nfound\n{tree(self.root or '')}{advice}"
        )

    def _check_ids(self, image_set: str, ids: list[str], files: dict[str, dict[str, str]]) -> None:
        """Whether each image of a set has its files; ``files`` are {what they are: {id: path}}."""
        for kind, there in files.items():
            missing = [name for name in ids if name not in there]
            if missing:
                raise DatasetError(f"{type(self).__name__}: {image_set} names {some(missing, 'id')} without a {kind}")

    def _pictures(self, folder: str) -> dict[str, str]:
        return {stem: name for stem, name in self._stems(f"{folder}/JPEGImages").items() if is_image(name)}

    def _stems(self, folder: str) -> dict[str, str]:
        path = os.path.join(self.devkit, folder)
        names = sorted(os.listdir(path)) if os.path.isdir(path) else []
        return {os.path.splitext(name)[0]: f"{folder}/{name}" for name in names if not name.startswith(".")}


class PictureDataset(Dataset):
    """Images alone, for prediction."""

    def __init__(self, paths: Sequence[str], transform: BoxTransform) -> None:
        self.paths, self.transform = PackedStrings(paths), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": self.transform(path, np.zeros((0, 4), np.float32))[0], "id": path}
