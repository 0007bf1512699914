"""Joints that exchange places in a horizontal flip."""

from __future__ import annotations

from datamodules.pose.joints import LSP_JOINTS, MPII_JOINTS, flip_indices


def test_flip_indices() -> None:
    assert flip_indices(["right_wrist", "head_top", "left_wrist", "left_eye"]).tolist() == [2, 1, 0, 3]
    # The pairs of pose-hg-train for LSP, counted from 1: 1-6, 2-5, 3-4, 7-12, 8-11, 9-10.
    assert flip_indices(LSP_JOINTS).tolist() == [5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6, 12, 13]
    assert flip_indices(MPII_JOINTS).tolist() == [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]
