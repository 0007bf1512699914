"""Rotations on images and in files: the body's axes as arrows, quaternions and angles.

The prediction of an image: ``rotation`` float (3,3), from the body's axes to the camera's (x right, y down, z away).
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from lightning_modules.pose.rotations import geodesic, matrix_to_euler, matrix_to_quaternion
from visualization.drawing import BLUE, GREEN, INK, PAPER, RED, load_font, shorten

AXES = ("x", RED), ("y", GREEN), ("z", BLUE)
REACH = 0.4  # of the image's shorter side, by an axis that is not foreshortened
RIGHT = 10.0  # degrees of error up to which it is called right

ORIENTATION_COLUMNS = ["w", "x", "y", "z", "yaw", "pitch", "roll"]


def is_orientation(prediction: Any) -> bool:
    """Whether a prediction is of this kind."""
    return isinstance(prediction, dict) and "rotation" in prediction


def draw_orientation(picture: Image.Image, prediction: dict[str, Tensor], truth: dict[str, Any]) -> Image.Image:
    """The image with the body's axes from its middle, x red, y green, z blue; below it the angles.

    Axes are as long as they look from straight ahead, and the one that points to the camera is drawn last. With a truth
    its axes are pale and wide below them, and the line has the angle between the two, on green up to 10 degrees.

    Args:
        image: RGB, of any size.
        prediction: see the module.
        truth: ``rotation`` float (3,3), or nothing.
    """
    width = max(picture.width, 224)
    size = max(11, min(40, round(width / 21)))
    font, pad, row = load_font(size), round(size * 0.4), round(size * 1.6)
    rotation, true = prediction["rotation"].float(), truth.get("rotation")
    canvas = Image.new("RGB", (width, picture.height + row), PAPER)
    left = (width - picture.width) // 2
    canvas.paste(picture, (left, 0))
    draw = ImageDraw.Draw(canvas)
    line = max(2, round(min(picture.size) / 80))
    if true is not None:
        _axes(draw, true.float(), picture, left, 3 * line, pale=True)
    _axes(draw, rotation, picture, left, line)
    angles = orientation_record(prediction)["orientation"]["degrees"]
    text, color = ", ".join(f"{name} {value:.0f}" for name, value in angles.items()), INK
    if true is not None:
        error = math.degrees(float(geodesic(rotation, true.float())))
        draw.rectangle((0, picture.height, width, picture.height + row), fill=GREEN if error <= RIGHT else RED)
        text, color = f"{error:.1f}° off: {text}", PAPER
    middle = picture.height + row / 2
    draw.text((pad, middle), shorten(text, font, width - 2 * pad), fill=color, font=font, anchor="lm")
    return canvas


def _axes(
    draw: ImageDraw.ImageDraw, rotation: Tensor, picture: Image.Image, left: int, line: int, pale: bool = False
) -> None:
    """The three axes as arrows; an arrow's head is left out where the axis points at the camera or away from it."""
    color: tuple[int, ...]
    reach = REACH * min(picture.size)
    middle = (left + picture.width / 2, picture.height / 2)
    columns = rotation.T.tolist()
    for k in sorted(range(3), key=lambda k: -columns[k][2]):
        name, color = AXES[k]
        if pale:
            color = (*((3 * 255 + 2 * c) // 5 for c in color),)
        x, y, _ = columns[k]
        end = (middle[0] + reach * x, middle[1] + reach * y)
        draw.line((middle, end), fill=color, width=line)
        if pale or math.hypot(x, y) < 0.15:
            continue
        along, head = (x / math.hypot(x, y), y / math.hypot(x, y)), 4 * line
        base = (end[0] - head * along[0], end[1] - head * along[1])
        across = (-along[1] * head / 2, along[0] * head / 2)
        corners = [end, (base[0] + across[0], base[1] + across[1]), (base[0] - across[0], base[1] - across[1])]
        draw.polygon(corners, fill=color)
        font = load_font(max(10, 6 * line))
        draw.text(
            (end[0] + 5 * line * along[0], end[1] + 5 * line * along[1]), name, fill=color, font=font, anchor="mm"
        )


def orientation_record(prediction: dict[str, Tensor]) -> dict[str, Any]:
    """``orientation``: {``quaternion``: [w, x, y, z], w >= 0; ``degrees``: {yaw, pitch, roll}, intrinsic ZYX}."""
    rotation = prediction["rotation"].double()
    angles = matrix_to_euler(rotation).rad2deg().tolist()
    named = {name: round(angle, 3) for name, angle in zip(("yaw", "pitch", "roll"), angles, strict=True)}
    quaternion = [round(number, 6) for number in matrix_to_quaternion(rotation).tolist()]
    return {"orientation": {"quaternion": quaternion, "degrees": named}}


def orientation_row(record: dict[str, Any]) -> list[Any]:
    """An image's row of predictions.csv under `ORIENTATION_COLUMNS`."""
    found = record["orientation"]
    return [repr(number) for number in (*found["quaternion"], *found["degrees"].values())]
