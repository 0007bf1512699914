"""Leeds Sports Pose (LSP) and its extended training set (LSPET).

Johnson and Everingham, "Clustered Pose and Nonlinear Appearance Models for Human Pose Estimation", BMVC 2010, and
"Learning Effective Human Pose Estimation from Inaccurate Annotation", CVPR 2011.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.base import Split
from datamodules.folders import draw_tree
from datamodules.pose.base import PoseData
from datamodules.pose.joints import LSP_JOINTS
from datamodules.pose.people import People, Person, read_mat
from errors import DatasetError, UserError

CROP_SCALE = 1.25  # side of the crop relative to the longer side of the joints' box

_SET = re.compile(r"([^:]+)(?::(\d+)-(\d+))?")


def read_lsp(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read ``joints.mat`` of LSP or LSPET.

    The array of LSP is (3, 14, N); its third row marks hidden joints, and all joints are labeled. The array of LSPET is
    (14, 3, N); its third column is 1 for labeled joints.

    Returns:
        Keypoints, float64 (N, 14, 2), and whether they are labeled, bool (N, 14).

    Raises:
        DatasetError: the array has another shape.
    """
    joints = np.asarray(read_mat(path, "joints", "LSP's array joints"))
    people = np.moveaxis(joints, -1, 0) if joints.ndim == 3 else joints[None]
    if people.shape[1:] == (3, len(LSP_JOINTS)):
        people = people.transpose(0, 2, 1)
        labeled = np.ones(people.shape[:2], bool)
    elif people.shape[1:] == (len(LSP_JOINTS), 3):
        labeled = people[..., 2] > 0
    else:
        raise DatasetError(f"{path}: expected joints of shape (3, 14, N) or (14, 3, N), found {joints.shape}")
    keypoints = people[..., :2].astype(np.float64) - 1
    return keypoints, labeled & np.isfinite(keypoints).all(-1)


def _to_person(image: str, keypoints: np.ndarray, labeled: np.ndarray) -> Person:
    """Crop a square around the labeled joints; its side is 0 for fewer than two joints."""
    box = keypoints[labeled] if labeled.any() else np.zeros((1, 2))
    low, high = box.min(0), box.max(0)
    center = (low + high) / 2
    return Person(image, 0, (center[0], center[1]), CROP_SCALE * (high - low).max(), keypoints, labeled, float("nan"))


class LSP(PoseData):
    """LSP, LSPET or both::

        root/lsp_dataset/joints.mat      (3, 14, 2000)
        root/lsp_dataset/images/im0001.jpg
        root/lspet_dataset/joints.mat    (14, 3, 10000)
        root/lspet_dataset/images/im00001.jpg

    A set is ``<folder>`` or ``<folder>:<first>-<last>``, counted from 1, both included. The defaults are the usual
    ones: train on LSPET and the first half of LSP, evaluate on the second half of LSP.

    The crop is a square around the labeled joints with 1.25 times the longer side of their box, in evaluation too: the
    datasets do not locate people in another way. People with fewer than two labeled joints are skipped. Head boxes are
    not annotated: ``head_size`` is nan.

    Args:
        root: parent of the sets' folders. Only prediction works without it.
        train: sets for training, see above.
        val: sets for validation.
        test: sets for testing.
        **kwargs: see `PoseData`.

    Raises:
        UserError: an option is out of range, or the files differ from the layout.
    """

    joint_names = LSP_JOINTS

    def __init__(
        self,
        root: str | None = None,
        train: Sequence[str] = ("lspet_dataset", "lsp_dataset:1-1000"),
        val: Sequence[str] = ("lsp_dataset:1001-2000",),
        test: Sequence[str] = ("lsp_dataset:1001-2000",),
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.sets: dict[str, tuple[str, ...]] = {"train": tuple(train), "val": tuple(val), "test": tuple(test)}
        for split, names in self.sets.items():
            for name in names:
                if not _SET.fullmatch(name):
                    raise UserError(f"{split}: expected sets like lsp_dataset or lsp_dataset:1-1000, found {name}")

    def source_name(self, split: Split) -> str | None:
        return ", ".join(self.sets.get(split, ())) or None

    def people(self, split: Split) -> People:
        kept, skipped = [], Counter[str]()
        for name in self.sets[split]:
            for person in self._read_set(name):
                if person.side > 0:
                    kept.append(person)
                else:
                    skipped["two labeled joints"] += 1
        return People.pack(kept, len(LSP_JOINTS), skipped)

    def missing_sets(self, split: Split) -> list[str]:
        """Return the sets of a split that do not exist."""
        folders = (name.partition(":")[0] for name in self.sets[split])
        return [name for name in folders if not os.path.isfile(os.path.join(self.folder, name, "joints.mat"))]

    def _read_set(self, name: str) -> list[Person]:
        match = _SET.fullmatch(name)
        assert match is not None
        folder, first, last = match.groups()
        path = os.path.join(self.folder, folder, "joints.mat")
        if not os.path.isfile(path):
            raise DatasetError(
                f"LSP: no {path}\nexpected\n  {self.root}/{folder}/\n    joints.mat\n    images/im0001.jpg\nfound\n"
                f"{draw_tree(self.folder)}"
            )
        keypoints, labeled = read_lsp(path)
        start, stop = (int(first), int(last)) if first else (1, len(keypoints))
        if not 1 <= start <= stop <= len(keypoints):
            raise DatasetError(f"{path}: expected a range of the people 1 to {len(keypoints)}, found {name}")
        # File names have four digits in LSP and five in LSPET.
        digits = 4 if os.path.isfile(os.path.join(self.folder, folder, "images", "im0001.jpg")) else 5
        return [
            _to_person(f"{folder}/images/im{i + 1:0{digits}d}.jpg", keypoints[i], labeled[i])
            for i in range(start - 1, stop)
        ]
