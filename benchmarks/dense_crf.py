"""Speed of the dense CRF, compared with pydensecrf2: ``python -m benchmarks.dense_crf --peer PYTHON``.

Print for each image the seconds on one core, lattices included, as the median of several runs, the ratio, and the
largest difference of the two results. The runs alternate, so that disturbances affect both; only process time counts.
Print also how much faster `lattice_mean_field` is than `mean_field` with the same lattices. Without ``--image`` the
images are drawn: texture at all scales, and noise, in which few colors are similar. The probabilities are drawn, too.

The peer is compiled at installation, in an environment of its own; ``--peer`` takes its Python::

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from datamodules.images import read_image
from errors import BrokenImageError, UserError
from lightning_modules.segmentation.crf import DEEPLAB_CRFS, DenseCRF, mean_field
from lightning_modules.segmentation.permutohedral import lattice_mean_field

# Script for the peer's Python; its arguments are an input file and an output file.
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
    """Draw random fields float32 (channels, height, width): noise at all scales, with standard deviation 1.

    Args:
        generator: source of randomness.
        channels: number of fields.
        height: height in pixels.
        width: width in pixels.
        finest: smallest scale in pixels, a power of 2.
        slope: noise at twice the scale is 2**slope times as strong.
    """
    field, size = torch.zeros(1, channels, height, width), finest
    while size < 2 * min(height, width):
        noise = torch.randn(1, channels, height // size + 2, width // size + 2, generator=generator)
        field += (size**slope) * F.interpolate(noise, (height, width), mode="bilinear", align_corners=True)
        size *= 2
    return (field / field.std())[0]


def load_images(options: argparse.Namespace, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Load or draw images uint8 (3, H, W), by name.

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


def seconds_of(function: Callable[[], object]) -> float:
    """Return seconds of process time."""
    start = time.process_time()
    function()
    return time.process_time() - start


def ours(system: DenseCRF, unary: np.ndarray, image: np.ndarray) -> tuple[float, np.ndarray]:
    """Return seconds of process time, and Q, float32 (C, H, W)."""
    given = torch.from_numpy(unary), torch.from_numpy(image)
    start = time.process_time()
    result = system.infer(*given)
    return time.process_time() - start, result.numpy()


def theirs(python: str, system: DenseCRF, unary: np.ndarray, image: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the same of pydensecrf in another Python.

    Raises:
        UserError: it fails there.
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
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    system = replace(
        DEEPLAB_CRFS[options.parameters], iterations=options.iterations, normalization=options.normalization
    )
    height, width = options.size
    unary = -(3 * draw(generator, options.classes, height, width, 8, 0.5)).log_softmax(0).numpy()
    print(f"{height}x{width} pixels, {options.classes} classes, one core, median of {options.repeats} runs; {system}")
    try:
        for name, image in load_images(options, generator).items():
            seconds: dict[str, list[float]] = {"ours": [], "pydensecrf2": []}
            # Warm up.
            ours(system, unary, image)
            for _ in range(options.repeats):
                took, found = ours(system, unary, image)
                seconds["ours"].append(took)
                if options.peer:
                    took, expected = theirs(options.peer, system, unary, image)
                    seconds["pydensecrf2"].append(took)
            lattices = system.lattices(torch.from_numpy(image))
            energies = torch.from_numpy(unary).flatten(1).T.contiguous()
            plain, fused = (
                seconds_of(partial(function, energies, lattices, system.iterations))
                for function in (mean_field, lattice_mean_field)
            )
            points = " and ".join(str(lattice.splat.rows) for lattice in lattices)
            print(f"{name}: {points} lattice points; fused mean field {plain / fused:.1f} times as fast; ", end="")
            print(f"ours {np.median(seconds['ours']):.3f} s", end="")
            if options.peer:
                ratio = np.median(np.array(seconds["pydensecrf2"]) / np.array(seconds["ours"]))
                print(
                    f", pydensecrf2 {np.median(seconds['pydensecrf2']):.3f} s, ratio {ratio:.2f}, "
                    f"largest difference {np.abs(found - expected).max():.1e}",
                    end="",
                )
            print()
    except (BrokenImageError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
