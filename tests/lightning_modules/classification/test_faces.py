"""Face detection, alignment and normalization: hand-computed transforms, OpenCV's results, drawn and real faces."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from datamodules.classification.fer2013 import FER2013
from datamodules.synthetic.fer2013 import EYE_CENTERS as DRAWN_EYE_CENTERS
from errors import UserError
from lightning_modules.classification import faces
from lightning_modules.classification.faces import (
    EYE_CENTERS,
    align_face,
    alignment_matrix,
    detect_faces,
    equalize,
    find_eyes,
    load_cascade,
    standardize,
)
from tests.lightning_modules.classification.conftest import draw_faces

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "fer2013_sample"

# --- alignment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [-20.0, 0.0, 13.0])
@pytest.mark.parametrize("scale", [0.7, 3.3])
def test_eyes_are_mapped_to_the_template(angle: float, scale: float) -> None:
    turn = np.radians(angle)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    eyes = 48 * scale * EYE_CENTERS @ rotation.T + (31.4, 17.9)
    matrix = alignment_matrix(eyes, 48)
    np.testing.assert_allclose(eyes @ matrix[:, :2].T + matrix[:, 2], 48 * EYE_CENTERS, atol=1e-9)
    np.testing.assert_allclose(matrix[:, :2] @ matrix[:, :2].T, np.eye(2) / scale**2, atol=1e-12)
    assert np.linalg.det(matrix[:, :2]) > 0, "expected a rotation, not a reflection"


@pytest.mark.parametrize(("angle", "scale"), [(0, 1.0), (12, 1.0), (-17, 2.6), (8, 5.0)])
def test_a_turned_face_comes_out_upright(angle: float, scale: float) -> None:
    """Draw two spots at the eyes of a rotated and scaled image and compare their centers of mass."""
    turn = np.radians(angle)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    eyes = 48 * scale * (EYE_CENTERS - 0.5) @ rotation.T + (163.3, 158.8)
    y, x = np.mgrid[0:320, 0:320] + 0.5
    spots = sum(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * (2.2 * scale) ** 2)) for cx, cy in eyes)
    face = align_face((spots * 250).astype(np.uint8), eyes).astype(float)
    yy, xx = np.mgrid[0:48, 0:48] + 0.5
    for half, (cx, cy) in ((xx < 24, 48 * EYE_CENTERS[0]), (xx >= 24, 48 * EYE_CENTERS[1])):
        mass = face * half
        assert (mass * xx).sum() / mass.sum() == pytest.approx(cx, abs=0.15)
        assert (mass * yy).sum() / mass.sum() == pytest.approx(cy, abs=0.15)


def test_large_faces_do_not_alias() -> None:
    """A checkerboard of single pixels, reduced by a factor of 8, becomes uniform gray."""
    board = (np.indices((480, 480)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.ptp(align_face(board, 384 * EYE_CENTERS + (48.3, 50.1))[2:-2, 2:-2].astype(int)) < 16


def test_the_drawn_eyes_are_where_the_template_has_them() -> None:
    np.testing.assert_array_equal(EYE_CENTERS, DRAWN_EYE_CENTERS)


# --- detection ----------------------------------------------------------------------------------------------------


def test_faces_and_eyes_are_found_where_they_were_drawn(photographs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for image, drawn_eyes in photographs:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        boxes = detect_faces(gray)
        assert len(boxes) == len(drawn_eyes)
        for box, eyes in zip(boxes, drawn_eyes, strict=True):
            found = find_eyes(gray, box)
            assert found is not None
            distance = np.linalg.norm(eyes[1] - eyes[0])
            assert np.linalg.norm(found - eyes, axis=1).max() < 0.1 * distance


def test_a_larger_photograph_has_its_faces_at_the_same_positions(
    photographs: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    gray = cv2.cvtColor(photographs[1][0], cv2.COLOR_RGB2GRAY)
    large = cv2.resize(gray, None, fx=4, fy=4)
    assert max(large.shape) > faces.MAX_DETECTION_SIDE
    small, boxes = detect_faces(gray), detect_faces(large) / 4
    assert len(boxes) == len(small)
    assert np.abs(boxes - small).max() < 0.1 * (small[0, 2] - small[0, 0])


@pytest.mark.parametrize("positions", [[(80, 40)], [(80, 40), (120, 79)], []])
def test_implausible_eyes_are_no_eyes(positions: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One eye, two on a steep line, none."""

    class Cascade:
        def detectMultiScale(self, *args: object, **kwargs: object) -> list[tuple[int, int, int, int]]:
            return [(x - 20, y - 20, 40, 40) for x, y in positions]

    monkeypatch.setattr(faces, "load_cascade", lambda name: Cascade())
    assert find_eyes(np.zeros((300, 300), np.uint8), np.array([50.0, 50.0, 250.0, 250.0])) is None


