"""Training input against torchvision's reference: ``python -m benchmarks.input_pipeline FOLDER``.

Both read the file, decode it, resize a random crop to 224x224 and flip it. The reference (torchvision's ImageNet
recipe) then converts to float and normalizes. Ours delivers uint8, a quarter of the bytes, and the module normalizes on
the device. Without a folder, the images are drawn in the size of ImageNet's.

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
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import cv2
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.timing import measure, paired_ratio
from cli.command import command, require_positive
from datamodules import images
from datamodules.folders import list_images
from datamodules.images import EncodedImage, image_size
from datamodules.loading import EpochSampler, ResumingLoader, SeededDataset, collate, init_worker
from datamodules.synthetic.imagenet import write_imagenet
from datamodules.transforms import TrainTransform, random_resized_box, to_tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224
BATCH_SIZE = 64
Seconds = dict[str, list[float]]


def all_rows(function: Callable[[str], object], path: str) -> object:
    """Call the function without the fast path that skips rows below the crop."""
    original, images.decode_jpeg_rows = images.decode_jpeg_rows, lambda *_: None
    try:
        return function(path)
    finally:
        images.decode_jpeg_rows = original


def pipelines() -> dict[str, Callable[[str], Any]]:
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

    return {
        "reference": reference,
        "ours": ours,
        "ours, normalized": normalized,
        "ours, all rows": partial(all_rows, ours),
    }


class RepeatedImages(Dataset):
    """Images that are repeated as needed.

    Args:
        paths: files of the images.
        transform: called with a path.
        count: number of samples.
    """

    def __init__(self, paths: list[str], transform: Callable[[str], Any], count: int) -> None:
        self.paths, self.transform, self.count = paths, transform, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.transform(self.paths[index % len(self.paths)]), "label": index}


def use_one_thread(worker_id: int) -> None:
    """Limit a worker of the reference to one thread, as ours is."""
    torch.set_num_threads(1)


def exhaust(loader: Iterable[object]) -> None:
    """Load all batches."""
    for _ in loader:
        pass


def measure_batches(paths: list[str], batches: int, repeats: int) -> Seconds:
    """Return the wall-clock seconds of each pass over all batches from one worker process."""
    count, functions = batches * BATCH_SIZE, pipelines()
    theirs = RepeatedImages(paths, functions["reference"], count)
    ours = SeededDataset(RepeatedImages(paths, functions["ours"], count), seed=0, replace=True)
    sampler = EpochSampler(len(ours), seed=0, shuffle=True, pad=True)
    common: dict[str, Any] = {"batch_size": BATCH_SIZE, "num_workers": 1, "persistent_workers": True}
    loaders = {
        "reference": DataLoader(theirs, shuffle=True, worker_init_fn=use_one_thread, **common),
        "ours": ResumingLoader(ours, sampler=sampler, collate_fn=collate, worker_init_fn=init_worker, **common),
    }
    # The untimed pass of `measure` starts the workers.
    return measure({name: partial(exhaust, loader) for name, loader in loaders.items()}, repeats)


def process(function: Callable[[str], object], paths: list[str]) -> None:
    """Process all images; every pass draws the same random numbers."""
    random.seed(0)
    torch.manual_seed(0)
    for path in paths:
        function(path)


def measure_images(functions: Mapping[str, Callable[[str], object]], paths: list[str], repeats: int) -> Seconds:
    """Return the processor seconds of each pass over all images."""
    passes = {name: partial(process, function, paths) for name, function in functions.items()}
    return measure(passes, repeats, time.process_time)


def growing_pipelines(paths: list[str]) -> dict[str, Callable[[str], object]]:
    """Return ours up to each of its stages."""
    box = {path: random_resized_box(*image_size(path), (0.08, 1.0), (3 / 4, 4 / 3)) for path in paths}

    def crop(path: str) -> Any:
        return EncodedImage(path).crop(box[path], (SIZE, SIZE))

    return {
        "read file and header": EncodedImage,
        "decode, crop and resize": crop,
        "flip and to tensor": lambda path: to_tensor(cv2.flip(crop(path), 1)),
    }


def print_times(seconds: Seconds, count: int) -> None:
    """Print the median time per image of each pipeline, from passes over this number of images."""
    for name, values in seconds.items():
        median = statistics.median(values) / count
        print(f"  {name:24s} {1e3 * median:6.3f} ms  {1 / median:6.0f} images/s")


def compare(paths: list[str], options: argparse.Namespace) -> None:
    """Print the three measurements, and the time of each stage of ours."""
    repeats = options.repeats
    seconds = measure_batches(paths, options.batches, repeats)
    print(f"batches of {BATCH_SIZE} from one worker process, median wall-clock time of {repeats} passes")
    print_times(seconds, options.batches * BATCH_SIZE)
    print(f"ratio {paired_ratio(seconds['reference'], seconds['ours']):.2f}: reference / ours, batches")
    seconds = measure_images(pipelines(), paths, repeats)
    print(f"one image at a time in the main process, median processor time of {repeats} passes")
    print_times(seconds, len(paths))
    for numerator, denominator in (
        ("reference", "ours"),
        ("reference", "ours, normalized"),
        ("ours, all rows", "ours"),
    ):
        print(f"ratio {paired_ratio(seconds[numerator], seconds[denominator]):.2f}: {numerator} / {denominator}")
    print("ours by stage:")
    previous = 0.0
    for name, values in measure_images(growing_pipelines(paths), paths, repeats).items():
        median = statistics.median(values)
        print(f"  {name:24s} {1e3 * (median - previous) / len(paths):6.3f} ms")
        previous = median


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", help="folder of images; default: drawn images")
    parser.add_argument("--batches", type=int, default=10, help="batches per pass; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes over all images; default: %(default)s")
    options = parser.parse_args(arguments)
    require_positive(options, "batches", "repeats")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as drawn:
        if options.folder is None:
            write_imagenet(drawn, classes=10, train=9, val=1, size=375)
        paths = list_images(options.folder or drawn)
        print(f"{len(paths)} {f'images of {os.path.normpath(options.folder)}' if options.folder else 'drawn images'}")
        compare(paths, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
