"""One object at a time: what DeconvNet learns from (Noh, Hong and Han 2015, sections 4.2 and 4.3)."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.ops import box_iou

from datamodules.base import Split
from datamodules.box_transforms import BoxTransform
from datamodules.images import read_image
from datamodules.proposals import check_proposals, read_proposals
from datamodules.segmentation.masks import masks_and_boxes, read_mask, read_objects
from datamodules.segmentation.voc import MaskDataset, MaskTree, Pictures
from datamodules.transforms import FILL, VOID, MaskTransform, to_tensor
from datamodules.voc import VOC_CLASSES
from errors import DatasetError, UserError

CONTEXT = 1.2  # by which a box is enlarged
LEAST_OVERLAP = 0.5  # of a proposal with an object

# --- crops ----------------------------------------------------------------------------------------------------------


def enlarge(box: np.ndarray) -> tuple[int, int, int, int]:
    """A box with context around it, 1.2 times as wide and high: left, top, right, bottom in whole pixels.

    Args:
        box: float (4,) xyxy in pixels. What comes out may reach beyond the image, and has a pixel at least.
    """
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * (CONTEXT / 2)
    left, top = np.rint(middle - half).astype(int).tolist()
    right, bottom = np.rint(middle + half).astype(int).tolist()
    return left, top, max(right, left + 1), max(bottom, top + 1)


def cut(array: np.ndarray, box: tuple[int, int, int, int], fill: int | tuple[int, int, int]) -> np.ndarray:
    """That part of an image uint8 (h,w,3) or of a mask (h,w); what lies beyond it is ``fill``."""
    left, top, right, bottom = box
    height, width = array.shape[:2]
    inner = array[max(0, top) : min(height, bottom), max(0, left) : min(width, right)]
    beyond = (max(0, -top), max(0, bottom - height), max(0, -left), max(0, right - width))
    return cv2.copyMakeBorder(inner, *beyond, cv2.BORDER_CONSTANT, value=fill)


def only_object(mask: np.ndarray, label: int, void: np.ndarray) -> np.ndarray:
    """Ids uint8 (H,W): one object has its class and all else, other objects too, is background; void stays void.

    Args:
        mask: uint8 (H,W), 1 where the object is.
        label: its class without the background; the id is one more.
        void: bool (H,W).
    """
    return np.where(mask > 0, np.uint8(label + 1), np.where(void, np.uint8(VOID), np.uint8(0)))


class CropDataset(Dataset):
    """A crop of each image, an object or a proposal drawn at random; see the batch contract, in training.

    Args:
        root: folder that the files are relative to.
        files: the images and their masks, with those of the objects.
        classes: number of classes, the background counted.
        transform: what becomes of a crop, which may be of any size.
        proposals: folder of boxes, see `VOCInstanceCrops`; None to crop objects.
    """

    def __init__(
        self, root: str, files: Pictures, classes: int, transform: MaskTransform, proposals: str | None
    ) -> None:
        self.root, self.files, self.classes, self.transform = root, files, classes, transform
        self.proposals = proposals

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        files = self.files[index]
        pixels = read_image(os.path.join(self.root, files.picture))
        size = pixels.shape[:2]
        objects, classes = os.path.join(self.root, files.objects), os.path.join(self.root, files.classes)
        ids, of_ids = read_objects(objects, classes, self.classes - 1, size)
        masks, boxes, labels = masks_and_boxes(ids, of_ids)
        if len(boxes) and self.proposals is None:
            drawn = random.randrange(len(boxes))
            mask, boxes = only_object(masks[drawn], labels[drawn], ids == VOID), boxes[drawn : drawn + 1]
        else:
            mask = read_mask(classes, self.classes, size)
            if len(boxes) and self.proposals is not None:
                proposed = read_proposals(self.proposals, files.picture)
                overlap = box_iou(torch.from_numpy(proposed), torch.from_numpy(boxes)).numpy()
                near = proposed[(overlap >= LEAST_OVERLAP).any(1)]
                boxes = near if len(near) else boxes
            elif not len(boxes):
                boxes = np.array([[0, 0, size[1], size[0]]], np.float32)
        box = enlarge(boxes[random.randrange(len(boxes))])
        moved, moved_mask = self.transform(cut(pixels, box, FILL), cut(mask, box, VOID))
        mask_of_crop = torch.from_numpy(moved_mask.astype(np.int64))
        return {"image": to_tensor(moved), "mask": mask_of_crop, "id": files.picture}


class WithProposals(Dataset):
    """A dataset's samples with the boxes of their images, see the batch contract.

    Args:
        dataset: gives images at their own size.
        folder: of the boxes.
    """

    def __init__(self, dataset: MaskDataset, folder: str) -> None:
        self.dataset, self.folder = dataset, folder

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        return {**sample, "proposals": torch.from_numpy(read_proposals(self.folder, sample["id"]))}


# --- datamodule -----------------------------------------------------------------------------------------------------


class VOCInstanceCrops(MaskTree):
    """DeconvNet's two stages of training, in the tree of `VOCSegmentation` with ``SegmentationObject/<id>.png``.

    Every image gives one crop an epoch, a box enlarged by 1.2 and warped to a square. In the first stage it is that
    of an object, drawn at random; all but that object is background. In the second it is a proposal's, drawn from those
    that have an IoU of 0.5 or more with an object's box (an object's, where there is none); all classes in it count. A
    image without objects is taken whole. (The paper counts every crop as an example, and rare classes repeatedly.)

    Validation, test and prediction are those of `VOCSegmentation`, images at their own size, and have the proposals
    with them if there are any.

    Args:
        root, train, val, test, classes: see `VOCSegmentation`; the first class is the background.
        crops: ``objects`` is the first stage, ``proposals`` the second.
        proposals: folder of the boxes, which ``python -m tools.proposals --masks`` writes; needed for the second
            stage. Prediction has none.
        image_size: side of the square that a crop is warped to.
        crop_size: side of the square that is then cut out of it.
        hflip: probability of a horizontal flip.
        sbd, images, download: see `VOCSegmentation`.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the tree, a mask or the proposals are not as described.
        ValueError: an argument is out of its range.
    """

    annotated = "{SegmentationClass,SegmentationObject}/<id>.png"
    voc_classes = ("background", *VOC_CLASSES)
    with_objects = True

    def __init__(
        self,
        root: str | None = None,
        train: Sequence[str] = ("VOC2012/train",),
        val: Sequence[str] = ("VOC2012/val",),
        test: Sequence[str] = ("VOC2012/val",),
        classes: list[str] | str | None = None,
        crops: Literal["objects", "proposals"] = "objects",
        proposals: str | None = None,
        image_size: int = 250,
        crop_size: int = 224,
        hflip: float = 0.5,
        sbd: str | None = None,
        images: str | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        sets = {"train": train, "val": val, "test": test}
        super().__init__(sbd=sbd, root=root, sets=sets, classes=classes, images=images, download=download, **kwargs)
        if crops not in ("objects", "proposals"):
            raise UserError(f"crops: expected objects or proposals, found {crops}")
        if crop_size > image_size:
            raise UserError(f"crop_size: expected image_size ({image_size}) or less, found {crop_size}")
        self.crops, self.proposals = crops, proposals
        self.train_transform = MaskTransform(image_size, crop_size, hflip=hflip)
        self.predict_transform = BoxTransform(None, exif_orientation=True)

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return self._to_predict()
        files, by_proposals = self.files(split), self.crops == "proposals"
        training = split == "train"
        if self.proposals is None and training and by_proposals:
            raise DatasetError(
                "proposals: the second stage needs boxes that may hold objects, found none: python -m "
                f"tools.proposals {self._options(split)} --out FOLDER, then --data.proposals FOLDER"
            )
        if self.proposals is not None and (by_proposals or not training):
            names = [files.pictures[i] for i in range(len(files))]
            check_proposals(self.proposals, names, self._options(split))
        if training:
            folder = self.proposals if by_proposals else None
            return CropDataset(self.devkit, files, self.num_classes, self.train_transform, folder)
        pictures = MaskDataset(self.devkit, files, self.num_classes, MaskTransform(), evaluation=True)
        return pictures if self.proposals is None else WithProposals(pictures, self.proposals)

    def _options(self, split: Split) -> str:
        return f"--masks --root {self.root} --sets {' '.join(self.sets[split])}" + (
            f" --sbd {self.given_sbd}" if self.given_sbd else ""
        )
