"""Synthetic dataset in the layout of FER2013, and photographs: brows, eyes and mouth of a face show its emotion."""

from __future__ import annotations

import os
from typing import NamedTuple

import cv2
import numpy as np

from datamodules.classification.fer2013 import EMOTIONS, SIDE, USAGES
from datamodules.synthetic.drawing import add_noise, check_arguments, draw_background, save_jpeg
from errors import UserError

NUM_PHOTOGRAPHS = 6


class Expression(NamedTuple):
    """Facial features relative to the neutral face, whose values are (0, 0, 1, 0, 0).

    Attributes:
        brow_raise: height of the brows above their neutral position, relative to the face's side.
        brow_tilt: height of their inner ends above their outer ends, relative to the face's side.
        eye_open: height of the eyes, relative to the neutral one.
        mouth_curve: -1 (corners down) to 1 (corners up).
        mouth_open: 0 (closed) to 1.
    """

    brow_raise: float
    brow_tilt: float
    eye_open: float
    mouth_curve: float
    mouth_open: float


EXPRESSIONS = {
    "angry": Expression(-0.015, -0.07, 0.8, -0.5, 0.0),
    "disgust": Expression(-0.015, -0.03, 0.35, -0.7, 0.35),
    "fear": Expression(0.035, 0.06, 1.5, -0.4, 0.4),
    "happy": Expression(0.0, 0.0, 0.75, 1.0, 0.3),
    "sad": Expression(0.0, 0.07, 0.65, -0.9, 0.0),
    "surprise": Expression(0.05, 0.0, 1.6, 0.0, 1.0),
    "neutral": Expression(0.0, 0.0, 1.0, 0.0, 0.0),
}
EXPRESSION_STD = Expression(0.008, 0.012, 0.1, 0.15, 0.06)
EYE_CENTERS = np.array([[0.315, 0.393], [0.685, 0.393]])  # (x, y), relative to the face's side
CANVAS_SCALE = 2.0  # side of the canvas of a head, relative to the face's side; the face is in the middle


def write_fer2013(
    folder: str, classes: int = 7, train: int = 64, val: int = 16, size: int = SIDE, seed: int = 0
) -> list[str]:
    """Write ``folder/fer2013.csv`` and, for prediction, ``folder/photographs/<n>_faces_<i>.jpg``.

    The faces of an emotion have similar brows, eyes and mouths; head, skin, light, rotation and position vary. The
    files depend only on the arguments.

    Args:
        folder: output folder, created if missing; existing files stay.
        classes: number of emotions, 2 to 7: the first ones of `EMOTIONS`.
        train: training faces per emotion.
        val: faces per emotion of each of the usages PublicTest and PrivateTest.
        size: side of the faces in pixels; the layout allows only 48.
        seed: another seed draws other faces.

    Returns:
        Names of the emotions in label order.

    Raises:
        UserError: an argument is out of range.
    """
    check_arguments(classes, len(EMOTIONS), train, val, size)
    if size != SIDE:
        raise UserError(f"size: expected {SIDE}, the side of FER2013's faces, found {size}; omit it")
    os.makedirs(os.path.join(folder, "photographs"), exist_ok=True)
    with open(os.path.join(folder, "fer2013.csv"), "w") as file:
        file.write("emotion,pixels,Usage\n")
        for usage_index, usage in enumerate(USAGES.values()):
            count = train if usage == "Training" else val
            # The emotions alternate: the rows of the release are not sorted by emotion either.
            for i in range(count * classes):
                rng = np.random.default_rng((seed, usage_index, i))
                pixels = draw_face(EMOTIONS[i % classes], rng).ravel().tolist()
                file.write(f"{i % classes},{' '.join(map(str, pixels))},{usage}\n")
    for i in range(NUM_PHOTOGRAPHS):
        rng = np.random.default_rng((seed, len(USAGES), i))
        emotions = [EMOTIONS[rng.integers(classes)] for _ in range(i % 3)]
        image, _ = draw_photograph(emotions, rng)
        save_jpeg(os.path.join(folder, "photographs", f"{len(emotions)}_faces_{i}.jpg"), image)
    return EMOTIONS[:classes]


