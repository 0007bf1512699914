"""Time measurement of all benchmarks: alternating runs, paired ratios, synchronized devices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from errors import UserError

Clock = Callable[[], float]
Result = TypeVar("Result")


def find_device(name: str) -> torch.device:
    """Return a device by its name.

    Raises:
        UserError: the device is unknown or not available.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device: expected cpu or an available GPU, found {name}") from None
    return device


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or the number of threads of the CPU, and the version of torch."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def now(device: torch.device) -> float:
    """Return the time in seconds after synchronizing with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(function: Callable[[], Result], clock: Clock = time.perf_counter) -> tuple[float, Result]:
    """Call a function; return the seconds it takes and its result.

    Args:
        function: the function.
        clock: wall-clock time, or ``time.process_time``, which excludes other work on the machine.
    """
    start = clock()
    result = function()
    return clock() - start, result


def measure(
    functions: Mapping[str, Callable[[], object]], repeats: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Time functions in turn, so that other work on the machine affects all of them.

    Args:
        functions: the functions by name.
        repeats: timed calls of each, after one untimed call.
        clock: see `timed`.

    Returns:
        Seconds of each call by name; calls with the same index are neighbors in time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            elapsed, _ = timed(function, clock)
            if repeat:
                seconds[name].append(elapsed)
    return seconds


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median of the ratios of paired measurements."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def frames_per_second(
    function: Callable[[Tensor], object], images: Sequence[Tensor], warm_up: int, timed: int
) -> float:
    """Measure frames per second, one image at a time.

    Args:
        function: called with each image.
        images: images on the device; they are repeated as needed.
        warm_up: untimed calls before the others.
        timed: timed calls.
    """
    for i in range(warm_up):
        function(images[i % len(images)])
    start = now(images[0].device)
    for i in range(timed):
        function(images[i % len(images)])
    return timed / (now(images[0].device) - start)
