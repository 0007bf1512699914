"""View of YOLO v1's detections: detections with the raw output of the grid cells.

``cells`` is ``{"boxes": float (S, S, B, 4), xyxy in pixels, "confidence": (S, S, B), "classes": (S, S, C)}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torchvision.ops import box_iou

from visualization.base import Size
from visualization.detections import KEYS, MISSED, DetectionView, coordinate_scale, valid_box
from visualization.drawing import GAP, INK, PAPER, class_color, load_font, resize_long_side


class YOLOGridView(DetectionView):
    """The detections; on a contact sheet beside them the grid (see `draw_grid`)."""

    def matches(self, prediction: Any) -> bool:
        return isinstance(prediction, dict) and prediction.keys() >= KEYS | {"cells"}

    def tile(
        self, image: Image.Image, prediction: dict[str, Any], ground_truth: dict[str, Any], names: Sequence[str] | None
    ) -> Image.Image:
        boxes = super().tile(image, prediction, ground_truth, names)
        grid = draw_grid(resize_long_side(image, self.tile_size), prediction, ground_truth, image.size)
        pair = Image.new("RGB", (2 * boxes.width + GAP, boxes.height), PAPER)
        pair.paste(boxes, (0, 0))
        pair.paste(grid, (boxes.width + GAP, 0))
        return pair


def draw_grid(
    image: Image.Image,
    prediction: dict[str, Any],
    ground_truth: dict[str, Any],
    size: Size | None = None,
) -> Image.Image:
    """Draw the grid as in the figure of the paper: the class of each cell, and all boxes as thick as their confidence.

    Cells have the color of their most probable class. A cell that contains the center of an object has a yellow frame;
    its responsible box, the one with the highest IoU, is white with its confidence.

    Args:
        image: RGB, of any size.
        prediction: with ``cells``, see the module.
        ground_truth: ``target`` (see the batch contract), or nothing.
        size: (width, height) of the tensor whose pixels the boxes refer to; None: those of ``image``.
    """
    cells = prediction["cells"]
    scale = coordinate_scale(image, size)
    boxes, confidence = cells["boxes"].float() * scale, cells["confidence"].float().clamp(0, 1)
    side = len(confidence)
    step = torch.tensor([image.width / side, image.height / side])
    font = load_font(max(10, round(min(image.size) / 26)))
    tinted = image.copy()
    tint = ImageDraw.Draw(tinted)
    frames = {}
    for row, labels in enumerate(cells["classes"].argmax(-1).tolist()):
        for column, label in enumerate(labels):
            corner = torch.tensor([column, row]) * step
            frames[row, column] = (*corner.tolist(), *(corner + step).tolist())
            tint.rectangle(frames[row, column], fill=class_color(label))
    canvas = Image.blend(image, tinted, 0.3)
    draw = ImageDraw.Draw(canvas)
    for frame in frames.values():
        draw.rectangle(frame, outline=PAPER)
    flat_boxes, flat_confidence = boxes.flatten(0, 2), confidence.flatten()
    for i in flat_confidence.argsort().tolist():
        if width := round(6 * float(flat_confidence[i])):
            draw.rectangle(valid_box(flat_boxes[i]), outline=INK, width=width)
    for box in (ground_truth["target"]["boxes"] if "target" in ground_truth else torch.zeros(0, 4)).float() * scale:
        column, row = ((box[:2] + box[2:]) / 2 / step).long().clamp(0, side - 1).tolist()
        responsible = int(box_iou(boxes[row, column], box[None])[:, 0].argmax())
        draw.rectangle(frames[row, column], outline=MISSED, width=3)
        x1, y1, x2, y2 = valid_box(boxes[row, column, responsible])
        draw.rectangle((x1, y1, x2, y2), outline=PAPER, width=2)
        text, center = f"{float(confidence[row, column, responsible]):.2f}", ((x1 + x2) / 2, (y1 + y2) / 2)
        draw.text(center, text, fill=PAPER, font=font, anchor="mm", stroke_width=2, stroke_fill=INK)
    return canvas
