"""Selective Search against OpenCV's: ``python -m benchmarks.selective_search --data.root VOCdevkit``.

Print, on the same images, the recall at an IoU of 0.5 (difficult objects are ignored), the median seconds per image on
one core, and the ratios. OpenCV runs its "fast" mode (k = 150, 300, 450), and R-CNN's k = 50 and 100 with its minimum
sizes, which are ours. All resize the image to a width of 500 px. The runs alternate, so that other work on the machine
affects all of them; only process time counts.

The peer is in a wheel that conflicts with this project's OpenCV. Install it elsewhere and put it first::

    python -m pip install --no-deps --target CONTRIB 'opencv-contrib-python-headless<5'
    PYTHONPATH=CONTRIB python -m benchmarks.selective_search --data.root VOCdevkit
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
import torch

from benchmarks.timing import paired_ratio, timed
from cli.command import command, require_positive
from datamodules.detection.voc import VOCDetection
from datamodules.images import read_image
from datamodules.proposals import overlaps_any
from lightning_modules.components.selective_search import MIN_BOX_SIDE, SCALES, SIGMA, resize_to_width, selective_search

NO_PEER = "no ratio: this OpenCV has no cv2.ximgproc; --help shows how to install the peer"


def opencv_search(image: np.ndarray, rcnn_parameters: bool) -> np.ndarray:
    """Return OpenCV's boxes, float32 (N, 4), xyxy in pixels, best first.

    Args:
        image: uint8 (H, W, 3), RGB.
        rcnn_parameters: use R-CNN's k and minimum sizes of segments and boxes; otherwise OpenCV's "fast" mode.
    """
    segmentation = cv2.ximgproc.segmentation  # type: ignore[attr-defined]
    resized = cv2.cvtColor(resize_to_width(image), cv2.COLOR_RGB2BGR)
    search = segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(resized)
    search.switchToSelectiveSearchFast()
    if rcnn_parameters:
        search.clearGraphSegmentations()
        for k in SCALES:
            search.addGraphSegmentation(segmentation.createGraphSegmentation(SIGMA, float(k), k))
    boxes = search.process().astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    if rcnn_parameters:
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(1)]
    scale = np.array([image.shape[1] / resized.shape[1], image.shape[0] / resized.shape[0]] * 2, np.float32)
    return boxes * scale


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selective_search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data.root", required=True, help="the folder VOCdevkit or its parent")
    parser.add_argument("--data.val", nargs="+", default=["VOC2007/val"], help="image sets; default: %(default)s")
    parser.add_argument("--data.classes", nargs="+", help="default: VOC's")
    parser.add_argument("--top_n", type=int, default=2000, help="maximum boxes per image; default: %(default)s")
    parser.add_argument("--images", type=int, help="number of images; default: all")
    options = parser.parse_args(arguments)
    require_positive(options, "top_n", "images")
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    methods: dict[str, Callable[[np.ndarray], np.ndarray]] = {"ours": selective_search}
    if hasattr(cv2, "ximgproc"):
        methods["OpenCV, R-CNN's parameters"] = partial(opencv_search, rcnn_parameters=True)
        methods["OpenCV, fast"] = partial(opencv_search, rcnn_parameters=False)
    found: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    counts: dict[str, list[int]] = {name: [] for name in methods}
    data = VOCDetection(
        getattr(options, "data.root"), train=getattr(options, "data.val"), classes=getattr(options, "data.classes")
    )
    annotations = data.annotations("train")
    for i in range(len(annotations.images))[: options.images]:
        objects = np.arange(annotations.start[i], annotations.start[i + 1])
        objects = objects[~annotations.difficult[objects]]
        path, annotated_size = os.path.join(data.devkit, annotations.images[i]), annotations.annotated_size(i)
        image = read_image(path, annotated_size=annotated_size)
        for name, method in methods.items():
            elapsed, boxes = timed(partial(method, image), time.process_time)
            seconds[name].append(elapsed)
            counts[name].append(len(boxes))
            found[name].append(overlaps_any(annotations.boxes[objects], boxes[: options.top_n]))
    total = sum(map(len, found["ours"]))
    print(f"{len(seconds['ours'])} images, {total} objects, up to {options.top_n} boxes per image, one core")
    print(f"{'':28} {'boxes':>7} {'recall':>8} {'seconds':>8}")
    for name in methods:
        recall = 100 * np.concatenate(found[name]).mean()
        print(f"{name:28} {np.mean(counts[name]):7.0f} {recall:8.2f} {np.median(seconds[name]):8.3f}")
    for name in list(methods)[1:]:
        print(f"ratio {paired_ratio(seconds['ours'], seconds[name]):.2f}: seconds, ours / {name}")
    if len(methods) == 1:
        print(NO_PEER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
