"""One set of YOLOv2 weights at several image sizes: ``python -m benchmarks.yolo_v2_sizes --ckpt_path best.ckpt``.

Print one line per size: mean average precision on the validation images, and frames per second with one image at a
time: from the resized uint8 tensor on the device to the final boxes, and of the network alone. Beside them stand the
figures of the paper's table 3 (VOC 2007 test, Titan X), which are comparable only on the same data.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from datamodules.detection.voc import VOCDetection
from errors import BrokenImageError, DatasetError
from lightning_modules.components.average_precision import VOCMeanAP
from lightning_modules.detection.yolo_v2 import YOLOv2

#: Table 3 of the paper: mAP in per cent and frames a second.
PAPER = {288: (69.0, 91), 352: (73.7, 81), 416: (76.8, 67), 480: (77.8, 59), 544: (78.6, 40)}


def frames_a_second(
    function: Callable[[Tensor], object], images: Sequence[Tensor], warm_up: int, timed: int, device: torch.device
) -> float:
    """Measure frames per second on images (1, 3, H, W) on the device, one after the other."""

    def run(count: int) -> None:
        for i in range(count):
            function(images[i % len(images)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run(warm_up)
    start = time.perf_counter()
    run(timed)
    return timed / (time.perf_counter() - start)


def measure(
    module: YOLOv2, data: VOCDetection, warm_up: int, timed: int, device: torch.device
) -> tuple[float, float, float]:
    """Return mean average precision, frames per second to the final boxes, and of the network alone."""
    metric = VOCMeanAP(module.num_classes, module.ap_method).to(device)
    images: list[Tensor] = []
    for batch in data.val_dataloader():
        pictures = batch["image"].to(device)
        target = [{key: value.to(device) for key, value in entry.items()} for entry in batch["target"]]
        metric.update(module.predict(pictures), target)
        images += pictures[: max(0, 50 - len(images))].split(1)
    whole = frames_a_second(module.predict, images, warm_up, timed, device)
    forward = frames_a_second(lambda x: module.network(module.preprocess(x)), images, warm_up, timed, device)
    return float(metric.compute()["map"]), whole, forward


def rows(module: YOLOv2, options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Yield the lines of the table."""
    own = module.class_names if isinstance(module.class_names, list) else None
    for size in options.sizes:
        data = VOCDetection(
            getattr(options, "data.root"),
            train=getattr(options, "data.val"),
            val=getattr(options, "data.val"),
            classes=getattr(options, "data.classes") or own,
            image_size=size,
            batch_size=getattr(options, "data.batch_size"),
        )
        if len(data.class_names) != module.num_classes:
            raise DatasetError(f"classes: the checkpoint has {module.num_classes}, the data {len(data.class_names)}")
        result = measure(module, data, options.warm_up, options.timed, device)
        paper = f"{PAPER[size][0]:9.1f} {PAPER[size][1]:9d}" if size in PAPER else f"{'-':>9} {'-':>9}"
        yield f"{size:5d} {100 * result[0]:8.1f} {result[1]:8.1f} {result[2]:8.1f}   |{paper}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yolo_v2_sizes", description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint of YOLOv2")
    parser.add_argument("--data.root", required=True, help="the folder VOCdevkit, or its parent")
    parser.add_argument("--data.val", nargs="+", default=["VOC2007/test"], help="image sets; default: %(default)s")
    parser.add_argument("--data.classes", nargs="+", help="default: the checkpoint's")
    parser.add_argument("--data.batch_size", type=int, default=16, help="for the average precision")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(PAPER), help="multiples of 32")
    parser.add_argument("--warm_up", type=int, default=50, help="images before the timed ones")
    parser.add_argument("--timed", type=int, default=200, help="images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        module = YOLOv2.load_from_checkpoint(options.ckpt_path, map_location=device, weights_only=True).eval()
        module.to(memory_format=module.memory_format)  # type: ignore[call-overload]
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        print(f"{options.ckpt_path} on {', '.join(getattr(options, 'data.val'))}")
        print(f"{name}, float32, torch {torch.__version__}")
        print(f"{'':5} {'measured here':^26}   | paper, VOC07 test, Titan X")
        print(f"{'size':>5} {'mAP':>8} {'FPS':>8} {'forward':>8}   |{'mAP':>9} {'FPS':>9}")
        with torch.inference_mode():
            for line in rows(module, options, device):
                print(line, flush=True)
    except (BrokenImageError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
