"""The patch classifier patch by patch and in one pass: ``python -m benchmarks.patch_classifier``.

The same network says the same of the same image: naively, each patch cut out (and 64 given to the network at a time,
so that the factor is not that of calling it); and in one pass, in which neighboring patches share their features. The
two agree to rounding, which is checked; VGG16, whose zero padding keeps them from agreeing, can be measured too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.sliding_window import measure
from lightning_modules.segmentation.patch_classifier import PatchNetwork, classify_densely, classify_each_patch


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patch_classifier", description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(180, 240), help="height and width; default: %(default)s")
    parser.add_argument("--backbone", choices=("small", "vgg16"), default="small", help="default: %(default)s")
    parser.add_argument("--patch", type=int, help="side of a patch in pixels; default: the network's, 64 or 224")
    parser.add_argument("--width", type=float, default=1.0, help="multiplies the channels; default: %(default)s")
    parser.add_argument("--stride", type=int, help="pixels from patch to patch; default: the network's, 8 or 32")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = PatchNetwork(21, options.backbone, options.patch, options.width).eval()
    stride = options.stride or network.stride
    image = torch.randn(1, 3, *options.size)
    functions: dict[str, Callable[[], Tensor]] = {
        "naive": lambda: classify_each_patch(network, image, stride),
        "dense": lambda: classify_densely(network, image, stride),
    }
    with torch.inference_mode():
        naive, dense = (function() for function in functions.values())
        times = measure(functions, options.repeats)
    apart, spread = (naive - dense).abs().max().item(), naive.std().item()
    if options.backbone == "small" and apart > 1e-3 * spread:
        print(f"the two do not agree: {apart:.1e} apart at most, logits spread by {spread:.1e}")
        return 1
    print(
        f"ratio {times['naive'] / times['dense']:.1f}: {times['naive'] * 1e3:.0f} ms patch by patch, "
        f"{times['dense'] * 1e3:.0f} ms dense, {naive.shape[2]}x{naive.shape[3]} patches of {network.patch} pixels, "
        f"one every {stride}, in {options.size[1]}x{options.size[0]}; {apart:.1e} apart at most, spread {spread:.1e}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
