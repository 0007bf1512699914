"""Draws a small dataset in FER2013's layout, and photographs: faces whose brows, eyes and mouth show an emotion."""

from __future__ import annotations

import os
from typing import NamedTuple

import cv2
import numpy as np

from datamodules.classification.fer2013 import EMOTIONS, SIDE, USAGES
from datamodules.synthetic.drawing import background, check_arguments, save, with_noise
from errors import UserError

PHOTOGRAPHS = 6


class Expression(NamedTuple):
    """What a face does with its features; 0, 0, 1, 0, 0 is a face at rest.

    Attributes:
        brow_raise: how much higher the brows are, as a part of the face's side.
        brow_tilt: how much higher their inner ends are than their outer ones, in the same measure.
        eye_open: height of the eyes as a part of that at rest.
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
JITTER = Expression(0.008, 0.012, 0.1, 0.15, 0.06)  # standard deviations
EYE_CENTRES = np.array([[0.315, 0.393], [0.685, 0.393]])  # x and y in a face, as parts of its side
HEAD_UNITS = 2.0  # sides of a face that a drawn head's canvas measures, the face in its middle


def write_fer2013(
    folder: str, classes: int = 7, train: int = 64, val: int = 16, size: int = SIDE, seed: int = 0
) -> list[str]:
    """Writes ``folder/fer2013.csv`` and, for prediction, ``folder/photographs/<n>_faces_<i>.jpg``.

    The faces of an emotion share brows, eyes and mouth, give or take; head, skin, light, turn and place vary. All is a
    function of the arguments alone. Usage PublicTest and PrivateTest have ``val`` faces an emotion each.

    Args:
        folder: where; it is made if missing, and what was written there before stays.
        classes: number of emotions, 2 to 7, the first ones of `EMOTIONS`.
        train, val: faces an emotion.
        size: side of the faces in pixels, which is 48 in this layout.
        seed: another seed draws other faces.

    Returns:
        Names of the emotions in label order.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(classes, len(EMOTIONS), train, val, size)
    if size != SIDE:
        raise UserError(f"size: FER2013's faces have {SIDE} pixels, found {size}: leave it out")
    os.makedirs(os.path.join(folder, "photographs"), exist_ok=True)
    with open(os.path.join(folder, "fer2013.csv"), "w") as file:
        file.write("emotion,pixels,Usage\n")
        for usage_index, usage in enumerate(USAGES.values()):
            count = train if usage == "Training" else val
            # Emotions in turn: the published rows are not sorted by them either.
            for i in range(count * classes):
                rng = np.random.default_rng((seed, usage_index, i))
                pixels = draw_face(EMOTIONS[i % classes], rng).ravel().tolist()
                file.write(f"{i % classes},{' '.join(map(str, pixels))},{usage}\n")
    for i in range(PHOTOGRAPHS):
        rng = np.random.default_rng((seed, len(USAGES), i))
        emotions = [EMOTIONS[rng.integers(classes)] for _ in range(i % 3)]
        picture, _ = draw_photograph(emotions, rng)
        save(os.path.join(folder, "photographs", f"{len(emotions)}_faces_{i}.jpg"), picture)
    return EMOTIONS[:classes]


def draw_face(emotion: str, rng: np.random.Generator) -> np.ndarray:
    """One face as FER2013 cuts them: uint8 (48,48)."""
    head, mask = draw_head(EXPRESSIONS[emotion], SIDE, rng)
    matrix = cv2.getRotationMatrix2D((SIDE, SIDE), rng.uniform(-8, 8), rng.uniform(0.94, 1.06))
    matrix[:, 2] = matrix[:, 2] + rng.uniform(-0.03, 0.03, 2) * SIDE - SIDE / 2
    head, mask = (cv2.warpAffine(x, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR) for x in (head, mask))
    behind = background(SIDE, SIDE, rng).mean(2)
    face = head * mask + behind * (1 - mask)
    return with_noise(face[..., None], rng)[..., 0]


