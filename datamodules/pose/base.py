"""What datasets of people's joints share: the people, the crop of one of them, whole images, and the options.

Coordinates are continuous, with the centers of pixels at whole numbers: (0, 0) is the middle of the first pixel, x to
the right, y down. Files that count from 1 lose that 1 where they are read, and nothing shifts a coordinate afterwards
but the affine map that makes the crop: a square of side s becomes S pixels by x -> (x + 0.5) S / s - 0.5, x counted
from the square's first pixel.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from scipy.io import loadmat, whosmat
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.folders import PackedStrings, some
from datamodules.images import EncodedImage, predicted_images
from datamodules.pose.crops import MARGIN, PersonCrop, WholePicture, apply_affine
from errors import DatasetError

FAR = 2  # sides of a person's box from its center: a joint farther away than that is most likely a slip


# --- people -------------------------------------------------------------------------------------------------------


class Person(NamedTuple):
    """One annotated person.

    Attributes:
        image: path of the image relative to the dataset's root.
        number: which of the image's annotations this is, from 0.
        center: (x, y) of the square that is cut out.
        side: of that square in pixels.
        keypoints: float (K,2).
        labeled: bool (K,).
        head_size: in pixels, nan where there is no head box.
    """

    image: str
    number: int
    center: tuple[float, float]
    side: float
    keypoints: np.ndarray
    labeled: np.ndarray
    head_size: float


@dataclass(frozen=True)
class People:
    """The people of a split, image after image.

    Attributes:
        images: paths of the P images relative to the dataset's root.
        image: int64 (N,), rising: the index of each person's image.
        number: int64 (N,), which of the image's annotations each person is.
        center: float64 (N,2), of the squares that are cut out.
        side: float64 (N,), of those squares.
        keypoints: float32 (N,K,2); 0 where not labeled.
        labeled: bool (N,K).
        head_size: float32 (N,), nan where there is no head box.
        skipped: {what people lack: how many were left out for it}.
    """

    images: PackedStrings
    picture: np.ndarray
    number: np.ndarray
    center: np.ndarray
    side: np.ndarray
    keypoints: np.ndarray
    labeled: np.ndarray
    head_size: np.ndarray
    skipped: dict[str, int]

    @classmethod
    def gather(cls, people: Sequence[Person], joints: int, skipped: Counter[str]) -> People:
        """Packs people, which need not be in the order of their images."""
        place = {name: i for i, name in enumerate(dict.fromkeys(person.image for person in people))}
        people = sorted(people, key=lambda person: (place[person.image], person.number))
        keypoints = np.array([person.keypoints for person in people], np.float64).reshape(-1, joints, 2)
        finite = np.isfinite(keypoints).all(-1)
        labeled = np.array([person.labeled for person in people], bool).reshape(-1, joints) & finite
        return cls(
            PackedStrings(list(place)),
            np.array([place[person.image] for person in people], np.int64),
            np.array([person.number for person in people], np.int64),
            np.array([person.center for person in people], np.float64).reshape(-1, 2),
            np.array([person.side for person in people], np.float64),
            np.where(labeled[..., None], keypoints, 0).astype(np.float32),
            labeled,
            np.array([person.head_size for person in people], np.float32),
            dict(skipped),
        )

    def __len__(self) -> int:
        return len(self.picture)

    def far(self) -> np.ndarray:
        """Indices of the people with a joint more than `FAR` sides of their box away from its center: int64 (M,)."""
        away = np.abs(self.keypoints - self.center[:, None]).max(-1) > FAR * self.side[:, None]
        return np.flatnonzero((away & self.labeled).any(1))

    def name(self, index: int) -> str:
        """``<path of the image>#<number of the person in it>``."""
        return f"{self.images[int(self.picture[index])]}#{self.number[index]}"

    def remarks(self) -> list[str]:
        """What was left out and what is odd, a line each."""
        lines = []
        if self.skipped:
            reasons = ", ".join(f"{count} without {what}" for what, count in sorted(self.skipped.items()))
            lines.append(f"{len(self)} people; left out {sum(self.skipped.values())}: {reasons}")
        far = [self.name(int(i)) for i in self.far()]
        if far:
            lines.append(
                f"kept {some(far, 'person', 'people')} with a joint more than {FAR} boxes away from its person"
            )
        return lines


def mirror_partners(joint_names: Sequence[str]) -> np.ndarray:
    """int64 (K,): the index of each joint's partner on the other side, its own where it has none."""
    other = [
        name.replace("left_", "right_") if name.startswith("left_") else name.replace("right_", "left_")
        for name in joint_names
    ]
    return np.array([joint_names.index(name) if name in joint_names else i for i, name in enumerate(other)], np.int64)


