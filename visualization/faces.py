"""Faces in photographs with what was recognized of each: how `PredictionWriter` draws them and writes them down.

The prediction of a photograph with N faces: ``boxes`` float (N,4), xyxy in its pixels; ``probabilities`` float (N,C);
``aligned`` bool (N,), whether both eyes were found; ``eyes`` float (N,2,2), their x and y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from visualization.classification import classification_record, top_classes
from visualization.drawing import BLUE, PAPER, RED, load_font, shorten

NO_FACE = "no face found"


def is_faces(prediction: Any) -> bool:
    """Whether a prediction is of this kind."""
    return isinstance(prediction, dict) and {"boxes", "aligned", "probabilities"} <= prediction.keys()


def draw_faces(
    picture: Image.Image, prediction: dict[str, Tensor], class_names: Sequence[str] | None, width: int
) -> Image.Image:
    """A copy of the photograph with a box a face, its most probable class and that one's probability; eyes as dots.

    Below a photograph without a face a line says so.

    Args:
        image: RGB, the photograph at any size.
        prediction: see the module.
        class_names: C names; None shows the numbers.
        width: of the photograph in the pixels that the boxes are in.
    """
    size = max(12, min(40, round(picture.width / 45)))
    font, pad, line = load_font(size), round(size * 0.3), max(2, size // 8)
    if not len(prediction["boxes"]):
        canvas = Image.new("RGB", (max(picture.width, 224), picture.height + size + 4 * pad), RED)
        canvas.paste(picture, (0, 0))
        at = (2 * pad, picture.height + 2 * pad + size / 2)
        ImageDraw.Draw(canvas).text(at, NO_FACE, fill=PAPER, font=font, anchor="lm")
        return canvas
    canvas = picture.copy()
    draw = ImageDraw.Draw(canvas)
    scale = picture.width / width
    for box, probabilities, aligned, eyes in zip(
        prediction["boxes"], prediction["probabilities"], prediction["aligned"], prediction["eyes"], strict=True
    ):
        x1, y1, x2, y2 = (float(side) * scale for side in box)
        draw.rectangle((x1, y1, x2, y2), outline=BLUE, width=line)
        for x, y in (eyes * scale).tolist() if aligned else ():
            draw.ellipse((x - line, y - line, x + line, y + line), fill=BLUE)
        _, name, probability = top_classes(probabilities, class_names, 1)[0]
        height = size + 2 * pad
        tags = [(f"{name} {100 * probability:.0f}%", y1 - height if y1 >= height else y1)]
        if not aligned:
            tags.append(("not aligned", y2 - height))
        for text, top in tags:
            text = shorten(text, font, picture.width - 2 * pad)
            tag = font.getlength(text) + 2 * pad
            left = max(0.0, min(x1, picture.width - tag))
            draw.rectangle((left, top, left + tag, top + height), fill=BLUE)
            draw.text((left + pad, top + height / 2), text, fill=PAPER, font=font, anchor="lm")
    return canvas


def faces_record(prediction: dict[str, Tensor], class_names: Sequence[str] | None) -> dict[str, Any]:
    """What predictions.json says of a photograph: ``faces``, from left to right; ``remark`` where there is none."""
    faces = [
        {
            "box": [round(side, 1) for side in box.tolist()],
            "aligned": bool(aligned),
            "predictions": classification_record(probabilities, class_names),
        }
        for box, aligned, probabilities in zip(
            prediction["boxes"], prediction["aligned"], prediction["probabilities"], strict=True
        )
    ]
    return {"faces": faces} if faces else {"faces": [], "remark": NO_FACE}


FACE_COLUMNS = ["faces", "face", "x1", "y1", "x2", "y2", "aligned"]


def face_rows(record: dict[str, Any]) -> list[tuple[list[Any], list[dict[str, Any]]]]:
    """A photograph's rows of predictions.csv, one a face: cells under `FACE_COLUMNS`, and the face's predictions.

    A photograph without a face has one row that counts 0 faces.
    """
    faces = record["faces"]
    if not faces:
        return [([0, *[""] * (len(FACE_COLUMNS) - 1)], [])]
    return [
        ([len(faces), i, *face["box"], face["aligned"]], face["predictions"]) for i, face in enumerate(faces, start=1)
    ]
