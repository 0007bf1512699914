"""Boxes stay on their objects and keep their labels under every transform."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np
import pytest

from datamodules.box_transforms import (
    BoxTransform,
    adjust_hsv,
    distort_ssd,
    distort_yolo,
    iou_crop,
    render_window,
    transform_boxes,
)

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
BOXES = np.array(
    [[10, 20, 60, 70], [90, 15, 150, 45], [30, 100, 55, 160], [100, 90, 190, 170], [5, 175, 45, 195]], np.float32
)


@pytest.fixture
def drawn(tmp_path: Path) -> str:
    """Rectangles of pure colors on black, 200x200, lossless."""
    pixels = np.zeros((200, 200, 3), np.uint8)
    for (x0, y0, x1, y1), color in zip(BOXES.astype(int), COLORS, strict=True):
        pixels[y0:y1, x0:x1] = color
    path = str(tmp_path / "x.png")
    cv2.imwrite(path, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    return path


def find_rectangle(image: np.ndarray, color: tuple[int, int, int]) -> tuple[float, float, float, float] | None:
    """The rectangle of a color in (H,W,3)."""
    mask = (np.abs(image.astype(int) - color) < 60).all(2)
    if not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hflip": 1.0},
        {"image_size": (300, 500)},
        {"expand": 4.0},
        {"iou_crop": True},
        {"jitter": 0.2, "hflip": 0.5},
        {"expand": 4.0, "iou_crop": True, "hflip": 0.5},
    ],
    ids=str,
)
def test_boxes_stay_on_their_objects(drawn: str, options: dict) -> None:
    transform = BoxTransform(**{"image_size": 300, **options})
    seen = 0
    for seed in range(30):
        random.seed(seed)
        image, boxes, kept = transform(drawn, BOXES)
        assert boxes.dtype == np.float32
        assert len(boxes) == len(kept) > 0
        assert (np.diff(kept) > 0).all()
        pixels = image.permute(1, 2, 0).numpy()
        # A pixel of the source is enlarged up to about 7 times by a crop, and interpolation blurs its edge.
        tolerance = 2 + 1.5 * 300 / 200 * (3.4 if options.get("iou_crop") else 1.7)
        for box, index in zip(boxes, kept, strict=True):
            found = find_rectangle(pixels, COLORS[index])
            if found is not None:
                seen += 1
                assert np.abs(np.array(found) - box).max() <= tolerance, (seed, index, found, box)
        if not (options.get("iou_crop") or options.get("jitter")):
            assert kept.tolist() == [0, 1, 2, 3, 4]
    assert seen > 30


def test_the_draw_is_pythons_random_state(drawn: str) -> None:
    transform = BoxTransform(200, "ssd", 4.0, True, hflip=0.5)

    def draw(seed: int) -> tuple:
        random.seed(seed)
        return transform(drawn, BOXES)

    assert (draw(1)[0] == draw(1)[0]).all()
    assert any(not (draw(1)[0] == draw(seed)[0]).all() for seed in (2, 3, 4))


def test_a_shorter_side_of_600_unless_the_longer_would_pass_1000(tmp_path: Path) -> None:
    transform = BoxTransform((600, 1000))
    none = np.zeros((0, 4), np.float32)
    for shape, expected in (((375, 500), (600, 800)), ((300, 900), (333, 1000)), ((500, 333), (901, 600))):
        path = str(tmp_path / "x.png")
        cv2.imwrite(path, np.zeros((*shape, 3), np.uint8))
        assert tuple(transform(path, none)[0].shape[1:]) == expected


def test_iou_crops_overlap_an_object_and_hold_a_center() -> None:
    centers = (BOXES[:, :2] + BOXES[:, 2:]) / 2
    crops = []
    for seed in range(300):
        random.seed(seed)
        crop = iou_crop((0, 0, 200, 200), BOXES)
        if crop != (0, 0, 200, 200):
            crops.append(crop)
            assert ((centers > crop[:2]) & (centers < crop[2:])).all(1).any()
            assert crop[0] >= 0
            assert crop[2] <= 200
    sizes = np.array([(c[2] - c[0], c[3] - c[1]) for c in crops])
    assert 120 < len(crops) < 290
    # Sides of scale * sqrt(aspect): between 0.3 * sqrt(0.5) and 1.
    assert sizes.min() >= 0.3 * np.sqrt(0.5) * 200 - 1
    assert sizes.max() <= 200
    aspects = sizes[:, 0] / sizes[:, 1]
    assert aspects.min() > 0.48
    assert aspects.max() < 2.1


def test_iou_crops_have_the_sizes_of_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their sampler.cpp (SampleBBox) 23% of the crops have a whole side of the image."""
    monkeypatch.setattr("datamodules.box_transforms.MIN_IOUS", (0.0,))
    rng = np.random.default_rng(0)
    scale, aspect = rng.uniform(0.3, 1, 20000), rng.uniform(0.5, 2, 20000)
    aspect = np.minimum(np.maximum(aspect, scale**2), 1 / scale**2)
    expected = np.stack([scale * np.sqrt(aspect), scale / np.sqrt(aspect)], 1)
    random.seed(0)
    window = (0, 0, 10000, 5000)
    crops = np.array([iou_crop(window, np.zeros((0, 4), np.float32)) for _ in range(20000)])
    found = (crops[:, 2:] - crops[:, :2]) / window[2:]
    # The integrals of (2 - 1 / s^2) and (s^2 - 0.5) over the scales s from sqrt(0.5) to 1, over 0.7 * 1.5.
    for index, whole in ((0, 0.163), (1, 0.066)):
        assert (expected[:, index] > 0.9999).mean() == pytest.approx(whole, abs=0.01)
        assert (found[:, index] > 0.9999).mean() == pytest.approx(whole, abs=0.01)
    assert found.mean(0) == pytest.approx(expected.mean(0), abs=0.005)
    assert found.prod(1).mean() == pytest.approx(expected.prod(1).mean(), abs=0.01)
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert np.quantile(found, q, axis=0) == pytest.approx(np.quantile(expected, q, axis=0), abs=0.02)


