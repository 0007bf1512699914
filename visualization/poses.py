"""People's joints on images and in files: skeletons and heatmaps, and where each joint was found.

The prediction of one person: ``keypoints`` float (K,2) in the pixels of the image, the middle of the first one (0, 0),
``scores`` float (K,) and, of a network with heatmaps, ``heatmaps`` float (S,K,h,w), of S stacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from visualization.detections import SHOWN
from visualization.drawing import INK, PAPER, class_name, load_font, shorten

# The person's own right and left, and what is on neither side.
RIGHT, LEFT, MIDDLE = (240, 105, 20), (30, 115, 235), (40, 165, 75)
HEATMAP_TILE = 96  # pixels, the longer side of one heatmap

KEYPOINT_COLUMNS = ["joint", "x", "y", "score"]


def is_pose(prediction: Any) -> bool:
    """Whether it is one person's joints, see the module; detections may have ``keypoints``, too."""
    return isinstance(prediction, dict) and {"keypoints", "scores"} <= prediction.keys() and "boxes" not in prediction


# --- skeletons ----------------------------------------------------------------------------------------------------


def limbs(joint_names: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of joints that a line connects, of those that there are; MPII's by the thorax, LSP's by the neck."""
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
    """Orange on the person's own right, blue on the left, else green."""
    return RIGHT if name.startswith("right_") else LEFT if name.startswith("left_") else MIDDLE


def draw_skeleton(
    picture: Image.Image,
    keypoints: Tensor,
    shown: Tensor,
    joint_names: Sequence[str] | None,
    size: tuple[int, int],
) -> None:
    """Draws a person's limbs and joints on the image itself.

    Args:
        image: RGB, of any size.
        keypoints: float (K,2) in the pixels of a tensor of ``size``.
        shown: bool (K,), the joints that are drawn; limbs are where both their ends are.
        joint_names: K names; None leaves the limbs out.
        size: (width, height) of that tensor.
    """
    names = [""] * len(keypoints) if joint_names is None else list(joint_names)
    scale = torch.tensor([picture.width / size[0], picture.height / size[1]])
    places = (keypoints.detach().cpu().float() + 0.5) * scale - 0.5
    # A joint far away would be drawn for minutes.
    drawn = shown.cpu() & places.isfinite().all(1) & (places.abs() < 1e4).all(1)
    points = [tuple(place) for place in places.tolist()]
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 80))
    for a, b in limbs(names):
        if drawn[a] and drawn[b]:
            sided = next((name for name in (names[b], names[a]) if name.startswith(("right_", "left_"))), names[a])
            draw.line((points[a], points[b]), fill=side_color(sided), width=line)
    radius = line
    for name, (x, y), visible in zip(names, points, drawn.tolist(), strict=True):
        if visible:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=side_color(name), outline=PAPER)


