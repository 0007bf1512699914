"""Joint names of the pose datasets, in the order of their keypoints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MPII_JOINTS = [
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax",
    "upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow",
    "left_wrist",
]  # fmt: skip

LSP_JOINTS = [
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "right_wrist", "right_elbow",
    "right_shoulder", "left_shoulder", "left_elbow", "left_wrist", "upper_neck", "head_top",
]  # fmt: skip


def flip_indices(joint_names: Sequence[str]) -> np.ndarray:
    """Return the joint that takes the place of each joint after a horizontal flip, int64 (K,).

    ``left_x`` and ``right_x`` are exchanged; every other joint keeps its place.
    """
    flipped = [
        name.replace("left_", "right_") if name.startswith("left_") else name.replace("right_", "left_")
        for name in joint_names
    ]
    return np.array([joint_names.index(name) if name in joint_names else i for i, name in enumerate(flipped)], np.int64)
