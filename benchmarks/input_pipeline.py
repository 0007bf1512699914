"""Images a second of our training input against torchvision's reference: ``make bench``.

Both read the file, decode, cut out and resize a random part to 224x224 and flip it. The reference (torchvision's
ImageNet recipe) then makes floats and normalizes; ours delivers uint8, a quarter of the bytes, and the module
normalizes on the device.

First what a training loop sees: one worker process that fills batches of 64 and hands them over through shared memory,
timed by the clock where they arrive, with all that our loader does for exact resume. Then one image at a time in the
main process, by processor time and without batches, where the size of what is delivered hardly counts; there ours is
timed with normalization too, so that nobody is misled.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from datamodules.images import EncodedImage, _reduction, image_size, list_images
from datamodules.loading import EpochSampler, ResumingLoader, SeededDataset, collate, init_worker
from datamodules.transforms import TrainTransform, random_resized_box, to_tensor
from errors import DatasetError

DEFAULT = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data", "imagenet_sample")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224
BATCH = 64
BATCHES = 10


def seconds(function: Callable[[Any], object], inputs: Sequence[Any]) -> float:
    """Processor time of one pass; the images are in the page cache, and other work on the machine does not count."""
    random.seed(0)
    torch.manual_seed(0)
    start = time.process_time()
    for item in inputs:
        function(item)
    return time.process_time() - start


def measure(functions: dict[str, Callable[[Any], object]], inputs: Sequence[Any], repeats: int) -> dict[str, float]:
    """Median milliseconds an image of each function; the runs alternate, so that a disturbance meets all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            elapsed = seconds(function, inputs)
            if repeat:  # the first pass warms caches
                times[name].append(elapsed / len(inputs) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def pipelines() -> dict[str, Callable[[str], object]]:
    """The whole pipelines, each from a path to a tensor."""
    recipe = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(MEAN, STD),
        ]
    )
    ours = TrainTransform(SIZE)
    mean, std = torch.tensor(MEAN).view(3, 1, 1) * 255, torch.tensor(STD).view(3, 1, 1) * 255

    def reference(path: str) -> object:
        with open(path, "rb") as file:
            return recipe(Image.open(file).convert("RGB"))

    def normalized(path: str) -> object:
        return ours(path).float().sub_(mean).div_(std)

    return {"reference": reference, "ours": ours, "ours, normalized": normalized}


class Pictures(Dataset):
    """``BATCHES`` times ``BATCH`` images, over and over the same paths, each through ``function``."""

    def __init__(self, paths: list[str], function: Callable[[str], Any]) -> None:
        self.paths, self.function = paths, function

    def __len__(self) -> int:
        return BATCH * BATCHES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.function(self.paths[index % len(self.paths)]), "label": index}


def one_thread(worker_id: int) -> None:
    """The reference's worker, kept to one thread as ours is."""
    torch.set_num_threads(1)


def batches(paths: list[str], repeats: int) -> dict[str, float]:
    """Median milliseconds an image where batches arrive from one worker process."""
    functions = pipelines()
    theirs = Pictures(paths, functions["reference"])
    ours = SeededDataset(Pictures(paths, functions["ours"]), seed=0, replace=True)
    sampler = EpochSampler(len(ours), seed=0, shuffle=True, pad=True)
    common: dict[str, Any] = {"batch_size": BATCH, "num_workers": 1, "persistent_workers": True}
    loaders = {
        "reference": DataLoader(theirs, shuffle=True, worker_init_fn=one_thread, **common),
        "ours": ResumingLoader(ours, sampler=sampler, collate_fn=collate, worker_init_fn=init_worker, **common),
    }
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for repeat in range(repeats + 1):
        for name, loader in loaders.items():
            start = time.perf_counter()
            count = sum(len(batch["image"]) for batch in loader)
            if repeat:  # the first pass starts the workers
                times[name].append((time.perf_counter() - start) / count * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def stages(paths: list[str], repeats: int) -> dict[str, float]:
    """Median milliseconds an image of each stage of ours, by differences of growing pipelines."""
    box = {path: random_resized_box(*image_size(path), (0.08, 1.0), (3 / 4, 4 / 3)) for path in paths}

    def crop(path: str) -> Any:
        return EncodedImage(path).crop(box[path], (SIZE, SIZE))

    growing: dict[str, Callable[[str], object]] = {
        "read file and header": EncodedImage,
        "decode": lambda path: EncodedImage(path)._decode(
            _reduction(*box[path][2:], SIZE, SIZE), reuse=True, rows=sum(box[path][::2])
        ),
        "crop and resize": crop,
        "flip and to tensor": lambda path: to_tensor(cv2.flip(crop(path), 1)),
    }
    totals = measure(growing, paths, repeats)
    before = [0.0, *list(totals.values())[:-1]]
    return {name: total - earlier for (name, total), earlier in zip(totals.items(), before, strict=True)}


def show(result: dict[str, float]) -> None:
    """Prints a line a pipeline."""
    for name, milliseconds in result.items():
        print(f"  {name:22s} {milliseconds:6.3f} ms  {1e3 / milliseconds:6.0f} images/s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input_pipeline", description=__doc__)
    parser.add_argument("folder", nargs="?", default=DEFAULT, help="images; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes over all images")
    options = parser.parse_args(arguments)
    try:
        paths = list_images(options.folder)
    except DatasetError as error:
        print(f"skipped: input_pipeline needs photographs: {error}")
        return 0
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    print(f"{len(paths)} images of {os.path.normpath(options.folder)}")
    result = batches(paths, options.repeats)
    print(f"batches of {BATCH} from one worker process, median of {options.repeats} passes by the clock")
    show(result)
    print(f"ratio {result['reference'] / result['ours']:.2f}")
    result = measure(pipelines(), paths, options.repeats)
    print(f"one image at a time in the main process, median processor time of {options.repeats} passes")
    show(result)
    print(f"ratio {result['reference'] / result['ours']:.2f}: ours delivers uint8, the device normalizes")
    print(f"ratio {result['reference'] / result['ours, normalized']:.2f}: with normalization on this core too")
    print("ours by stage:")
    for name, milliseconds in stages(paths, options.repeats).items():
        print(f"  {name:22s} {milliseconds:6.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
