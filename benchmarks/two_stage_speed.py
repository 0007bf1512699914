"""Seconds per image of R-CNN, Fast R-CNN and Faster R-CNN: ``python -m benchmarks.two_stage_speed --images FOLDER``.

The comparison of the lecture: R-CNN runs the network on every proposal, Fast R-CNN once per image, and Faster R-CNN
also computes the proposals from its own features. All have VGG-16, the same images and up to as many proposals, from
the uint8 image in memory to the final boxes. The table splits the time into proposals (Selective Search on the CPU, or
the region proposal network with its suppression), features (the convolutions; in R-CNN all layers that process a crop)
and heads, which is the rest. The weights are untrained, which changes the boxes but not their number. The lecture's
figures stand beside ours: another machine and other software.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from datamodules.box_transforms import BoxTransform
from datamodules.folders import list_images
from datamodules.image_dataset import ImageDataset
from errors import BrokenImageError, DatasetError
from lightning_modules.base import VisionModule
from lightning_modules.components.selective_search import selective_search
from lightning_modules.detection.fast_rcnn import FastRCNN
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.detection.rcnn import RCNN

#: Seconds an image in the lecture (Li, Karpathy and Johnson's table), with VGG16 on a K40; proposals included.
LECTURE = {"R-CNN": 50.0, "Fast R-CNN": 2.0, "Faster R-CNN": 0.2}
Row = dict[str, float]


class Clock:
    """Sum the seconds of calls by the part they belong to; synchronize the device before and after each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def call(self, part: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        start = self.now()
        result = function(*arguments, **named)
        self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start
        return result

    @contextmanager
    def watching(self, parts: Sequence[tuple[str, Any, str]]) -> Iterator[None]:
        """Add every call of ``owner.name`` to ``part``, for each (part, owner, name)."""
        with ExitStack() as stack:
            for part, owner, name in parts:
                function = getattr(owner, name)

                def timed(*arguments: Any, part: str = part, function: Any = function, **named: Any) -> Any:
                    return self.call(part, function, *arguments, **named)

                stack.enter_context(mock.patch.object(owner, name, timed))
            yield


def measure(
    module: VisionModule,
    pictures: Sequence[Tensor],
    parts: Sequence[tuple[str, Any, str]],
    top: int | None,
    warm_up: int,
) -> Row:
    """Return the seconds per image, in total and of each part.

    Args:
        module: ready on the device.
        images: uint8 (3,H,W) on the device.
        parts: see `Clock.watching`.
        top: Selective Search's boxes of an image, at most; None where the network has its own.
        warm_up: images before those that count.
    """
    clock = Clock(pictures[0].device)
    boxes = 0
    for i, picture in enumerate([*list(pictures[:1]) * warm_up, *pictures]):
        if i == warm_up:
            clock.seconds = {}
        with clock.watching(parts):
            if top is None:
                clock.call("all", module.predict, [picture])
                continue
            pixels = picture.permute(1, 2, 0).contiguous().cpu().numpy()
            proposals = torch.from_numpy(clock.call("proposals", selective_search, pixels, top)).to(picture.device)
            clock.call("all", module.predict, [picture], [proposals])  # type: ignore[call-arg]
            boxes += len(proposals) if i >= warm_up else 0
    row = {part: seconds / len(pictures) for part, seconds in clock.seconds.items()}
    if top is not None:
        row["all"] += row["proposals"]
        row["boxes"] = boxes / len(pictures)
    row["heads"] = row["all"] - row["proposals"] - row["features"]
    return row


def line(name: str, row: Row, first: Row) -> str:
    """Return a line of the table."""
    shares = "".join(f"{100 * row[part] / row['all']:10.1f}%" for part in ("proposals", "features", "heads"))
    lecture = f"{LECTURE[name]:10g} {LECTURE['R-CNN'] / LECTURE[name]:7g}" if name in LECTURE else f"{'-':>10} {'-':>7}"
    return f"{name:28s} {row['all']:9.3f} {first['all'] / row['all']:7.1f} {shares}   |{lecture}"


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Yield the lines of the table."""
    paths = list_images(options.images)[: options.timed]
    own, large = (ImageDataset(paths, BoxTransform(size).image_only) for size in ((500, 500), (600, 1000)))
    crops, pictures = ([dataset[i]["image"].to(device) for i in range(len(dataset))] for dataset in (own, large))

    def ready(module: Any) -> Any:
        return module.eval().to(device=device, memory_format=module.memory_format)

    rcnn = ready(
        RCNN(
            backbone="vgg16",
            width_multiplier=options.width_multiplier,
            crop_size=224,
            crop_batch_size=options.crop_batch_size,
            num_classes=20,
        )
    )
    # As after the last stage, with SVM scores and regressed boxes.
    rcnn.finished_stages = 3
    with mock.patch.object(rcnn, "whitening", return_value=_identity(20, device)):
        first = measure(rcnn, crops, [("features", rcnn.network, "forward")], options.proposals, options.warm_up)
    yield line("R-CNN", first, first)
    del rcnn
    fast = ready(FastRCNN(width_multiplier=options.width_multiplier, num_classes=20))
    row = measure(fast, pictures, [("features", fast.network.trunk, "forward")], options.proposals, options.warm_up)
    yield line("Fast R-CNN", row, first)
    without = {**row, "all": row["all"] - row["proposals"], "proposals": 0.0}
    yield line("  its proposals not counted", without, first)
    del fast
    faster = ready(FasterRCNN(width_multiplier=options.width_multiplier, num_classes=20))
    parts = [
        ("features", faster.network.trunk, "forward"),
        ("proposals", faster.network.rpn, "forward"),
        ("proposals", faster, "propose"),
    ]
    yield line("Faster R-CNN", measure(faster, pictures, parts, None, options.warm_up), first)
    yield f"Selective Search: {first['boxes']:.0f} boxes an image for R-CNN, {row['boxes']:.0f} for Fast R-CNN"


def _identity(num_classes: int, device: torch.device) -> Any:
    eye = torch.eye(4, device=device).expand(num_classes, 4, 4)
    return torch.zeros(num_classes, 4, device=device), eye, eye


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_stage_speed", description=__doc__.split("\n")[0])
    parser.add_argument("--images", required=True, help="a folder of images")
    parser.add_argument("--timed", type=int, default=50 if cuda else 2, help="images; default: %(default)s")
    parser.add_argument("--warm_up", type=int, default=5 if cuda else 0, help="untimed runs; default: %(default)s")
    parser.add_argument(
        "--proposals", type=int, default=2000, help="proposals of Selective Search per image; default: %(default)s"
    )
    parser.add_argument(
        "--width_multiplier", type=float, default=1.0, help="factor of the channels; default: %(default)s"
    )
    parser.add_argument(
        "--crop_batch_size", type=int, default=128, help="crops per batch of R-CNN; default: %(default)s"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 by autocast")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    width = f"width multiplier {options.width_multiplier:g}"
    print(f"{machine}, {options.dtype}, {width}, torch {torch.__version__}, {options.timed} images")
    print(f"{'':28s} {'measured here':^50}   | lecture, K40")
    columns = f"{'seconds':>9} {'speed':>7} {'proposals':>11}{'features':>11}{'heads':>11}"
    print(f"{'':28s} {columns}   |{'seconds':>10} {'speed':>7}")
    torch.manual_seed(0)
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"),
        ):
            for text in rows(options, device):
                print(text, flush=True)
    except (BrokenImageError, DatasetError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