def draw_photograph(
    emotions: list[str], rng: np.random.Generator, height: int = 360, width: int = 540, tilt: float = 12.0
) -> tuple[np.ndarray, np.ndarray]:
    """A photograph of some people, side by side: such that OpenCV's frontal face cascade finds their faces.

    Args:
        emotions: one a person, at most 3.
        rng: where all randomness comes from.
        height, width: in pixels.
        tilt: heads are turned by up to this many degrees to either side.

    Returns:
        The image, uint8 (H,W,3), RGB, and the centers of the eyes, float64 (N,2,2): x and y in pixels, a person's
        eye on the left in the image first, an image's first pixel reaching from 0 to 1.
    """
    picture = background(height, width, rng)
    eyes = np.empty((len(emotions), 2, 2))
    for i, emotion in enumerate(emotions):
        room = min(height, width / max(1, len(emotions)))
        side = round(room / HEAD_UNITS * rng.uniform(0.85, 1.05))
        head, mask = draw_head(EXPRESSIONS[emotion], side, rng)
        canvas = len(head)
        angle = rng.uniform(-tilt, tilt)
        place = np.array([(i + 0.5) * width / len(emotions), height * rng.uniform(0.46, 0.54)])
        matrix = cv2.getRotationMatrix2D((canvas / 2, canvas / 2), angle, 1.0)
        matrix[:, 2] = matrix[:, 2] + place - canvas / 2
        eyes[i] = (canvas / 2 + (EYE_CENTRES - 0.5) * side) @ matrix[:, :2].T + matrix[:, 2]
        # OpenCV counts from the centers of the pixels.
        matrix[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5
        head, mask = (cv2.warpAffine(x, matrix, (width, height), flags=cv2.INTER_LINEAR) for x in (head, mask))
        tint = np.array([1.08, 0.98, 0.86])  # of skin; the mean of the channels stays
        picture = picture * (1 - mask[..., None]) + head[..., None] * tint * mask[..., None]
    return with_noise(picture, rng), eyes


def draw_head(expression: Expression, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A head with hair and shoulders: gray values of 0..255 and its mask of 0..1, both float64 (2 side, 2 side).

    Args:
        expression: of the face, to which some jitter is added.
        side: of the face in pixels; it lies in the middle.
        rng: where all randomness comes from.
    """
    e = Expression(*np.array(expression) + np.array(JITTER) * rng.normal(size=len(JITTER)))
    y, x = (np.mgrid[0 : 2 * side, 0 : 2 * side] + 0.5) / side - (HEAD_UNITS - 1) / 2  # 0..1 is the face

    def ellipse(cx: float, cy: float, rx: float, ry: float, soft: float = 0.02) -> np.ndarray:
        """1 inside, 0 outside; ``soft`` is how wide the edge is."""
        distance = np.hypot((x - cx) / rx, (y - cy) / ry) - 1
        return np.clip(0.5 - distance * min(rx, ry) / soft, 0, 1)

    def blob(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return np.exp(-(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2))

    def paint(picture: np.ndarray, value: float | np.ndarray, where: np.ndarray) -> np.ndarray:
        return picture * (1 - where) + value * where

    skin, hair = rng.uniform(165, 215), rng.uniform(15, 70)
    head_width, head_height = rng.uniform(0.43, 0.48), rng.uniform(0.58, 0.64)
    shoulders = ellipse(0.5, 1.75, 0.85, 0.62)
    neck = ellipse(0.5, 1.1, 0.25, 0.35)
    back = ellipse(0.5, 0.36, head_width + 0.07, head_height + 0.02)
    head = ellipse(0.5, 0.5, head_width, head_height)
    mask = np.maximum.reduce([shoulders, neck, back, head])
    picture = paint(np.full_like(x, rng.uniform(40, 200)), 0.75 * skin, neck)
    picture = paint(picture, hair, back * (y < 0.6))
    # Light comes from ahead, a little from one side: the middle of the face is the brightest part.
    light = 1 - 0.28 * np.hypot((x - 0.5) / head_width, (y - 0.45) / head_height) ** 2
    light = light + rng.uniform(-0.15, 0.15) * (x - 0.5)
    picture = paint(picture, skin * light, head * (y > -0.05 + 0.06 * np.cos(9 * x)))
    # The relief that the cascade looks for: dark sockets, a bright bridge of the nose between them, bright cheeks.
    for cx, cy in EYE_CENTRES:
        picture = picture - 0.38 * skin * blob(cx, cy - 0.01, 0.13, 0.075)
        picture = picture + 0.08 * skin * blob(cx + (cx - 0.5) * 0.15, 0.62, 0.11, 0.09)
    picture = picture + 0.14 * skin * blob(0.5, 0.47, 0.045, 0.17) - 0.2 * skin * blob(0.5, 0.685, 0.1, 0.022)
    picture = picture - 0.12 * skin * blob(0.5, 0.92, 0.16, 0.03)
    for (cx, cy), outward in zip(EYE_CENTRES, (-1, 1), strict=True):
        opening = max(0.012, 0.034 * e.eye_open)
        picture = paint(picture, 0.3 * skin, ellipse(cx, cy, 0.1, opening + 0.014))
        picture = paint(picture, 235, ellipse(cx, cy, 0.088, opening))
        picture = paint(picture, 25, ellipse(cx, cy, 0.037, 0.037) * ellipse(cx, cy, 0.088, opening))
        middle = cy - 0.115 - e.brow_raise + e.brow_tilt * outward * (x - cx) / 0.2 + 0.6 * (x - cx) ** 2
        brow = np.clip(1.3 - abs(y - middle) / 0.018, 0, 1) * np.clip(1.3 - abs(x - cx) / 0.1, 0, 1)
        picture = paint(picture, 0.8 * hair, brow)
    half = 0.17 + 0.04 * e.mouth_curve - 0.06 * e.mouth_open
    across = np.clip((x - 0.5) / half, -1.2, 1.2)
    line = 0.8 + 0.055 * e.mouth_curve * (0.5 - across**2)  # y grows downwards: corners up is a larger y in the middle
    gap = 0.016 + max(0.0, 0.085 * e.mouth_open) * np.sqrt(np.clip(1 - across**2, 0, 1))
    lips = np.clip((gap + 0.022 - abs(y - line)) / 0.015, 0, 1) * np.clip(6 * (1.05 - abs(across)), 0, 1)
    inside = np.clip((gap - abs(y - line)) / 0.012, 0, 1) * np.clip(6 * (0.98 - abs(across)), 0, 1)
    picture = paint(paint(picture, 0.62 * skin, lips), 30, inside)
    if e.mouth_curve > 0.5:
        picture = paint(picture, 230, inside * np.clip((line - y) / 0.01, 0, 1))  # upper teeth
    return np.clip(picture, 0, 255), mask
