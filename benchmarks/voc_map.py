"""Speed of average precision on a set as large as VOC 2007 test: ``python -m benchmarks.voc_map``.

4,952 images with 2.4 objects on average and 60 detections each, 20 classes, one thread. Compare `VOCMeanAP` with
torchmetrics' MeanAveragePrecision (backend faster_coco_eval, IoU 0.5 alone) in the same run: seconds of update and
compute together, and their ratio. The protocols differ (see lightning_modules/components/average_precision.py), so the
values differ slightly.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torchmetrics.detection import MeanAveragePrecision

from lightning_modules.components.average_precision import VOCMeanAP

IMAGES, DETECTIONS, CLASSES, BATCH = 4952, 60, 20, 32


def draw(images: int, detections: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw predictions, half of them near objects, and targets."""
    torch.manual_seed(0)
    preds, target = [], []
    for _ in range(images):
        objects = int(torch.randint(1, 5, ()))
        corner, size = torch.rand(objects, 2) * 300, 20 + torch.rand(objects, 2) * 180
        boxes, labels = torch.cat([corner, corner + size], 1), torch.randint(CLASSES, (objects,))
        target.append({"boxes": boxes, "labels": labels, "difficult": torch.rand(objects) < 0.1})
        of = torch.randint(objects, (detections,))
        near = boxes[of] + torch.randn(detections, 4) * 15
        corner, size = torch.rand(detections, 2) * 300, 20 + torch.rand(detections, 2) * 180
        odd = torch.rand(detections, 1) < 0.5
        found = torch.where(odd, torch.cat([corner, corner + size], 1), near)
        classes = torch.where(odd[:, 0], torch.randint(CLASSES, (detections,)), labels[of])
        preds.append({"boxes": found, "scores": torch.rand(detections), "labels": classes})
    return preds, target


def timed(metric: Any, preds: list[dict[str, Any]], target: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    """Return the seconds of all updates, in batches, and of compute."""
    start = time.perf_counter()
    for i in range(0, len(preds), BATCH):
        metric.update(preds[i : i + BATCH], target[i : i + BATCH])
    results = metric.compute()
    return time.perf_counter() - start, results


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--detections", type=int, default=DETECTIONS, help="detections per image")
    options = parser.parse_args()
    torch.set_num_threads(1)
    preds, target = draw(options.images, options.detections)
    print(f"{options.images} images x {options.detections} detections, {CLASSES} classes, torch {torch.__version__}")
    ours, results = timed(VOCMeanAP(CLASSES), preds, target)
    print(f"VOCMeanAP                        {ours:6.2f} s   mAP {float(results['map']):.4f}")
    peer = MeanAveragePrecision(backend="faster_coco_eval", iou_thresholds=[0.5])
    peer.warn_on_many_detections = False
    crowds = [{"boxes": t["boxes"], "labels": t["labels"], "iscrowd": t["difficult"].long()} for t in target]
    theirs, results = timed(peer, preds, crowds)
    print(f"torchmetrics, faster_coco_eval   {theirs:6.2f} s   mAP {float(results['map']):.4f}")
    print(f"ratio theirs / ours: {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
