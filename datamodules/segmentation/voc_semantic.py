"""Semantic segmentation on PASCAL VOC, SBD and custom datasets in VOC's layout."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.base import Split
from datamodules.box_transforms import BoxTransform
from datamodules.segmentation.base import PackedMaskFiles, VOCMaskData
from datamodules.segmentation.masks import open_image, read_mask
from datamodules.transforms import MaskTransform, to_tensor
from datamodules.voc import VOC_CLASSES


class SemanticDataset(Dataset):
    """Images with the class of each pixel; see the batch contract.

    Args:
        root: folder that the files are relative to.
        files: the images and their masks.
        num_classes: number of classes, including the background.
        transform: transforms images and masks.
        evaluation: return the stored mask as ``original_mask`` and transform only the image.
        exif_orientation: apply the EXIF orientation where the size of the mask does not tell.
    """

    def __init__(
        self,
        root: str,
        files: PackedMaskFiles,
        num_classes: int,
        transform: MaskTransform,
        evaluation: bool,
        exif_orientation: bool = True,
    ) -> None:
        self.root, self.files, self.num_classes, self.transform = root, files, num_classes, transform
        self.evaluation, self.exif_orientation = evaluation, exif_orientation

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        files = self.files[index]
        mask_path = os.path.join(self.root, files.class_mask)
        original_mask = read_mask(mask_path, self.num_classes)
        encoded = open_image(os.path.join(self.root, files.image), mask_path, original_mask, self.exif_orientation)
        image, mask = self.transform(encoded.decode(), original_mask)
        key, mask = ("original_mask", original_mask) if self.evaluation else ("mask", mask)
        return {"image": to_tensor(image), key: torch.from_numpy(mask.astype(np.int64)), "id": files.image}


class VOCSegmentation(VOCMaskData):
    """VOC, SBD, the union of both, or a custom dataset in VOC's layout::

        VOCdevkit/VOC2012/JPEGImages/<id>.jpg
        VOCdevkit/VOC2012/SegmentationClass/<id>.png                         palette indices are class ids, 255 = void
        VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval}.txt    one id per line
        benchmark_RELEASE/dataset/{img/<id>.jpg,cls/<id>.mat,inst/<id>.mat,train.txt,val.txt}    beside VOCdevkit

    Image sets are ``VOC2012/train`` (1,464 images), ``VOC2012/val`` (1,449), ``SBD/train`` (8,498), ``SBD/val``
    (2,857) and ``SBD/trainaug`` (10,582: SBD and VOC2012 train without VOC2012 val, with VOC's masks where they
    exist). FCN's validation set of 736 images is ``VOC2012/seg11valid``, with the authors' list in
    ImageSets/Segmentation.

    ``classes`` are in the order of the ids, starting with id 0. In evaluation, masks keep their original size.

    Args:
        root: the folder ``VOCdevkit`` or its parent. Only prediction works without it.
        image_size: size that training images are resized to first: the side of a square, or [shorter, longest], which
            keeps the aspect ratio; null keeps their size.
        crop_size: side of the random square crop in training; pixels outside the image are void. null trains on full
            images.
        scale: smallest and largest factor of the random scaling before the crop.
        hflip: probability of a horizontal flip in training.
        color_jitter: brightness, contrast and saturation are multiplied by factors in [1 - c, 1 + c] in training.
        eval_image_size: size of images in validation, test and prediction, as ``image_size``; null keeps their size.
        **kwargs: see `VOCMaskData`.

    Raises:
        UserError: an option is out of range, or the dataset differs from the layout.
    """

    annotation_files = "SegmentationClass/<id>.png"
    default_classes = ("background", *VOC_CLASSES)

    def __init__(
        self,
        root: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        crop_size: int | None = 321,
        scale: tuple[float, float] = (0.5, 1.5),
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        eval_image_size: int | tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.train_transform = MaskTransform(image_size, crop_size, scale, hflip, color_jitter)
        self.eval_transform = MaskTransform(eval_image_size)
        self.predict_transform = BoxTransform(eval_image_size, exif_orientation=self.exif_orientation)

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return self._prediction_dataset()
        training, files = split == "train", self.files(split)
        if training:
            self.warn_of_untrained_classes(files)
        else:
            self._report_eval_size(split, self.train_transform.image_size, self.eval_transform.image_size)
        transform = self.train_transform if training else self.eval_transform
        return SemanticDataset(self.devkit, files, self.num_classes, transform, not training, self.exif_orientation)
