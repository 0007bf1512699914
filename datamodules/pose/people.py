"""Annotated people, and the MATLAB files that pose datasets store them in.

Coordinates are continuous, with the centers of pixels at whole numbers: (0, 0) is the center of the first pixel, x
points right, y down. Readers subtract 1 from files that count from 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.io import loadmat, whosmat

from datamodules.folders import summarize_names
from datamodules.image_dataset import PackedStrings
from errors import DatasetError

# A labeled joint farther from the center of its person's square than this many sides is probably an annotation error.
MAX_JOINT_DISTANCE = 2


class Person(NamedTuple):
    """One annotated person.

    Attributes:
        image: path of the image relative to the dataset's root.
        number: index among the annotations of the image, from 0.
        center: (x, y) of the square crop.
        side: side of the square crop in pixels.
        keypoints: float (K, 2).
        labeled: bool (K,).
        head_size: in pixels; nan if unknown.
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
    """The people of a split, sorted by image.

    Attributes:
        images: paths of the P images relative to the dataset's root.
        image_index: index of each person's image, int64 (N,), ascending.
        number: index of each person among the annotations of the image, int64 (N,).
        center: centers of the square crops, float64 (N, 2).
        side: sides of the square crops, float64 (N,).
        keypoints: float32 (N, K, 2); 0 where not labeled.
        labeled: bool (N, K).
        head_size: in pixels, float32 (N,); nan if unknown.
        skipped: {missing annotation: number of people that were skipped for it}.
    """

    images: PackedStrings
    image_index: np.ndarray
    number: np.ndarray
    center: np.ndarray
    side: np.ndarray
    keypoints: np.ndarray
    labeled: np.ndarray
    head_size: np.ndarray
    skipped: dict[str, int]

    @classmethod
    def pack(cls, people: Sequence[Person], num_joints: int, skipped: Counter[str]) -> People:
        """Pack people, in any order, into arrays."""
        index_of = {name: i for i, name in enumerate(dict.fromkeys(person.image for person in people))}
        people = sorted(people, key=lambda person: (index_of[person.image], person.number))
        keypoints = np.array([person.keypoints for person in people], np.float64).reshape(-1, num_joints, 2)
        finite = np.isfinite(keypoints).all(-1)
        labeled = np.array([person.labeled for person in people], bool).reshape(-1, num_joints) & finite
        return cls(
            PackedStrings(list(index_of)),
            np.array([index_of[person.image] for person in people], np.int64),
            np.array([person.number for person in people], np.int64),
            np.array([person.center for person in people], np.float64).reshape(-1, 2),
            np.array([person.side for person in people], np.float64),
            np.where(labeled[..., None], keypoints, 0).astype(np.float32),
            labeled,
            np.array([person.head_size for person in people], np.float32),
            dict(skipped),
        )

    def __len__(self) -> int:
        return len(self.image_index)

    def person_id(self, index: int) -> str:
        """Return ``<path of the image>#<number>``."""
        return f"{self.images[int(self.image_index[index])]}#{self.number[index]}"

    def warnings(self) -> list[str]:
        """Return one line about skipped people and one about people with distant joints."""
        lines = []
        if self.skipped:
            lines.append(f"{len(self)} people; skipped {sum(self.skipped.values())}: {self.skipped_reasons()}")
        distance = np.abs(self.keypoints - self.center[:, None]).max(-1)
        distant = ((distance > MAX_JOINT_DISTANCE * self.side[:, None]) & self.labeled).any(1)
        ids = [self.person_id(int(i)) for i in np.flatnonzero(distant)]
        if ids:
            lines.append(
                f"kept {summarize_names(ids, 'person', 'people')} with a joint more than {MAX_JOINT_DISTANCE} crop "
                "sides from the center"
            )
        return lines

    def skipped_reasons(self) -> str:
        """Return ``2 without joints, 1 without a head box``."""
        return ", ".join(f"{count} without {missing}" for missing, count in sorted(self.skipped.items()))


def read_mat(path: str, name: str, expected: str) -> Any:
    """Read a variable of a MATLAB file; arrays are squeezed, structs become objects.

    Args:
        path: the file.
        name: name of the variable.
        expected: description of the variable, for the error message.

    Raises:
        DatasetError: the file is not a MATLAB file of version 7 or less, or has no such variable.
    """
    try:
        content = loadmat(path, squeeze_me=True, struct_as_record=False, variable_names=[name])
        known = [known for known, *_ in whosmat(path)]
    except Exception as error:  # SciPy raises exceptions of many types on damaged files
        raise DatasetError(f"{path}: expected {expected}, found {' '.join(str(error).split())[:120]}") from None
    if name not in content:
        raise DatasetError(f"{path}: expected {expected}, found {', '.join(known[:5]) or 'no variable'}")
    return content[name]
