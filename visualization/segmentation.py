"""View of semantic segmentation: a map of class ids, integers (h, w)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from datamodules.transforms import VOID
from datamodules.voc import voc_palette
from visualization.base import PredictionView, Scale, Size
from visualization.drawing import GAP, INK, PAPER, class_name, font_size, load_font, shorten

OPACITY, VOID_OPACITY = 0.6, 0.9
PALETTE = voc_palette()


class SegmentationView(PredictionView):
    """The image in VOC's colors of the predicted classes above a legend, beside it the ground truth if it is known.

    A first class called ``background`` is transparent; void is nearly opaque. The ground truth is ``original_mask`` or
    ``mask``, int64 (h, w) with 255 for void.
    """

    key = "classes"

    def matches(self, prediction: Any) -> bool:
        return isinstance(prediction, Tensor) and prediction.ndim == 2 and not prediction.is_floating_point()

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        target = ground_truth.get("original_mask", ground_truth.get("mask"))
        maps = [resize_ids(ids, image.size) for ids in ([prediction] if target is None else [prediction, target])]
        titles = [] if target is None else ["prediction", "ground truth"]
        text_size = font_size(min(image.size) / 24)
        font, pad, row = load_font(text_size), round(text_size * 0.4), round(text_size * 1.6)
        width = len(maps) * (image.width + GAP) - GAP
        lines: list[list[tuple[int, str, float]]] = [[]]
        x = float(pad)
        for index, name in legend(maps, names):
            name = shorten(name, font, width - text_size - 4 * pad)
            step = text_size + 3 * pad + font.getlength(name)
            if lines[-1] and x + step > width:
                lines.append([])
                x = pad
            lines[-1].append((index, name, x))
            x += step
        top = row if titles else 0
        canvas = Image.new("RGB", (width, top + image.height + row * len(lines)), PAPER)
        draw = ImageDraw.Draw(canvas)
        for k, ids in enumerate(maps):
            left = k * (image.width + GAP)
            canvas.paste(overlay_ids(image, ids, names), (left, top))
            if titles:
                draw.text((left + pad, top / 2), titles[k], fill=INK, font=font, anchor="lm")
        for k, line in enumerate(lines):
            middle = top + image.height + k * row + row / 2
            for index, name, x in line:
                swatch = (x, middle - text_size / 2, x + text_size, middle + text_size / 2)
                draw.rectangle(swatch, fill=tuple(PALETTE[index].tolist()), outline=INK)
                draw.text((x + text_size + pad, middle), name, fill=INK, font=font, anchor="lm")
        return canvas

    def record(self, prediction: Any, names: Any, scale: Scale) -> dict[str, Any]:
        """Return the predicted classes, largest first, with their share of the pixels."""
        counts = torch.bincount(prediction.flatten().long())
        order = [i for i in counts.argsort(descending=True, stable=True).tolist() if counts[i]]
        shares = (counts.double() / max(1, prediction.numel())).tolist()
        return {"classes": [{"label": i, "class": class_name(i, names), "share": round(shares[i], 6)} for i in order]}

    def columns(self, record: dict[str, Any]) -> list[str]:
        return ["class", "share"]

    def rows(self, record: dict[str, Any]) -> list[list[Any]]:
        return [[item["class"], repr(item["share"])] for item in record["classes"]]

    def mask(self, prediction: Tensor) -> Tensor:
        return prediction


def overlay_ids(image: Image.Image, ids: np.ndarray, class_names: Sequence[str] | None) -> Image.Image:
    """Blend the colors of ids, uint8 (H, W), over an image of the same size."""
    opacity = np.full(256, OPACITY)
    opacity[VOID] = VOID_OPACITY
    if class_names is not None and len(class_names) and class_names[0] == "background":
        opacity[0] = 0
    alpha = opacity[ids][..., None]
    mixed = np.asarray(image.convert("RGB")) * (1 - alpha) + PALETTE[ids] * alpha
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def legend(maps: Sequence[np.ndarray], class_names: Sequence[str] | None) -> list[tuple[int, str]]:
    """Return (id, name) of all ids on the maps, largest area first, void last."""
    counts = np.sum([np.bincount(ids.ravel(), minlength=256) for ids in maps], axis=0)
    order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i] and i != VOID]
    named = [(i, class_name(i, class_names)) for i in order]
    return [*named, (VOID, "void")] if counts[VOID] else named


def resize_ids(ids: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Resize ids, integers (h, w), to uint8 of ``size`` (width, height) by nearest neighbor."""
    pixels = Image.fromarray(ids.detach().cpu().to(torch.uint8).numpy())
    return np.asarray(pixels if pixels.size == size else pixels.resize(size, Image.Resampling.NEAREST))
