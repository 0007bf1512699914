"""Faces of photographs: detection, alignment by the eyes, and normalization of illumination.

OpenCV's Haar cascades (Viola and Jones, "Rapid Object Detection using a Boosted Cascade of Simple Features", CVPR 2001)
find faces and eyes.
"""

from __future__ import annotations

import os
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from errors import UserError

FACE_SIZE = 48  # pixels, as in FER2013, so that faces of photographs and of the dataset are enlarged by the same factor

# Eye centers (x, y) of FER2013's faces relative to their side, left eye in the image first. Medians over 488 faces by
# OpenCV's two eye cascades are (0.309..0.316, 0.394..0.399) and (0.673..0.683, 0.389..0.395), here made symmetric. In
# boxes of the frontal face cascade the eyes are within 0.015 of these positions.
EYE_CENTERS = np.array([[0.315, 0.393], [0.685, 0.393]])

FACE_CASCADE, EYE_CASCADE = "haarcascade_frontalface_default.xml", "haarcascade_eye.xml"
MAX_DETECTION_SIDE = 1280  # pixels; larger photographs are reduced for the detection
MIN_FACE_FRACTION = 1 / 20  # of the photograph's shorter side; smaller detections are mostly texture
MIN_FACE_SIZE = 30  # pixels; the cascade was trained on 24
MAX_COVERED = 0.25  # of a detection's area, by a larger detection
EYE_SEARCH_SIZE = 200  # pixels; side to which a face is resized for the eye cascade
MAX_EYE_DISTANCE = 0.15  # from `EYE_CENTERS`, relative to the face's side; an eyebrow's end is farther away
MAX_EYE_ANGLE = 25  # degrees between the line through the eyes and the horizontal


@lru_cache
def load_cascade(name: str) -> cv2.CascadeClassifier:
    """Load one of the Haar cascades that are part of OpenCV's wheel.

    Raises:
        UserError: OpenCV has no cascades; version 5 removed them.
    """
    folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
    path = os.path.join(folder, name)
    if not hasattr(cv2, "CascadeClassifier") or not os.path.isfile(path):
        raise UserError(
            f"OpenCV {cv2.__version__}: expected {name} for face detection, found none; "
            "pip install 'opencv-python-headless<5'"
        )
    return cv2.CascadeClassifier(path)


