"""Selective Search here and in OpenCV's contrib modules: ``python -m benchmarks.selective_search --data.root DIR``.

Print, on the same images, the recall at an IoU of 0.5 (difficult objects are ignored), and the seconds per image on one
core: the median, and the median of the ratios. OpenCV runs its "fast" mode (k = 150, 300, 450), and R-CNN's k = 50 and
100 with its minimum sizes, which are ours. All images are resized to a width of 500 px. The runs alternate, so that
disturbances affect all of them.

The peer is in a wheel that cannot be installed beside this project's OpenCV. Install it elsewhere and put it first::

    python -m pip install --no-deps --target CONTRIB 'opencv-contrib-python-headless<5'
    PYTHONPATH=CONTRIB python -m benchmarks.selective_search --data.root VOCdevkit
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch

from datamodules.detection.voc import VOCDetection
from datamodules.images import read_image
from datamodules.proposals import overlaps_any
from errors import BrokenImageError
from lightning_modules.components.selective_search import MIN_BOX_SIDE, SCALES, SIGMA, resize_to_width, selective_search

HINT = (
    "no cv2.ximgproc here, so that there is nothing to compare with: python -m pip install --no-deps --target CONTRIB "
    "'opencv-contrib-python-headless<5', then PYTHONPATH=CONTRIB python -m benchmarks.selective_search ..."
)


def opencv(image: np.ndarray, as_rcnn: bool) -> np.ndarray:
    """Return OpenCV's boxes of an image, uint8 (H, W, 3) RGB: float32 (N, 4), xyxy in pixels, best first.

    Args:
        image: the image.
        as_rcnn: k, the segments' and the boxes' least sizes are R-CNN's; else its own "fast".
    """
    parts = cv2.ximgproc.segmentation  # type: ignore[attr-defined]
    small = cv2.cvtColor(resize_to_width(image), cv2.COLOR_RGB2BGR)
    search = parts.createSelectiveSearchSegmentation()
    search.setBaseImage(small)
    search.switchToSelectiveSearchFast()
    if as_rcnn:
        search.clearGraphSegmentations()
        for k in SCALES:
            search.addGraphSegmentation(parts.createGraphSegmentation(SIGMA, float(k), k))
    boxes = search.process().astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    if as_rcnn:
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(1)]
    scale = np.array([image.shape[1] / small.shape[1], image.shape[0] / small.shape[0]] * 2, np.float32)
    return boxes * scale


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selective_search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data.root", required=True, help="the folder VOCdevkit, or its parent")
    parser.add_argument("--data.val", nargs="+", default=["VOC2007/val"], help="image sets; default: %(default)s")
    parser.add_argument("--data.classes", nargs="+", help="default: VOC's")
    parser.add_argument("--top", type=int, default=2000, help="boxes per image; default: %(default)s")
    parser.add_argument("--images", type=int, help="number of images; default: all")
    options = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    methods: dict[str, Callable[[np.ndarray], np.ndarray]] = {"ours": selective_search}
    if hasattr(cv2, "ximgproc"):
        methods["OpenCV, R-CNN's k"] = lambda image: opencv(image, as_rcnn=True)
        methods["OpenCV, fast"] = lambda image: opencv(image, as_rcnn=False)
    found: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    boxes: dict[str, list[int]] = {name: [] for name in methods}
    try:
        data = VOCDetection(
            getattr(options, "data.root"),
            train=getattr(options, "data.val"),
            classes=getattr(options, "data.classes"),
        )
        annotations = data.annotations("train")
        for i in range(len(annotations.images))[: options.images]:
            objects = np.arange(annotations.start[i], annotations.start[i + 1])
            objects = objects[~annotations.difficult[objects]]
            image = read_image(os.path.join(data.devkit, annotations.images[i]))
            for name, method in methods.items():
                # Of this process alone: what else runs on the machine does not count.
                start = time.process_time()
                result = method(image)
                seconds[name].append(time.process_time() - start)
                boxes[name].append(len(result))
                found[name].append(overlaps_any(annotations.boxes[objects], result[: options.top]))
    except (BrokenImageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    objects_in_all = sum(map(len, found["ours"]))
    print(f"{len(seconds['ours'])} images, {objects_in_all} objects, up to {options.top} boxes an image, one core")
    print(f"{'':20} {'boxes':>7} {'recall':>8} {'seconds':>8}")
    for name in methods:
        recall = 100 * np.concatenate(found[name]).mean()
        print(f"{name:20} {np.mean(boxes[name]):7.0f} {recall:8.2f} {np.median(seconds[name]):8.3f}")
    for name in [name for name in methods if name != "ours"]:
        ratio = np.median(np.array(seconds["ours"]) / np.array(seconds[name]))
        print(f"ratio {ratio:.2f}: seconds, ours against {name}")
    if len(methods) == 1:
        print(HINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