def test_an_opencv_without_cascades_is_answered_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2.data, "haarcascades", str(tmp_path) + os.sep)
    load_cascade.cache_clear()
    with pytest.raises(UserError, match=r"^OpenCV .* expected haarcascade_frontalface_default.xml.*<5'$"):
        detect_faces(np.zeros((100, 100), np.uint8))
    load_cascade.cache_clear()


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} does not exist")
def test_real_faces_are_found_and_aligned() -> None:
    """Most rotated and enlarged FER2013 faces are found and restored."""
    data = FER2013(str(SHARED))
    samples = data.faces.pixels[torch.from_numpy(data.indices("val")[:40])].numpy()
    found = aligned = 0
    upright, tilted = [], []
    for i, face in enumerate(samples):
        large = cv2.copyMakeBorder(cv2.resize(face, None, fx=4, fy=4), 90, 90, 90, 90, cv2.BORDER_REPLICATE)
        angle = (-14, 14)[i % 2]
        matrix = cv2.getRotationMatrix2D((len(large) / 2, len(large) / 2), angle, 1)
        image = cv2.warpAffine(large, matrix, large.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        boxes = detect_faces(image)
        found += len(boxes) == 1
        eyes = find_eyes(image, boxes[0]) if len(boxes) == 1 else None
        if eyes is not None:
            aligned += 1
            cut = align_face(image, eyes)
            x1, y1, x2, y2 = boxes[0].astype(int)
            for crop, scores in ((cut, upright), (cv2.resize(image[y1:y2, x1:x2], (48, 48)), tilted)):
                scores.append(np.corrcoef(crop[8:40, 8:40].ravel(), face[8:40, 8:40].ravel())[0, 1])
    assert found >= 28
    assert aligned >= 20
    assert np.mean(upright) > np.mean(tilted) + 0.05


# --- normalization ------------------------------------------------------------------------------------------------


def test_equalization_is_opencvs() -> None:
    images = torch.cat([draw_faces(5), torch.full((1, 1, 48, 48), 77, dtype=torch.uint8)])
    expected = np.stack([cv2.equalizeHist(image[0].numpy()) for image in images])[:, None]
    np.testing.assert_array_equal(equalize(images).numpy(), expected)


def test_equalization_is_opencvs_for_any_size_and_range() -> None:
    """Sizes decide which values lie on a half; a scale that is rounded twice moves some to the other side."""
    rng = np.random.default_rng(0)
    for i in range(1000):
        height, width = rng.integers(1, 80, 2)
        low = rng.integers(0, 255)
        image = rng.integers(low, rng.integers(low + 1, 257), (height, width)).astype(np.uint8)
        if i % 2:
            image = np.clip(rng.normal(120, rng.uniform(1, 60), (height, width)), 0, 255).astype(np.uint8)
        found = equalize(torch.from_numpy(image)[None, None])[0, 0].numpy()
        np.testing.assert_array_equal(found, cv2.equalizeHist(image))


def test_standardized_faces_have_mean_0_and_deviation_1() -> None:
    images = torch.cat([draw_faces(3), torch.full((1, 1, 48, 48), 77, dtype=torch.uint8)])
    found = standardize(images)
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:3].square().mean((1, 2, 3)), torch.ones(3))
    assert not found[3].any()
