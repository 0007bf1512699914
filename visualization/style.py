"""View of stylized images: ``{"stylized": uint8 (3, H, W)}``, and ``random`` bool for features of random weights."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from visualization.base import PredictionView, Scale, Size
from visualization.drawing import font_size, titled_panels, to_pil


class StyleView(PredictionView):
    """The content image, the style image if there is one (``style`` in the ground truth), and the stylized image."""

    key = "stylized"
    square_tiles = True

    def matches(self, prediction: Any) -> bool:
        return isinstance(prediction, dict) and "stylized" in prediction

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        panels = [("content", image)]
        if "style" in ground_truth:
            panels.append(("style", to_pil(ground_truth["style"])))
        title = "stylized (random features)" if is_random(prediction) else "stylized"
        panels.append((title, to_pil(prediction["stylized"])))
        height = image.height
        resized = [
            (title, x.resize((max(1, round(x.width * height / x.height)), height), Image.Resampling.BICUBIC))
            for title, x in panels
        ]
        return titled_panels(resized, font_size(height / 20))

    def annotate(self, image: Image.Image, prediction: Any, names: Any, size: Size, scale: Scale) -> Image.Image:
        """Return the stylized image alone."""
        return to_pil(prediction["stylized"])

    def record(self, prediction: Any, names: Any, scale: Scale) -> dict[str, Any]:
        """Return ``{"stylized": [width, height], "random_features": bool}``."""
        height, width = prediction["stylized"].shape[-2:]
        return {"stylized": [width, height], "random_features": is_random(prediction)}

    def columns(self, record: dict[str, Any]) -> list[str]:
        return ["width", "height", "random_features"]

    def rows(self, record: dict[str, Any]) -> list[list[Any]]:
        return [[*record["stylized"], record["random_features"]]]


def is_random(prediction: dict[str, Tensor]) -> bool:
    """Return whether the features had random weights."""
    return bool(prediction.get("random", False))
