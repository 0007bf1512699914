"""View of one person's joints: ``{"keypoints": float (K, 2), "scores": float (K,)}``.

Keypoints are in pixels of the input; the center of its first pixel is (0, 0). Networks with heatmaps add ``heatmaps``
float (S, K, h, w) of S stacks; cascades add ``stages`` float (S, K, 2), the keypoints after each stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from visualization.base import PredictionView, Scale, Size
from visualization.drawing import (
    GAP,
    INK,
    PAPER,
    class_name,
    font_size,
    load_font,
    resize_long_side,
    shorten,
    titled_panels,
    to_pil,
)
from visualization.samples import Sample

# The person's right and left, and joints on neither side.
RIGHT, LEFT, MIDDLE = (240, 105, 20), (30, 115, 235), (40, 165, 75)
HEATMAP_TILE = 96  # pixels, the longer side of one heatmap
STAGE_TILE = 192  # pixels, the longer side of one image in the figure of stages
MAX_STAGE_ROWS = 6


class PoseView(PredictionView):
    """The skeleton, beside it that of the ground truth (``keypoints``, ``labeled``) if it is known."""

    key = "keypoints"
    tile_size = 256

    def matches(self, prediction: Any) -> bool:
        return (
            isinstance(prediction, dict) and prediction.keys() >= {"keypoints", "scores"} and "boxes" not in prediction
        )

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        found = image.copy()
        keypoints = prediction["keypoints"]
        draw_skeleton(found, keypoints, torch.ones(len(keypoints), dtype=torch.bool), names, size)
        if "keypoints" not in ground_truth:
            return found
        true = image.copy()
        draw_skeleton(true, ground_truth["keypoints"], ground_truth["labeled"], names, size)
        return titled_panels([("prediction", found), ("ground truth", true)], font_size(min(image.size) / 20))

    def record(self, prediction: Any, names: Any, scale: Scale) -> dict[str, Any]:
        return {"keypoints": joint_records(prediction["keypoints"], prediction["scores"], names)}

    def columns(self, record: dict[str, Any]) -> list[str]:
        return ["joint", "x", "y", "score"]

    def rows(self, record: dict[str, Any]) -> list[list[Any]]:
        return [[item["joint"], *(repr(item[key]) for key in ("x", "y", "score"))] for item in record["keypoints"]]

    def annotate(self, image: Image.Image, prediction: Any, names: Any, size: Size, scale: Scale) -> Image.Image:
        """Draw keypoints that are in the pixels of the file (see `to_original`)."""
        return self.draw(image, prediction, {}, names, (round(size[0] * scale[0]), round(size[1] * scale[1])))

    def to_original(
        self, prediction: dict[str, Tensor], ground_truth: dict[str, Any], scale: Scale
    ) -> dict[str, Tensor]:
        """Apply the affine matrix ``to_original`` (2, 3) of the batch; without one, the input is the resized file."""
        keypoints = prediction["keypoints"].double()
        if "to_original" in ground_truth:
            matrix = ground_truth["to_original"].double()
            keypoints = keypoints @ matrix[:, :2].T + matrix[:, 2]
        else:
            keypoints = (keypoints + 0.5) * torch.tensor(scale, dtype=torch.float64) - 0.5
        return {**prediction, "keypoints": keypoints}

    def extra_figures(self, samples: Sequence[Sample], names: Sequence[str] | None) -> dict[str, Image.Image]:
        """Return ``heatmaps`` of the first sample and ``stages`` of all, if the prediction has them."""
        figures, first = {}, samples[0]
        if "heatmaps" in first.prediction:
            figures["heatmaps"] = draw_heatmaps(to_pil(first.image), first.prediction["heatmaps"], names)
        if "stages" in first.prediction:
            figures["stages"] = draw_stages(samples, names)
        return figures


# --- skeletons ----------------------------------------------------------------------------------------------------


def limbs(joint_names: Sequence[str]) -> list[tuple[int, int]]:
    """Return pairs of joints that a line connects; arms meet at the thorax (MPII) or else at the upper neck (LSP)."""
    names = list(joint_names)
    chest = "thorax" if "thorax" in names else "upper_neck"
    pairs = [("head_top", "upper_neck"), ("upper_neck", "thorax"), ("thorax", "pelvis")]
    for side in ("right", "left"):
        arm = [chest, *(f"{side}_{joint}" for joint in ("shoulder", "elbow", "wrist"))]
        hip = "pelvis" if "pelvis" in names else f"{side}_shoulder"
        leg = [hip, *(f"{side}_{joint}" for joint in ("hip", "knee", "ankle"))]
        pairs += [*pairwise(arm), *pairwise(leg)]
    return [(names.index(a), names.index(b)) for a, b in pairs if a in names and b in names]


def side_color(name: str) -> tuple[int, int, int]:
    """Return orange for the person's right side, blue for the left, green for neither."""
    return RIGHT if name.startswith("right_") else LEFT if name.startswith("left_") else MIDDLE


