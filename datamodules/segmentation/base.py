"""Files of PASCAL VOC and the Semantic Boundaries Dataset (SBD), and the base of the datamodules that read them.

SBD: Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from datamodules.archives import Archive
from datamodules.base import Split
from datamodules.folders import IMAGE_EXTENSIONS, draw_tree
from datamodules.image_dataset import PackedStrings
from datamodules.segmentation.masks import count_ids, read_ids
from datamodules.transforms import VOID
from datamodules.voc import VOCData
from errors import BrokenImageError, DatasetError, UserError

# The checksum is torchvision's.
SBD_ARCHIVE = Archive(
    (
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours",
        "https://web.archive.org/web/2020/https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
        "semantic_contours",
    ),
    "benchmark.tgz",
    "82b4d87ceb2ed10f6038a1cba92111cb",
)

MAX_MASKS_AT_START = 200  # that are read to find classes without a pixel; about 0.5 s

VOC_TRAIN_SIZE = 1464  # images of VOC2012 train
TRAINAUG_SIZE = 10582  # images of VOC2012 train and SBD, without VOC2012 val


class MaskFiles(NamedTuple):
    """Files of one image relative to the devkit; ``object_mask`` is empty if the datamodule does not need it."""

    image: str
    class_mask: str
    object_mask: str = ""


@dataclass(frozen=True)
class PackedMaskFiles:
    """Files of all images of a split, in the order of its lists."""

    images: PackedStrings
    class_masks: PackedStrings
    object_masks: PackedStrings

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> MaskFiles:
        return MaskFiles(self.images[index], self.class_masks[index], self.object_masks[index])


class VOCMaskData(VOCData):
    """Base of datamodules for masks: the files of VOC and SBD, and the union of both.

    Args:
        root: the folder ``VOCdevkit`` or its parent. Only prediction works without it.
        train: image sets for training, each ``<folder>/<list>``.
        val: image sets for validation.
        test: image sets for testing.
        sbd: the folder ``benchmark_RELEASE``; null selects the one beside ``VOCdevkit``.
        **kwargs: see `VOCData`.

    Raises:
        UserError: the number of classes is out of range.
    """

    image_set_folder = "Segmentation"
    needs_object_masks = False
    #: Whether the first class is the background.
    classes_include_background = True

    def __init__(
        self,
        root: str | None = None,
        train: Sequence[str] = ("VOC2012/train",),
        val: Sequence[str] = ("VOC2012/val",),
        test: Sequence[str] = ("VOC2012/val",),
        sbd: str | None = None,
        **kwargs: Any,
    ) -> None:
        classes = kwargs.get("classes")
        if isinstance(classes, list) and not 0 < len(classes) < VOID:
            raise UserError(f"classes: expected 1 to {VOID - 1} names, found {len(classes)}")
        super().__init__(root, train, val, test, **kwargs)
        self.given_sbd = sbd

    @property
    def sbd(self) -> str:
        """The folder ``benchmark_RELEASE``."""
        parent = os.path.dirname(os.path.normpath(self.devkit)) or "."
        return self.given_sbd or os.path.join(parent, "benchmark_RELEASE")

    def prepare_data(self) -> None:
        """Download missing archives of VOC and SBD if ``download`` is set."""
        super().prepare_data()
        uses_sbd = any(name.startswith("SBD/") for name in self._required_image_sets())
        if self.download and uses_sbd and not os.path.isdir(os.path.join(self.sbd, "dataset")):
            SBD_ARCHIVE.download(self._sbd_parent)

    def files(self, split: Split) -> PackedMaskFiles:
        """List the files of a split's image sets, in the order of the lists.

        Raises:
            DatasetError: a list, an image or a mask is missing.
        """
        found = [files for image_set in self.image_sets[split] for files in self._files(image_set)]
        return PackedMaskFiles(*(PackedStrings([files[i] for files in found]) for i in range(3)))

    def untrained_classes(self, counts: np.ndarray) -> str:
        """Describe the classes without a pixel, see `VOCData.absent_classes`.

        Args:
            counts: pixels of the training masks per id, int64 (256,).
        """
        first = 0 if self.classes_include_background else 1
        line = self.absent_classes(self.class_names, counts[first : first + self.num_classes], "pixel")
        if line and counts[VOID] and not counts[1:VOID].any():
            line += (
                f". All masks have ids 0 and {VOID} only, and {VOID} is void. To make white class 1: python -m "
                "tools.color_masks MASKS FOLDER --colors FILE, with the lines '0 0 0 0' and '1 255 255 255'"
            )
        return line

    @rank_zero_only
    def warn_of_untrained_classes(self, files: PackedMaskFiles) -> None:
        """Warn of classes without a pixel in the training masks, on rank 0.

        Masks are read, evenly spaced, until all classes are found, but `MAX_MASKS_AT_START` at most. The loader reports
        masks that cannot be read.
        """
        counts, read = np.zeros(256, np.int64), 0
        for i in np.linspace(0, len(files) - 1, min(len(files), MAX_MASKS_AT_START)).round().astype(int).tolist():
            with suppress(BrokenImageError, DatasetError):
                counts += count_ids(read_ids(os.path.join(self.devkit, files[i].class_mask)))
                read += 1
                if not self.untrained_classes(counts):
                    return
        if read:
            sample = f"in {read} of {len(files)} masks; python -m tools.check reads all of them"
            rank_zero_warn(self.untrained_classes(counts) + ("" if read == len(files) else f" ({sample})"))

    def _lists(self, image_set: str) -> list[str]:
        return ["SBD/train", "SBD/val", "VOC2012/train", "VOC2012/val"] if image_set == "SBD/trainaug" else [image_set]

    def _list_path(self, image_set: str) -> str:
        folder, name = image_set.split("/")
        return os.path.join(self._sbd_dataset, f"{name}.txt") if folder == "SBD" else super()._list_path(image_set)

    def _files(self, image_set: str) -> list[MaskFiles]:
        if image_set == "SBD/trainaug":
            return self._trainaug_files()
        if image_set.startswith("SBD/"):
            return self._sbd_files(image_set, self._read_sbd_ids(image_set))
        return self._voc_files(image_set, self._read_ids(image_set))

    def _voc_files(self, image_set: str, ids: list[str]) -> list[MaskFiles]:
        folder = image_set.split("/")[0]
        files = {"an image in JPEGImages": self._image_paths(folder)}
        for kind in ("SegmentationClass", *(("SegmentationObject",) if self.needs_object_masks else ())):
            files[f"a mask in {kind}"] = self._paths_by_stem(f"{folder}/{kind}", IMAGE_EXTENSIONS)
        selected = self._select_files(image_set, ids, files)
        return [MaskFiles(*(paths[name] for paths in selected)) for name in ids]

    def _sbd_files(self, image_set: str, ids: list[str]) -> list[MaskFiles]:
        files = {f"a file in {os.path.join(self._sbd_dataset, 'img')}": self._sbd_paths("img", IMAGE_EXTENSIONS)}
        for kind in ("cls", *(("inst",) if self.needs_object_masks else ())):
            files[f"a file in {os.path.join(self._sbd_dataset, kind)}"] = self._sbd_paths(kind, (".mat",))
        selected = self._select_files(image_set, ids, files)
        return [MaskFiles(*(paths[name] for paths in selected)) for name in ids]

    def _sbd_paths(self, kind: str, extensions: tuple[str, ...]) -> dict[str, list[str]]:
        """Return {id: paths relative to the devkit} of a folder of SBD."""
        return self._paths_by_stem(os.path.join(os.path.relpath(self._sbd_dataset, self.devkit), kind), extensions)

    def _trainaug_files(self) -> list[MaskFiles]:
        """List SBD train and val and VOC2012 train, without VOC2012 val; masks are VOC's where they exist.

        For the released data these are the 10,582 images that DeepLab and most later systems train on.
        """
        voc, held_out = self._read_ids("VOC2012/train"), set(self._read_ids("VOC2012/val"))
        sbd = {*self._read_sbd_ids("SBD/train"), *self._read_sbd_ids("SBD/val")}
        sbd_only = sorted(sbd - set(voc) - held_out)
        total = len(voc) + len(sbd_only)
        summary = (
            f"{total:,} images, {len(voc):,} with VOC's masks and {len(sbd_only):,} with SBD's; "
            f"{len(sbd & held_out):,} of SBD's {len(sbd):,} images are in VOC's val and ignored"
        )
        if len(voc) == VOC_TRAIN_SIZE and total != TRAINAUG_SIZE:
            raise DatasetError(
                f"SBD/trainaug: expected {TRAINAUG_SIZE:,} images, found {summary}; restore the lists of the releases: "
                f"{SBD_ARCHIVE.instructions(self._sbd_parent)}"
            )
        rank_zero_info(f"SBD/trainaug: {summary}")
        return self._voc_files("VOC2012/train", voc) + self._sbd_files("SBD/trainaug", sbd_only)

    @property
    def _sbd_dataset(self) -> str:
        return os.path.join(self.sbd, "dataset")

    @property
    def _sbd_parent(self) -> str:
        return os.path.dirname(os.path.normpath(self.sbd)) or "."

    def _read_sbd_ids(self, image_set: str) -> list[str]:
        path = self._list_path(image_set)
        folder, list_name = os.path.split(path)
        if os.path.isfile(path):
            return self._match_ids(path, self._sbd_paths("img", IMAGE_EXTENSIONS))
        if os.path.isdir(folder):
            known = sorted(entry.removesuffix(".txt") for entry in os.listdir(folder) if entry.endswith(".txt"))
            raise DatasetError(f"{folder}: expected the list {list_name}, found {', '.join([*known, 'trainaug'])}")
        raise DatasetError(
            f"{type(self).__name__}: no image set {image_set}\nexpected\n  {self.sbd}/dataset/\n    img/<id>.jpg\n"
            f"    cls/<id>.mat\n    inst/<id>.mat\n    {{train,val}}.txt\nfound\n{draw_tree(self.sbd)}\n"
            f"set --data.download true, or {SBD_ARCHIVE.instructions(self._sbd_parent)}"
        )
