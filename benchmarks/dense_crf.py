"""Dense CRF against pydensecrf2: ``python -m benchmarks.dense_crf --peer PYTHON``.

Print for each image the median seconds of several runs on one core, lattices included, the ratio, and the largest
difference of the two results. The runs alternate, so that other work affects both; only process time counts. Print also
the ratio of `mean_field` and `lattice_mean_field` on the same lattices. Without ``--image`` the images are drawn:
texture at all scales, and noise, in which few colors are similar. The probabilities are always drawn.

The peer is compiled at installation, in an environment of its own; ``--peer`` is its Python::

    python -m venv PEER
    PEER/bin/python -m pip install numpy pydensecrf2
    taskset -c 0 python -m benchmarks.dense_crf --peer PEER/bin/python
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import measure, paired_ratio, timed
from cli.command import command, require_positive
from datamodules.images import read_image
from errors import UserError
from lightning_modules.segmentation.crf import DEEPLAB_CRFS, DenseCRF, mean_field
from lightning_modules.segmentation.permutohedral import lattice_mean_field

# Script for the peer's Python; its arguments are an input file and an output file.
PEER = """
import sys, time
import numpy as np
import pydensecrf.densecrf as dcrf
arrays = dict(np.load(sys.argv[1]))
image, unary = np.ascontiguousarray(arrays["image"].transpose(1, 2, 0)), arrays["unary"]
normalization = getattr(dcrf, "NORMALIZE_" + str(arrays["normalization"]).upper())
number = {name: float(value) for name, value in arrays.items() if value.ndim == 0 and name != "normalization"}
start = time.process_time()
crf = dcrf.DenseCRF2D(image.shape[1], image.shape[0], len(unary))
crf.setUnaryEnergy(unary.reshape(len(unary), -1))
crf.addPairwiseGaussian(number["theta_gamma"], number["gaussian_weight"], dcrf.CONST_KERNEL, normalization)
crf.addPairwiseBilateral(
    number["theta_alpha"], number["theta_beta"], image, number["bilateral_weight"], dcrf.CONST_KERNEL, normalization
)
result = np.array(crf.inference(int(number["iterations"])))
print(time.process_time() - start)
np.save(sys.argv[2], result.reshape(unary.shape))
"""


def draw_fields(
    generator: torch.Generator, channels: int, height: int, width: int, min_scale: int, slope: float
) -> Tensor:
    """Draw random fields, float32 (channels, height, width): noise at all scales with standard deviation 1.

    Args:
        generator: source of randomness.
        channels: number of fields.
        height: height in pixels.
        width: width in pixels.
        min_scale: smallest scale in pixels, a power of 2.
        slope: noise at twice the scale is 2**slope times as strong.
    """
    fields, scale = torch.zeros(1, channels, height, width), min_scale
    while scale < 2 * min(height, width):
        noise = torch.randn(1, channels, height // scale + 2, width // scale + 2, generator=generator)
        fields += (scale**slope) * F.interpolate(noise, (height, width), mode="bilinear", align_corners=True)
        scale *= 2
    return (fields / fields.std())[0]


def load_images(options: argparse.Namespace, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Load or draw images, uint8 (3, H, W), by name.

    Raises:
        BrokenImageError: a file cannot be read.
    """
    height, width = options.size
    if options.image:
        return {
            os.path.basename(path): cv2.resize(read_image(path), (width, height), interpolation=cv2.INTER_AREA)
            .transpose(2, 0, 1)
            .copy()
            for path in options.image
        }
    brightness, color = (draw_fields(generator, channels, height, width, 1, 0.7) for channels in (1, 3))
    noise = torch.randint(0, 256, (3, height, width), generator=generator)
    return {
        "texture": (120 + 45 * brightness + 15 * color).round().clamp(0, 255).byte().numpy(),
        "noise": noise.byte().numpy(),
    }


def run_peer(python: str, crf: DenseCRF, unary: np.ndarray, image: np.ndarray) -> tuple[float, np.ndarray]:
    """Run pydensecrf in another Python.

    Args:
        python: path of the other Python.
        crf: the parameters.
        unary: negative log-probabilities, float32 (C, H, W).
        image: uint8 (3, H, W).

    Returns:
        Seconds of process time, and probabilities Q, float32 (C, H, W).

    Raises:
        UserError: pydensecrf does not run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, result = os.path.join(folder, "source.npz"), os.path.join(folder, "result.npy")
        arrays: dict[str, Any] = {"unary": unary, "image": image, **asdict(crf)}
        np.savez(source, **arrays)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [python, "-c", PEER, source, result], env=environment, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).splitlines()[-1]
            raise UserError(f"peer: expected a Python with pydensecrf2, found {python}: {reason}") from None
        return float(done.stdout), np.load(result)


def compare(name: str, crf: DenseCRF, unary: np.ndarray, image: np.ndarray, options: argparse.Namespace) -> None:
    """Print the times and ratios of an image with this name; see `run_peer` for the other arguments."""
    arrays = torch.from_numpy(unary), torch.from_numpy(image)
    crf.infer(*arrays)  # warm up
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(options.repeats):
        seconds, found = timed(partial(crf.infer, *arrays), time.process_time)
        ours.append(seconds)
        if options.peer:
            seconds, expected = run_peer(options.peer, crf, unary, image)
            theirs.append(seconds)
    lattices = crf.lattices(arrays[1])
    energies = arrays[0].flatten(1).T.contiguous()
    functions = {
        function.__name__: partial(function, energies, lattices, crf.iterations)
        for function in (mean_field, lattice_mean_field)
    }
    plain, fused = measure(functions, options.repeats, time.process_time).values()
    points = " and ".join(str(lattice.splat.rows) for lattice in lattices)
    print(f"{name}: {points} lattice points, ours {statistics.median(ours):.3f} s")
    print(f"  ratio {paired_ratio(plain, fused):.2f}: seconds, mean_field / lattice_mean_field, {name}")
    if options.peer:
        difference = np.abs(found.numpy() - expected).max()
        print(f"  pydensecrf2 {statistics.median(theirs):.3f} s, largest difference {difference:.1e}")
        print(f"  ratio {paired_ratio(theirs, ours):.2f}: seconds, pydensecrf2 / ours, {name}")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dense_crf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peer", metavar="PYTHON", help="Python with pydensecrf2; default: none")
    parser.add_argument("--image", nargs="+", help="image files, which are resized; default: drawn images")
    parser.add_argument("--size", nargs=2, type=int, default=[375, 500], metavar=("H", "W"), help="default: 375 500")
    parser.add_argument("--classes", type=int, default=21, help="default: %(default)s")
    parser.add_argument("--parameters", choices=list(DEEPLAB_CRFS), default="resnet101", help="default: %(default)s")
    parser.add_argument("--normalization", choices=["after", "symmetric"], default="after", help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; default: %(default)s")
    options = parser.parse_args(arguments)
    require_positive(options, "size", "classes", "iterations", "repeats")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    crf = replace(DEEPLAB_CRFS[options.parameters], iterations=options.iterations, normalization=options.normalization)
    height, width = options.size
    unary = -(3 * draw_fields(generator, options.classes, height, width, 8, 0.5)).log_softmax(0).numpy()
    print(f"{height}x{width} pixels, {options.classes} classes, one core, median of {options.repeats} runs; {crf}")
    for name, image in load_images(options, generator).items():
        compare(name, crf, unary, image, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
