"""Average precision on a set as large as VOC 2007 test: ``python -m benchmarks.voc_map``.

Compare `VOCMeanAP` with torchmetrics' MeanAveragePrecision (backend faster_coco_eval, IoU 0.5 only) on the same
generated detections and one thread: seconds of all updates and ``compute``, and their ratio. The protocols differ (see
lightning_modules/components/average_precision.py), so the values differ slightly.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision

from benchmarks.timing import measure, paired_ratio
from cli.command import command, require_positive
from lightning_modules.components.average_precision import VOCMeanAP

CLASSES, BATCH_SIZE = 20, 32
Samples = list[dict[str, Tensor]]


def random_boxes(count: int) -> Tensor:
    """Draw boxes, float32 (count, 4), xyxy in pixels."""
    top_left, size = torch.rand(count, 2) * 300, 20 + torch.rand(count, 2) * 180
    return torch.cat([top_left, top_left + size], 1)


def draw(images: int, detections: int) -> tuple[Samples, Samples]:
    """Draw predictions, half of them near objects, and targets of 1 to 4 objects per image."""
    torch.manual_seed(0)
    preds, target = [], []
    for _ in range(images):
        objects = int(torch.randint(1, 5, ()))
        boxes, labels = random_boxes(objects), torch.randint(CLASSES, (objects,))
        target.append({"boxes": boxes, "labels": labels, "difficult": torch.rand(objects) < 0.1})
        matched = torch.randint(objects, (detections,))
        near = boxes[matched] + torch.randn(detections, 4) * 15
        is_random = torch.rand(detections) < 0.5
        preds.append(
            {
                "boxes": torch.where(is_random[:, None], random_boxes(detections), near),
                "scores": torch.rand(detections),
                "labels": torch.where(is_random, torch.randint(CLASSES, (detections,)), labels[matched]),
            }
        )
    return preds, target


def evaluate(metric: Metric, preds: Samples, target: Samples) -> None:
    """Update a metric in batches and compute it."""
    metric.reset()
    for i in range(0, len(preds), BATCH_SIZE):
        metric.update(preds[i : i + BATCH_SIZE], target[i : i + BATCH_SIZE])
    metric.compute()


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.voc_map", description=__doc__)
    parser.add_argument("--images", type=int, default=4952, help="number of images; default: %(default)s")
    parser.add_argument("--detections", type=int, default=60, help="detections per image; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of each metric; default: %(default)s")
    options = parser.parse_args(arguments)
    require_positive(options, "images", "detections", "repeats")
    torch.set_num_threads(1)
    preds, target = draw(options.images, options.detections)
    crowds = [{"boxes": t["boxes"], "labels": t["labels"], "iscrowd": t["difficult"].long()} for t in target]
    peer: Any = MeanAveragePrecision(backend="faster_coco_eval", iou_thresholds=[0.5])
    peer.warn_on_many_detections = False
    metrics: dict[str, tuple[Metric, Samples]] = {
        "VOCMeanAP": (VOCMeanAP(CLASSES), target),
        "torchmetrics": (peer, crowds),
    }
    functions = {name: partial(evaluate, metric, preds, gt) for name, (metric, gt) in metrics.items()}
    print(f"{options.images} images, {options.detections} detections per image, torch {torch.__version__}")
    seconds = measure(functions, options.repeats)
    for name, (metric, _) in metrics.items():
        print(f"  {name:14s} {statistics.median(seconds[name]):7.2f} s   mAP {float(metric.compute()['map']):.4f}")
    print(f"ratio {paired_ratio(seconds['torchmetrics'], seconds['VOCMeanAP']):.1f}: seconds, torchmetrics / VOCMeanAP")
    return 0


if __name__ == "__main__":
    sys.exit(main())
