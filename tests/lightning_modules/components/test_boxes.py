"""Boxes of a batch as one tensor, and suppression, against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from lightning_modules.components.boxes import corners, join, offsets, overlaps, pad, place_in_group, suppress


def candidates(n: int, images: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random boxes xyxy of about the same place, scores, labels and images."""
    torch.manual_seed(seed)
    corner, size = torch.rand(n, 2) * 20, 5 + torch.rand(n, 2) * 20
    boxes = torch.cat([corner, corner + size], dim=1)
    return boxes, torch.rand(n), torch.randint(classes, (n,)), torch.randint(images, (n,))


def test_join_knows_each_objects_image() -> None:
    target = [{"boxes": torch.rand(n, 4), "labels": torch.full((n,), n)} for n in (2, 0, 3)]
    boxes, labels, image = join(target)
    assert boxes.shape == (5, 4)
    assert image.tolist() == [0, 0, 2, 2, 2]
    assert labels.tolist() == [2, 2, 3, 3, 3]


@pytest.mark.parametrize(("top", "keep"), [(None, None), (4, None), (None, 3), (4, 3)])
def test_suppression_is_that_of_each_image_and_class(top: int | None, keep: int | None) -> None:
    images, classes = 4, 3
    boxes, scores, labels, image = candidates(120, images - 1, classes, seed=0)  # the last image has none
    results = suppress(boxes, scores, labels, image, images, 0.4, top, keep)
    assert len(results) == images
    for i, result in enumerate(results):
        expected: list[tuple[float, int]] = []
        for c in range(classes):
            mine = ((image == i) & (labels == c)).nonzero()[:, 0]
            mine = mine[scores[mine].argsort(descending=True)][:top]
            kept = mine[nms(boxes[mine], scores[mine], 0.4)]
            overlaps = box_iou(boxes[kept], boxes[kept]).fill_diagonal_(0)
            assert (overlaps <= 0.4).all()
            expected += [(float(scores[k]), c) for k in kept]
        expected = sorted(expected, reverse=True)[:keep]
        assert [(float(s), int(c)) for s, c in zip(result["scores"], result["labels"], strict=True)] == expected
        assert result["boxes"].shape == (len(expected), 4)


def test_suppression_of_nothing() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    results = suppress(torch.zeros(0, 4), torch.zeros(0), empty, empty, 2, 0.5, top=3, keep=3)
    assert [len(result["boxes"]) for result in results] == [0, 0]


def test_places_in_groups() -> None:
    group = np.random.default_rng(0).integers(0, 5, 50)
    expected = [int((group[:i] == g).sum()) for i, g in enumerate(group)]
    assert place_in_group(torch.from_numpy(group)).tolist() == expected


def test_offsets_come_back() -> None:
    boxes, anchors = candidates(200, 1, 1, 0)[0], candidates(200, 1, 1, 1)[0]
    for deviations in ((1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)):
        there = offsets(boxes, anchors, deviations)
        torch.testing.assert_close(corners(there, anchors, deviations), boxes, atol=1e-4, rtol=1e-5)
    one = offsets(torch.tensor([10.0, 20, 30, 60]), torch.tensor([0.0, 0, 10, 20]), (0.1, 0.1, 0.2, 0.2))
    # The center moves by 15 of 10 and by 30 of 20; both sides double.
    torch.testing.assert_close(one, torch.tensor([15.0, 15, np.log(2) / 0.2, np.log(2) / 0.2]).float())
    far = corners(torch.tensor([0.0, 0, 1e6, 1e6]), torch.tensor([0.0, 0, 16, 16]), (1, 1, 1, 1))
    torch.testing.assert_close(far, torch.tensor([-492.0, -492, 508, 508]), atol=1e-2, rtol=0)


def test_overlaps_of_padded_boxes() -> None:
    """The same as torchvision's, image by image; what fills up overlaps nothing."""
    entries = [{"boxes": candidates(n, 1, 1, n)[0], "labels": torch.arange(n)} for n in (3, 0, 5)]
    boxes, labels = pad(entries)
    others = candidates(30, 1, 1, 9)[0]
    found = overlaps(boxes, others)
    assert found.shape == (3, 5, 30)
    for i, entry in enumerate(entries):
        n = len(entry["boxes"])
        torch.testing.assert_close(found[i, :n], box_iou(entry["boxes"], others))
        assert (found[i, n:] == 0).all()
        assert labels[i, :n].tolist() == list(range(n))
    each = torch.stack([others, others + 1, others + 2])
    torch.testing.assert_close(overlaps(boxes, each)[2], box_iou(entries[2]["boxes"], others + 2))
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    assert pad(empty)[0].shape == (2, 1, 4)
    assert overlaps(pad(empty)[0], torch.zeros(2, 4)).tolist() == [[[0, 0]], [[0, 0]]]
