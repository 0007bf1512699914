"""Classes of pixels on images and in files: overlays with VOC's colors and a legend, masks as VOC stores them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from visualization.detections import SHOWN, is_detections
from visualization.drawing import INK, PAPER, class_name, load_font, shorten

VOID = 255
OPACITY = 0.6


def is_segmentation(prediction: Any) -> bool:
    """Whether it is a map of class ids, integers (h,w)."""
    return isinstance(prediction, Tensor) and prediction.ndim == 2 and not prediction.is_floating_point()


@lru_cache(maxsize=1)
def palette() -> np.ndarray:
    """VOC's colors, uint8 (256,3) RGB."""
    from datamodules.voc import voc_palette

    return voc_palette()


def draw_segmentation(
    picture: Image.Image, prediction: Tensor, truth: dict[str, Any], class_names: Sequence[str] | None
) -> Image.Image:
    """The image in the colors of the predicted classes, beside it in those of the true ones, if known; a legend.

    A first class called ``background`` leaves the image as it is. Void is VOC's cream, nearly opaque.

    Args:
        image: RGB, of any size.
        prediction: ids, integers (h,w); the image may be larger.
        truth: ``original_mask`` or ``mask``, int64 (h,w) with 255 for void, or nothing.
        class_names: C names; None shows the numbers.
    """
    maps = [prediction]
    true = truth.get("original_mask", truth.get("mask"))
    titles = [] if true is None else ["predicted", "truth"]
    maps += [] if true is None else [true]
    arrays = [resized_ids(ids, picture.size) for ids in maps]
    gap = 4
    size = max(11, min(28, round(min(picture.size) / 24)))
    font, pad, row = load_font(size), round(size * 0.4), round(size * 1.6)
    width = len(arrays) * (picture.width + gap) - gap
    items = legend(arrays, class_names)
    lines: list[list[tuple[int, str, float]]] = [[]]
    x = float(pad)
    for index, name in items:
        name = shorten(name, font, width - size - 4 * pad)
        step = size + 3 * pad + font.getlength(name)
        if lines[-1] and x + step > width:
            lines.append([])
            x = pad
        lines[-1].append((index, name, x))
        x += step
    top = row if titles else 0
    canvas = Image.new("RGB", (width, top + picture.height + row * len(lines)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, ids in enumerate(arrays):
        left = place * (picture.width + gap)
        canvas.paste(overlay(picture, ids, class_names), (left, top))
        if titles:
            draw.text((left + pad, top / 2), titles[place], fill=INK, font=font, anchor="lm")
    for i, line in enumerate(lines):
        middle = top + picture.height + i * row + row / 2
        for index, name, x in line:
            chip = (x, middle - size / 2, x + size, middle + size / 2)
            draw.rectangle(chip, fill=tuple(palette()[index].tolist()), outline=INK)
            draw.text((x + size + pad, middle), name, fill=INK, font=font, anchor="lm")
    return canvas


def overlay(picture: Image.Image, ids: np.ndarray, class_names: Sequence[str] | None) -> Image.Image:
    """The image in the colors of ids, uint8 (H,W) of its size."""
    opacity = np.full(256, OPACITY)
    opacity[VOID] = 0.9
    if class_names is not None and len(class_names) and class_names[0] == "background":
        opacity[0] = 0
    share = opacity[ids][..., None]
    mixed = np.asarray(picture.convert("RGB")) * (1 - share) + palette()[ids] * share
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def legend(maps: Sequence[np.ndarray], class_names: Sequence[str] | None) -> list[tuple[int, str]]:
    """(id, name) of all that is on some map, the largest first, void last."""
    counts = sum(np.bincount(ids.ravel(), minlength=256) for ids in maps)
    order = [i for i in np.argsort(-np.asarray(counts), kind="stable").tolist() if np.asarray(counts)[i] and i != VOID]
    named = [(i, class_name(i, class_names)) for i in order]
    return [*named, (VOID, "void")] if np.asarray(counts)[VOID] else named


def resized_ids(ids: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Ids as uint8 (height, width) of ``size`` (width, height), each from the nearest pixel."""
    pixels = Image.fromarray(ids.detach().cpu().to(torch.uint8).numpy())
    return np.asarray(pixels if pixels.size == size else pixels.resize(size, Image.Resampling.NEAREST))


def ids_of(prediction: Any) -> Tensor | None:
    """What is stored as a mask: the classes' ids, or of objects 1, 2, ... in the order of their scores; else None.

    Objects with a score below 0.3 are left out, and those that share a pixel leave it to the best one.
    """
    if is_segmentation(prediction):
        return prediction
    if not is_detections(prediction) or "masks" not in prediction:
        return None
    masks = prediction["masks"]
    ids = torch.zeros(masks.shape[1:], dtype=torch.uint8)
    for i in reversed(range(min(len(masks), VOID - 1))):
        if prediction["scores"][i] >= SHOWN:
            ids[masks[i].bool()] = i + 1
    return ids


def save_ids(ids: Tensor, size: tuple[int, int], path: Path) -> None:
    """Writes ids (h,w), resized to ``size`` (width, height), as a PNG with VOC's palette."""
    image = Image.fromarray(resized_ids(ids, size))
    image.putpalette(palette().tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def segmentation_record(prediction: Tensor, class_names: Sequence[str] | None) -> dict[str, Any]:
    """What predictions.json says of an image: ``classes``, the largest first, with their part of its pixels."""
    counts = torch.bincount(prediction.flatten().long())
    order = [i for i in counts.argsort(descending=True, stable=True).tolist() if counts[i]]
    shares = (counts.double() / max(1, prediction.numel())).tolist()
    return {"classes": [{"label": i, "class": class_name(i, class_names), "share": round(shares[i], 6)} for i in order]}