def test_an_image_without_objects_is_cropped_too(drawn: str) -> None:
    random.seed(1)
    image, boxes, kept = BoxTransform(100, iou_crop=True, expand=2.0)(drawn, np.zeros((0, 4), np.float32))
    assert image.shape == (3, 100, 100)
    assert boxes.shape == (0, 4)
    assert kept.shape == (0,)


def test_boxes_are_clipped_or_dropped() -> None:
    boxes = np.array([[-5, -5, 10, 10], [95, 40, 130, 60], [200, 0, 220, 20], [99.5, 0, 140, 40]], np.float32)
    moved, kept = transform_boxes(boxes, (0, 0, 100, 100), (200, 200))
    assert kept.tolist() == [0, 1, 3]
    np.testing.assert_allclose(moved, [[0, 0, 20, 20], [190, 80, 200, 120], [199, 0, 200, 80]])
    _, kept = transform_boxes(boxes, (0, 0, 100, 100), (200, 200), by_center=True)
    assert kept.tolist() == [0]
    # A tiny object of a large image is smaller than a pixel, but it is there.
    assert transform_boxes(np.array([[1, 1, 3, 3]], np.float32), (0, 0, 1000, 1000), (100, 100))[1].tolist() == [0]


def test_beyond_the_image_is_the_mean_color() -> None:
    image = render_window(np.zeros((10, 20, 3), np.uint8), (-20, -10, 20, 10), (40, 80))
    assert (image[20:, 40:] == 0).all()
    assert (image[:20] == (124, 116, 104)).all()
    assert (image[:, :40] == (124, 116, 104)).all()
    assert (render_window(np.zeros((10, 20, 3), np.uint8), (30, 30, 50, 50), (8, 8)) == (124, 116, 104)).all()


def test_photometric_distortion_moves_no_pixel_and_stays_moderate() -> None:
    ramp = np.stack([np.tile(np.arange(0, 256, 4), (64, 1))] * 3, -1).astype(np.uint8)
    changes = []
    for seed in range(200):
        random.seed(seed)
        changed = distort_ssd(ramp)
        assert changed.shape == ramp.shape
        assert (np.diff(changed[0].astype(int), axis=0) >= 0).all()  # gray stays in order
        changes.append(np.abs(changed.astype(int) - ramp).mean())
    assert min(changes) < 2
    assert 10 < max(changes) < 90
    red = np.full((1, 1, 3), (200, 100, 100), np.uint8)
    assert adjust_hsv(red, 60, 1, 1)[0, 0].tolist() == [100, 200, 100]  # a third of a turn
    assert adjust_hsv(red, 0, 0, 1)[0, 0].tolist() == [200, 200, 200]
    assert adjust_hsv(red, 0, 1, 0.5)[0, 0].tolist() == [100, 50, 50]


def test_yolov2_turns_the_hue_by_a_tenth_at_most(drawn: str) -> None:
    red = np.full((1, 1, 3), (160, 80, 80), np.uint8)
    samples = []
    for seed in range(300):
        random.seed(seed)
        pixels = distort_yolo(red, hue=0.1)
        h, s, v = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[0, 0].astype(float)
        samples.append((h - 180 if h > 90 else h, s / 127.5, v / 160))
    turn, saturation, exposure = np.array(samples).T
    assert np.abs(turn).max() <= 19
    assert turn.min() < -15
    assert turn.max() > 15
    for factor in (saturation, exposure):  # half of them below 1, as darknet's rand_scale draws
        assert 1 / 1.5 - 0.02 <= factor.min() < 0.7
        assert 1.45 < factor.max() <= 1.52
        assert 0.4 < (factor < 1).mean() < 0.6
    random.seed(5)
    with_hue = BoxTransform(64, "yolo2")(drawn, BOXES)[0]
    random.seed(5)
    without = BoxTransform(64, "yolo")(drawn, BOXES)[0]
    assert (with_hue != without).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size: expected 1 or more, found 0"),
        ({"image_size": 8, "expand": 0.5}, "expand: expected 1 or more"),
        ({"image_size": 8, "jitter": 0.5}, "jitter: expected 0 to 0.5"),
        ({"image_size": 8, "photometric": "none of them"}, "photometric: expected none, ssd, yolo or yolo2"),
    ],
)
def test_arguments_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoxTransform(**options)
