"""Sliding window as a loop and as a convolution: ``python -m benchmarks.sliding_window``.

The same network classifies the same windows of an image in three ways: one crop at a time, as in the lecture; in
batches of 100 crops; and in one pass over the image, in which neighboring windows share their features. The benchmark
checks that all agree up to rounding.
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
from lightning_modules.detection.sliding_window import STRIDE, WindowNetwork, classify_each_window

BATCH_SIZE = 100
MAX_DIFFERENCE = 1e-4  # of the logits


def classify_in_batches(network: WindowNetwork, image: Tensor, window: int) -> Tensor:
    """Compute the logits of `classify_each_window` in batches of windows."""
    crops = image.unfold(1, window, STRIDE).unfold(2, window, STRIDE).permute(1, 2, 0, 3, 4)
    rows, columns = crops.shape[:2]
    logits = torch.cat([network(batch) for batch in crops.flatten(0, 1).split(BATCH_SIZE)])
    return logits.unflatten(0, (rows, columns)).permute(2, 0, 1)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit status, 1 if the results differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sliding_window", description=__doc__)
    parser.add_argument("--size", type=int, default=320, help="side of the image in pixels; default: %(default)s")
    parser.add_argument("--window", type=int, default=64, help="side of a window in pixels; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each way; default: %(default)s")
    options = parser.parse_args(arguments)
    require_positive(options, "repeats")
    size, window = options.size, options.window
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = WindowNetwork(20, window).eval()
    if size < window:
        raise UserError(f"size: expected at least the window of {window} pixels, found {size}")
    image = torch.randn(3, size, size)
    functions: dict[str, Callable[[], Tensor]] = {
        "one at a time": lambda: classify_each_window(network, image, window, STRIDE),
        f"batches of {BATCH_SIZE}": lambda: classify_in_batches(network, image, window),
        "one pass": lambda: network.dense(image[None])[0],
    }
    with torch.inference_mode():
        *separate, dense = (function() for function in functions.values())
        difference = max((logits - dense).abs().max().item() for logits in separate)
        seconds = measure(functions, options.repeats)
    rows, columns = dense.shape[1:]
    print(
        f"{rows}x{columns} windows of {window} pixels with stride {STRIDE} in {size}x{size}: "
        f"largest logit {dense.abs().max():.2f}, largest difference {difference:.1e}"
    )
    if difference > MAX_DIFFERENCE:
        print("error: the results differ", file=sys.stderr)
        return 1
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"  {name:20s} {1e3 * median:8.1f} ms  {rows * columns / median:8.0f} windows/s")
    *names, one_pass = functions
    for name in names:
        print(f"ratio {paired_ratio(seconds[name], seconds[one_pass]):.1f}: seconds, {name} / {one_pass}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