def detect_faces(gray: np.ndarray) -> np.ndarray:
    """Detect upright frontal faces.

    A detection of which a larger one covers more than `MAX_COVERED` is dropped: such detections are chins and collars.

    Args:
        gray: photograph, uint8 (H, W).

    Returns:
        Squares, float64 (N, 4), xyxy in pixels, sorted from left to right.

    Raises:
        UserError: see `load_cascade`.
    """
    cascade = load_cascade(FACE_CASCADE)
    scale = min(1.0, MAX_DETECTION_SIDE / max(gray.shape))
    small = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else gray
    min_size = max(MIN_FACE_SIZE, round(MIN_FACE_FRACTION * min(small.shape)))
    found = cascade.detectMultiScale(small, scaleFactor=1.1, minNeighbors=5, minSize=(min_size, min_size))
    boxes = np.array(found, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes[np.lexsort((boxes[:, 1], boxes[:, 0]))]
    sides = np.minimum(boxes[:, None, 2:], boxes[:, 2:]) - np.maximum(boxes[:, None, :2], boxes[:, :2])
    overlap, area = sides.clip(0).prod(2), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    covered = (overlap > MAX_COVERED * area[:, None]) & (area > area[:, None])
    return boxes[~covered.any(1)] / scale


def find_eyes(gray: np.ndarray, box: np.ndarray) -> np.ndarray | None:
    """Find the eyes of a face: the detections of the eye cascade in its upper part that are nearest to `EYE_CENTERS`.

    Args:
        gray: photograph, uint8 (H, W).
        box: the face, (4,), xyxy in pixels.

    Returns:
        Eye centers (x, y) in pixels, float64 (2, 2), left eye in the image first. None if an eye has no detection
        within `MAX_EYE_DISTANCE`, or if the line through the eyes is steeper than `MAX_EYE_ANGLE`.
    """
    cascade = load_cascade(EYE_CASCADE)
    x, y, side = round(box[0]), round(box[1]), box[2] - box[0]
    upper = gray[max(0, y) : y + round(0.6 * side), max(0, x) : x + round(side)]
    scale = EYE_SEARCH_SIZE / side
    face = cv2.resize(upper, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    found = np.array(cascade.detectMultiScale(face, scaleFactor=1.05, minNeighbors=3, minSize=(25, 25)), np.float64)
    if not len(found):
        return None
    centers = (found[:, :2] + found[:, 2:] / 2) / EYE_SEARCH_SIZE
    distances = np.linalg.norm(centers - EYE_CENTERS[:, None], axis=2)
    if (distances.min(1) > MAX_EYE_DISTANCE).any():
        return None
    left, right = centers[distances.argmin(1)]
    if abs(right[1] - left[1]) > np.tan(np.radians(MAX_EYE_ANGLE)) * (right[0] - left[0]):
        return None
    return np.stack([left, right]) * side + (max(0, x), max(0, y))


def alignment_matrix(eyes: np.ndarray, size: int) -> np.ndarray:
    """Compute the similarity transform that maps two eyes to `EYE_CENTERS` in a square of ``size`` pixels.

    Two pairs of points determine it. With points as complex numbers it is z -> a z + b. Coordinates are continuous: the
    first pixel covers 0..1.

    Args:
        eyes: eye centers (x, y) in pixels, (2, 2), left eye in the image first.
        size: side of the square in pixels.

    Returns:
        Affine matrix, float64 (2, 3).
    """
    (p, q), (u, v) = ((z[:, 0] + 1j * z[:, 1]) for z in (eyes, EYE_CENTERS * size))
    a = (v - u) / (q - p)
    b = u - a * p
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align_face(gray: np.ndarray, eyes: np.ndarray, size: int = FACE_SIZE) -> np.ndarray:
    """Crop a face so that its eyes are at `EYE_CENTERS`; the border of the photograph is replicated.

    Large faces are warped to a multiple of ``size`` and then averaged, which avoids aliasing.

    Args:
        gray: photograph, uint8 (H, W).
        eyes: eye centers (x, y) in pixels, (2, 2), left eye in the image first.
        size: side of the result in pixels.

    Returns:
        The face, uint8 (size, size).
    """
    reduction = np.linalg.norm(eyes[1] - eyes[0]) / np.linalg.norm((EYE_CENTERS[1] - EYE_CENTERS[0]) * size)
    factor = max(1, round(reduction))
    matrix = alignment_matrix(eyes, size * factor)
    # In OpenCV's coordinates the center of the first pixel is 0.
    matrix[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5
    warped_size = (size * factor, size * factor)
    face = cv2.warpAffine(gray, matrix, warped_size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(face, (size, size), interpolation=cv2.INTER_AREA) if factor > 1 else face


def equalize(faces: Tensor) -> Tensor:
    """Equalize the histogram of each face, as OpenCV's equalizeHist does.

    Gray value g becomes 255 (F(g) - F(g0)) / (HW - F(g0)), in OpenCV's float32 arithmetic. F counts the pixels up to a
    value, and g0 is the smallest value that occurs. A face of one gray value does not change.

    Args:
        faces: uint8 (B, 1, H, W).

    Returns:
        Equalized faces, uint8 (B, 1, H, W).
    """
    flat = faces.flatten(1).long()
    counts = torch.zeros(len(flat), 256, dtype=torch.int64, device=faces.device)
    cumulative = counts.scatter_add_(1, flat, torch.ones_like(flat)).cumsum(1)
    first = cumulative.gather(1, flat.amin(1, keepdim=True))
    rest = flat.shape[1] - first
    # torch.div rounds once, as OpenCV does; ``255 / x`` is 255 * (1 / x), which moves some halves to the other side.
    scale = torch.div(torch.full_like(rest, 255, dtype=torch.float32), rest.clamp_min(1).float())
    table = ((cumulative - first).float() * scale).round().clamp(0, 255).long()
    return torch.where(rest > 0, table.gather(1, flat), flat).to(torch.uint8).view_as(faces)


def standardize(faces: Tensor) -> Tensor:
    """Normalize each face to mean 0 and standard deviation 1, uint8 (B, 1, H, W) to float32; uniform faces become 0."""
    faces = faces.float()
    centered = faces - faces.mean((1, 2, 3), keepdim=True)
    return centered / centered.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1)
