"""Joint names and their mirror images."""

from __future__ import annotations

from collections.abc import Sequence

MPII_JOINTS = [
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax",
    "upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow",
    "left_wrist",
]  # fmt: skip


def flip_indices(joint_names: Sequence[str]) -> list[int]:
    """Return the joint that takes the place of each joint after a horizontal flip.

    ``left_x`` and ``right_x`` are exchanged; every other joint keeps its place.
    """
    names = list(joint_names)
    opposite = {"left": "right", "right": "left"}
    indices = []
    for i, name in enumerate(names):
        side, _, rest = name.partition("_")
        flipped = f"{opposite.get(side)}_{rest}"
        indices.append(names.index(flipped) if flipped in names else i)
    return indices
