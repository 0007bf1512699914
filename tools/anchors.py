"""Find anchors for YOLOv2: ``python -m tools.anchors --root VOCdevkit --image_size 416``.

Cluster the shapes of the training boxes (Redmon and Farhadi, "YOLO9000", CVPR 2017, section 2, "Dimension Clusters").
The last line of the output can be pasted into a config below ``model.init_args``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

from cli.command import command, names_or_file
from datamodules.detection.voc import VOCDetection
from datamodules.images import read_header
from errors import DatasetError, UserError
from lightning_modules.detection.yolo_v2 import STRIDE

RESTARTS = 5  # of k-means
MAX_ITERATIONS = 300  # k-means may cycle, since the mean of a cluster does not minimize the distance 1 - IoU


def shape_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the IoU of boxes with a common center, float64 (N, K), from sizes (N, 2) and (K, 2)."""
    intersection = np.minimum(a[:, None], b).prod(-1)
    return intersection / (a.prod(-1)[:, None] + b.prod(-1) - intersection)


def mean_iou(sizes: np.ndarray, anchors: np.ndarray) -> float:
    """Compute the mean IoU of each box with its best anchor (figure 2 of the paper)."""
    return float(shape_iou(sizes, anchors).max(1).mean())


def find_anchors(sizes: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """Cluster box sizes by k-means with the distance 1 - IoU; keep the best of 5 restarts.

    Args:
        sizes: widths and heights, float (N, 2), positive, with at least k different rows.
        k: number of anchors.
        seed: of the k-means++ initialization.

    Returns:
        Widths and heights, float64 (k, 2), sorted by area.

    Raises:
        UserError: k is out of range.
    """
    sizes = np.asarray(sizes, np.float64)
    different = len(np.unique(sizes, axis=0))
    if not 1 <= k <= different:
        raise UserError(f"k: expected 1 to {different}, the number of different shapes, found {k}")
    rng = np.random.default_rng(seed)
    results = [_cluster(sizes, k, rng) for _ in range(RESTARTS)]
    best = max(results, key=lambda anchors: mean_iou(sizes, anchors))
    return best[np.argsort(best.prod(1), kind="stable")]


def _cluster(sizes: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    anchors = sizes[rng.integers(len(sizes))][None]
    while len(anchors) < k:
        distance = 1 - shape_iou(sizes, anchors).max(1)
        anchors = np.concatenate([anchors, sizes[rng.choice(len(sizes), p=distance / distance.sum())][None]])
    nearest = np.full(len(sizes), -1)
    for _ in range(MAX_ITERATIONS):
        before, nearest = nearest, shape_iou(sizes, anchors).argmax(1)
        if (before == nearest).all():
            break
        counts = np.bincount(nearest, minlength=k)[:, None]
        sums = np.stack([np.bincount(nearest, side, minlength=k) for side in sizes.T], axis=1)
        anchors = np.where(counts > 0, sums / counts.clip(1), anchors)  # an empty cluster keeps its anchor
    return anchors


def training_sizes(data: VOCDetection, image_side: int) -> np.ndarray:
    """Compute the sizes of all objects that are trained on, in images that are warped to a square.

    Args:
        data: the dataset; its option ``train_difficult`` counts.
        image_side: side of the square in pixels.

    Returns:
        Widths and heights in grid cells, float64 (N, 2).

    Raises:
        BrokenImageError: an image cannot be read.
    """
    annotations = data.annotations("train")
    for i in np.flatnonzero(annotations.sizes[:, 0] == 0).tolist():
        read_header(os.path.join(data.devkit, annotations.images[i]))  # raises the reason
    heights_widths = np.repeat(annotations.sizes.astype(np.float64), np.diff(annotations.start), axis=0)
    boxes = annotations.boxes.astype(np.float64)
    sizes = (boxes[:, 2:] - boxes[:, :2]) / heights_widths[:, ::-1] * image_side / STRIDE
    return sizes[~annotations.difficult | data.train_difficult]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the anchors, and the mean IoU for 1 to 10 of them; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.anchors", description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True, help="the folder VOCdevkit or its parent")
    parser.add_argument("--train", nargs="+", default=["VOC2007/trainval", "VOC2012/trainval"], help="image sets")
    parser.add_argument("--classes", nargs="+", help="names in label order, or a file of them; default: VOC's")
    parser.add_argument("--image_size", type=int, default=416, help="side of the training images in pixels")
    parser.add_argument("--k", type=int, default=5, help="number of anchors")
    parser.add_argument("--seed", type=int, default=0, help="seed of k-means")
    options = parser.parse_args(arguments)
    if options.image_size < 1:
        raise UserError(f"image_size: expected at least 1, found {options.image_size}")
    # YOLOv2 does not train on difficult objects.
    data = VOCDetection(
        options.root, train=options.train, classes=names_or_file(options.classes), train_difficult=False
    )
    sizes = training_sizes(data, options.image_size)
    if not len(sizes):
        raise DatasetError(f"train: expected objects to cluster in {', '.join(options.train)}, found none")
    anchors = find_anchors(sizes, options.k, options.seed)
    print(f"{len(sizes)} boxes of {', '.join(options.train)}, in cells of {STRIDE} pixels at {options.image_size}")
    print("mean IoU of a box with its best anchor:")
    for k in range(1, 1 + min(10, len(np.unique(sizes, axis=0)))):
        print(f"  {k:2d} anchors  {mean_iou(sizes, find_anchors(sizes, k, options.seed)):.4f}")
    print(f"for model.init_args, mean IoU {mean_iou(sizes, anchors):.4f}:")
    print(f"    anchors: [{', '.join(f'[{w:.4g}, {h:.4g}]' for w, h in anchors)}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
