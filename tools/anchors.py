"""Anchors for YOLOv2 from a dataset: ``python -m tools.anchors --root VOCdevkit --image_size 416``.

The boxes of a training set are clustered by their shape (Redmon and Farhadi 2017, section 2, "Dimension Clusters").
What is printed can be pasted into a config, below ``model.init_args``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

from datamodules.detection.voc import VOCDetection
from datamodules.images import image_size
from errors import BrokenImageError, DatasetError, UserError

STRIDE = 32  # pixels of a cell
RESTARTS = 5


def shape_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes with one center, (N,2) and (K,2) widths and heights: float64 (N,K)."""
    shared = np.minimum(a[:, None], b).prod(-1)
    return shared / (a.prod(-1)[:, None] + b.prod(-1) - shared)


def mean_iou(sizes: np.ndarray, anchors: np.ndarray) -> float:
    """The IoU of each box with its best anchor, on average: what figure 2 of the paper shows."""
    return float(shape_iou(sizes, anchors).max(1).mean())


def find_anchors(sizes: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """k-means with the distance 1 - IoU: float64 (k,2), by rising area. The best of five starts is taken.

    Args:
        sizes: float (N,2), widths and heights above 0, at least k different ones.
        k: number of anchors.
        seed: of the starts, boxes far from those that were drawn before (k-means++).
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
    # It may turn in a circle, since the mean is not what the distance asks for: an end is set.
    for _ in range(300):
        before, nearest = nearest, shape_iou(sizes, anchors).argmax(1)
        if (before == nearest).all():
            break
        counts = np.bincount(nearest, minlength=k)[:, None]
        sums = np.stack([np.bincount(nearest, side, minlength=k) for side in sizes.T], axis=1)
        # An anchor that nothing is nearest to stays where it is.
        anchors = np.where(counts > 0, sums / counts.clip(1), anchors)
    return anchors


def training_sizes(data: VOCDetection, side: int) -> np.ndarray:
    """Widths and heights in cells of all training objects, in images warped to a square: float64 (N,2).

    Args:
        data: the dataset.
        side: of the square in pixels.
    """
    annotations = data.annotations("train")
    names = annotations.images
    shapes = [image_size(os.path.join(data.devkit, names[i])) for i in range(len(names))]
    heights_widths = np.repeat(np.array(shapes, np.float64), np.diff(annotations.start), axis=0)
    boxes = annotations.boxes.astype(np.float64)
    return (boxes[:, 2:] - boxes[:, :2]) / heights_widths[:, ::-1] * side / STRIDE


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the anchors and what more or fewer of them would give; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.anchors", description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True, help="the folder VOCdevkit, or the one that it lies in")
    parser.add_argument("--train", nargs="+", default=["VOC2007/trainval", "VOC2012/trainval"], help="image sets")
    parser.add_argument("--classes", nargs="+", help="names in label order, or a file of them; default: VOC's")
    parser.add_argument("--image_size", type=int, default=416, help="side in pixels of the squares that are trained on")
    parser.add_argument("--k", type=int, default=5, help="number of anchors")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    classes = options.classes
    if classes is not None and len(classes) == 1 and os.path.isfile(classes[0]):
        classes = classes[0]
    try:
        if options.image_size < 1:
            raise UserError(f"image_size: expected 1 or more, found {options.image_size}")
        data = VOCDetection(options.root, train=options.train, classes=classes)
        sizes = training_sizes(data, options.image_size)
        if not len(sizes):
            raise DatasetError(f"{', '.join(options.train)}: there is no object to cluster")
        anchors = find_anchors(sizes, options.k, options.seed)
    except (BrokenImageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(sizes)} boxes of {', '.join(options.train)}, in cells of {STRIDE} pixels at {options.image_size}")
    print("mean IoU of a box with its best anchor:")
    for k in range(1, 1 + min(10, len(np.unique(sizes, axis=0)))):
        print(f"  {k:2d} anchors  {mean_iou(sizes, find_anchors(sizes, k, options.seed)):.4f}")
    print(f"for model.init_args, mean IoU {mean_iou(sizes, anchors):.4f}:")
    print(f"    anchors: [{', '.join(f'[{w:.4g}, {h:.4g}]' for w, h in anchors)}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
