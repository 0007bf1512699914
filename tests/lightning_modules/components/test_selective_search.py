"""Selective Search: the grouping against a plain form of algorithm 1, and properties of its boxes."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.synthetic.voc import draw_voc_scene
from lightning_modules.components.selective_search import (
    adjacent_regions,
    group_regions,
    histogram_bins,
    region_histograms,
    segment,
    selective_search,
)


def group_regions_plain(labels: np.ndarray, bins: np.ndarray, first: int) -> list[tuple[int, int, int, int]]:
    """Return the boxes of all regions in the order of their creation; every similarity is computed from the pixels.

    Args:
        labels: int (H, W).
        bins: (27, H*W), see `histogram_bins`.
        first: first row of the bins to use: 0 for color and texture, 3 for texture alone.
    """
    height, width = labels.shape
    regions = [
        {(y, x) for y in range(height) for x in range(width) if labels[y, x] == n} for n in range(labels.max() + 1)
    ]

    def box(pixels: set) -> tuple[int, int, int, int]:
        y, x = [p[0] for p in pixels], [p[1] for p in pixels]
        return min(x), min(y), max(x) + 1, max(y) + 1

    def histogram(pixels: set, rows: range) -> np.ndarray:
        counts = np.zeros(75 + 240)
        for y, x in pixels:
            for row in rows:
                counts[bins[row, y * width + x]] += 1
        return counts / counts.sum()

    def touch(a: set, b: set) -> bool:
        return any((y + dy, x + dx) in b for y, x in a for dy in (-1, 0, 1) for dx in (-1, 0, 1))

    def similarity(a: set, b: set) -> float:
        parts = ([range(3)] if first == 0 else []) + [range(3, 27)]
        shared = sum(np.minimum(histogram(a, rows), histogram(b, rows)).sum() for rows in parts)
        x0, y0, x1, y1 = box(a | b)
        size = 1 - (len(a) + len(b)) / labels.size
        fill = 1 - ((x1 - x0) * (y1 - y0) - len(a) - len(b)) / labels.size
        return shared + size + fill

    boxes, left = [box(r) for r in regions], regions
    while len(left) > 1:
        pairs = [(i, j) for i in range(len(left)) for j in range(i) if touch(left[i], left[j])]
        i, j = max(pairs, key=lambda pair: similarity(left[pair[0]], left[pair[1]]))
        new = left[i] | left[j]
        left = [r for k, r in enumerate(left) if k not in (i, j)] + [new]
        boxes.append(box(new))
    return boxes


def random_labels(rng: np.random.Generator, height: int, width: int, count: int) -> np.ndarray:
    """Assign each pixel to the nearest of some random points."""
    points = rng.random((count, 2)) * (height, width)
    at = np.stack(np.mgrid[:height, :width], 2)[:, :, None]
    nearest = ((at - points) ** 2 * rng.uniform(0.5, 2, (count, 1))).sum(3).argmin(2)
    return np.unique(nearest, return_inverse=True)[1].reshape(height, width)


@pytest.mark.parametrize("first", [0, 3], ids=["all", "without color"])
def test_the_grouping_is_the_papers(first: int) -> None:
    rng = np.random.default_rng(first)
    for _ in range(12):
        height, width = rng.integers(6, 14, 2)
        labels = random_labels(rng, height, width, int(rng.integers(2, 9)))
        bins = histogram_bins(rng.integers(0, 256, (height, width, 3), np.uint8))
        features = region_histograms(bins, labels, labels.max() + 1)
        hierarchy = group_regions(labels, features if first == 0 else features[:, 75:])
        assert [tuple(b) for b in hierarchy.boxes.tolist()] == group_regions_plain(labels, bins, first)


def test_regions_are_adjacent_by_sides_and_corners_and_not_by_their_boxes() -> None:
    labels = np.array(
        [
            [0, 0, 0, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 1, 2, 1, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 0, 0, 3],
        ]
    )
    # The boxes of 0 and 2 overlap; 1 and 3 share a corner.
    assert adjacent_regions(labels).tolist() == [[0, 1], [0, 3], [1, 2], [1, 3]]


def test_each_region_is_its_two_children() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 60, 3), np.uint8)
    labels = random_labels(rng, 40, 60, 30)
    n = labels.max() + 1
    hierarchy = group_regions(labels, region_histograms(histogram_bins(image), labels, n))
    assert sorted(hierarchy.children.ravel().tolist()) == list(range(2 * n - 2))  # each is merged once, except the last
    assert hierarchy.boxes[-1].tolist() == [0, 0, 60, 40]
    for new, (i, j) in enumerate(hierarchy.children.tolist(), start=n):
        a, b = hierarchy.boxes[i], hierarchy.boxes[j]
        expected = np.r_[np.minimum(a[:2], b[:2]), np.maximum(a[2:], b[2:])]
        assert max(i, j) < new
        np.testing.assert_array_equal(hierarchy.boxes[new], expected)


def test_histograms_cover_the_range_of_colors_and_eight_directions() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    image[:, 10:] = 255
    labels = (np.arange(400).reshape(20, 20) % 20 >= 10).astype(int)
    h = region_histograms(histogram_bins(image), labels, 2)
    color, texture = h[:, :75].reshape(2, 3, 25), h[:, 75:].reshape(2, 8, 3, 10)
    np.testing.assert_allclose(color[0, :, 0], 1 / 3)
    np.testing.assert_allclose(color[1, :, 24], 1 / 3)
    np.testing.assert_allclose(h[:, :75].sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(h[:, 75:].sum(1), 1, rtol=1e-6)
    # The image rises to the right: in that direction and the two that differ by 45 degrees.
    rises = (texture[..., 1:].sum(3) > 0).all((0, 2))
    assert rises.tolist() == [True, True, False, False, False, False, False, True]
    falls = region_histograms(histogram_bins(image[:, ::-1]), labels, 2)[:, 75:].reshape(2, 8, 3, 10)
    assert (falls[..., 1:].sum(3) > 0).all((0, 2)).tolist() == [False, False, False, True, True, True, False, False]


def test_the_scale_is_the_papers_k_for_pixels_of_0_to_255() -> None:
    """An edge of one gray level in three channels weighs 0.8 after the blur, compared with k / 400 pixels."""
    image = np.full((20, 40, 3), 100, np.uint8)
    image[:, 20:] = 101
    assert len(np.unique(segment(image, 100))) == 2
    assert len(np.unique(segment(image, 400))) == 1


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an image of 294x200, its objects and its proposals."""
    image, objects, _ = draw_voc_scene(4, 200, np.random.default_rng(4))
    boxes = np.array([[x0 - 1, y0 - 1, x1, y1] for _, (x0, y0, x1, y1), _ in objects], np.float32)
    return image, boxes, selective_search(image)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    shared = (np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])).clip(0).prod(2)
    return shared / ((a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1) - shared)


