"""Which class each pixel belongs to, and which object: PASCAL VOC, the Semantic Boundaries Dataset, and sets like them.

Masks are images of ids. In the files of VOC an id is an index into a palette: a reader that converts to colors or
to gray loses it. 255 is void, which is neither learned nor measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch.utils.data import Dataset

from datamodules.base import Split
from datamodules.box_transforms import BoxTransform
from datamodules.folders import PackedStrings, tree
from datamodules.images import is_image, read_image
from datamodules.segmentation.masks import masks_and_boxes, read_mask, read_objects
from datamodules.transforms import VOID, MaskTransform, to_tensor
from datamodules.voc import VOC_CLASSES, VOCTree, download, how_to_fetch
from errors import DatasetError, UserError

# The Semantic Boundaries Dataset (Hariharan et al. 2011); the MD5 sum is the one that torchvision checks.
SBD_HOSTS = (
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours",
    "https://web.archive.org/web/2020/https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
    "semantic_contours",
)
SBD_ARCHIVE = ("benchmark.tgz", "82b4d87ceb2ed10f6038a1cba92111cb")

VOC_TRAIN, TRAINAUG = 1464, 10582  # images of VOC2012's train set, and of the union with SBD without VOC2012's val

# --- masks ----------------------------------------------------------------------------------------------------------


# --- datasets -------------------------------------------------------------------------------------------------------


class Files(NamedTuple):
    """One image's files, relative to the devkit; ``objects`` is empty where they are not asked for."""

    picture: str
    classes: str
    objects: str = ""


@dataclass(frozen=True)
class Pictures:
    """The files of a split, one entry an image, in the order of its lists; see `Files`."""

    pictures: PackedStrings
    classes: PackedStrings
    objects: PackedStrings

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Files:
        return Files(self.pictures[index], self.classes[index], self.objects[index])


class MaskDataset(Dataset):
    """Images with the class of each pixel, see the batch contract.

    Args:
        root: folder that the files are relative to.
        files: the images and their masks.
        classes: number of classes.
        transform: moves image and mask together.
        evaluation: the mask is given as it is on disk, as ``original_mask``, and only the image goes through
            ``transform``; else ``mask`` belongs to the image that is given.
    """

    def __init__(self, root: str, files: Pictures, classes: int, transform: MaskTransform, evaluation: bool) -> None:
        self.root, self.files, self.classes, self.transform = root, files, classes, transform
        self.evaluation = evaluation

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        files = self.files[index]
        pixels = read_image(os.path.join(self.root, files.picture))
        ids = read_mask(os.path.join(self.root, files.classes), self.classes, pixels.shape[:2])
        moved, moved_ids = self.transform(pixels, ids)
        name, mask = ("original_mask", ids) if self.evaluation else ("mask", moved_ids)
        return {"image": to_tensor(moved), name: torch.from_numpy(mask.astype(np.int64)), "id": files.picture}


class ObjectDataset(Dataset):
    """Images with the mask, box and class of each object, see the batch contract.

    Masks are resized and reflected with the image, boxes drawn round what is left of them; an object of which no
    pixel is left goes with its label.

    Args:
        root: folder that the files are relative to.
        files: the images and their masks.
        classes: number of classes, the background not counted.
        transform: moves image and masks together.
    """

    def __init__(self, root: str, files: Pictures, classes: int, transform: MaskTransform) -> None:
        self.root, self.files, self.classes, self.transform = root, files, classes, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        files = self.files[index]
        pixels = read_image(os.path.join(self.root, files.picture))
        objects, classes = os.path.join(self.root, files.objects), os.path.join(self.root, files.classes)
        ids, labels = read_objects(objects, classes, self.classes, pixels.shape[:2])
        pixels, ids = self.transform(pixels, ids)
        masks, boxes, labels = masks_and_boxes(ids, labels)
        target = {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(labels),
            "difficult": torch.zeros(len(labels), dtype=torch.bool),
            "masks": torch.from_numpy(masks),
        }
        return {"image": to_tensor(pixels), "target": target, "id": files.picture}


# --- datamodules ----------------------------------------------------------------------------------------------------


