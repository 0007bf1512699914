"""Time of SSD's matching: the plain loop over objects against the batched form.

    python -m benchmarks.ssd_matching

Prints milliseconds per batch of both, and their ratio, for several numbers of objects per image.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

from lightning_modules.components.boxes import batched_box_iou
from lightning_modules.detection.ssd import VARIANTS, make_priors, match_objects
from lightning_modules.detection.ssd_matching import match_objects_batched


def milliseconds(function: Callable[[Tensor], Tensor], iou: Tensor) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    function(iou)
    return 1000 * (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ssd_matching", description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch; default: %(default)s")
    parser.add_argument("--objects", type=int, nargs="+", default=[4, 12, 40], help="objects per image")
    parser.add_argument("--repeat", type=int, default=5, help="paired runs, of which the median counts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    priors = box_convert(make_priors(VARIANTS["ssd300"]), "cxcywh", "xyxy")
    generator = torch.Generator().manual_seed(0)
    for objects in options.objects:
        corner = 200 * torch.rand(options.batch_size, objects, 2, generator=generator)
        size = 20 + 80 * torch.rand(options.batch_size, objects, 2, generator=generator)
        iou = batched_box_iou(torch.cat([corner, corner + size], 2), priors)
        match_objects(iou), match_objects_batched(iou)  # warm-up
        pairs = [
            (milliseconds(match_objects, iou), milliseconds(match_objects_batched, iou)) for _ in range(options.repeat)
        ]
        plain, batched = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{objects} objects: plain {plain:.1f} ms, batched {batched:.1f} ms, ratio {ratio:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