def test_boxes_are_inside_the_image_large_enough_and_unique(scene: tuple) -> None:
    image, _, boxes = scene
    height, width = image.shape[:2]
    assert boxes.dtype == np.float32
    assert len(boxes) > 100
    assert (boxes >= 0).all()
    assert (boxes <= [width, height, width, height]).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 20 * width / 500 - 1e-3).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    assert (boxes == np.float32([0, 0, width, height])).all(1).any()


def test_the_search_is_deterministic_and_top_keeps_the_first_boxes(scene: tuple) -> None:
    image, _, boxes = scene
    np.testing.assert_array_equal(selective_search(image, top=50), boxes[:50])


def test_large_regions_tend_to_come_first(scene: tuple) -> None:
    boxes = scene[2]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert area[:50].mean() > 2 * area[-50:].mean()


def test_objects_are_found(scene: tuple) -> None:
    _, objects, boxes = scene
    assert len(objects) >= 2
    assert (iou(objects, boxes).max(1) > 0.7).all()


@pytest.mark.parametrize(("height", "width"), [(60, 200), (150, 800)], ids=["enlarged", "reduced"])
def test_boxes_are_in_pixels_of_the_input(height: int, width: int) -> None:
    image = np.full((height, width, 3), (40, 80, 160), np.uint8)
    box = np.array([width // 4, height // 3, width // 2, height * 3 // 4])
    image[box[1] : box[3], box[0] : box[2]] = (220, 60, 30)
    assert iou(box[None].astype(np.float32), selective_search(image)).max() > 0.95


@pytest.mark.parametrize("shape", [(1, 3), (3, 200), (20, 50)])
def test_an_image_of_one_color_has_at_most_one_box(shape: tuple[int, int]) -> None:
    boxes = selective_search(np.full((*shape, 3), 90, np.uint8))
    whole = [[0, 0, shape[1], shape[0]]]
    # A height of 3 pixels becomes 8 at a width of 500, below the minimum.
    assert boxes.tolist() == (whole if shape != (3, 200) else [])
    assert boxes.shape[1:] == (4,)


def test_other_types_and_shapes_raise() -> None:
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"image: expected uint8 \(H, W, 3\), found"):
            selective_search(wrong)
