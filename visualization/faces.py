"""View of the faces in a photograph and their expressions.

The prediction of N faces is ``boxes`` float (N, 4), xyxy in pixels; ``probabilities`` float (N, C); ``aligned`` bool
(N,), whether both eyes were detected; ``eyes`` float (N, 2, 2), their x and y.
"""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from visualization.base import PredictionView, Scale, Size
from visualization.classification import TOP_COLUMNS, top_cells, top_classes, top_records
from visualization.drawing import BLUE, PAPER, RED, font_size, load_font, shorten

NO_FACE = "no face found"
FACE_COLUMNS = ["faces", "face", "x1", "y1", "x2", "y2", "aligned"]


class FacesView(PredictionView):
    """A box per face with its most probable class, and dots for detected eyes; a line if there is no face."""

    key = "faces"

    def matches(self, prediction: Any) -> bool:
        return isinstance(prediction, dict) and {"boxes", "aligned", "probabilities"} <= prediction.keys()

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        text_size = font_size(image.width / 45, 12, 40)
        font, pad, line = load_font(text_size), round(text_size * 0.3), max(2, text_size // 8)
        if not len(prediction["boxes"]):
            canvas = Image.new("RGB", (max(image.width, 224), image.height + text_size + 4 * pad), RED)
            canvas.paste(image, (0, 0))
            position = (2 * pad, image.height + 2 * pad + text_size / 2)
            ImageDraw.Draw(canvas).text(position, NO_FACE, fill=PAPER, font=font, anchor="lm")
            return canvas
        canvas = image.copy()
        draw = ImageDraw.Draw(canvas)
        scale = image.width / (size or image.size)[0]
        for box, probabilities, aligned, eyes in zip(
            prediction["boxes"], prediction["probabilities"], prediction["aligned"], prediction["eyes"], strict=True
        ):
            x1, y1, x2, y2 = (float(side) * scale for side in box)
            draw.rectangle((x1, y1, x2, y2), outline=BLUE, width=line)
            for x, y in (eyes * scale).tolist() if aligned else ():
                draw.ellipse((x - line, y - line, x + line, y + line), fill=BLUE)
            _, name, probability = top_classes(probabilities, names, 1)[0]
            height = text_size + 2 * pad
            tags = [(f"{name} {100 * probability:.0f}%", y1 - height if y1 >= height else y1)]
            if not aligned:
                tags.append(("not aligned", y2 - height))
            for text, top in tags:
                text = shorten(text, font, image.width - 2 * pad)
                width = font.getlength(text) + 2 * pad
                left = max(0.0, min(x1, image.width - width))
                draw.rectangle((left, top, left + width, top + height), fill=BLUE)
                draw.text((left + pad, top + height / 2), text, fill=PAPER, font=font, anchor="lm")
        return canvas

    def record(self, prediction: Any, names: Any, scale: Scale) -> dict[str, Any]:
        """Return the faces from left to right; ``remark`` if there is none."""
        faces = [
            {
                "box": [round(side, 1) for side in box.tolist()],
                "aligned": bool(aligned),
                "predictions": top_records(probabilities, names),
            }
            for box, aligned, probabilities in zip(
                prediction["boxes"], prediction["aligned"], prediction["probabilities"], strict=True
            )
        ]
        return {"faces": faces} if faces else {"faces": [], "remark": NO_FACE}

    def columns(self, record: dict[str, Any]) -> list[str]:
        return [*FACE_COLUMNS, *TOP_COLUMNS]

    def rows(self, record: dict[str, Any]) -> list[list[Any]]:
        """Return one row per face, or a row that counts 0 faces."""
        faces = record["faces"]
        if not faces:
            return [[0, *[""] * (len(FACE_COLUMNS) - 1 + len(TOP_COLUMNS))]]
        return [
            [len(faces), i, *face["box"], face["aligned"], *top_cells(face["predictions"])]
            for i, face in enumerate(faces, start=1)
        ]