def draw_skeleton(
    image: Image.Image,
    keypoints: Tensor,
    visible: Tensor,
    joint_names: Sequence[str] | None,
    size: Size | None = None,
) -> None:
    """Draw a person's limbs and joints on the image, in place.

    Args:
        image: RGB, of any size.
        keypoints: float (K, 2) in the pixels of a tensor of ``size``.
        visible: bool (K,), the joints that are drawn; a limb is drawn if both its ends are.
        joint_names: K names; None draws no limbs.
        size: (width, height) of that tensor; None: those of ``image``.
    """
    names = [""] * len(keypoints) if joint_names is None else list(joint_names)
    width, height = size or image.size
    scale = torch.tensor([image.width / width, image.height / height])
    pixels = (keypoints.detach().cpu().float() + 0.5) * scale - 0.5
    # Pillow takes minutes for a joint far outside of the image.
    drawn = visible.cpu() & pixels.isfinite().all(1) & (pixels.abs() < 1e4).all(1)
    points = [tuple(point) for point in pixels.tolist()]
    draw = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 80))
    for a, b in limbs(names):
        if drawn[a] and drawn[b]:
            sided = next((name for name in (names[b], names[a]) if name.startswith(("right_", "left_"))), names[a])
            draw.line((points[a], points[b]), fill=side_color(sided), width=line)
    for name, (x, y), shown in zip(names, points, drawn.tolist(), strict=True):
        if shown:
            draw.ellipse((x - line, y - line, x + line, y + line), fill=side_color(name), outline=PAPER)


def joint_records(keypoints: Tensor, scores: Tensor, joint_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return ``{"joint", "x", "y", "score"}`` per joint of keypoints (K, 2) and scores (K,)."""
    return [
        {"joint": class_name(k, joint_names), "x": round(x, 3), "y": round(y, 3), "score": round(score, 6)}
        for k, ((x, y), score) in enumerate(zip(keypoints.tolist(), scores.tolist(), strict=True))
    ]


# --- heatmaps and stages ------------------------------------------------------------------------------------------


def draw_heatmaps(image: Image.Image, heatmaps: Tensor, joint_names: Sequence[str] | None) -> Image.Image:
    """Draw heatmaps over the gray image, a row per stack and a column per joint; values of 1 and more are red.

    Args:
        image: RGB, of any size.
        heatmaps: float (S, K, h, w).
        joint_names: K names; None for ``class <index>``.
    """
    from matplotlib import colormaps

    small = resize_long_side(image, HEATMAP_TILE)
    gray = np.asarray(small.convert("L"), np.float32)[..., None] * 0.8
    stacks, joints = heatmaps.shape[:2]
    resized = torch.nn.functional.interpolate(
        heatmaps.detach().cpu().float(), (small.height, small.width), mode="bilinear", align_corners=False
    ).clamp(0, 1)
    font, gap = load_font(11), 3
    head, margin = 18, 60
    canvas = Image.new("RGB", (margin + joints * (small.width + gap), head + stacks * (small.height + gap)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for s in range(stacks):
        top = head + s * (small.height + gap)
        draw.text((4, top + small.height / 2), f"stack {s + 1}", fill=INK, font=font, anchor="lm")
        for k in range(joints):
            heat = resized[s, k].numpy()
            alpha = 0.85 * np.sqrt(heat)[..., None]
            mixed = gray * (1 - alpha) + 255 * colormaps["turbo"](heat)[..., :3] * alpha
            left = margin + k * (small.width + gap)
            canvas.paste(Image.fromarray(np.rint(mixed).astype(np.uint8)), (left, top))
            if s == 0:
                name = shorten(class_name(k, joint_names).replace("_", " "), font, small.width)
                draw.text((left, head / 2), name, fill=INK, font=font, anchor="lm")
    return canvas


def draw_stages(samples: Sequence[Sample], joint_names: Sequence[str] | None) -> Image.Image:
    """Draw the keypoints after each stage and the ground truth if it is known, a row per person.

    Args:
        samples: at most the first six; predictions have ``stages`` float (S, K, 2).
        joint_names: K names; None draws no limbs.
    """
    samples = samples[:MAX_STAGE_ROWS]
    count = len(samples[0].prediction["stages"])
    titles = [f"stage {s + 1}" for s in range(count)] + ["ground truth"] * ("keypoints" in samples[0].ground_truth)
    head, step = 24, STAGE_TILE + GAP
    canvas = Image.new("RGB", (len(titles) * step, head + len(samples) * step), PAPER)
    draw, font = ImageDraw.Draw(canvas), load_font(13)
    for column, title in enumerate(titles):
        draw.text((column * step + 6, head / 2), title, fill=INK, font=font, anchor="lm")
    for row, sample in enumerate(samples):
        image, stages = to_pil(sample.image), sample.prediction["stages"]
        small = resize_long_side(image, STAGE_TILE)
        skeletons = [(keypoints, torch.ones(len(keypoints), dtype=torch.bool)) for keypoints in stages]
        if len(titles) > count:
            skeletons.append((sample.ground_truth["keypoints"], sample.ground_truth["labeled"]))
        for column, (keypoints, visible) in enumerate(skeletons):
            tile = small.copy()
            draw_skeleton(tile, keypoints, visible, joint_names, image.size)
            canvas.paste(tile, (column * step, head + row * step))
    return canvas
