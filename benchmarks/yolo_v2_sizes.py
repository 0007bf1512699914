"""One set of YOLOv2 weights at several image sizes: ``python -m benchmarks.yolo_v2_sizes --ckpt_path best.ckpt``.

Print one row per size: mAP on the validation images, and frames per second with one image at a time, from the resized
uint8 tensor on the device to the final boxes, and of the network alone. The ratios compare the speed with that of the
largest size. The figures of the paper's table 3 (VOC 2007 test, Titan X) are comparable only on the same data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.checkpoints import load_system
from benchmarks.timing import describe_device, find_device, frames_per_second
from cli.command import command, require_positive
from datamodules.detection.voc import VOCDetection
from errors import DatasetError
from lightning_modules.components.average_precision import VOCMeanAP
from lightning_modules.detection.yolo_v2 import YOLOv2

MAX_IMAGES = 50  # whose speed is measured
#: Table 3 of the paper: mAP in percent and frames per second by size.
PAPER = {288: (69.0, 91), 352: (73.7, 81), 416: (76.8, 67), 480: (77.8, 59), 544: (78.6, 40)}


class Row(NamedTuple):
    """mAP in 0..1, and frames per second to the final boxes and of the network alone."""

    mean_ap: float
    to_boxes: float
    network: float


def measure_size(module: YOLOv2, data: VOCDetection, options: argparse.Namespace, device: torch.device) -> Row:
    """Evaluate the validation images, and measure the speed on the first of them."""
    metric = VOCMeanAP(module.num_classes, module.ap_method).to(device)
    images: list[Tensor] = []
    for batch in data.val_dataloader():
        image = batch["image"].to(device)
        target = [{key: value.to(device) for key, value in entry.items()} for entry in batch["target"]]
        metric.update(module.predict(image), target)
        images += image[: MAX_IMAGES - len(images)].split(1) if len(images) < MAX_IMAGES else []
    to_boxes, network = (
        frames_per_second(function, images, options.warm_up, options.timed)
        for function in (module.predict, lambda x: module.network(module.preprocess(x)))
    )
    return Row(float(metric.compute()["map"]), to_boxes, network)


def load_data(module: YOLOv2, size: int, options: argparse.Namespace) -> VOCDetection:
    """Return the images at a size.

    Raises:
        DatasetError: the checkpoint has another number of classes.
    """
    data = VOCDetection(
        getattr(options, "data.root"),
        train=getattr(options, "data.val"),
        val=getattr(options, "data.val"),
        classes=getattr(options, "data.classes")
        or (module.class_names if isinstance(module.class_names, list) else None),
        image_size=size,
        batch_size=getattr(options, "data.batch_size"),
    )
    if len(data.class_names) != module.num_classes:
        raise DatasetError(
            f"data.classes: expected the checkpoint's {module.num_classes} classes, found {len(data.class_names)}"
        )
    return data


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yolo_v2_sizes", description=__doc__)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of YOLOv2")
    parser.add_argument("--data.root", required=True, help="the folder VOCdevkit or its parent")
    parser.add_argument("--data.val", nargs="+", default=["VOC2007/test"], help="image sets; default: %(default)s")
    parser.add_argument("--data.classes", nargs="+", help="default: the checkpoint's")
    parser.add_argument("--data.batch_size", type=int, default=16, help="for the mAP; default: %(default)s")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=list(PAPER), help="multiples of 32 pixels; default: %(default)s"
    )
    parser.add_argument("--warm_up", type=int, default=50, help="untimed images; default: %(default)s")
    parser.add_argument("--timed", type=int, default=200, help="timed images; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    require_positive(options, "sizes", "timed")
    device = find_device(options.device)
    module, _ = load_system(options.ckpt_path, (YOLOv2,), device)
    print(f"{options.ckpt_path} on {', '.join(getattr(options, 'data.val'))}")
    print(f"{describe_device(device)}, float32")
    print(f"{'':5} {'measured here':^26}   | paper, VOC07 test, Titan X")
    print(f"{'size':>5} {'mAP':>8} {'FPS':>8} {'network':>8}   |{'mAP':>9} {'FPS':>9}")
    speeds: dict[int, float] = {}
    with torch.inference_mode():
        for size in options.sizes:
            row = measure_size(module, load_data(module, size, options), options, device)
            paper = f"{PAPER[size][0]:9.1f} {PAPER[size][1]:9d}" if size in PAPER else f"{'-':>9} {'-':>9}"
            print(f"{size:5d} {100 * row.mean_ap:8.1f} {row.to_boxes:8.1f} {row.network:8.1f}   |{paper}", flush=True)
            speeds[size] = row.to_boxes
    largest = max(speeds)
    for size in speeds:
        if size != largest:
            print(f"ratio {speeds[size] / speeds[largest]:.2f}: frames per second, {size} / {largest} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
