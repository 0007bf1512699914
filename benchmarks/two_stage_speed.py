"""Seconds per image of R-CNN, Fast R-CNN and Faster R-CNN: ``python -m benchmarks.two_stage_speed --images FOLDER``.

The lecture's comparison: R-CNN runs the network on every proposal, Fast R-CNN once per image, and Faster R-CNN also
computes the proposals from its own features. All have VGG-16, the same images and up to the same number of proposals,
from the uint8 image in memory to the final boxes. The table splits the time into:

- proposals: Selective Search on the CPU, or the region proposal network with its non-maximum suppression;
- features: the convolutions; in R-CNN all layers that process a crop;
- heads: the rest.

The weights are untrained, which changes the boxes but not their number. The lecture's figures are those of another
machine and other software.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.timing import describe_device, find_device, now
from cli.command import command, require_positive
from datamodules.box_transforms import BoxTransform
from datamodules.folders import list_images
from datamodules.image_dataset import ImageDataset
from lightning_modules.base import VisionModule
from lightning_modules.components.selective_search import selective_search
from lightning_modules.detection.fast_rcnn import FastRCNN
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.detection.rcnn import RCNN

#: Seconds per image with VGG-16 on a K40, proposals included (Li, Karpathy and Johnson's table).
LECTURE = {"R-CNN": 50.0, "Fast R-CNN": 2.0, "Faster R-CNN": 0.2}
NUM_CLASSES = 20
Row = dict[str, float]


class PartTimer:
    """Sum the seconds of calls by the part that they belong to; synchronize the device before and after each.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def call(self, part: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a function and add its time to a part."""
        start = now(self.device)
        result = function(*arguments, **named)
        self.seconds[part] = self.seconds.get(part, 0.0) + now(self.device) - start
        return result

    @contextmanager
    def watch(self, methods: Sequence[tuple[str, Any, str]]) -> Iterator[None]:
        """Add every call of ``owner.name`` to ``part``, for each (part, owner, name)."""
        with ExitStack() as stack:
            for part, owner, name in methods:
                function = getattr(owner, name)

                def timed(*arguments: Any, part: str = part, function: Any = function, **named: Any) -> Any:
                    return self.call(part, function, *arguments, **named)

                stack.enter_context(mock.patch.object(owner, name, timed))
            yield


def measure_parts(
    module: VisionModule,
    images: Sequence[Tensor],
    methods: Sequence[tuple[str, Any, str]],
    top_n: int | None,
    warm_up: int,
) -> Row:
    """Return the seconds per image, in total and of each part.

    Args:
        module: the system, on the device.
        images: uint8 (3, H, W) on the device.
        methods: see `PartTimer.watch`.
        top_n: maximum number of Selective Search's boxes per image; None for a system that computes its proposals.
        warm_up: untimed images before the others.
    """
    timer = PartTimer(images[0].device)
    boxes = 0
    for i, image in enumerate([*list(images[:1]) * warm_up, *images]):
        if i == warm_up:
            timer.seconds = {}
        with timer.watch(methods):
            if top_n is None:
                timer.call("all", module.predict, [image])
                continue
            pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
            proposals = torch.from_numpy(timer.call("proposals", selective_search, pixels, top_n)).to(image.device)
            timer.call("all", module.predict, [image], [proposals])  # type: ignore[call-arg]
            boxes += len(proposals) if i >= warm_up else 0
    row = {part: seconds / len(images) for part, seconds in timer.seconds.items()}
    if top_n is not None:
        row["all"] += row["proposals"]
        row["boxes"] = boxes / len(images)
    row["heads"] = row["all"] - row["proposals"] - row["features"]
    return row


def format_row(name: str, row: Row, rcnn: Row) -> str:
    """Format a row of the table; speeds are relative to R-CNN."""
    percentages = "".join(f"{100 * row[part] / row['all']:10.1f}%" for part in ("proposals", "features", "heads"))
    lecture = f"{LECTURE[name]:10g} {LECTURE['R-CNN'] / LECTURE[name]:7g}" if name in LECTURE else f"{'-':>10} {'-':>7}"
    return f"{name:28s} {row['all']:9.3f} {rcnn['all'] / row['all']:7.1f} {percentages}   |{lecture}"


def prepare(module: Any, device: torch.device) -> Any:
    """Move a system to the device for evaluation."""
    return module.eval().to(device=device, memory_format=module.memory_format)


def measure_rcnn(images: Sequence[Tensor], options: argparse.Namespace, device: torch.device) -> Row:
    """Measure R-CNN as after its last stage, with SVM scores and regressed boxes."""
    module = prepare(
        RCNN(
            backbone="vgg16",
            width_multiplier=options.width_multiplier,
            crop_size=224,
            crop_batch_size=options.crop_batch_size,
            num_classes=NUM_CLASSES,
        ),
        device,
    )
    module.finished_stages = 3
    identity = torch.eye(4, device=device).expand(NUM_CLASSES, 4, 4)
    whitening = torch.zeros(NUM_CLASSES, 4, device=device), identity, identity
    methods = [("features", module.network, "forward")]
    with mock.patch.object(module, "whitening", return_value=whitening):
        return measure_parts(module, images, methods, options.proposals, options.warm_up)


def measure_fast_rcnn(images: Sequence[Tensor], options: argparse.Namespace, device: torch.device) -> Row:
    """Measure Fast R-CNN with Selective Search."""
    module = prepare(FastRCNN(width_multiplier=options.width_multiplier, num_classes=NUM_CLASSES), device)
    methods = [("features", module.network.trunk, "forward")]
    return measure_parts(module, images, methods, options.proposals, options.warm_up)


def measure_faster_rcnn(images: Sequence[Tensor], options: argparse.Namespace, device: torch.device) -> Row:
    """Measure Faster R-CNN."""
    module = prepare(FasterRCNN(width_multiplier=options.width_multiplier, num_classes=NUM_CLASSES), device)
    methods = [
        ("features", module.network.trunk, "forward"),
        ("proposals", module.network.rpn, "forward"),
        ("proposals", module, "propose"),
    ]
    return measure_parts(module, images, methods, None, options.warm_up)


def measure_all(options: argparse.Namespace, device: torch.device) -> None:
    """Print the rows of the table, and the ratios."""
    paths = list_images(options.images)[: options.timed]
    for_rcnn, for_others = (
        [dataset[i]["image"].to(device) for i in range(len(dataset))]
        for dataset in (ImageDataset(paths, BoxTransform(size).image_only) for size in ((500, 500), (600, 1000)))
    )
    rows = {"R-CNN": measure_rcnn(for_rcnn, options, device)}
    print(format_row("R-CNN", rows["R-CNN"], rows["R-CNN"]), flush=True)
    rows["Fast R-CNN"] = fast = measure_fast_rcnn(for_others, options, device)
    rows["  without proposals"] = {**fast, "all": fast["all"] - fast["proposals"], "proposals": 0.0}
    for name in ("Fast R-CNN", "  without proposals"):
        print(format_row(name, rows[name], rows["R-CNN"]), flush=True)
    rows["Faster R-CNN"] = measure_faster_rcnn(for_others, options, device)
    print(format_row("Faster R-CNN", rows["Faster R-CNN"], rows["R-CNN"]))
    print(
        f"Selective Search: {rows['R-CNN']['boxes']:.0f} boxes per image for R-CNN, {fast['boxes']:.0f} for Fast R-CNN"
    )
    for slow, faster in (("R-CNN", "Fast R-CNN"), ("Fast R-CNN", "Faster R-CNN"), ("R-CNN", "Faster R-CNN")):
        print(f"ratio {rows[slow]['all'] / rows[faster]['all']:.1f}: seconds per image, {slow} / {faster}")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.two_stage_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--timed", type=int, default=50 if cuda else 2, help="timed images; default: %(default)s")
    parser.add_argument("--warm_up", type=int, default=5 if cuda else 0, help="untimed images; default: %(default)s")
    parser.add_argument(
        "--proposals", type=int, default=2000, help="proposals of Selective Search per image; default: %(default)s"
    )
    parser.add_argument("--width_multiplier", type=float, default=1.0, help="scales channels; default: %(default)s")
    parser.add_argument(
        "--crop_batch_size", type=int, default=128, help="crops per batch of R-CNN; default: %(default)s"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 by autocast")
    options = parser.parse_args(arguments)
    require_positive(options, "timed", "proposals", "crop_batch_size")
    device = find_device(options.device)
    print(
        f"{describe_device(device)}, {options.dtype}, width multiplier {options.width_multiplier:g}, "
        f"{options.timed} images"
    )
    print(f"{'':28s} {'measured here':^50}   | lecture, K40")
    columns = f"{'seconds':>9} {'speed':>7} {'proposals':>11}{'features':>11}{'heads':>11}"
    print(f"{'':28s} {columns}   |{'seconds':>10} {'speed':>7}")
    torch.manual_seed(0)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        measure_all(options, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
