"""Plain and batched matching of SSD's priors: ``python -m benchmarks.ssd_matching``.

Print the milliseconds per batch and their ratio for several numbers of objects per image.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torchvision.ops import box_convert

from benchmarks.timing import measure, paired_ratio
from cli.command import command, require_positive
from lightning_modules.components.boxes import batched_box_iou
from lightning_modules.detection.ssd import VARIANTS, make_priors, match_objects
from lightning_modules.detection.ssd_matching import match_objects_batched


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ssd_matching", description=__doc__)
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch; default: %(default)s")
    parser.add_argument(
        "--objects", type=int, nargs="+", default=[4, 12, 40], help="objects per image; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each way; default: %(default)s")
    options = parser.parse_args(arguments)
    require_positive(options, "batch_size", "objects", "repeats")
    torch.set_num_threads(1)
    priors = box_convert(make_priors(VARIANTS["ssd300"]), "cxcywh", "xyxy")
    generator = torch.Generator().manual_seed(0)
    for objects in options.objects:
        top_left = 200 * torch.rand(options.batch_size, objects, 2, generator=generator)
        size = 20 + 80 * torch.rand(options.batch_size, objects, 2, generator=generator)
        iou = batched_box_iou(torch.cat([top_left, top_left + size], 2), priors)
        functions = {"plain": partial(match_objects, iou), "batched": partial(match_objects_batched, iou)}
        seconds = measure(functions, options.repeats)
        plain, batched = (1e3 * statistics.median(values) for values in seconds.values())
        print(f"{objects} objects per image: plain {plain:.1f} ms, batched {batched:.1f} ms")
        ratio = paired_ratio(seconds["plain"], seconds["batched"])
        print(f"ratio {ratio:.2f}: seconds, plain / batched, {objects} objects")
    return 0


if __name__ == "__main__":
    sys.exit(main())
