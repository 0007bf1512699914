"""View of detected objects: ``{"boxes": float (K, 4), xyxy in pixels, "scores": (K,), "labels": (K,)}``, best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_iou

from visualization.base import PredictionView, Scale, Size, Table
from visualization.drawing import (
    GREEN,
    INK,
    PAPER,
    RED,
    class_color,
    class_name,
    font_size,
    load_font,
    shorten,
    to_pil,
)
from visualization.samples import Sample

SCORE_THRESHOLD = 0.3  # of detections that are drawn; tables have all of them
MAX_TAGS = 20  # the best detections have a tag with class and score; more tags would hide the image
MATCH_THRESHOLD = 0.5  # IoU from which an object counts as found
MISSED = (245, 180, 0)
NO_DETECTION = f"nothing found (score {SCORE_THRESHOLD:g} or more)"
DETECTION_COLUMNS = ["detections", "detection", "class", "score", "x1", "y1", "x2", "y2"]
KEYS = {"boxes", "scores", "labels"}


class DetectionView(PredictionView):
    """Boxes with a score of at least 0.3, and a line below the image that counts them.

    With a ``target`` in the ground truth, boxes that match an object are green, all others red, and missed objects
    yellow; missed difficult objects are tagged as difficult. Without, each class has its color.
    """

    key = "detections"

    def matches(self, prediction: Any) -> bool:
        extra = ("cells", "masks", "keypoints")
        return isinstance(prediction, dict) and prediction.keys() >= KEYS and not any(k in prediction for k in extra)

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        scale = coordinate_scale(image, size)
        drawn = prediction["scores"] >= SCORE_THRESHOLD
        boxes, labels = prediction["boxes"][drawn].float() * scale, prediction["labels"][drawn].tolist()
        scores = prediction["scores"][drawn].tolist()
        line = max(2, round(min(image.size) / 200))
        text_size = font_size(min(image.size) / 24)
        font = load_font(text_size)
        footer = round(1.7 * text_size)
        canvas = Image.new("RGB", (image.width, image.height + footer), PAPER)
        canvas.paste(image, (0, 0))
        draw = ImageDraw.Draw(canvas)
        target = ground_truth.get("target")
        if target is None:
            colors = [class_color(label) for label in labels]
            text = f"{len(labels)} found" if labels else NO_DETECTION
        else:
            matches = match_detections(boxes / scale, labels, target)
            colors = [RED if match is None else GREEN for match in matches]
            objects = zip(target["boxes"].float() * scale, target["labels"].tolist(), is_difficult(target), strict=True)
            for i, (box, label, difficult) in enumerate(objects):
                if i not in matches:
                    tag = ("difficult: " if difficult else "") + class_name(label, names)
                    _draw_box(draw, box, MISSED, line, tag, font, image.width)
            total, found, false = count_detections(prediction, target)
            text = f"{found} of {total} found, {false} false"
        # Draw the best ones last, so that no weaker one covers them.
        for i in reversed(range(len(boxes))):
            tag = f"{class_name(labels[i], names)} {scores[i]:.2f}" if i < MAX_TAGS else ""
            _draw_box(draw, boxes[i], colors[i], line, tag, font, image.width)
        text = shorten(text, font, image.width - text_size)
        draw.text((text_size // 2, image.height + footer / 2), text, fill=INK, font=font, anchor="lm")
        return canvas

    def record(self, prediction: Any, names: Any, scale: Scale) -> dict[str, Any]:
        """Return all detections, best first, with boxes in the pixels of the file; ``remark`` if there is none."""
        columns = (prediction[key].tolist() for key in ("boxes", "labels", "scores"))
        detections = [
            {
                "box": [round(side * factor, 1) for side, factor in zip(box, scale * 2, strict=True)],
                "label": label,
                "class": class_name(label, names),
                "score": score,
            }
            for box, label, score in zip(*columns, strict=True)
        ]
        return {"detections": detections, **({} if detections else {"remark": "nothing found"})}

    def columns(self, record: dict[str, Any]) -> list[str]:
        return DETECTION_COLUMNS

    def rows(self, record: dict[str, Any]) -> list[list[Any]]:
        """Return one row per detection, or a row that counts 0 detections."""
        detections = record["detections"]
        if not detections:
            return [[0, *[""] * (len(DETECTION_COLUMNS) - 1)]]
        return [
            [len(detections), i, item["class"], repr(item["score"]), *item["box"]]
            for i, item in enumerate(detections, start=1)
        ]

    def table(self, samples: Sequence[Sample], names: Sequence[str] | None) -> Table:
        rows = []
        for image, prediction, ground_truth in samples:
            drawn = self.draw(to_pil(image), prediction, ground_truth, names)
            counts = count_detections(prediction, ground_truth.get("target"))
            rows.append([str(ground_truth.get("id", "")), drawn, *counts])
        return ["id", "image", "objects", "found", "false"], rows


def match_detections(boxes: Tensor, labels: list[int], target: dict[str, Tensor]) -> list[int | None]:
    """Match detections to objects of their class with an IoU of at least 0.5, each object at most once.

    Args:
        boxes: detections, best first, float (K, 4), xyxy in pixels.
        labels: their classes, length K.
        target: ground truth with ``boxes`` (M, 4) and ``labels`` (M,).

    Returns:
        The index of the object, or None for a false detection, length K.
    """
    matches: list[int | None] = []
    for iou, label in zip(box_iou(boxes, target["boxes"].float()), labels, strict=True):
        iou = torch.where(target["labels"] == label, iou, 0.0)
        best = int(iou.argmax()) if len(iou) else -1
        matches.append(best if best >= 0 and iou[best] >= MATCH_THRESHOLD and best not in matches else None)
    return matches


def count_detections(prediction: dict[str, Any], target: dict[str, Tensor] | None) -> tuple[int, int, int]:
    """Count (objects, found objects, false detections) of what is drawn.

    Difficult objects are not counted, and detections that match them are not false.
    """
    if target is None:
        return 0, 0, 0
    drawn = prediction["scores"] >= SCORE_THRESHOLD
    matches = match_detections(prediction["boxes"][drawn].float(), prediction["labels"][drawn].tolist(), target)
    counted = [i for i, difficult in enumerate(is_difficult(target)) if not difficult]
    return len(counted), sum(i in matches for i in counted), matches.count(None)


def is_difficult(target: dict[str, Tensor]) -> list[bool]:
    """Return the ``difficult`` flags of a target; False for all if it has none."""
    return target.get("difficult", torch.zeros(len(target["boxes"]), dtype=torch.bool)).tolist()


def coordinate_scale(image: Image.Image, size: tuple[int, int] | None) -> Tensor:
    """Return the factors of xyxy, float (4,), from pixels of a tensor of ``size`` (width, height) to the image's."""
    width, height = size or image.size
    return torch.tensor([image.width / width, image.height / height] * 2)


def valid_box(box: Tensor) -> tuple[float, float, float, float]:
    """Return xyxy with x2 >= x1 and y2 >= y1; Pillow rejects other boxes, which an untrained network may predict."""
    x1, y1, x2, y2 = box.tolist()
    return x1, y1, max(x1, x2), max(y1, y2)


def _draw_box(
    draw: ImageDraw.ImageDraw,
    box: Tensor,
    color: tuple[int, int, int],
    line: int,
    text: str,
    font: Any,
    image_width: int,
) -> None:
    x1, y1, x2, y2 = valid_box(box)
    draw.rectangle((x1, y1, x2, y2), outline=color, width=line)
    if not text:
        return
    pad = 2
    height = font.size + 2 * pad
    width = min(image_width, font.getlength(text) + 2 * pad)
    left = max(0.0, min(x1, image_width - width))
    top = y1 - height if y1 >= height else y1
    draw.rectangle((left, top, left + width, top + height), fill=color)
    draw.text((left + pad, top + height / 2), shorten(text, font, width - pad), fill=PAPER, font=font, anchor="lm")
