"""Leeds Sports Pose (Johnson and Everingham 2010) and its extension LSPET (2011): joints.mat beside its images."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from datamodules.base import Split
from datamodules.folders import tree
from datamodules.pose.base import People, Person, PoseData, read_mat
from errors import DatasetError, UserError

LSP_JOINTS = [
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "right_wrist", "right_elbow",
    "right_shoulder", "left_shoulder", "left_elbow", "left_wrist", "upper_neck", "head_top",
]  # fmt: skip

ENLARGE = 1.25  # the square's side, in the longer side of the joints' box, as MPII's is in the person's height


def read_lsp(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Joints, float64 (N,14,2), counted from 0, and whether they are labeled, bool (N,14).

    LSP's array is (3,14,N): its third row says which joints are hidden, but all are annotated. LSPET's is (14,3,N): its
    third column is 1 for joints that are annotated.

    Raises:
        DatasetError: the file is neither.
    """
    joints = np.asarray(read_mat(path, "joints", "LSP's array joints"))
    people = np.moveaxis(joints, -1, 0) if joints.ndim == 3 else joints[None]
    if people.shape[1:] == (3, len(LSP_JOINTS)):
        people = people.transpose(0, 2, 1)
        labeled = np.ones(people.shape[:2], bool)
    elif people.shape[1:] == (len(LSP_JOINTS), 3):
        labeled = people[..., 2] > 0
    else:
        raise DatasetError(f"{path}: expected joints of (3,14,N) or (14,3,N), found {joints.shape}")
    points = people[..., :2].astype(np.float64) - 1
    return points, labeled & np.isfinite(points).all(-1)


class LSP(PoseData):
    """LSP, LSPET, or both::

        root/lsp_dataset/joints.mat      (3,14,2000)
        root/lsp_dataset/images/im0001.jpg
        root/lspet_dataset/joints.mat    (14,3,10000)
        root/lspet_dataset/images/im00001.jpg

    A set is ``<folder>`` or ``<folder>:<first>-<last>``, people counted from 1, both included. The defaults are the
    usual ones: trained on LSPET and the first half of LSP, measured on the second half of LSP.

    The square that is cut out is a quarter larger than the longer side of the labeled joints' box, about its center:
    in evaluation too, as the dataset says nothing else of where a person is. People with fewer than two labeled joints
    are left out. There are no heads' boxes: ``head_size`` is nan.

    Args:
        root: folder of the sets' folders. Only prediction can do without.
        train, val, test: sets, see above.
        crop, image_size, scale, rotation, hflip, color, images: see `PoseData`.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the files are not as described.
        ValueError: an argument is out of its range.
    """

    joint_names = LSP_JOINTS

    def __init__(
        self,
        root: str | None = None,
        train: Sequence[str] = ("lspet_dataset", "lsp_dataset:1-1000"),
        val: Sequence[str] = ("lsp_dataset:1001-2000",),
        test: Sequence[str] = ("lsp_dataset:1001-2000",),
        crop: Literal["person", "picture"] = "person",
        image_size: int | tuple[int, int] | None = 256,
        scale: float = 0.25,
        rotation: float = 30.0,
        hflip: float = 0.5,
        color: float = 0.4,
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, crop, image_size, scale, rotation, hflip, color, images, **kwargs)
        self.sets: dict[str, tuple[str, ...]] = {"train": tuple(train), "val": tuple(val), "test": tuple(test)}
        for split, names in self.sets.items():
            for name in names:
                if not _SET.fullmatch(name):
                    raise UserError(f"{split}: expected sets like lsp_dataset or lsp_dataset:1-1000, found {name}")

    def people(self, split: Split) -> People:
        kept, skipped = [], Counter[str]()
        for name in self.sets[split]:
            for person in self._people(name):
                if person.side > 0:
                    kept.append(person)
                else:
                    skipped["two labeled joints"] += 1
        return People.gather(kept, len(LSP_JOINTS), skipped)

    def _people(self, name: str) -> list[Person]:
        match = _SET.fullmatch(name)
        assert match is not None
        folder, first, last = match.groups()
        path = os.path.join(self.folder, folder, "joints.mat")
        if not os.path.isfile(path):
            raise DatasetError(
                f"LSP: no {path}\nexpected\n  {self.root}/{folder}/\n    joints.mat\n    images/im0001.jpg\nfound\n"
                f"{tree(self.folder)}"
            )
        points, labeled = read_lsp(path)
        start, stop = (int(first), int(last)) if first else (1, len(points))
        if not 1 <= start <= stop <= len(points):
            raise DatasetError(f"LSP: {name}: {path} has the people 1 to {len(points)}")
        # The files' names have four digits in LSP and five in LSPET.
        digits = 4 if os.path.isfile(os.path.join(self.folder, folder, "images", "im0001.jpg")) else 5
        return [
            _person(f"{folder}/images/im{i + 1:0{digits}d}.jpg", points[i], labeled[i]) for i in range(start - 1, stop)
        ]


_SET = re.compile(r"([^:]+)(?::(\d+)-(\d+))?")


def _person(image: str, points: np.ndarray, labeled: np.ndarray) -> Person:
    """A person whose side is 0 where fewer than two joints give a box."""
    low, high = (points[labeled].min(0), points[labeled].max(0)) if labeled.any() else (np.zeros(2), np.zeros(2))
    center = (low + high) / 2
    return Person(image, 0, (center[0], center[1]), ENLARGE * (high - low).max(), points, labeled, float("nan"))