def draw_face(emotion: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a face with the crop of FER2013, uint8 (48, 48)."""
    head, mask = draw_head(EXPRESSIONS[emotion], SIDE, rng)
    matrix = cv2.getRotationMatrix2D((SIDE, SIDE), rng.uniform(-8, 8), rng.uniform(0.94, 1.06))
    matrix[:, 2] = matrix[:, 2] + rng.uniform(-0.03, 0.03, 2) * SIDE - SIDE / 2
    head, mask = (cv2.warpAffine(x, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR) for x in (head, mask))
    background = draw_background(SIDE, SIDE, rng).mean(2)
    face = head * mask + background * (1 - mask)
    return add_noise(face[..., None], rng)[..., 0]


def draw_photograph(
    emotions: list[str], rng: np.random.Generator, height: int = 360, width: int = 540, tilt: float = 12.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw people side by side, whose faces OpenCV's frontal face cascade detects.

    Args:
        emotions: one emotion per person, for at most three people.
        rng: source of all randomness.
        height: in pixels.
        width: in pixels.
        tilt: largest rotation of a head in degrees, to either side.

    Returns:
        RGB image, uint8 (H, W, 3), and the centers of the N people's eyes, float64 (N, 2, 2): (x, y) in pixels, the
        eye on the left of the image first. The first pixel extends from 0 to 1.
    """
    image = draw_background(height, width, rng)
    eyes = np.empty((len(emotions), 2, 2))
    for i, emotion in enumerate(emotions):
        available = min(height, width / max(1, len(emotions)))
        side = round(available / CANVAS_SCALE * rng.uniform(0.85, 1.05))
        head, mask = draw_head(EXPRESSIONS[emotion], side, rng)
        canvas_side = len(head)
        angle = rng.uniform(-tilt, tilt)
        center = np.array([(i + 0.5) * width / len(emotions), height * rng.uniform(0.46, 0.54)])
        matrix = cv2.getRotationMatrix2D((canvas_side / 2, canvas_side / 2), angle, 1.0)
        matrix[:, 2] = matrix[:, 2] + center - canvas_side / 2
        eyes[i] = (canvas_side / 2 + (EYE_CENTERS - 0.5) * side) @ matrix[:, :2].T + matrix[:, 2]
        # In OpenCV's coordinates, the center of the first pixel is 0.
        matrix[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5
        head, mask = (cv2.warpAffine(x, matrix, (width, height), flags=cv2.INTER_LINEAR) for x in (head, mask))
        tint = np.array([1.08, 0.98, 0.86])  # skin color of nearly the same gray value
        image = image * (1 - mask[..., None]) + head[..., None] * tint * mask[..., None]
    return add_noise(image, rng), eyes


def draw_head(expression: Expression, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a head with hair and shoulders.

    Args:
        expression: mean expression; its features vary with `EXPRESSION_STD`.
        side: side of the face in pixels; the face is in the middle.
        rng: source of all randomness.

    Returns:
        Gray values, 0 to 255, and the mask of the person, 0 to 1; both float64 (2 side, 2 side).
    """
    e = Expression(*np.array(expression) + np.array(EXPRESSION_STD) * rng.normal(size=len(EXPRESSION_STD)))
    # The face is 0 to 1.
    y, x = (np.mgrid[0 : 2 * side, 0 : 2 * side] + 0.5) / side - (CANVAS_SCALE - 1) / 2

    def ellipse(cx: float, cy: float, rx: float, ry: float, edge: float = 0.02) -> np.ndarray:
        """Return 1 inside and 0 outside, with a soft edge of width ``edge``."""
        distance = np.hypot((x - cx) / rx, (y - cy) / ry) - 1
        return np.clip(0.5 - distance * min(rx, ry) / edge, 0, 1)

    def gaussian(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return np.exp(-(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2))

    def blend(image: np.ndarray, value: float | np.ndarray, alpha: np.ndarray) -> np.ndarray:
        return image * (1 - alpha) + value * alpha

    skin, hair = rng.uniform(165, 215), rng.uniform(15, 70)
    head_width, head_height = rng.uniform(0.43, 0.48), rng.uniform(0.58, 0.64)
    shoulders = ellipse(0.5, 1.75, 0.85, 0.62)
    neck = ellipse(0.5, 1.1, 0.25, 0.35)
    back = ellipse(0.5, 0.36, head_width + 0.07, head_height + 0.02)
    head = ellipse(0.5, 0.5, head_width, head_height)
    mask = np.maximum.reduce([shoulders, neck, back, head])
    image = blend(np.full_like(x, rng.uniform(40, 200)), 0.75 * skin, neck)
    image = blend(image, hair, back * (y < 0.6))
    # Frontal light, slightly from one side: the middle of the face is brightest.
    light = 1 - 0.28 * np.hypot((x - 0.5) / head_width, (y - 0.45) / head_height) ** 2
    light = light + rng.uniform(-0.15, 0.15) * (x - 0.5)
    image = blend(image, skin * light, head * (y > -0.05 + 0.06 * np.cos(9 * x)))
    # The contrasts that the face cascade detects: dark eye sockets, and bright cheeks and bridge of the nose.
    for cx, cy in EYE_CENTERS:
        image = image - 0.38 * skin * gaussian(cx, cy - 0.01, 0.13, 0.075)
        image = image + 0.08 * skin * gaussian(cx + (cx - 0.5) * 0.15, 0.62, 0.11, 0.09)
    image = image + 0.14 * skin * gaussian(0.5, 0.47, 0.045, 0.17) - 0.2 * skin * gaussian(0.5, 0.685, 0.1, 0.022)
    image = image - 0.12 * skin * gaussian(0.5, 0.92, 0.16, 0.03)
    for (cx, cy), outward in zip(EYE_CENTERS, (-1, 1), strict=True):
        opening = max(0.012, 0.034 * e.eye_open)
        image = blend(image, 0.3 * skin, ellipse(cx, cy, 0.1, opening + 0.014))
        image = blend(image, 235, ellipse(cx, cy, 0.088, opening))
        image = blend(image, 25, ellipse(cx, cy, 0.037, 0.037) * ellipse(cx, cy, 0.088, opening))
        middle = cy - 0.115 - e.brow_raise + e.brow_tilt * outward * (x - cx) / 0.2 + 0.6 * (x - cx) ** 2
        brow = np.clip(1.3 - abs(y - middle) / 0.018, 0, 1) * np.clip(1.3 - abs(x - cx) / 0.1, 0, 1)
        image = blend(image, 0.8 * hair, brow)
    half_width = 0.17 + 0.04 * e.mouth_curve - 0.06 * e.mouth_open
    across = np.clip((x - 0.5) / half_width, -1.2, 1.2)
    # y points down: if the corners are up, y is larger in the middle of the mouth.
    line = 0.8 + 0.055 * e.mouth_curve * (0.5 - across**2)
    gap = 0.016 + max(0.0, 0.085 * e.mouth_open) * np.sqrt(np.clip(1 - across**2, 0, 1))
    lips = np.clip((gap + 0.022 - abs(y - line)) / 0.015, 0, 1) * np.clip(6 * (1.05 - abs(across)), 0, 1)
    inside = np.clip((gap - abs(y - line)) / 0.012, 0, 1) * np.clip(6 * (0.98 - abs(across)), 0, 1)
    image = blend(blend(image, 0.62 * skin, lips), 30, inside)
    if e.mouth_curve > 0.5:
        image = blend(image, 230, inside * np.clip((line - y) / 0.01, 0, 1))  # upper teeth
    return np.clip(image, 0, 255), mask
