"""Boxes: targets of a batch, IoU, regression deltas, sampling and non-maximum suppression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from lightning_modules.components.boxes import (
    batched_box_iou,
    concatenate_targets,
    decode_boxes,
    encode_boxes,
    grouped_nms,
    non_maximum_suppression,
    pad_targets,
    rank_in_group,
    sample_balanced,
)

NO_OBJECTS = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def candidates(n: int, images: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random overlapping boxes (xyxy), scores, labels and image indices."""
    torch.manual_seed(seed)
    corner, size = torch.rand(n, 2) * 20, 5 + torch.rand(n, 2) * 20
    boxes = torch.cat([corner, corner + size], dim=1)
    return boxes, torch.rand(n), torch.randint(classes, (n,)), torch.randint(images, (n,))


def random_boxes(rng: np.random.Generator, n: int, side: float) -> Tensor:
    """Random boxes (xyxy) in an image of side x side pixels."""
    corner, size = rng.uniform(0, side * 0.7, (n, 2)), rng.uniform(3, side * 0.4, (n, 2))
    return torch.from_numpy(np.concatenate([corner, np.minimum(corner + size, side)], 1)).float()


def test_concatenated_targets_keep_the_image_of_each_object() -> None:
    target = [{"boxes": torch.rand(n, 4), "labels": torch.full((n,), n)} for n in (2, 0, 3)]
    boxes, labels, image = concatenate_targets(target)
    assert boxes.shape == (5, 4)
    assert image.tolist() == [0, 0, 2, 2, 2]
    assert labels.tolist() == [2, 2, 3, 3, 3]


@pytest.mark.parametrize(("top_k", "keep_top_k"), [(None, None), (4, None), (None, 3), (4, 3)])
def test_suppression_is_that_of_each_image_and_class(top_k: int | None, keep_top_k: int | None) -> None:
    images, classes = 4, 3
    boxes, scores, labels, image = candidates(120, images - 1, classes, seed=0)  # the last image has none
    results = non_maximum_suppression(boxes, scores, labels, image, images, 0.4, top_k, keep_top_k)
    assert len(results) == images
    for i, result in enumerate(results):
        expected: list[tuple[float, int]] = []
        for c in range(classes):
            group = ((image == i) & (labels == c)).nonzero()[:, 0]
            group = group[scores[group].argsort(descending=True)][:top_k]
            kept = group[nms(boxes[group], scores[group], 0.4)]
            iou = box_iou(boxes[kept], boxes[kept]).fill_diagonal_(0)
            assert (iou <= 0.4).all()
            expected += [(float(scores[k]), c) for k in kept]
        expected = sorted(expected, reverse=True)[:keep_top_k]
        assert [(float(s), int(c)) for s, c in zip(result["scores"], result["labels"], strict=True)] == expected
        assert result["boxes"].shape == (len(expected), 4)


def test_suppression_without_candidates() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    results = non_maximum_suppression(torch.zeros(0, 4), torch.zeros(0), empty, empty, 2, 0.5, top_k=3, keep_top_k=3)
    assert [len(result["boxes"]) for result in results] == [0, 0]


