"""The dense CRF here and pydensecrf2's: ``python -m benchmarks.dense_crf --peer PYTHON``.

Prints for each image the seconds that one core takes, lattices included, as the median of some runs, the ratio, and
by how much the two results differ at most. The runs alternate, so that a disturbance meets both, and only the process's
own time counts. Without ``--image`` the images are drawn: one with texture of all sizes, and one of noise, where next
to no colors are alike. The probabilities are drawn, too.

The peer is compiled when it is installed, and into an environment of its own; its Python is what ``--peer`` takes::

    python -m venv PEER
    PEER/bin/python -m pip install numpy pydensecrf2
    taskset -c 0 python -m benchmarks.dense_crf --peer PEER/bin/python
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from datamodules.images import read_image
from errors import BrokenImageError, UserError
from lightning_modules.segmentation.crf import DEEPLAB, DenseCRF

# What the other Python does; its arguments are a file to read and one to write.
PEER = """
import sys, time
import numpy as np
import pydensecrf.densecrf as dcrf
given = dict(np.load(sys.argv[1]))
image, unary = np.ascontiguousarray(given["image"].transpose(1, 2, 0)), given["unary"]
normalization = getattr(dcrf, "NORMALIZE_" + str(given["normalization"]).upper())
number = {name: float(value) for name, value in given.items() if value.ndim == 0 and name != "normalization"}
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


def draw(generator: torch.Generator, channels: int, height: int, width: int, finest: int, slope: float) -> torch.Tensor:
    """Random fields float32 (channels,H,W) of mean 0 and deviation 1: noise of all sizes, the larger the stronger.

    Args:
        generator: draws.
        channels, height, width: of the result.
        finest: size of the smallest grains in pixels, a power of 2.
        slope: a grain of twice the size is 2**slope times as strong.
    """
    field, size = torch.zeros(1, channels, height, width), finest
    while size < 2 * min(height, width):
        noise = torch.randn(1, channels, height // size + 2, width // size + 2, generator=generator)
        field += (size**slope) * F.interpolate(noise, (height, width), mode="bilinear", align_corners=True)
        size *= 2
    return (field / field.std())[0]


def pictures(options: argparse.Namespace, generator: torch.Generator) -> dict[str, np.ndarray]:
    """uint8 (3,H,W) by name.

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
    light = 120 + 45 * draw(generator, 1, height, width, 1, 0.7) + 15 * draw(generator, 3, height, width, 1, 0.7)
    noise = torch.randint(0, 256, (3, height, width), generator=generator)
    return {
        "texture": light.round().clamp(0, 255).byte().numpy(),
        "noise": noise.byte().numpy(),
    }


def ours(system: DenseCRF, unary: np.ndarray, image: np.ndarray) -> tuple[float, np.ndarray]:
    """Seconds of the process and Q, float32 (C,H,W)."""
    given = torch.from_numpy(unary), torch.from_numpy(image)
    start = time.process_time()
    result = system.infer(*given)
    return time.process_time() - start, result.numpy()


def theirs(python: str, system: DenseCRF, unary: np.ndarray, image: np.ndarray) -> tuple[float, np.ndarray]:
    """`ours`, of pydensecrf in another Python.

    Raises:
        RuntimeError: it fails there.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = os.path.join(folder, "given.npz"), os.path.join(folder, "result.npy")
        arrays: dict[str, Any] = {"unary": unary, "image": image, **asdict(system)}
        np.savez(given, **arrays)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [python, "-c", PEER, given, result], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"--peer {python}: pydensecrf does not run there: {done.stderr.splitlines()[-1]}")
        return float(done.stdout), np.load(result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dense_crf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peer", metavar="PYTHON", help="the Python that has pydensecrf2; default: ours alone")
    parser.add_argument("--image", nargs="+", help="images, resized; default: two that are drawn")
    parser.add_argument("--size", nargs=2, type=int, default=[375, 500], metavar=("H", "W"), help="default: 375 500")
    parser.add_argument("--classes", type=int, default=21, help="default: %(default)s")
    parser.add_argument("--parameters", choices=list(DEEPLAB), default="resnet101", help="default: %(default)s")
    parser.add_argument("--normalization", choices=["after", "symmetric"], default="after", help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    system = replace(DEEPLAB[options.parameters], iterations=options.iterations, normalization=options.normalization)
    height, width = options.size
    unary = -(3 * draw(generator, options.classes, height, width, 8, 0.5)).log_softmax(0).numpy()
    print(f"{height}x{width} pixels, {options.classes} classes, one core, median of {options.repeats} runs; {system}")
    try:
        for name, image in pictures(options, generator).items():
            seconds: dict[str, list[float]] = {"ours": [], "pydensecrf2": []}
            # Once unmeasured: what is loaded at the first call does not count.
            ours(system, unary, image)
            for _ in range(options.repeats):
                took, found = ours(system, unary, image)
                seconds["ours"].append(took)
                if options.peer:
                    took, expected = theirs(options.peer, system, unary, image)
                    seconds["pydensecrf2"].append(took)
            corners = [kernel.splat.rows for kernel in system.kernels(torch.from_numpy(image))]
            print(f"{name}: {' and '.join(map(str, corners))} corners; ours {np.median(seconds['ours']):.3f} s", end="")
            if options.peer:
                ratio = np.median(np.array(seconds["pydensecrf2"]) / np.array(seconds["ours"]))
                print(
                    f", pydensecrf2 {np.median(seconds['pydensecrf2']):.3f} s, ratio {ratio:.2f}: how many times as "
                    f"fast ours is; greatest difference {np.abs(found - expected).max():.1e}",
                    end="",
                )
            print()
    except (BrokenImageError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
