"""Separate and dense inference of the patch classifier: ``python -m benchmarks.patch_classifier``.

The plain way classifies separate patches in batches of 64, so that the ratio does not measure the overhead of calls.
The dense way computes one pass over the image. Both agree up to rounding, which the benchmark checks. The results of
VGG-16 differ, because of its zero padding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.timing import measure, paired_ratio
from cli.command import command, require_positive
from errors import UserError
from lightning_modules.segmentation.patch_classifier import PatchNetwork, classify_densely, classify_each_patch

MAX_DIFFERENCE = 1e-3  # of the logits, relative to their standard deviation


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit status, 1 if the results differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patch_classifier", description=__doc__)
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(180, 240),
        metavar=("H", "W"),
        help="image in pixels; default: %(default)s",
    )
    parser.add_argument("--backbone", choices=("small", "vgg16"), default="small", help="default: %(default)s")
    parser.add_argument("--patch_size", type=int, help="side of a patch in pixels; default: 64 or 224 (vgg16)")
    parser.add_argument("--width_multiplier", type=float, default=1.0, help="scales channels; default: %(default)s")
    parser.add_argument("--stride", type=int, help="pixels between patches; default: 8 or 32 (vgg16)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way; default: %(default)s")
    options = parser.parse_args(arguments)
    require_positive(options, "repeats", "stride")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = PatchNetwork(21, options.backbone, options.patch_size, options.width_multiplier).eval()
    height, width = options.size
    if min(height, width) < network.patch_size:
        raise UserError(f"size: expected at least a patch of {network.patch_size} pixels, found {height} {width}")
    stride = options.stride or network.stride
    image = torch.randn(1, 3, height, width)
    functions: dict[str, Callable[[], Tensor]] = {
        "separate": lambda: classify_each_patch(network, image, stride),
        "dense": lambda: classify_densely(network, image, stride),
    }
    with torch.inference_mode():
        separate, dense = (function() for function in functions.values())
        seconds = measure(functions, options.repeats)
    difference, std = (separate - dense).abs().max().item(), separate.std().item()
    rows, columns = separate.shape[2:]
    print(
        f"{rows}x{columns} patches of {network.patch_size} pixels with stride {stride} in {height}x{width}: "
        f"largest difference {difference:.1e}, standard deviation of the logits {std:.1e}"
    )
    if options.backbone == "small" and difference > MAX_DIFFERENCE * std:
        print("error: the results differ", file=sys.stderr)
        return 1
    for name, values in seconds.items():
        print(f"  {name:10s} {1e3 * statistics.median(values):8.1f} ms")
    print(f"ratio {paired_ratio(seconds['separate'], seconds['dense']):.1f}: seconds, separate / dense")
    return 0


if __name__ == "__main__":
    sys.exit(main())
