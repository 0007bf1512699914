"""Boxes on images and in tables: what a detector found, and the grid of those that have one."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_iou

from visualization.drawing import BLUE, GREEN, INK, PAPER, RED, class_name, load_font, shorten

SHOWN = 0.3  # the score from which on a detection is drawn; tables have all of them
TAGGED = 20  # so many, the best, have their class and score written; more of them hide the image
MATCHED = 0.5  # the overlap with which an object counts as found
MISSED = (245, 180, 0)
NO_DETECTION = f"nothing found (score {SHOWN:g} or more)"


def is_detections(prediction: Any) -> bool:
    """Whether it is ``{"boxes": (K,4) xyxy in pixels, "scores": (K,), "labels": (K,)}``.

    It may have ``cells``, see `draw_cells`, or ``masks``, bool or uint8 (K,H,W).
    """
    return isinstance(prediction, dict) and {"boxes", "scores", "labels"} <= prediction.keys()


def draw_detections(
    picture: Image.Image,
    prediction: dict[str, Any],
    truth: dict[str, Any],
    class_names: Sequence[str] | None,
    size: tuple[int, int],
) -> Image.Image:
    """The image with all boxes of a score of 0.3 or more, below it a line that counts them.

    Where the truth is known, boxes that find an object are green, all others red, and objects that no box finds
    yellow; the difficult ones of these say so. Otherwise each class has its color. Masks have one color an object.

    Args:
        image: RGB, of any size.
        prediction: see `is_detections`, best first.
        truth: ``target``, see the batch contract, or nothing.
        class_names: C names; None shows the numbers.
        size: (width, height) of the tensor in whose pixels the boxes are; the image may be larger or of another
            aspect.
    """
    scale = torch.tensor([picture.width / size[0], picture.height / size[1]] * 2)
    shown = prediction["scores"] >= SHOWN
    boxes, labels = prediction["boxes"][shown].float() * scale, prediction["labels"][shown].tolist()
    scores = prediction["scores"][shown].tolist()
    line = max(2, round(min(picture.size) / 200))
    size_of_text = max(11, min(28, round(min(picture.size) / 24)))
    font = load_font(size_of_text)
    footer = round(1.7 * size_of_text)
    canvas = Image.new("RGB", (picture.width, picture.height + footer), PAPER)
    canvas.paste(picture if "masks" not in prediction else tint(picture, prediction["masks"][shown]), (0, 0))
    draw = ImageDraw.Draw(canvas)
    target = truth.get("target")
    if target is None:
        colors = [class_color(label) for label in labels]
        text = f"{len(labels)} found" if labels else NO_DETECTION
    else:
        finds = found_objects(boxes / scale, labels, target)
        colors = [RED if find is None else GREEN for find in finds]
        difficult = difficult_ones(target)
        for i, (box, label) in enumerate(zip(target["boxes"].float() * scale, target["labels"].tolist(), strict=True)):
            if i not in finds:
                mark = "difficult: " if difficult[i] else ""
                _box(draw, box, MISSED, line, mark + class_name(label, class_names), font, picture.size)
        objects, found, false = count_found(prediction, target)
        text = f"{found} of {objects} found, {false} false"
    # The best ones last, so that no weaker one covers them.
    for i in reversed(range(len(boxes))):
        tag = f"{class_name(labels[i], class_names)} {scores[i]:.2f}" if i < TAGGED else ""
        _box(draw, boxes[i], colors[i], line, tag, font, picture.size)
    text = shorten(text, font, picture.width - size_of_text)
    draw.text((size_of_text // 2, picture.height + footer / 2), text, fill=INK, font=font, anchor="lm")
    return canvas


def tint(picture: Image.Image, masks: Tensor) -> Image.Image:
    """The image with masks, bool or uint8 (K,H,W), each in a color of its own, the first one on top."""
    canvas = picture
    for i in reversed(range(len(masks))):
        mask = Image.fromarray(masks[i].to(torch.uint8).mul(255).cpu().numpy())
        colored = Image.blend(picture, Image.new("RGB", picture.size, class_color(i)), 0.5)
        canvas = Image.composite(colored, canvas, mask.resize(picture.size, Image.Resampling.NEAREST))
    return canvas


def without_faint_masks(prediction: Any) -> Any:
    """The detections that are drawn alone, where they have masks: a hundred of a large image take 100 megabytes."""
    if not is_detections(prediction) or "masks" not in prediction:
        return prediction
    shown = prediction["scores"] >= SHOWN
    return {key: prediction[key][shown] for key in ("boxes", "scores", "labels", "masks")}


def draw_cells(
    picture: Image.Image, prediction: dict[str, Any], truth: dict[str, Any], size: tuple[int, int]
) -> Image.Image:
    """What YOLO's lecture draws: the grid, every predicted box as thick as it is confident, each cell's class.

    Cells have the color of their most probable class. A cell that holds an object's center has a thick frame, and of
    its boxes the responsible one, which overlaps the object most, is drawn in white with its confidence.

    Args:
        image: RGB, of any size.
        prediction: with ``cells``: {"boxes": (S,S,B,4) xyxy in pixels, "confidence": (S,S,B), "classes": (S,S,C)}.
        truth: ``target``, see the batch contract, or nothing.
        size: (width, height) of the tensor in whose pixels the boxes are.
    """
    cells = prediction["cells"]
    scale = torch.tensor([picture.width / size[0], picture.height / size[1]] * 2)
    boxes, confidence = cells["boxes"].float() * scale, cells["confidence"].float().clamp(0, 1)
    side = len(confidence)
    step = torch.tensor([picture.width / side, picture.height / side])
    font = load_font(max(10, round(min(picture.size) / 26)))
    tinted = picture.copy()
    tint = ImageDraw.Draw(tinted)
    frames = {}
    for row, line in enumerate(cells["classes"].argmax(-1).tolist()):
        for column, label in enumerate(line):
            corner = torch.tensor([column, row]) * step
            frames[row, column] = (*corner.tolist(), *(corner + step).tolist())
            tint.rectangle(frames[row, column], fill=class_color(label))
    canvas = Image.blend(picture, tinted, 0.3)
    draw = ImageDraw.Draw(canvas)
    for frame in frames.values():
        draw.rectangle(frame, outline=PAPER)
    flat, strength = boxes.flatten(0, 2), confidence.flatten()
    for i in strength.argsort().tolist():
        if width := round(6 * float(strength[i])):
            draw.rectangle(_ordered(flat[i]), outline=INK, width=width)
    for box in (truth["target"]["boxes"] if "target" in truth else torch.zeros(0, 4)).float() * scale:
        column, row = ((box[:2] + box[2:]) / 2 / step).long().clamp(0, side - 1).tolist()
        responsible = int(box_iou(boxes[row, column], box[None])[:, 0].argmax())
        draw.rectangle(frames[row, column], outline=MISSED, width=3)
        corners = _ordered(boxes[row, column, responsible])
        draw.rectangle(corners, outline=PAPER, width=2)
        text = f"{float(confidence[row, column, responsible]):.2f}"
        middle = ((corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2)
        draw.text(middle, text, fill=PAPER, font=font, anchor="mm", stroke_width=2, stroke_fill=INK)
    return canvas


def found_objects(boxes: Tensor, labels: list[int], target: dict[str, Tensor]) -> list[int | None]:
    """The object that each box finds, best box first: of its class, overlapped by half or more, not found before."""
    finds: list[int | None] = []
    for overlap, label in zip(box_iou(boxes, target["boxes"].float()), labels, strict=True):
        overlap = torch.where(target["labels"] == label, overlap, 0.0)
        best = int(overlap.argmax()) if len(overlap) else -1
        finds.append(best if best >= 0 and overlap[best] >= MATCHED and best not in finds else None)
    return finds


def count_found(prediction: dict[str, Any], target: dict[str, Tensor] | None) -> tuple[int, int, int]:
    """(objects, found ones, false detections) of what is drawn; difficult objects are not among them, nor false."""
    if target is None:
        return 0, 0, 0
    shown = prediction["scores"] >= SHOWN
    finds = found_objects(prediction["boxes"][shown].float(), prediction["labels"][shown].tolist(), target)
    to_find = [i for i, difficult in enumerate(difficult_ones(target)) if not difficult]
    return len(to_find), sum(i in finds for i in to_find), finds.count(None)


def difficult_ones(target: dict[str, Tensor]) -> list[bool]:
    """The marks, which a target may lack."""
    return target.get("difficult", torch.zeros(len(target["boxes"]), dtype=torch.bool)).tolist()


def class_color(label: int) -> tuple[int, int, int]:
    """A color for a class, far from those of the classes before it."""
    if label == 0:
        return BLUE
    # Steps of the golden ratio never come near a hue that is taken.
    red, green, blue = colorsys.hsv_to_rgb((0.61 + 0.618034 * label) % 1, 0.75, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def detections_record(
    prediction: dict[str, Tensor], class_names: Sequence[str] | None, scale: tuple[float, float]
) -> dict[str, Any]:
    """What predictions.json says of an image: ``detections``, best first; ``remark`` where there is none.

    Args:
        prediction: see `is_detections`.
        class_names: C names; None gives the numbers.
        scale: what x and y are multiplied by to come to the pixels of the image on disk.
    """
    detections = [
        {
            "box": [round(side * factor, 1) for side, factor in zip(box, scale * 2, strict=True)],
            "label": label,
            "class": class_name(label, class_names),
            "score": score,
        }
        for box, label, score in zip(*(prediction[key].tolist() for key in ("boxes", "labels", "scores")), strict=True)
    ]
    return {"detections": detections, **({} if detections else {"remark": "nothing found"})}


DETECTION_COLUMNS = ["detections", "detection", "class", "score", "x1", "y1", "x2", "y2"]


def detection_rows(record: dict[str, Any]) -> list[list[Any]]:
    """An image's rows of predictions.csv under `DETECTION_COLUMNS`, one a detection; one row where there is none."""
    found = record["detections"]
    if not found:
        return [[0, *[""] * (len(DETECTION_COLUMNS) - 1)]]
    return [[len(found), i, item["class"], repr(item["score"]), *item["box"]] for i, item in enumerate(found, start=1)]


def _box(
    draw: ImageDraw.ImageDraw, box: Tensor, color: tuple[int, int, int], line: int, text: str, font: Any, size: Any
) -> None:
    x1, y1, x2, y2 = _ordered(box)
    draw.rectangle((x1, y1, x2, y2), outline=color, width=line)
    if not text:
        return
    pad = 2
    height = font.size + 2 * pad
    width = min(size[0], font.getlength(text) + 2 * pad)
    left = max(0.0, min(x1, size[0] - width))
    top = y1 - height if y1 >= height else y1
    draw.rectangle((left, top, left + width, top + height), fill=color)
    draw.text((left + pad, top + height / 2), shorten(text, font, width - pad), fill=PAPER, font=font, anchor="lm")


def _ordered(box: Tensor) -> tuple[float, float, float, float]:
    """A box that Pillow draws whatever a network says."""
    x1, y1, x2, y2 = box.tolist()
    return x1, y1, max(x1, x2), max(y1, y2)