def draw_pose(
    picture: Image.Image,
    prediction: dict[str, Tensor],
    truth: dict[str, Any],
    joint_names: Sequence[str] | None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """The image with the joints that were found, beside it with the true ones, if known.

    Args:
        image: RGB, of any size.
        prediction: see the module.
        truth: ``keypoints`` float (K,2) and ``labeled`` bool (K,), or nothing.
        joint_names: K names.
        size: (width, height) of the tensor in whose pixels the joints are; None: the image's own.
    """
    size = size or picture.size
    found = picture.copy()
    draw_skeleton(found, prediction["keypoints"], torch.ones(len(prediction["keypoints"])).bool(), joint_names, size)
    if "keypoints" not in truth:
        return found
    true = picture.copy()
    draw_skeleton(true, truth["keypoints"], truth["labeled"], joint_names, size)
    gap, text = 4, max(11, min(28, round(min(picture.size) / 20)))
    font, row = load_font(text), round(1.6 * text)
    canvas = Image.new("RGB", (2 * picture.width + gap, picture.height + row), PAPER)
    draw = ImageDraw.Draw(canvas)
    for left, title, drawn in ((0, "found", found), (picture.width + gap, "truth", true)):
        canvas.paste(drawn, (left, row))
        draw.text((left + text // 2, row / 2), title, fill=INK, font=font, anchor="lm")
    return canvas


def draw_people(
    picture: Image.Image, prediction: dict[str, Tensor], joint_names: Sequence[str] | None, size: tuple[int, int]
) -> Image.Image:
    """The image with the joints of all detected people of a score of 0.3 or more.

    Args:
        image, joint_names, size: see `draw_pose`.
        prediction: ``keypoints`` float (N,K,2) and ``scores`` float (N,).
    """
    drawn = picture.copy()
    for keypoints, score in zip(prediction["keypoints"], prediction["scores"].tolist(), strict=True):
        if score >= SHOWN:
            draw_skeleton(drawn, keypoints, torch.ones(len(keypoints)).bool(), joint_names, size)
    return drawn


# --- heatmaps -----------------------------------------------------------------------------------------------------


def draw_heatmaps(picture: Image.Image, heatmaps: Tensor, joint_names: Sequence[str] | None) -> Image.Image:
    """A row a stack, a column a joint: the heatmap over the image, which is gray where it is low, red from 1 on.

    Args:
        image: RGB, of any size.
        heatmaps: float (S,K,h,w).
        joint_names: K names; None shows the numbers.
    """
    from matplotlib import colormaps

    scale = HEATMAP_TILE / max(picture.size)
    small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
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
            share = 0.85 * np.sqrt(heat)[..., None]
            mixed = gray * (1 - share) + 255 * colormaps["turbo"](heat)[..., :3] * share
            left = margin + k * (small.width + gap)
            canvas.paste(Image.fromarray(np.rint(mixed).astype(np.uint8)), (left, top))
            if s == 0:
                name = shorten(class_name(k, joint_names).replace("_", " "), font, small.width)
                draw.text((left, head / 2), name, fill=INK, font=font, anchor="lm")
    return canvas


# --- files --------------------------------------------------------------------------------------------------------


def in_file_pixels(prediction: dict[str, Tensor], to_original: Tensor) -> dict[str, Tensor]:
    """A person's joints in the pixels of the image on disk, by the matrix (2,3) of the batch contract."""
    matrix = to_original.double()
    places = prediction["keypoints"].double() @ matrix[:, :2].T + matrix[:, 2]
    return {**prediction, "keypoints": places}


def pose_record(prediction: dict[str, Tensor], joint_names: Sequence[str] | None) -> dict[str, Any]:
    """``keypoints``: a list of {``joint``, ``x``, ``y``, ``score``}."""
    rows = zip(prediction["keypoints"].tolist(), prediction["scores"].tolist(), strict=True)
    return {
        "keypoints": [
            {"joint": class_name(k, joint_names), "x": round(x, 3), "y": round(y, 3), "score": round(score, 6)}
            for k, ((x, y), score) in enumerate(rows)
        ]
    }


def add_joints(
    record: dict[str, Any],
    prediction: dict[str, Tensor],
    joint_names: Sequence[str] | None,
    scale: tuple[float, float],
) -> dict[str, Any]:
    """The record of detected people, each with its ``keypoints`` in the pixels of the image on disk.

    Args:
        record: ``detections``, in the order of the prediction.
        prediction: ``keypoints`` float (N,K,2) and ``keypoint_scores`` float (N,K).
        joint_names: K names.
        scale: what x and y are multiplied by to come to those pixels.
    """
    places = (prediction["keypoints"].double() + 0.5) * torch.tensor(scale, dtype=torch.float64) - 0.5
    for item, keypoints, scores in zip(record["detections"], places, prediction["keypoint_scores"], strict=True):
        item |= pose_record({"keypoints": keypoints, "scores": scores}, joint_names)
    return record


def pose_rows(record: dict[str, Any]) -> list[list[Any]]:
    """An image's rows of predictions.csv under `KEYPOINT_COLUMNS`, one a joint."""
    return [[item["joint"], *(repr(item[key]) for key in ("x", "y", "score"))] for item in record["keypoints"]]
