"""Sliding window as a loop and as a convolution: ``python -m benchmarks.sliding_window``.

The same network classifies the same windows of an image in three ways: one crop after the other, as in the lecture; in
batches of a hundred crops; and in one pass over the image, in which neighboring windows share their features. All agree
up to rounding, which is checked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_modules.detection.sliding_window import STRIDE, WindowNetwork, classify_each_window

BATCH = 100


def classify_in_batches(network: WindowNetwork, image: Tensor, window: int) -> Tensor:
    """Compute what `classify_each_window` does in batches of a hundred windows."""
    crops = image.unfold(1, window, STRIDE).unfold(2, window, STRIDE).permute(1, 2, 0, 3, 4)
    rows, columns = crops.shape[:2]
    logits = torch.cat([network(part) for part in crops.flatten(0, 1).split(BATCH)])
    return logits.unflatten(0, (rows, columns)).permute(2, 0, 1)


def measure(functions: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each; the runs alternate, so that disturbances affect all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sliding_window", description=__doc__)
    parser.add_argument("--size", type=int, default=320, help="side of the image in pixels; default: %(default)s")
    parser.add_argument("--window", type=int, default=64, help="side of a window; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    window = options.window
    network = WindowNetwork(20, window).eval()
    image = torch.randn(3, options.size, options.size)
    functions: dict[str, Callable[[], Tensor]] = {
        "one by one": lambda: classify_each_window(network, image, window, STRIDE),
        "a hundred at a time": lambda: classify_in_batches(network, image, window),
        "one pass": lambda: network.dense(image[None])[0],
    }
    with torch.inference_mode():
        results = [function() for function in functions.values()]
        apart = max((result - results[-1]).abs().max().item() for result in results)
        times = measure(functions, options.repeats)
    rows, columns = results[-1].shape[1:]
    print(
        f"{rows}x{columns} windows of {window} pixels, one every {STRIDE}, in {options.size}x{options.size}: "
        f"logits of {results[-1].abs().max():.2f} at most, {apart:.1e} apart at most"
    )
    if apart > 1e-4:
        print("the three do not agree")
        return 1
    for name, value in times.items():
        print(f"  {name:20s} {value * 1e3:8.1f} ms  {rows * columns / value:8.0f} windows/s")
    print(f"ratio {times['one by one'] / times['one pass']:.1f}: the loop against one pass")
    print(
        f"ratio {times['a hundred at a time'] / times['one pass']:.1f}: the loop a hundred at a time against one pass"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