def read_mat(path: str, name: str, expected: str) -> Any:
    """A variable of a MATLAB file, its arrays squeezed and its structs objects.

    Args:
        path: the file.
        name: of the variable.
        expected: what it is, for the message.

    Raises:
        DatasetError: the file is not MATLAB's (up to version 7), or has no such variable.
    """
    try:
        content = loadmat(path, squeeze_me=True, struct_as_record=False, variable_names=[name])
        known = [known for known, *_ in whosmat(path)]
    except Exception as error:  # SciPy raises whatever a damaged file leads it to
        raise DatasetError(f"{path}: expected {expected}, found {' '.join(str(error).split())[:120]}") from None
    if name not in content:
        raise DatasetError(f"{path}: expected {expected}, found {', '.join(known[:5]) or 'no variable'}")
    return content[name]


# --- views --------------------------------------------------------------------------------------------------------


# --- datasets -----------------------------------------------------------------------------------------------------


class PoseDataset(Dataset):
    """One person a sample, or with a `WholePicture` one image; see the batch contract.

    Args:
        root: folder that the paths are relative to.
        people: whom it holds.
        joint_names: K names, as in `PoseData`.
        view: what makes the image.
        training: leave people out of whom nothing is to be seen in a whole image.
    """

    def __init__(
        self,
        root: str,
        people: People,
        joint_names: Sequence[str],
        view: PersonCrop | WholePicture,
        training: bool = False,
    ) -> None:
        self.root, self.people, self.view, self.training = root, people, view, training
        self.partners = mirror_partners(joint_names)

    def __len__(self) -> int:
        return len(self.people.images if isinstance(self.view, WholePicture) else self.people)

    def __getitem__(self, index: int) -> dict[str, Any]:
        people, view = self.people, self.view
        if isinstance(view, WholePicture):
            return self._picture(index, view)
        path = os.path.join(self.root, people.images[int(people.picture[index])])
        image, matrix, flipped = view(path, people.center[index], float(people.side[index]))
        keypoints, labeled = self._move(np.array([index]), matrix, flipped)
        return {
            "image": image,
            "keypoints": torch.from_numpy(keypoints[0]),
            "labeled": torch.from_numpy(labeled[0]),
            "head_size": float(people.head_size[index]),
            "to_original": _inverse(matrix),
            "id": people.name(index),
        }

    def _picture(self, index: int, view: WholePicture) -> dict[str, Any]:
        people, name = self.people, self.people.images[index]
        mine = np.arange(*np.searchsorted(people.picture, [index, index + 1]))
        image, matrix, flipped = view(os.path.join(self.root, name))
        keypoints, labeled = self._move(mine, matrix, flipped)
        boxes = joint_boxes(keypoints, labeled, image.shape[1], image.shape[2])
        kept = np.arange(len(mine))
        if self.training:
            kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] > 1).all(1))
        target = {
            "boxes": torch.from_numpy(boxes[kept]),
            "labels": torch.zeros(len(kept), dtype=torch.int64),
            "keypoints": torch.from_numpy(keypoints[kept]),
            "labeled": torch.from_numpy(labeled[kept]),
            "head_size": torch.from_numpy(people.head_size[mine[kept]]),
        }
        return {"image": image, "target": target, "to_original": _inverse(matrix), "id": name}

    def _move(self, mine: np.ndarray, matrix: np.ndarray, flipped: bool) -> tuple[np.ndarray, np.ndarray]:
        """Some people's joints in the image's pixels, float32 (M,K,2), and whether they are labeled, bool (M,K)."""
        keypoints, labeled = apply_affine(self.people.keypoints[mine], matrix), self.people.labeled[mine]
        if flipped:
            keypoints, labeled = keypoints[:, self.partners], labeled[:, self.partners]
        return np.where(labeled[..., None], keypoints, 0).astype(np.float32), labeled


class ViewedPictures(Dataset):
    """Images alone, for prediction: ``image``, ``to_original``, ``id``. For crops, the whole of an image is one."""

    def __init__(self, paths: Sequence[str], view: PersonCrop | WholePicture) -> None:
        self.paths, self.view = PackedStrings(paths), view

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        if isinstance(self.view, WholePicture):
            image, matrix, _ = self.view(path)
        else:
            opened = EncodedImage(path, self.view.exif_orientation)
            center = (opened.width - 1) / 2, (opened.height - 1) / 2
            image, matrix, _ = self.view(path, center, max(opened.width, opened.height))
        return {"image": image, "to_original": _inverse(matrix), "id": path}


