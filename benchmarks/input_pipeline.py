"""Images per second of the training input against torchvision's reference: ``make bench``.

Both read the file, decode it, resize a random crop to 224x224 and flip it. The reference (torchvision's ImageNet
recipe) then converts to float and normalizes. Ours delivers uint8, a quarter of the bytes, and the module normalizes on
the device.

Three measurements:

- batches: one worker process fills batches of 64 and passes them through shared memory, by wall-clock time, with
  everything that the loader does for exact resume;
- single images: in the main process, by processor time, also with normalization on the CPU;
- skipped rows: the same with and without `datamodules.jpeg.decode_jpeg_rows`.
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

from datamodules import images
from datamodules.folders import list_images
from datamodules.images import EncodedImage, image_size
from datamodules.loading import EpochSampler, ResumingLoader, SeededDataset, collate, init_worker
from datamodules.transforms import TrainTransform, random_resized_box, to_tensor
from errors import DatasetError

DEFAULT = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data", "imagenet_sample")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224
BATCH = 64
BATCHES = 10


def seconds(function: Callable[[Any], object], inputs: Sequence[Any]) -> float:
    """Return the processor time of one pass, which excludes other work on the machine."""
    random.seed(0)
    torch.manual_seed(0)
    start = time.process_time()
    for item in inputs:
        function(item)
    return time.process_time() - start


def measure(functions: dict[str, Callable[[Any], object]], inputs: Sequence[Any], repeats: int) -> dict[str, float]:
    """Return the median milliseconds per image of each function; passes alternate, so that disturbances affect all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            elapsed = seconds(function, inputs)
            if repeat:  # the first pass fills the caches
                times[name].append(elapsed / len(inputs) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def pipelines() -> dict[str, Callable[[str], object]]:
    """Return the pipelines, each from a path to a tensor."""
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

    return {"reference": reference, "ours": ours, "ours, normalized": normalized, "ours, all rows": all_rows(ours)}


def all_rows(function: Callable[[str], object]) -> Callable[[str], object]:
    """Return the function without the fast path that skips rows below the crop."""

    def decode_all(path: str) -> object:
        original, images.decode_jpeg_rows = images.decode_jpeg_rows, lambda *_: None
        try:
            return function(path)
        finally:
            images.decode_jpeg_rows = original

    return decode_all


class RepeatedImages(Dataset):
    """``BATCHES`` times ``BATCH`` images, cycling through the paths, each transformed by ``function``."""

    def __init__(self, paths: list[str], function: Callable[[str], Any]) -> None:
        self.paths, self.function = paths, function

    def __len__(self) -> int:
        return BATCH * BATCHES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.function(self.paths[index % len(self.paths)]), "label": index}


def one_thread(worker_id: int) -> None:
    """Limit a worker of the reference to one thread, as ours is."""
    torch.set_num_threads(1)


def batches(paths: list[str], repeats: int) -> dict[str, float]:
    """Return the median milliseconds per image if batches arrive from one worker process."""
    functions = pipelines()
    theirs = RepeatedImages(paths, functions["reference"])
    ours = SeededDataset(RepeatedImages(paths, functions["ours"]), seed=0, replace=True)
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
    """Return the median milliseconds per image of each stage of ours, from differences of growing pipelines."""
    box = {path: random_resized_box(*image_size(path), (0.08, 1.0), (3 / 4, 4 / 3)) for path in paths}

    def crop(path: str) -> Any:
        return EncodedImage(path).crop(box[path], (SIZE, SIZE))

    growing: dict[str, Callable[[str], object]] = {
        "read file and header": EncodedImage,
        "decode, crop and resize": crop,
        "flip and to tensor": lambda path: to_tensor(cv2.flip(crop(path), 1)),
    }
    totals = measure(growing, paths, repeats)
    before = [0.0, *list(totals.values())[:-1]]
    return {name: total - earlier for (name, total), earlier in zip(totals.items(), before, strict=True)}


def show(result: dict[str, float]) -> None:
    """Print one line per pipeline."""
    for name, milliseconds in result.items():
        print(f"  {name:24s} {milliseconds:6.3f} ms  {1e3 / milliseconds:6.0f} images/s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
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
    print(f"batches of {BATCH} from one worker process, median wall-clock time of {options.repeats} passes")
    show(result)
    print(f"ratio {result['reference'] / result['ours']:.2f}")
    result = measure(pipelines(), paths, options.repeats)
    print(f"one image at a time in the main process, median processor time of {options.repeats} passes")
    show(result)
    print(f"ratio {result['reference'] / result['ours']:.2f}: ours delivers uint8, the device normalizes")
    print(f"ratio {result['reference'] / result['ours, normalized']:.2f}: with normalization on the CPU")
    print(f"ratio {result['ours, all rows'] / result['ours']:.2f}: rows below the crop skipped")
    print("ours by stage:")
    for name, milliseconds in stages(paths, options.repeats).items():
        print(f"  {name:24s} {milliseconds:6.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
