"""Training windows: bounds, labels and box targets; detection windows: positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from lightning_modules.components.image_batches import stack_images
from lightning_modules.detection.windows import (
    IGNORE_LABEL,
    Windows,
    crop_windows,
    resize_to_window_grid,
    sample_windows,
    scores_above,
    window_grid,
)

C = 3


def objects(rng: np.random.Generator, count: int, width: int, height: int) -> dict[str, torch.Tensor]:
    extent = rng.uniform(8, 60, (count, 2))
    low = rng.uniform(0, 1, (count, 2)) * (np.array([width, height]) - extent)
    boxes = torch.from_numpy(np.concatenate([low, low + extent], 1)).float()
    return {"boxes": boxes, "labels": torch.from_numpy(rng.integers(0, C, count))}


def sample(target: list, size: torch.Tensor, count: int = 24, min_side: float = 10, max_side: float = 70) -> Windows:
    side_range = torch.full((len(size), 1), float(min_side)), torch.full((len(size), 1), float(max_side))
    return sample_windows(target, size, C, count, 0.5, side_range, (0.8, 1.25))


def test_windows_obey_the_bounds_on_the_iou() -> None:
    rng = np.random.default_rng(0)
    seen = {"object": 0, "background": 0, "ignored": 0}
    for seed in range(30):
        torch.manual_seed(seed)
        size = torch.tensor([[100.0, 80.0], [64.0, 120.0], [90.0, 90.0]])
        target = [
            objects(rng, count, *map(int, wh))
            for count, wh in zip(rng.permutation([0, 2, 9]), size.tolist(), strict=True)
        ]
        windows = sample(target, size)
        assert windows.boxes.shape == (3, 24, 4)
        assert (windows.boxes >= 0).all()
        assert (windows.boxes <= size.repeat(1, 2)[:, None] + 1e-4).all()
        assert (windows.boxes[..., 2:] > windows.boxes[..., :2]).all()
        for t, boxes, labels, relative in zip(target, *windows, strict=True):
            # Tolerances: torchvision computes IoUs in single precision.
            overlap = torch.cat([box_iou(boxes, t["boxes"]), torch.zeros(24, 1)], 1)
            best, which = overlap.max(1)
            for i, label in enumerate(labels.tolist()):
                if label == C:
                    assert best[i] < 0.3 + 1e-5
                    seen["background"] += 1
                elif label == IGNORE_LABEL:
                    assert 0.3 - 1e-5 <= best[i] < 0.5 + 1e-5
                    seen["ignored"] += 1
                else:
                    assert best[i] >= 0.5 - 1e-5
                    assert label == t["labels"][which[i]]
                    corner, extent = boxes[i, :2].repeat(2), (boxes[i, 2:] - boxes[i, :2]).repeat(2)
                    torch.testing.assert_close(relative[i] * extent + corner, t["boxes"][which[i]], atol=1e-3, rtol=0)
                    seen["object"] += 1
    assert min(seen["object"], seen["background"]) > 300


def test_an_isolated_object_gives_as_many_positives_as_asked_for() -> None:
    torch.manual_seed(0)
    target = [{"boxes": torch.tensor([[30.0, 30, 60, 60]]), "labels": torch.tensor([1])}]
    windows = sample(target, torch.tensor([[100.0, 100.0]]), count=40)
    assert (windows.labels == 1).sum() == 20
    assert (windows.labels == C).sum() == 20


def test_an_image_without_objects_gives_only_background() -> None:
    no_objects = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    for target in (
        [no_objects],
        [no_objects, {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([2])}],
    ):
        windows = sample(target, torch.full((len(target), 2), 90.0))
        assert (windows.labels[0] == C).all()
        assert torch.isfinite(windows.box_targets).all()


def test_an_image_filled_by_one_object_gives_ignored_windows() -> None:
    target = [{"boxes": torch.tensor([[0.0, 0, 50, 50]]), "labels": torch.tensor([2])}]
    windows = sample(target, torch.tensor([[50.0, 50.0]]), min_side=36, max_side=45)
    assert set(windows.labels.unique().tolist()) <= {2, IGNORE_LABEL}


def test_the_same_seed_samples_the_same_windows() -> None:
    target = [objects(np.random.default_rng(0), 4, 90, 90)]
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(sample(target, torch.tensor([[90.0, 90.0]])).boxes)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_crops_at_integer_positions_are_exact() -> None:
    images = torch.randn(2, 3, 40, 40)
    boxes = torch.tensor([[[3.0, 5, 19, 21]], [[0, 0, 16, 16]]])
    crops = crop_windows(images, boxes, 16)
    torch.testing.assert_close(crops, torch.stack([images[0, :, 5:21, 3:19], images[1, :, :16, :16]]))


def test_images_of_several_sizes_are_padded() -> None:
    images = [torch.full((3, 4, 6), 7, dtype=torch.uint8), torch.full((3, 5, 2), 9, dtype=torch.uint8)]
    stacked, size = stack_images(images)
    assert stacked.shape == (2, 3, 5, 6)
    assert stacked.dtype == torch.uint8
    assert stacked.sum() == 7 * 3 * 24 + 9 * 3 * 10
    assert size.tolist() == [[6, 4], [2, 5]]


@pytest.mark.parametrize(("height", "width"), [(64.0, 64.0), (100.0, 231.0), (20.0, 90.0)])
def test_windows_cover_the_image_to_its_edge(height: float, width: float) -> None:
    resized = resize_to_window_grid(torch.zeros(1, 3, 77, 113), height, width, window_size=32, stride=8)
    boxes = window_grid(resized, 77, 113, window_size=32, stride=8)
    assert boxes[0, 0, :2].tolist() == [0, 0]
    torch.testing.assert_close(boxes[-1, -1, 2:], torch.tensor([113.0, 77.0]))
    assert boxes.shape[:2] == tuple((side - 32) // 8 + 1 for side in resized.shape[-2:])
    assert all(abs(s - max(32, t)) <= 4 for s, t in zip(resized.shape[-2:], (height, width), strict=True))


def test_scores_above_returns_image_class_row_and_column() -> None:
    scores = torch.zeros(2, 3, 4, 5)
    scores[1, 2, 3, 4], scores[0, 1, 0, 2] = 0.9, 0.7
    found, index = scores_above(scores, 0.5)
    torch.testing.assert_close(found, torch.tensor([0.7, 0.9]))
    assert [i.tolist() for i in index] == [[0, 1], [1, 2], [0, 3], [2, 4]]
