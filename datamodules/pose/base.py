"""Base of the pose datamodules: crops of people, or full images with all their people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.folders import list_prediction_images, summarize_names
from datamodules.image_dataset import PackedStrings
from datamodules.images import EncodedImage
from datamodules.pose.crops import FullImage, PersonCrop, apply_affine
from datamodules.pose.joints import flip_indices
from datamodules.pose.people import People
from errors import DatasetError, UserError

JOINT_BOX_MARGIN = 0.15  # relative to the longer side of the joints' extent, to include hands and feet


def joint_boxes(keypoints: np.ndarray, labeled: np.ndarray, height: int, width: int) -> np.ndarray:
    """Compute a box around the labeled joints of each person, with a margin, clipped to the image.

    Boxes are measured from the upper left corner of the image, as in detection: the center x of a pixel is at x + 0.5.

    Args:
        keypoints: float (N, K, 2).
        labeled: bool (N, K), at least one per person.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        Boxes, float32 (N, 4), xyxy in pixels.
    """
    points = keypoints.reshape(-1, labeled.shape[1], 2) + 0.5  # keeps its shape if there are no people
    low = np.where(labeled[..., None], points, np.inf).min(1)
    high = np.where(labeled[..., None], points, -np.inf).max(1)
    margin = JOINT_BOX_MARGIN * (high - low).max(1, keepdims=True) + 0.5
    limit = np.array([width, height])
    return np.concatenate([(low - margin).clip(0, limit), (high + margin).clip(0, limit)], axis=1).astype(np.float32)


def _inverse(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(cv2.invertAffineTransform(matrix).astype(np.float32))


# --- datasets -------------------------------------------------------------------------------------------------------


class PoseDataset(Dataset):
    """One person per sample, or with `FullImage` one image per sample; see the batch contract.

    Args:
        root: folder that the paths are relative to.
        people: the people.
        joint_names: K names, as in `PoseData`.
        transform: transform of each image.
        training: ignore people outside the image; for `FullImage`.
    """

    def __init__(
        self,
        root: str,
        people: People,
        joint_names: Sequence[str],
        transform: PersonCrop | FullImage,
        training: bool = False,
    ) -> None:
        self.root, self.people, self.transform, self.training = root, people, transform, training
        self.flip_indices = flip_indices(joint_names)

    def __len__(self) -> int:
        return len(self.people.images if isinstance(self.transform, FullImage) else self.people)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if isinstance(self.transform, FullImage):
            return self._full_image(index, self.transform)
        people = self.people
        path = os.path.join(self.root, people.images[int(people.image_index[index])])
        image, matrix, flipped = self.transform(path, people.center[index], float(people.side[index]))
        keypoints, labeled = self._transform_joints(np.array([index]), matrix, flipped)
        return {
            "image": image,
            "keypoints": torch.from_numpy(keypoints[0]),
            "labeled": torch.from_numpy(labeled[0]),
            "head_size": float(people.head_size[index]),
            "to_original": _inverse(matrix),
            "id": people.person_id(index),
        }

    def _full_image(self, index: int, transform: FullImage) -> dict[str, Any]:
        people, name = self.people, self.people.images[index]
        members = np.arange(*np.searchsorted(people.image_index, [index, index + 1]))
        image, matrix, flipped = transform(os.path.join(self.root, name))
        keypoints, labeled = self._transform_joints(members, matrix, flipped)
        boxes = joint_boxes(keypoints, labeled, image.shape[1], image.shape[2])
        kept = np.arange(len(members))
        if self.training:
            kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] > 1).all(1))
        target = {
            "boxes": torch.from_numpy(boxes[kept]),
            "labels": torch.zeros(len(kept), dtype=torch.int64),
            "keypoints": torch.from_numpy(keypoints[kept]),
            "labeled": torch.from_numpy(labeled[kept]),
            "head_size": torch.from_numpy(people.head_size[members[kept]]),
        }
        return {"image": image, "target": target, "to_original": _inverse(matrix), "id": name}

    def _transform_joints(
        self, members: np.ndarray, matrix: np.ndarray, flipped: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return keypoints in pixels of the transformed image, float32 (M, K, 2), and ``labeled``, bool (M, K)."""
        keypoints, labeled = apply_affine(self.people.keypoints[members], matrix), self.people.labeled[members]
        if flipped:
            keypoints, labeled = keypoints[:, self.flip_indices], labeled[:, self.flip_indices]
        return np.where(labeled[..., None], keypoints, 0).astype(np.float32), labeled