class MaskTree(VOCTree):
    """What `VOCSegmentation` and `VOCInstance` share: the files of VOC and SBD, and the set that is built from both.

    Args:
        sbd: the folder ``benchmark_RELEASE``; None for the one that lies beside ``VOCdevkit``.
        **kwargs: see `VOCTree`.
    """

    lists = "Segmentation"
    with_objects = False

    def __init__(self, sbd: str | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.given_sbd = sbd
        if isinstance(self.given_classes, list) and not 0 < len(self.given_classes) < VOID:
            raise UserError(f"classes: expected 1 to {VOID - 1} names, found {len(self.given_classes)}")

    @property
    def sbd(self) -> str:
        """The folder ``benchmark_RELEASE``."""
        return self.given_sbd or os.path.join(
            os.path.dirname(os.path.normpath(self.devkit)) or ".", "benchmark_RELEASE"
        )

    def prepare_data(self) -> None:
        """With ``download``, fetches what is not there of VOC and of SBD."""
        super().prepare_data()
        wanted = any(name.startswith("SBD/") for name in self._image_sets())
        if self.download and wanted and not os.path.isdir(os.path.join(self.sbd, "dataset")):
            download(SBD_ARCHIVE, self._above_sbd, SBD_HOSTS)

    def files(self, split: Split) -> Pictures:
        """The files of a split's image sets, in the order of the lists.

        Raises:
            DatasetError: a list, an image or a mask is missing.
        """
        found = [files for image_set in self.sets[split] for files in self._files(image_set)]
        return Pictures(*(PackedStrings([files[i] for files in found]) for i in range(3)))

    def _image_sets(self) -> list[str]:
        names = super()._image_sets()
        return [*names, "VOC2012/train", "VOC2012/val"] if "SBD/trainaug" in names else names

    def _files(self, image_set: str) -> list[Files]:
        if image_set == "SBD/trainaug":
            return self._trainaug()
        if image_set.startswith("SBD/"):
            return self._sbd_files(image_set, self._sbd_ids(image_set))
        return self._voc_files(image_set, self._ids(image_set))

    def _voc_files(self, image_set: str, ids: list[str]) -> list[Files]:
        folder = image_set.split("/")[0]
        kinds = ("SegmentationClass", *(("SegmentationObject",) if self.with_objects else ()))
        there = {"image in JPEGImages": self._pictures(folder)}
        for kind in kinds:
            masks = self._stems(f"{folder}/{kind}").items()
            there[f"mask in {kind}"] = {name: path for name, path in masks if is_image(path)}
        self._check_ids(image_set, ids, there)
        return [Files(*(paths[name] for paths in there.values())) for name in ids]

    def _sbd_files(self, image_set: str, ids: list[str]) -> list[Files]:
        relative = os.path.relpath(os.path.join(self.sbd, "dataset"), self.devkit)
        there = {}
        for kind in ("img", "cls", *(("inst",) if self.with_objects else ())):
            there[f"file in {os.path.join(self.sbd, 'dataset', kind)}"] = self._stems(os.path.join(relative, kind))
        self._check_ids(image_set, ids, there)
        return [Files(*(paths[name] for paths in there.values())) for name in ids]

    def _trainaug(self) -> list[Files]:
        """SBD's train and val and VOC2012's train, without VOC2012's val; VOC's own masks where VOC has them.

        Of the released data these are the 10,582 images that DeepLab and most after it are trained on.
        """
        own, held_out = self._ids("VOC2012/train"), set(self._ids("VOC2012/val"))
        everything = {*self._sbd_ids("SBD/train"), *self._sbd_ids("SBD/val")}
        others = sorted(everything - set(own) - held_out)
        total = len(own) + len(others)
        what = (
            f"{total:,} images, {len(own):,} of them with VOC's masks and {len(others):,} with SBD's; "
            f"{len(everything & held_out):,} of SBD's {len(everything):,} are in VOC's val and left out"
        )
        if len(own) == VOC_TRAIN and total != TRAINAUG:
            raise DatasetError(
                f"{type(self).__name__}: SBD/trainaug: expected {TRAINAUG:,} images, found {what}: the lists of one "
                f"of the two are not those of the release: {how_to_fetch(SBD_ARCHIVE, self._above_sbd, SBD_HOSTS)}"
            )
        rank_zero_info(f"SBD/trainaug: {what}")
        return self._voc_files("VOC2012/train", own) + self._sbd_files("SBD/trainaug", others)

    @property
    def _above_sbd(self) -> str:
        return os.path.dirname(os.path.normpath(self.sbd)) or "."

    def _sbd_ids(self, image_set: str) -> list[str]:
        name = image_set.split("/")[1]
        folder = os.path.join(self.sbd, "dataset")
        try:
            with open(os.path.join(folder, f"{name}.txt"), encoding="utf-8") as file:
                return [line.strip() for line in file if line.strip()]
        except OSError:
            pass
        if os.path.isdir(folder):
            known = sorted(entry.removesuffix(".txt") for entry in os.listdir(folder) if entry.endswith(".txt"))
            raise DatasetError(
                f"{type(self).__name__}: no list {name}.txt in {folder}: there are {', '.join([*known, 'trainaug'])}"
            )
        raise DatasetError(
            f"{type(self).__name__}: no image set {image_set}\nexpected\n  {self.sbd}/dataset/\n    img/<id>.jpg\n"
            f"    cls/<id>.mat\n    inst/<id>.mat\n    {{train,val}}.txt\nfound\n{tree(self.sbd)}\n"
            f"--data.download true, or {how_to_fetch(SBD_ARCHIVE, self._above_sbd, SBD_HOSTS)}"
        )


class VOCSegmentation(MaskTree):
    """The class of each pixel: VOC, SBD, the set built from both, or a set of one's own in VOC's layout::

        VOCdevkit/VOC2012/JPEGImages/<id>.jpg
        VOCdevkit/VOC2012/SegmentationClass/<id>.png                    ids: a palette's indices, 255 = void
        VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval}.txt    one id a line
        benchmark_RELEASE/dataset/{img/<id>.jpg,cls/<id>.mat,inst/<id>.mat,train.txt,val.txt}    beside VOCdevkit

    Image sets are ``VOC2012/train`` (1,464 images), ``VOC2012/val`` (1,449), ``SBD/train`` (8,498), ``SBD/val``
    (2,857) and ``SBD/trainaug`` (10,582: SBD and VOC2012's train without VOC2012's val; VOC's own masks where there
    are any). FCN's validation set of 736 images is ``VOC2012/seg11valid``, with the authors' list in
    ImageSets/Segmentation.

    In evaluation images come at their own size, and the truth always does.

    Args:
        root: the folder ``VOCdevkit``, or the one that it lies in. Only prediction can do without.
        train, val, test: image sets, see above.
        classes: names in the order of the ids, from id 0 on, or a file with one a line; None for the background and
            VOC's twenty.
        image_size: what training images are resized to first: the side of a square, or [shorter, longest], which
            keeps the aspect; None leaves them.
        crop_size: side of the squares that are cut out in training; what lies beyond an image is void. None takes
            whole images.
        scale: smallest and largest factor by which training images are scaled before the crop.
        hflip: probability of a horizontal flip in training.
        color_jitter: brightness, contrast and saturation change by factors in 1 +- this in training.
        eval_size: what images are resized to in validation, test and prediction, as ``image_size``; None leaves them.
        sbd: the folder ``benchmark_RELEASE``; None for the one beside ``VOCdevkit``.
        images: for prediction, a folder of images, one image, or a video (of which all frames are predicted).
        download: fetch what is missing of VOC2007, VOC2012 and SBD.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the tree or a mask is not as described.
        ValueError: an argument is out of its range.
    """

    annotated = "SegmentationClass/<id>.png"
    voc_classes = ("background", *VOC_CLASSES)

    def __init__(
        self,
        root: str | None = None,
        train: Sequence[str] = ("VOC2012/train",),
        val: Sequence[str] = ("VOC2012/val",),
        test: Sequence[str] = ("VOC2012/val",),
        classes: list[str] | str | None = None,
        image_size: int | tuple[int, int] | None = None,
        crop_size: int | None = 321,
        scale: tuple[float, float] = (0.5, 1.5),
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        eval_size: int | tuple[int, int] | None = None,
        sbd: str | None = None,
        images: str | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        sets = {"train": train, "val": val, "test": test}
        super().__init__(sbd=sbd, root=root, sets=sets, classes=classes, images=images, download=download, **kwargs)
        self.train_transform = MaskTransform(image_size, crop_size, scale, hflip, color_jitter)
        self.eval_transform = MaskTransform(eval_size)
        self.predict_transform = BoxTransform(eval_size, exif_orientation=True)

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return self._to_predict()
        training = split == "train"
        transform = self.train_transform if training else self.eval_transform
        return MaskDataset(self.devkit, self.files(split), self.num_classes, transform, evaluation=not training)


class VOCInstance(MaskTree):
    """The mask, box and class of each object, in the tree of `VOCSegmentation` with ``SegmentationObject/<id>.png``.

    Labels count from 0 and leave the background out. In evaluation images come at their own size.

    Args:
        root, train, val, test: see `VOCSegmentation`.
        classes: names in the order of the ids, from id 1 on (0 is the background), or a file with one a line; None for
            VOC's twenty.
        image_size: what training images are resized to: the side of a square, or [shorter, longest], which keeps the
            aspect; None leaves them.
        hflip: probability of a horizontal flip in training.
        sbd, images, download: see `VOCSegmentation`.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the tree or a mask is not as described.
        ValueError: an argument is out of its range.
    """

    annotated = "{SegmentationClass,SegmentationObject}/<id>.png"
    with_objects = True

    def __init__(
        self,
        root: str | None = None,
        train: Sequence[str] = ("VOC2012/train",),
        val: Sequence[str] = ("VOC2012/val",),
        test: Sequence[str] = ("VOC2012/val",),
        classes: list[str] | str | None = None,
        image_size: int | tuple[int, int] | None = None,
        hflip: float = 0.5,
        sbd: str | None = None,
        images: str | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        sets = {"train": train, "val": val, "test": test}
        super().__init__(sbd=sbd, root=root, sets=sets, classes=classes, images=images, download=download, **kwargs)
        self.train_transform = MaskTransform(image_size, hflip=hflip)
        self.predict_transform = BoxTransform(None, exif_orientation=True)

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return self._to_predict()
        transform = self.train_transform if split == "train" else MaskTransform()
        return ObjectDataset(self.devkit, self.files(split), self.num_classes, transform)