def crowded_candidates(n: int, images: int, classes: int, integer: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Overlapping boxes at the far corner of 500-pixel images, different scores, and the group of each box."""
    generator = torch.Generator().manual_seed(n + classes + integer)
    corner = 350 + torch.rand(n, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + 5 + torch.rand(n, 2, generator=generator) * 100], dim=1)
    scores = (torch.randperm(n, generator=generator).double() / n).float()
    group = torch.randint(images * classes, (n,), generator=generator)
    return boxes.round() if integer else boxes, scores, group


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize(
    ("n", "images", "classes"), [(38_400, 64, 20), (38_400, 64, 365), (900, 64, 365), (900, 1, 1), (3000, 2, 2)]
)
def test_groups_are_suppressed_as_if_alone_and_in_float64(n: int, images: int, classes: int, integer: bool) -> None:
    boxes, scores, group = crowded_candidates(n, images, classes, integer)
    expected = torch.zeros(n, dtype=torch.bool)
    order = torch.argsort(group, stable=True)
    for alone in order.split(torch.bincount(group).tolist()):
        expected[alone[nms(boxes[alone].double(), scores[alone].double(), 0.5)]] = True
    kept = grouped_nms(boxes, scores, group, 0.5)
    assert torch.equal(kept.sort().values, expected.nonzero()[:, 0])
    assert (scores[kept].diff() < 0).all()


def test_the_last_group_of_many_is_suppressed_exactly() -> None:
    """The IoU is 0.5 + 1e-4. Float32 cannot hold a tenth of a pixel beside the shift of 23,360 groups."""
    pair = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5.001]])
    boxes = torch.cat([pair, torch.tensor([[490.0, 490, 500, 500]]).expand(100, 4), pair + 0.3])
    group = torch.cat([torch.zeros(2), torch.arange(1, 101), torch.full((2,), 64 * 365 - 1)]).long()
    scores = torch.linspace(1, 0.5, len(boxes))
    kept = grouped_nms(boxes, scores, group, 0.5)
    assert kept.tolist() == [0, *range(2, 103)]
    assert len(grouped_nms(boxes, scores, group, 0.5002)) == len(boxes)


def test_groups_with_negative_coordinates_stay_apart() -> None:
    boxes = torch.tensor([[-50.0, -50, -10, -10], [-50, -50, -10, -10]])
    assert grouped_nms(boxes, torch.tensor([0.4, 0.9]), torch.tensor([3, 7]), 0.5).tolist() == [1, 0]
    assert grouped_nms(boxes, torch.tensor([0.4, 0.9]), torch.tensor([3, 3]), 0.5).tolist() == [1]


def test_rank_in_group() -> None:
    group = np.random.default_rng(0).integers(0, 5, 50)
    expected = [int((group[:i] == g).sum()) for i, g in enumerate(group)]
    assert rank_in_group(torch.from_numpy(group)).tolist() == expected


def test_balanced_samples() -> None:
    """256 candidates, at most half of them positive, filled up with negatives; ignored ones are never sampled."""
    torch.manual_seed(0)
    for positives, negatives, expected in (
        (500, 1000, (128, 128)),
        (20, 1000, (20, 236)),
        (20, 30, (20, 30)),
        (0, 0, (0, 0)),
    ):
        order = torch.randperm(2000)
        positive, negative = (torch.zeros(1, 2000, dtype=torch.bool) for _ in range(2))
        positive[0, order[:positives]] = True
        negative[0, order[positives : positives + negatives]] = True
        sample = sample_balanced(positive, negative, 256, 0.5)
        assert (int(sample.positive.sum()), int((sample.valid & ~sample.positive).sum())) == expected
        assert positive.gather(1, sample.indices)[sample.positive].all()
        assert negative.gather(1, sample.indices)[sample.valid & ~sample.positive].all()
        assert len(sample.indices.unique()) == sample.indices.numel()
    first, second = (sample_balanced(positive | True, negative, 256, 0.5).indices for _ in range(2))
    assert not torch.equal(first, second)


def test_decode_inverts_encode() -> None:
    boxes, anchors = candidates(200, 1, 1, 0)[0], candidates(200, 1, 1, 1)[0]
    for std in ((1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)):
        deltas = encode_boxes(boxes, anchors, std)
        torch.testing.assert_close(decode_boxes(deltas, anchors, std), boxes, atol=1e-4, rtol=1e-5)
    one = encode_boxes(torch.tensor([10.0, 20, 30, 60]), torch.tensor([0.0, 0, 10, 20]), (0.1, 0.1, 0.2, 0.2))
    # The center moves by 15 of 10 and by 30 of 20; both sides double.
    torch.testing.assert_close(one, torch.tensor([15.0, 15, np.log(2) / 0.2, np.log(2) / 0.2]).float())
    far = decode_boxes(torch.tensor([0.0, 0, 1e6, 1e6]), torch.tensor([0.0, 0, 16, 16]), (1, 1, 1, 1))
    torch.testing.assert_close(far, torch.tensor([-492.0, -492, 508, 508]), atol=1e-2, rtol=0)


def test_iou_of_padded_boxes() -> None:
    """Equal to torchvision's, image by image; padding has an IoU of 0."""
    entries = [{"boxes": candidates(n, 1, 1, n)[0], "labels": torch.arange(n)} for n in (3, 0, 5)]
    boxes, labels = pad_targets(entries)
    others = candidates(30, 1, 1, 9)[0]
    iou = batched_box_iou(boxes, others)
    assert iou.shape == (3, 5, 30)
    for i, entry in enumerate(entries):
        n = len(entry["boxes"])
        torch.testing.assert_close(iou[i, :n], box_iou(entry["boxes"], others))
        assert (iou[i, n:] == 0).all()
        assert labels[i, :n].tolist() == list(range(n))
    each = torch.stack([others, others + 1, others + 2])
    torch.testing.assert_close(batched_box_iou(boxes, each)[2], box_iou(entries[2]["boxes"], others + 2))
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    assert pad_targets(empty)[0].shape == (2, 1, 4)
    assert batched_box_iou(pad_targets(empty)[0], torch.zeros(2, 4)).tolist() == [[[0, 0]], [[0, 0]]]
