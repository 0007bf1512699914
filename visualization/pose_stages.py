"""What each stage of a cascade found of people's joints, side by side.

The prediction of one person, see `visualization.poses`, has ``stages`` float (S,K,2), in the pixels of the image, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from visualization.drawing import INK, PAPER, load_font
from visualization.poses import draw_skeleton

TILE = 192  # pixels, the longer side of one image
PEOPLE = 6  # rows at most
GAP, HEAD = 4, 24


def draw_stages(
    samples: Sequence[tuple[Image.Image, Tensor, dict[str, Any]]], joint_names: Sequence[str] | None
) -> Image.Image:
    """A row a person: what each stage found, one a column, and the truth, if known.

    Args:
        samples: image RGB, stages float (S,K,2) in its pixels, and ``keypoints`` (K,2) and ``labeled`` (K,) or
            nothing.
        joint_names: K names; None leaves the limbs out.
    """
    samples = samples[:PEOPLE]
    count = len(samples[0][1])
    titles = [f"stage {s + 1}" for s in range(count)] + ["truth"] * ("keypoints" in samples[0][2])
    canvas = Image.new("RGB", (len(titles) * (TILE + GAP), HEAD + len(samples) * (TILE + GAP)), PAPER)
    draw, font = ImageDraw.Draw(canvas), load_font(13)
    for column, title in enumerate(titles):
        draw.text((column * (TILE + GAP) + 6, HEAD / 2), title, fill=INK, font=font, anchor="lm")
    for row, (picture, stages, truth) in enumerate(samples):
        scale = TILE / max(picture.size)
        small = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
        everything = torch.ones(stages.shape[1], dtype=torch.bool)
        shown = [(points, everything) for points in stages]
        if len(titles) > count:
            shown.append((truth["keypoints"], truth["labeled"]))
        for column, (points, which) in enumerate(shown):
            tile = small.copy()
            draw_skeleton(tile, points, which, joint_names, picture.size)
            canvas.paste(tile, (column * (TILE + GAP), HEAD + row * (TILE + GAP)))
    return canvas
