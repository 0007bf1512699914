"""Crops of single objects and of proposals, the training data of DeconvNet.

Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015, sections 4.2 and 4.3.
"""

from __future__ import annotations

import os
import random
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.base import Split
from datamodules.box_transforms import BoxTransform
from datamodules.proposals import overlaps_any, read_image_proposals, require_proposals
from datamodules.segmentation.base import PackedMaskFiles, VOCMaskData
from datamodules.segmentation.masks import (
    masks_and_boxes,
    open_image,
    read_mask,
    read_objects,
    require_equal_sizes,
)
from datamodules.segmentation.voc_semantic import SemanticDataset
from datamodules.transforms import FILL_COLOR, VOID, MaskTransform, to_tensor
from datamodules.voc import VOC_CLASSES
from errors import DatasetError, UserError

CONTEXT_SCALE = 1.2  # enlargement of a box before it is cropped
MIN_IOU = 0.5  # of a training proposal with an object

# --- crops ----------------------------------------------------------------------------------------------------------


def add_context(box: np.ndarray) -> tuple[int, int, int, int]:
    """Enlarge a box by 1.2 around its center and round it to whole pixels.

    Args:
        box: float (4,), xyxy in pixels.

    Returns:
        left, top, right, bottom; at least one pixel wide and high, possibly beyond the image.
    """
    center, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * (CONTEXT_SCALE / 2)
    left, top = np.rint(center - half).astype(int).tolist()
    right, bottom = np.rint(center + half).astype(int).tolist()
    return left, top, max(right, left + 1), max(bottom, top + 1)


def crop_with_padding(
    array: np.ndarray, box: tuple[int, int, int, int], fill: int | tuple[int, int, int]
) -> np.ndarray:
    """Crop an image, uint8 (H, W, 3), or a mask, uint8 (H, W), and pad it with ``fill`` beyond its border."""
    left, top, right, bottom = box
    height, width = array.shape[:2]
    inside = array[max(0, top) : min(height, bottom), max(0, left) : min(width, right)]
    padding = (max(0, -top), max(0, bottom - height), max(0, -left), max(0, right - width))
    return cv2.copyMakeBorder(inside, *padding, cv2.BORDER_CONSTANT, value=fill)


def single_object_mask(mask: np.ndarray, label: int, void: np.ndarray) -> np.ndarray:
    """Build the class ids for one object: all other pixels, including other objects, are background.

    Args:
        mask: binary mask of the object, uint8 (H, W).
        label: class of the object, without the background; its id is ``label + 1``.
        void: pixels that stay void, bool (H, W).

    Returns:
        Class ids, uint8 (H, W).
    """
    return np.where(mask > 0, np.uint8(label + 1), np.where(void, np.uint8(VOID), np.uint8(0)))


# --- datasets -------------------------------------------------------------------------------------------------------


class InstanceCropDataset(Dataset):
    """One random crop per image, around an object or a proposal; see the batch contract (training).

    Args:
        root: folder that the files are relative to.
        files: the images and their masks, including masks of objects.
        num_classes: number of classes, including the background.
        transform: transforms crops of any size.
        proposals: folder of proposals to crop, see `VOCInstanceCrops`; None crops objects.
        exif_orientation: apply the EXIF orientation where the size of the mask does not tell.
    """

    def __init__(
        self,
        root: str,
        files: PackedMaskFiles,
        num_classes: int,
        transform: MaskTransform,
        proposals: str | None,
        exif_orientation: bool = True,
    ) -> None:
        self.root, self.files, self.num_classes, self.transform = root, files, num_classes, transform
        self.proposals, self.exif_orientation = proposals, exif_orientation

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.files[index].image
        image_path, class_path, object_path = (os.path.join(self.root, path) for path in self.files[index])
        ids, labels_of_ids = read_objects(object_path, class_path, self.num_classes - 1)
        image = open_image(image_path, object_path, ids, self.exif_orientation).decode()
        masks, boxes, labels = masks_and_boxes(ids, labels_of_ids)
        if len(boxes) and self.proposals is None:
            i = random.randrange(len(boxes))
            mask, boxes = single_object_mask(masks[i], labels[i], ids == VOID), boxes[i : i + 1]
        else:
            mask = read_mask(class_path, self.num_classes)
            require_equal_sizes(class_path, mask, object_path, ids)
            if len(boxes) and self.proposals is not None:
                proposals = read_image_proposals(self.proposals, name)
                positive = proposals[overlaps_any(proposals, boxes, MIN_IOU)]
                boxes = positive if len(positive) else boxes
            elif not len(boxes):
                boxes = np.array([[0, 0, image.shape[1], image.shape[0]]], np.float32)
        box = add_context(boxes[random.randrange(len(boxes))])
        crop, crop_mask = self.transform(crop_with_padding(image, box, FILL_COLOR), crop_with_padding(mask, box, VOID))
        return {"image": to_tensor(crop), "mask": torch.from_numpy(crop_mask.astype(np.int64)), "id": name}


