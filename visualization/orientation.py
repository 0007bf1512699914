"""View of orientation predictions: ``{"rotation": float (3, 3)}`` from the body's axes to the camera's.

The camera's axes are x right, y down, z away from it.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from lightning_modules.pose.rotations import geodesic_distance, matrix_to_euler, matrix_to_quaternion
from visualization.base import PredictionView, Scale, Size
from visualization.drawing import BLUE, GREEN, INK, PAPER, RED, font_size, load_font, shorten

AXES = ("x", RED), ("y", GREEN), ("z", BLUE)
AXIS_LENGTH = 0.4  # of an axis parallel to the image plane, relative to the image's shorter side
CORRECT = 10.0  # degrees; larger errors are red


class OrientationView(PredictionView):
    """The projected axes of the body from the image's center, and a line with the angles below the image.

    x is red, y green, z blue; the axis that points towards the camera is drawn last. If the ground truth has a
    ``rotation``, its axes are pale and wide, and the line has the angular error, on green up to 10 degrees, else on
    red.
    """

    key = "orientation"
    tile_size = 256
    square_tiles = True

    def matches(self, prediction: Any) -> bool:
        return isinstance(prediction, dict) and "rotation" in prediction

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        width = max(image.width, 224)
        text_size = font_size(width / 21, 11, 40)
        font, pad, row = load_font(text_size), round(text_size * 0.4), round(text_size * 1.6)
        rotation, target = prediction["rotation"].float(), ground_truth.get("rotation")
        canvas = Image.new("RGB", (width, image.height + row), PAPER)
        left = (width - image.width) // 2
        canvas.paste(image, (left, 0))
        draw = ImageDraw.Draw(canvas)
        center, length = (left + image.width / 2, image.height / 2), AXIS_LENGTH * min(image.size)
        line = max(2, round(min(image.size) / 80))
        if target is not None:
            _draw_axes(draw, target.float(), center, length, 3 * line, pale=True)
        _draw_axes(draw, rotation, center, length, line)
        text = ", ".join(f"{name} {value:.0f}" for name, value in _degrees(prediction).items())
        color = INK
        if target is not None:
            error = math.degrees(float(geodesic_distance(rotation, target.float())))
            draw.rectangle((0, image.height, width, image.height + row), fill=GREEN if error <= CORRECT else RED)
            text, color = f"{error:.1f}° off: {text}", PAPER
        text = shorten(text, font, width - 2 * pad)
        draw.text((pad, image.height + row / 2), text, fill=color, font=font, anchor="lm")
        return canvas

    def record(self, prediction: Any, names: Any, scale: Scale) -> dict[str, Any]:
        """Return ``quaternion`` [w, x, y, z], w >= 0, and ``degrees`` {yaw, pitch, roll}, intrinsic ZYX."""
        quaternion = matrix_to_quaternion(prediction["rotation"].double()).tolist()
        return {
            "orientation": {"quaternion": [round(number, 6) for number in quaternion], "degrees": _degrees(prediction)}
        }

    def columns(self, record: dict[str, Any]) -> list[str]:
        return ["w", "x", "y", "z", *record["orientation"]["degrees"]]

    def rows(self, record: dict[str, Any]) -> list[list[Any]]:
        orientation = record["orientation"]
        return [[repr(number) for number in (*orientation["quaternion"], *orientation["degrees"].values())]]


def _degrees(prediction: dict[str, Tensor]) -> dict[str, float]:
    angles = matrix_to_euler(prediction["rotation"].double()).rad2deg().tolist()
    return {name: round(angle, 3) for name, angle in zip(("yaw", "pitch", "roll"), angles, strict=True)}


def _draw_axes(
    draw: ImageDraw.ImageDraw,
    rotation: Tensor,
    center: tuple[float, float],
    length: float,
    line: int,
    pale: bool = False,
) -> None:
    """Draw the axes as arrows; pale axes, and axes along the line of sight, have no head."""
    color: tuple[int, ...]
    columns = rotation.T.tolist()
    for k in sorted(range(3), key=lambda k: -columns[k][2]):
        name, color = AXES[k]
        if pale:
            color = (*((3 * 255 + 2 * c) // 5 for c in color),)
        x, y, _ = columns[k]
        end = (center[0] + length * x, center[1] + length * y)
        draw.line((center, end), fill=color, width=line)
        if pale or math.hypot(x, y) < 0.15:
            continue
        direction, head = (x / math.hypot(x, y), y / math.hypot(x, y)), 4 * line
        base = (end[0] - head * direction[0], end[1] - head * direction[1])
        side = (-direction[1] * head / 2, direction[0] * head / 2)
        draw.polygon([end, (base[0] + side[0], base[1] + side[1]), (base[0] - side[0], base[1] - side[1])], fill=color)
        position = (end[0] + 5 * line * direction[0], end[1] + 5 * line * direction[1])
        draw.text(position, name, fill=color, font=load_font(max(10, 6 * line)), anchor="mm")
