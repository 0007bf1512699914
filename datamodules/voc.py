"""PASCAL VOC (Everingham et al. 2010, 2015) and everything annotated in its layout: the tree, and detection."""

from __future__ import annotations

import inspect
import os
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset
from torchvision.datasets.utils import check_md5

from datamodules.base import Split, VisionDataModule
from datamodules.box_transforms import BoxTransform, Photometric
from datamodules.image_folder import PackedStrings, some, tree
from datamodules.images import DatasetError, image_size, is_image, predicted_images
from datamodules.proposals import check_proposals, read_proposals
from datamodules.video import VideoDataset, is_video

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def voc_palette() -> np.ndarray:
    """VOC's colours of the ids 0 to 255, uint8 (256,3) RGB (VOClabelcolormap.m).

    Bits 0, 1, 2 of an id are the highest ones of red, green and blue, bits 3, 4, 5 the next, bits 6 and 7 the third.
    """
    ids, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((ids >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


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
        raise RuntimeError(f"no download ({'; '.join(failures)}): {how_to_fetch(archive, folder, hosts)}")
    # Pythons before 3.11.4 know no filters; what is unpacked has the right MD5 sum.
    options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(target) as tar:
        tar.extractall(folder, **options)


# --- annotations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotations:
    """The objects of all pictures of a set, picture after picture.

    Attributes:
        images: paths of the pictures relative to the devkit.
        boxes: float32 (T,4) xyxy: continuous, from (0, 0) at the picture's upper left corner; what VOC writes as pixels
            xmin to xmax, both included and counted from 1, is xmin - 1 to xmax.
        labels: int64 (T,).
        difficult: bool (T,).
        start: int64 (N+1,): picture i has the objects start[i] to start[i+1].
        flat: XML files of the boxes that were left out since they have no area.
        outside: the same of those that were left out since they lie outside of their picture.
        clipped: the same of those that reach beyond it and were clipped.
    """

    images: PackedStrings
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    start: np.ndarray
    flat: list[str]
    outside: list[str]
    clipped: list[str]

    def remarks(self) -> list[str]:
        """What was left out or changed, a line each, with a file."""
        kinds = (
            (self.flat, "left out {} whose box has no area"),
            (self.outside, "left out {} whose box lies outside of the picture"),
            (self.clipped, "clipped the box of {} that reaches beyond the picture"),
        )
        return [what.format(some(files, "object")) for files, what in kinds if files]


Object = tuple[float, float, float, float, int, bool]  # left, top, right, bottom, label, difficult


def read_annotation(path: str, label_of: dict[str, int]) -> tuple[list[Object], tuple[float, float]]:
    """The objects of one XML file, and the (width, height) that it says its picture has; (0, 0) where it does not.

    Parts of objects (a person's head and hands) are no objects. ``difficult`` may be missing: then it is not.

    Raises:
        DatasetError: the file is not XML, an object has no name or box, or its class is not among those given.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise DatasetError(f"{path}: expected an annotation in VOC's XML, found {error}") from None
    objects = []
    for number, item in enumerate(root.findall("object"), start=1):
        name = (item.findtext("name") or "").strip()
        if name not in label_of:
            raise DatasetError(
                f"{path}: object {number} is a {name!r}, expected one of {', '.join(label_of)}: "
                "give the classes by --data.classes"
            )
        try:
            xmin, ymin, xmax, ymax = (
                float(item.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")
            )
            difficult = bool(int(item.findtext("difficult") or 0))
        except ValueError as error:
            raise DatasetError(f"{path}: object {number} has no whole box ({error})") from None
        objects.append((xmin - 1, ymin - 1, xmax, ymax, label_of[name], difficult))
    try:
        return objects, (float(root.findtext("size/width", "")), float(root.findtext("size/height", "")))
    except ValueError:
        return objects, (0.0, 0.0)


class VOCDataset(Dataset):
    """Pictures with their objects, see the batch contract; ``target`` is left out where there are no annotations.

    Args:
        root: folder that the paths are relative to.
        annotations: the objects.
        transform: picture and boxes to tensors.
        difficult: keep objects that are marked difficult.
        proposals: a folder that `datamodules.proposals` wrote: each picture's are moved as its boxes are.
    """

    def __init__(
        self,
        root: str,
        annotations: Annotations,
        transform: BoxTransform,
        difficult: bool = True,
        proposals: str | None = None,
    ) -> None:
        self.root, self.annotations, self.transform, self.difficult = root, annotations, transform, difficult
        self.proposals = proposals

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        a = self.annotations
        mine = np.arange(a.start[index], a.start[index + 1])
        if not self.difficult:
            mine = mine[~a.difficult[mine]]
        name, boxes = a.images[index], a.boxes[mine]
        if self.proposals is not None:
            boxes = np.concatenate([boxes, read_proposals(self.proposals, name)])
        image, boxes, kept = self.transform(os.path.join(self.root, name), boxes, len(mine))
        objects = int(np.searchsorted(kept, len(mine)))
        kept = kept[:objects]
        target = {
            "boxes": torch.from_numpy(boxes[:objects]),
            "labels": torch.from_numpy(a.labels[mine[kept]]),
            "difficult": torch.from_numpy(a.difficult[mine[kept]]),
        }
        sample = {"image": image, "target": target, "id": name}
        return sample if self.proposals is None else {**sample, "proposals": torch.from_numpy(boxes[objects:])}


class PictureDataset(Dataset):
    """Pictures alone, for prediction."""

    def __init__(self, paths: Sequence[str], transform: BoxTransform) -> None:
        self.paths, self.transform = PackedStrings(paths), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": self.transform(path, np.zeros((0, 4), np.float32))[0], "id": path}


# --- datamodule ---------------------------------------------------------------------------------------------------


class VOCTree(VisionDataModule):
    """What all datasets in VOC's layout share: where the devkit lies, lists of pictures, classes, what to fetch.

    Args:
        root: the folder ``VOCdevkit``, or the one that it lies in. Only prediction can do without.
        sets: the image sets of train, val and test, each ``<folder>/<name of the list>``.
        classes: names in label order, or a file with one a line; None for VOC's.
        images: for prediction, a folder of pictures, one picture, or a video (of which all frames are predicted).
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
                    raise ValueError(f"{split}: expected image sets like VOC2007/trainval, found {name}")

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
            raise DatasetError(f"{type(self).__name__}: {path} names no picture")
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
        """Whether each picture of a set has its files; ``files`` are {what they are: {id: path}}."""
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


class VOCDetection(VOCTree):
    """VOC2007, VOC2012, both, or a set of one's own in the same layout::

        VOCdevkit/VOC2007/JPEGImages/<id>.jpg
        VOCdevkit/VOC2007/Annotations/<id>.xml
        VOCdevkit/VOC2007/ImageSets/Main/{train,val,trainval,test}.txt    one id a line

    The defaults are the papers': trained on 07+12 (16,551 pictures), validated and tested on VOC2007's test set
    (4,952), so that the best checkpoint is chosen on the test set, as the papers did; ``train: [VOC2007/train]`` and
    ``val: [VOC2007/val]`` keep them apart.

    Args:
        root: the folder ``VOCdevkit``, or the one that it lies in. Only prediction can do without.
        train, val, test: image sets, each ``<folder>/<name of the list>``.
        classes: names in label order, or a file with one a line; None for VOC's twenty.
        image_size: side in pixels of the square that pictures are warped to (YOLO 448, SSD 300); or [shorter, longest],
            which keeps the aspect (Faster R-CNN: [600, 1000]) and gives lists of pictures of different sizes.
        eval_image_size: the same for validation, test and prediction; None for ``image_size``.
        photometric, expand, iou_crop, jitter, hflip: training augmentation, see `BoxTransform`.
        train_difficult: train on difficult objects too (SSD does, the R-CNN family does not).
        proposals: folder of boxes that may hold objects, for Fast R-CNN: ``python -m datamodules.proposals`` writes it.
            Prediction has none.
        images: for prediction, a folder of pictures, one picture, or a video (of which all frames are predicted).
        download: fetch what is missing of VOC2007 and VOC2012.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the tree or an annotation is not as described.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        root: str | None = None,
        train: Sequence[str] = ("VOC2007/trainval", "VOC2012/trainval"),
        val: Sequence[str] = ("VOC2007/test",),
        test: Sequence[str] = ("VOC2007/test",),
        classes: list[str] | str | None = None,
        image_size: int | tuple[int, int] = 300,
        eval_image_size: int | tuple[int, int] | None = None,
        photometric: Photometric = "none",
        expand: float = 1.0,
        iou_crop: bool = False,
        jitter: float = 0.0,
        hflip: float = 0.5,
        train_difficult: bool = True,
        proposals: str | None = None,
        images: str | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        sets = {"train": train, "val": val, "test": test}
        super().__init__(root=root, sets=sets, classes=classes, images=images, download=download, **kwargs)
        self.save_hyperparameters(logger=False, frame=inspect.currentframe())
        self.train_difficult, self.proposals = train_difficult, proposals
        self.train_transform = BoxTransform(image_size, photometric, expand, iou_crop, jitter, hflip)
        self.eval_transform = BoxTransform(image_size if eval_image_size is None else eval_image_size)
        self.predict_transform = BoxTransform(self.eval_transform.size, exif_orientation=True)

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return self._to_predict()
        annotations = self.annotations(split)
        for line in annotations.remarks():
            rank_zero_warn(f"{split}: {line}")
        if self.proposals is not None:
            names = [annotations.images[i] for i in range(len(annotations.images))]
            check_proposals(self.proposals, names, f"{self._options()} --sets {' '.join(self.sets[split])}")
        training = split == "train"
        transform = self.train_transform if training else self.eval_transform
        difficult = self.train_difficult or not training
        return VOCDataset(self.devkit, annotations, transform, difficult, self.proposals)

    def _options(self) -> str:
        """What the commands that read this dataset need to be told."""
        classes = self.given_classes if isinstance(self.given_classes, list) else [self.given_classes or ""]
        return f"--root {self.root}" + (f" --classes {' '.join(classes)}" if self.given_classes else "")

    def annotations(self, split: Split) -> Annotations:
        """All objects of a split's image sets, in the order of the lists.

        Raises:
            DatasetError: a list, a picture or an annotation is missing, or an annotation is not as expected.
        """
        label_of = {name: i for i, name in enumerate(self.class_names)}
        images: list[str] = []
        objects: list[Object] = []
        start = [0]
        flat: list[str] = []
        outside: list[str] = []
        clipped: list[str] = []
        for image_set in self.sets[split]:
            folder = image_set.split("/")[0]
            ids, pictures = self._ids(image_set), self._pictures(folder)
            annotated = self._stems(f"{folder}/Annotations")
            self._check_ids(image_set, ids, {"picture in JPEGImages": pictures, "XML file in Annotations": annotated})
            for name in ids:
                images.append(pictures[name])
                path = os.path.join(self.devkit, annotated[name])
                found, (width, height) = read_annotation(path, label_of)
                if any(item[0] < 0 or item[1] < 0 or item[2] > width or item[3] > height for item in found):
                    # Many files have no size, or a wrong one: the picture knows.
                    height, width = image_size(os.path.join(self.devkit, pictures[name]))
                for left, top, right, bottom, label, difficult in found:
                    inner = max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)
                    if not (right > left and bottom > top):
                        flat.append(annotated[name])
                    elif not (inner[2] > inner[0] and inner[3] > inner[1]):
                        outside.append(annotated[name])
                    else:
                        if inner != (left, top, right, bottom):
                            clipped.append(annotated[name])
                        objects.append((*inner, label, difficult))
                start.append(len(objects))
        return Annotations(
            PackedStrings(images),
            np.array([item[:4] for item in objects], np.float32).reshape(-1, 4),
            np.array([item[4] for item in objects], np.int64),
            np.array([item[5] for item in objects], bool),
            np.array(start),
            flat,
            outside,
            clipped,
        )