class PosePredictionDataset(Dataset):
    """Images without people, for prediction: ``image``, ``to_original``, ``id``.

    Args:
        paths: the images.
        transform: transform of each image; `PersonCrop` takes the full image as one person.
    """

    def __init__(self, paths: Sequence[str], transform: PersonCrop | FullImage) -> None:
        self.paths, self.transform = PackedStrings(paths), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        if isinstance(self.transform, FullImage):
            image, matrix, _ = self.transform(path)
        else:
            header = EncodedImage(path, self.transform.exif_orientation)
            center = (header.width - 1) / 2, (header.height - 1) / 2
            image, matrix, _ = self.transform(path, center, max(header.width, header.height))
        return {"image": image, "to_original": _inverse(matrix), "id": path}


# --- datamodule -----------------------------------------------------------------------------------------------------


class PoseData(VisionDataModule):
    """Base of the pose datamodules. A subclass defines `people` and ``joint_names``.

    Args:
        root: the dataset's folder. Only prediction works without it.
        crop: ``person``: a sample is a square crop around one person; ``image``: a sample is a full image with all its
            people, for detectors.
        image_size: side of the crops in pixels. For full images the longest side, or [shorter, longest]; null keeps
            their size.
        scale: standard deviation of z in the random factor 2^z of a training crop's side; crops only.
        rotation: standard deviation in degrees of the rotation of 40% of the training crops; crops only.
        hflip: probability of a horizontal flip in training; left and right joints are exchanged with it.
        color_jitter: each channel is multiplied by a random factor in [1 - c, 1 + c] in training.
        translation: largest random shift of a training crop along x and y, relative to its side; crops only. Toshev
            and Szegedy 2014 (DeepPose) translate crops but state no range. Their configs here use 0.1, which is the
            margin around a person in the crops.
        images: for prediction, an image or a folder of images; with ``crop: person`` each is taken as one person.
        **kwargs: see `VisionDataModule`.

    Raises:
        UserError: an option is out of range, or the files differ from the layout.
    """

    #: K names in the order of ``keypoints``, linked to the model; `flip_indices` defines the names of left and right.
    joint_names: list[str]

    @property
    def head_boxes(self) -> bool:
        """Whether a person of ``val`` has a head box; linked to the model, because PCKh needs them."""
        return bool(np.isfinite(self.people("val").head_size).any())

    def __init__(
        self,
        root: str | None = None,
        crop: Literal["person", "image"] = "person",
        image_size: int | tuple[int, int] | None = 256,
        scale: float = 0.25,
        rotation: float = 30.0,
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        translation: float = 0.0,
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.images = root, images
        self.train_transform: PersonCrop | FullImage
        self.eval_transform: PersonCrop | FullImage
        if crop == "person":
            options = (image_size, scale, rotation, hflip, color_jitter, self.exif_orientation, translation)
            self.train_transform = PersonCrop(*options)  # type: ignore[arg-type]
            self.eval_transform = PersonCrop(image_size, exif_orientation=self.exif_orientation)  # type: ignore[arg-type]
        else:
            if translation:
                raise UserError(f"translation: expected 0 with crop image, found {translation}; it needs crop person")
            self.train_transform = FullImage(image_size, hflip, color_jitter, self.exif_orientation)
            self.eval_transform = FullImage(image_size, exif_orientation=self.exif_orientation)

    @property
    def folder(self) -> str:
        """The dataset's folder."""
        if self.root is None:
            raise DatasetError(f"{type(self).__name__}: expected a dataset, found none; set --data.root FOLDER")
        return self.root

    def people(self, split: Split) -> People:
        """Read the people of a split, without opening images.

        Raises:
            DatasetError: the files differ from the layout.
        """
        raise NotImplementedError

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return PosePredictionDataset(list_prediction_images(self.images), self.eval_transform)
        people = self.people(split)
        for line in people.warnings():
            rank_zero_warn(f"{split}: {line}")
        if not len(people):
            reasons = f"; skipped {people.skipped_reasons()}" if people.skipped else ""
            raise DatasetError(f"{type(self).__name__}: expected people in {split}, found none{reasons}")
        names = (people.images[i] for i in range(len(people.images)))
        missing = [name for name in names if not os.path.isfile(os.path.join(self.folder, name))]
        if missing:
            raise DatasetError(
                f"{self.folder}: expected all images of {split}, found none of {summarize_names(missing, 'image')}"
            )
        training = split == "train"
        transform = self.train_transform if training else self.eval_transform
        return PoseDataset(self.folder, people, self.joint_names, transform, training)
