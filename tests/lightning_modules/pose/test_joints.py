"""Joint names: equal in both worlds, and the authors' flip pairs."""

from __future__ import annotations

import datamodules.pose.joints
from lightning_modules.pose.joints import MPII_JOINTS, flip_indices


def test_flip_indices_go_by_name() -> None:
    assert flip_indices(MPII_JOINTS) == [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]
    assert flip_indices(["nose", "left_eye", "right_ear", "right_eye"]) == [0, 3, 2, 1]


def test_models_and_data_agree() -> None:
    assert MPII_JOINTS == datamodules.pose.joints.MPII_JOINTS
    for names in (MPII_JOINTS, datamodules.pose.joints.LSP_JOINTS):
        assert flip_indices(names) == datamodules.pose.joints.flip_indices(names).tolist()
