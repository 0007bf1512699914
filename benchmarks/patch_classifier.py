"""Speed of separate and dense inference of the patch classifier: ``python -m benchmarks.patch_classifier``.

The plain way classifies separate patches in batches of 64, so that the ratio does not measure call overhead. The dense
way computes one pass over the image. Both agree up to rounding, which is checked. VGG-16, whose zero padding prevents
equality, can be measured too.
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
    """Run the benchmark; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patch_classifier", description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(180, 240), help="height and width; default: %(default)s")
    parser.add_argument("--backbone", choices=("small", "vgg16"), default="small", help="default: %(default)s")
    parser.add_argument("--patch_size", type=int, help="side of a patch in pixels; default: 64 or 224 (vgg16)")
    parser.add_argument("--width_multiplier", type=float, default=1.0, help="scales channels; default: %(default)s")
    parser.add_argument("--stride", type=int, help="pixels between patches; default: 8 or 32 (vgg16)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = PatchNetwork(21, options.backbone, options.patch_size, options.width_multiplier).eval()
    stride = options.stride or network.stride
    image = torch.randn(1, 3, *options.size)
    functions: dict[str, Callable[[], Tensor]] = {
        "separate": lambda: classify_each_patch(network, image, stride),
        "dense": lambda: classify_densely(network, image, stride),
    }
    with torch.inference_mode():
        separate, dense = (function() for function in functions.values())
        times = measure(functions, options.repeats)
    difference, spread = (separate - dense).abs().max().item(), separate.std().item()
    if options.backbone == "small" and difference > 1e-3 * spread:
        print(f"error: results differ by up to {difference:.1e}, standard deviation of the logits {spread:.1e}")
        return 1
    rows, columns = separate.shape[2:]
    print(
        f"ratio {times['separate'] / times['dense']:.1f}: {times['separate'] * 1e3:.0f} ms for separate patches, "
        f"{times['dense'] * 1e3:.0f} ms dense; {rows}x{columns} patches of {network.patch_size} pixels with stride "
        f"{stride} in {options.size[1]}x{options.size[0]}; difference {difference:.1e}, standard deviation {spread:.1e}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