class ProposalDataset(Dataset):
    """The samples of another dataset with the proposals of their images; see the batch contract.

    Args:
        dataset: returns images at their original size.
        folder: folder of the proposals.
    """

    def __init__(self, dataset: SemanticDataset, folder: str) -> None:
        self.dataset, self.folder = dataset, folder

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        return {**sample, "proposals": torch.from_numpy(read_image_proposals(self.folder, sample["id"]))}


# --- datamodule -----------------------------------------------------------------------------------------------------


class VOCInstanceCrops(VOCMaskData):
    """The two training stages of DeconvNet, in the layout of `VOCSegmentation` with ``SegmentationObject/<id>.png``.

    Each image gives one crop per epoch: a box, enlarged by 1.2 and warped to a square. The first stage crops a random
    object; all other pixels are background. The second stage crops a random proposal whose IoU with an object is at
    least 0.5 (an object, if there is none) and keeps all classes. An image without objects is used as a whole. The
    paper instead treats every crop as a sample and repeats rare classes.

    Validation, test and prediction are those of `VOCSegmentation` at the original size, with the proposals of each
    image if ``proposals`` is set (not in prediction). ``classes`` start with the background.

    Args:
        root: the folder ``VOCdevkit`` or its parent. Only prediction works without it.
        crops: ``objects`` for the first stage, ``proposals`` for the second.
        proposals: folder of region proposals, written by ``python -m tools.proposals --masks``; required for the second
            stage.
        image_size: side of the square that a crop is warped to.
        crop_size: side of the random square crop of that square.
        hflip: probability of a horizontal flip.
        **kwargs: see `VOCMaskData`.

    Raises:
        UserError: an option is out of range, or the dataset differs from the layout.
    """

    annotation_files = "{SegmentationClass,SegmentationObject}/<id>.png"
    default_classes = ("background", *VOC_CLASSES)
    needs_object_masks = True

    def __init__(
        self,
        root: str | None = None,
        crops: Literal["objects", "proposals"] = "objects",
        proposals: str | None = None,
        image_size: int = 250,
        crop_size: int = 224,
        hflip: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if crops not in ("objects", "proposals"):
            raise UserError(f"crops: expected objects or proposals, found {crops}")
        if crop_size > image_size:
            raise UserError(f"crop_size: expected at most image_size ({image_size}), found {crop_size}")
        self.crops, self.proposals = crops, proposals
        self.train_transform = MaskTransform(image_size, crop_size, hflip=hflip)
        self.predict_transform = BoxTransform(None, exif_orientation=self.exif_orientation)

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return self._prediction_dataset()
        files, crops_proposals = self.files(split), self.crops == "proposals"
        training = split == "train"
        if self.proposals is None and training and crops_proposals:
            raise DatasetError(
                "proposals: expected a folder for the second stage, found none; set --data.proposals FOLDER after "
                f"python -m tools.proposals {self._proposal_options(split)} --out FOLDER"
            )
        if self.proposals is not None and (crops_proposals or not training):
            names = [files.images[i] for i in range(len(files))]
            require_proposals(self.proposals, names, self._proposal_options(split))
        if training:
            self.warn_of_untrained_classes(files)
            folder = self.proposals if crops_proposals else None
            return InstanceCropDataset(
                self.devkit, files, self.num_classes, self.train_transform, folder, self.exif_orientation
            )
        dataset = SemanticDataset(self.devkit, files, self.num_classes, MaskTransform(), True, self.exif_orientation)
        return dataset if self.proposals is None else ProposalDataset(dataset, self.proposals)

    def _proposal_options(self, split: Split) -> str:
        """Return the options of ``python -m tools.proposals`` for this dataset."""
        sbd = f" --sbd {self.given_sbd}" if self.given_sbd else ""
        stored = "" if self.exif_orientation else " --exif_orientation false"
        return f"--masks --root {self.root} --sets {' '.join(self.image_sets[split])}{sbd}{stored}"
