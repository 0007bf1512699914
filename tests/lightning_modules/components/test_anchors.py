"""Anchors: the authors' values, and the order of the cells."""

from __future__ import annotations

import torch

from lightning_modules.components.anchors import make_anchors

CPU = torch.device("cpu")


def test_anchors_of_one_cell_are_the_authors() -> None:
    """py-faster-rcnn's generate_anchors has inclusive pixels and rounded sides."""
    anchors = make_anchors((128, 256, 512), (0.5, 1, 2), 16, (1, 1), CPU)
    authors = [
        (-84, -40, 99, 55), (-176, -88, 191, 103), (-360, -184, 375, 199),
        (-56, -56, 71, 71), (-120, -120, 135, 135), (-248, -248, 263, 263),
        (-36, -80, 51, 95), (-80, -168, 95, 183), (-168, -344, 183, 359),
    ]  # fmt: skip
    expected = torch.tensor(authors).float() + torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(anchors[3:6], expected[3:6])
    torch.testing.assert_close(anchors, expected, atol=12, rtol=0)
    assert ((anchors[:, :2] + anchors[:, 2:]) / 2 == 8).all()


def test_anchors_are_in_the_order_of_the_cells() -> None:
    anchors = make_anchors((32,), (1,), 8, (2, 3), CPU)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centers.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