def _inverse(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(cv2.invertAffineTransform(matrix).astype(np.float32))


def joint_boxes(keypoints: np.ndarray, labeled: np.ndarray, height: int, width: int) -> np.ndarray:
    """The box of each person's labeled joints, enlarged by `MARGIN` and clipped to the image: float32 (N,4) xyxy.

    Edges are counted from the image's upper left corner, as `VOCDetection`'s are: a pixel's center x lies at x + 0.5.

    Args:
        keypoints: float (N,K,2).
        labeled: bool (N,K), at least one a person.
        height, width: of the image.
    """
    # With no people there are no least and greatest joints.
    points = keypoints.reshape(-1, labeled.shape[1], 2) + 0.5
    low = np.where(labeled[..., None], points, np.inf).min(1)
    high = np.where(labeled[..., None], points, -np.inf).max(1)
    margin = MARGIN * (high - low).max(1, keepdims=True) + 0.5
    limit = np.array([width, height])
    return np.concatenate([(low - margin).clip(0, limit), (high + margin).clip(0, limit)], axis=1).astype(np.float32)


# --- datamodule ---------------------------------------------------------------------------------------------------


class PoseData(VisionDataModule):
    """Base of datasets of people's joints. A subclass defines `people` and ``joint_names``.

    Args:
        root: the dataset's folder. Only prediction can do without.
        crop: ``person``: a sample is a square around one person; ``image``: a sample is an image with all its
            people, which detectors take.
        image_size: side of the crops in pixels. Of whole images the longest side, or [shorter, longest]; null leaves
            them as they are.
        scale: deviation of the binary logarithm of the factor that training crops' sides change by.
        rotation: deviation in degrees of the angle that two of five training crops are turned by.
        hflip: probability of a horizontal flip in training; left and right joints are exchanged with it.
        color: in training each channel is multiplied by a factor uniform in 1 +- this.
            Whole images are flipped and colored only. See `PersonCrop`.
        images: for prediction, a folder of images or one image. With ``crop: person`` each is taken for a person.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the files are not as described.
        ValueError: an argument is out of its range.
    """

    #: The joints in the order of ``keypoints``; ``train.py`` links it to the model's ``joint_names``. The partner of a
    #: joint on the other side bears its name with left and right exchanged.
    joint_names: list[str]

    def __init__(
        self,
        root: str | None = None,
        crop: Literal["person", "picture"] = "person",
        image_size: int | tuple[int, int] | None = 256,
        scale: float = 0.25,
        rotation: float = 30.0,
        hflip: float = 0.5,
        color: float = 0.4,
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.images = root, images
        self.train_view: PersonCrop | WholePicture
        self.eval_view: PersonCrop | WholePicture
        self.predict_view: PersonCrop | WholePicture
        if crop == "person":
            self.train_view = PersonCrop(image_size, scale, rotation, hflip, color)  # type: ignore[arg-type]
            self.eval_view = PersonCrop(image_size)  # type: ignore[arg-type]
            self.predict_view = PersonCrop(image_size, exif_orientation=True)  # type: ignore[arg-type]
        else:
            self.train_view, self.eval_view = WholePicture(image_size, hflip, color), WholePicture(image_size)
            self.predict_view = WholePicture(image_size, exif_orientation=True)

    @property
    def folder(self) -> str:
        """The dataset's folder."""
        if self.root is None:
            raise DatasetError(f"{type(self).__name__}: no dataset given: --data.root FOLDER")
        return self.root

    def people(self, split: Split) -> People:
        """The people of a split, read without opening an image.

        Raises:
            DatasetError: the files are not as described.
        """
        raise NotImplementedError

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            return ViewedPictures(predicted_images(self.images), self.predict_view)
        people = self.people(split)
        for line in people.remarks():
            rank_zero_warn(f"{split}: {line}")
        self._check_pictures(split, people)
        training = split == "train"
        view = self.train_view if training else self.eval_view
        return PoseDataset(self.folder, people, self.joint_names, view, training)

    def _check_pictures(self, split: Split, people: People) -> None:
        if not len(people):
            raise DatasetError(f"{type(self).__name__}: {split} has no people{_reasons(people.skipped)}")
        names = (people.images[i] for i in range(len(people.images)))
        missing = [name for name in names if not os.path.isfile(os.path.join(self.folder, name))]
        if missing:
            raise DatasetError(
                f"{type(self).__name__}: {split} has people on {some(missing, 'picture')} that "
                f"{'is' if len(missing) == 1 else 'are'} not in {self.folder}"
            )


def _reasons(skipped: dict[str, int]) -> str:
    return f": left out {', '.join(f'{n} without {what}' for what, n in sorted(skipped.items()))}" if skipped else ""
