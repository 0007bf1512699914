"""Instance segmentation on PASCAL VOC, SBD and custom datasets in VOC's layout."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Split
from datamodules.box_transforms import BoxTransform
from datamodules.segmentation.base import PackedMaskFiles, VOCMaskData
from datamodules.segmentation.masks import masks_and_boxes, open_image, read_objects
from datamodules.transforms import MaskTransform, to_tensor


class InstanceDataset(Dataset):
    """Images with the mask, box and class of each object; see the batch contract.

    Boxes are computed from the transformed masks. An object without a pixel after the transform is removed.

    Args:
        root: folder that the files are relative to.
        files: the images and their masks.
        num_classes: number of classes, without the background.
        transform: transforms images and masks.
        evaluation: also return ``original_target``, the objects in pixels of the image on disk.
        exif_orientation: apply the EXIF orientation where the size of the mask does not tell.
    """

    def __init__(
        self,
        root: str,
        files: PackedMaskFiles,
        num_classes: int,
        transform: MaskTransform,
        evaluation: bool = False,
        exif_orientation: bool = True,
    ) -> None:
        self.root, self.files, self.num_classes, self.transform = root, files, num_classes, transform
        self.evaluation, self.exif_orientation = evaluation, exif_orientation

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_path, class_mask, object_mask = (os.path.join(self.root, name) for name in self.files[index])
        ids, labels = read_objects(object_mask, class_mask, self.num_classes)
        encoded = open_image(image_path, object_mask, ids, self.exif_orientation)
        image, transformed_ids = self.transform(encoded.decode(), ids)
        target = _objects(transformed_ids, labels)
        sample = {
            "image": to_tensor(image),
            "target": target,
            "original_size": torch.tensor(ids.shape),
            "id": self.files[index].image,
        }
        return {**sample, "original_target": _objects(ids, labels)} if self.evaluation else sample


def _objects(ids: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    """Return the objects of a mask of object ids as a ``target`` of the batch contract."""
    masks, boxes, labels = masks_and_boxes(ids, labels)
    return {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.from_numpy(labels),
        "difficult": torch.zeros(len(labels), dtype=torch.bool),
        "masks": torch.from_numpy(masks),
    }


class VOCInstance(VOCMaskData):
    """VOC, SBD or a custom dataset in the layout of `VOCSegmentation`, with ``SegmentationObject/<id>.png``.

    ``classes`` are in the order of the ids, starting with id 1: labels start at 0 and do not include the background.
    Metrics refer to the masks at their size on disk, whatever the size of the images.

    Args:
        root: the folder ``VOCdevkit`` or its parent. Only prediction works without it.
        image_size: size that images are resized to: the side of a square, or [shorter, longest], which keeps the aspect
            ratio; null keeps their size.
        eval_image_size: image size in validation, test and prediction; null uses ``image_size``.
        hflip: probability of a horizontal flip in training.
        **kwargs: see `VOCMaskData`.

    Raises:
        UserError: an option is out of range, or the dataset differs from the layout.
    """

    annotation_files = "{SegmentationClass,SegmentationObject}/<id>.png"
    needs_object_masks = True
    classes_include_background = False

    def __init__(
        self,
        root: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        eval_image_size: int | tuple[int, int] | None = None,
        hflip: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.train_transform = MaskTransform(image_size, hflip=hflip)
        self.eval_transform = MaskTransform(image_size if eval_image_size is None else eval_image_size)
        self.predict_transform = BoxTransform(self.eval_transform.image_size, exif_orientation=self.exif_orientation)

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return self._prediction_dataset()
        training, files = split == "train", self.files(split)
        if training:
            self.warn_of_untrained_classes(files)
        else:
            self._report_eval_size(split, self.train_transform.image_size, self.eval_transform.image_size)
        transform = self.train_transform if training else self.eval_transform
        return InstanceDataset(self.devkit, files, self.num_classes, transform, not training, self.exif_orientation)
