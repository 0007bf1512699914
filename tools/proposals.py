"""Compute Selective Search proposals for a dataset: ``python -m tools.proposals --root VOCdevkit --out DIR``.

The command skips images that have a valid file, so that it continues an interrupted run. See `datamodules.proposals`
for the files.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial

import cv2
import numpy as np
from rich.progress import track

from cli.command import command, make_folder, names_or_file, require_positive
from datamodules.detection.voc import DetectionAnnotations, VOCDetection
from datamodules.images import read_image
from datamodules.proposals import overlaps_any, proposal_path, read_image_proposals, read_proposals, write_proposals
from datamodules.segmentation.masks import open_image, read_ids
from datamodules.segmentation.voc_semantic import VOCSegmentation
from errors import BrokenImageError, DatasetError, UserError
from lightning_modules.components.selective_search import selective_search
from visualization.region_hierarchy import draw_region_hierarchy

Job = tuple[Callable[[], np.ndarray], str, int]  # reader of an image, file of its proposals, maximum number of boxes


# --- computation ----------------------------------------------------------------------------------------------------


def compute(jobs: Sequence[Job], num_workers: int) -> Iterator[str | None]:
    """Compute and write proposals; yield for each finished job None, or the reason why its image cannot be read.

    Raises:
        UserError: a worker was killed.
    """
    if num_workers == 1:
        for job in jobs:
            yield _run(job)
        return
    # Spawn: a forked process would inherit locks that threads of this process may hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        for future in as_completed([pool.submit(_run, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "workers: expected workers that run to the end, found one that was killed, possibly out of memory; "
            "run the command again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, images that are being processed are still written


def _run(job: Job) -> str | None:
    read, path, top_n = job
    try:
        write_proposals(path, selective_search(read(), top_n), top_n)
    except BrokenImageError as error:
        return str(error)
    return None


def _read_image_of_mask(path: str, mask_path: str, exif_orientation: bool) -> np.ndarray:
    return open_image(path, mask_path, read_ids(mask_path), exif_orientation).decode()


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    cv2.setNumThreads(0)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def find_missing(folder: str, images: Sequence[str], top_n: int) -> tuple[list[str], list[str]]:
    """Return the images without valid proposals, and the reason for each invalid file."""
    missing, reasons = [], []
    for image in images:
        path = proposal_path(folder, image)
        try:
            found = read_proposals(path)[1]
            if found == top_n:
                continue
            reasons.append(f"{path}: expected at most {top_n} boxes, found a file of at most {found}")
        except FileNotFoundError:
            pass
        except DatasetError as error:
            reasons.append(str(error))
        missing.append(image)
    return missing, reasons


# --- output ---------------------------------------------------------------------------------------------------------


def summarize(folder: str, annotations: DetectionAnnotations) -> str:
    """Return the mean number of boxes and the recall of objects, without difficult ones, at IoU 0.5."""
    boxes, found = 0, []
    for i in range(len(annotations.images)):
        with suppress(FileNotFoundError):
            proposals = read_image_proposals(folder, annotations.images[i])
            objects = np.arange(annotations.start[i], annotations.start[i + 1])
            objects = objects[~annotations.difficult[objects]]
            found.append(overlaps_any(annotations.boxes[objects], proposals))
            boxes += len(proposals)
    hits = np.concatenate([np.zeros(0, bool), *found])
    recall = f", recall {hits.mean():.4f} of {len(hits)} objects at IoU 0.5" if len(hits) else ""
    return f"{len(found)} images, {boxes / max(1, len(found)):.1f} boxes per image{recall}"


def write_figure(image: str, pixels: np.ndarray, path: str) -> None:
    """Write a PNG that shows the regions of an image, uint8 (H, W, 3), while they are merged."""
    encoded, data = cv2.imencode(".png", cv2.cvtColor(draw_region_hierarchy(pixels), cv2.COLOR_RGB2BGR))
    assert encoded
    try:
        with open(path, "wb") as file:
            file.write(data.tobytes())
    except OSError as error:
        raise UserError(f"figure: expected a file that can be written, found {error}") from None
    print(f"{path}: regions of {image}")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Compute missing proposals; return the exit status, 1 if an image cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m tools.proposals", description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True, help="the folder VOCdevkit or its parent")
    parser.add_argument(
        "--sets",
        nargs="+",
        default=["VOC2007/trainval", "VOC2012/trainval", "VOC2007/test"],
        help="image sets; default: %(default)s",
    )
    parser.add_argument("--out", required=True, help="output folder; pass it to a training run as --data.proposals")
    parser.add_argument("--classes", nargs="+", help="names in label order, or a file of them; default: VOC's")
    parser.add_argument(
        "--top_n", type=int, default=2000, help="maximum number of boxes per image; default: %(default)s"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one per core")
    parser.add_argument("--masks", action="store_true", help="use image sets for segmentation and SBD, for DeconvNet")
    parser.add_argument("--sbd", help="with --masks: the folder benchmark_RELEASE; default: beside VOCdevkit")
    parser.add_argument(
        "--exif_orientation",
        choices=("true", "false"),
        default="true",
        help="as --data.exif_orientation of the training run; default: %(default)s",
    )
    parser.add_argument("--figure", help="PNG file for the regions of the first image while they are merged")
    options = parser.parse_args(arguments)
    require_positive(options, "top_n", "workers")
    annotations: DetectionAnnotations | None = None
    readers: dict[str, Callable[[], np.ndarray]] = {}
    exif_orientation = options.exif_orientation == "true"
    if options.masks:
        segmentation = VOCSegmentation(options.root, train=options.sets, sbd=options.sbd)
        files = segmentation.files("train")
        for i in range(len(files)):
            image, mask = (os.path.join(segmentation.devkit, name) for name in (files[i].image, files[i].class_mask))
            readers[files[i].image] = partial(_read_image_of_mask, image, mask, exif_orientation)
    else:
        detection = VOCDetection(
            options.root,
            train=options.sets,
            classes=names_or_file(options.classes),
            exif_orientation=exif_orientation,
        )
        annotations = detection.annotations("train")
        for i in range(len(annotations.images)):
            path, annotated_size = os.path.join(detection.devkit, annotations.images[i]), annotations.annotated_size(i)
            readers[annotations.images[i]] = partial(read_image, path, exif_orientation, annotated_size)
    make_folder("out", options.out)
    names = list(readers)
    if options.figure:
        write_figure(names[0], readers[names[0]](), options.figure)
    missing, reasons = find_missing(options.out, names, options.top_n)
    for line in reasons:
        print(f"recomputing: {line}", file=sys.stderr)
    print(f"{len(names)} images, {len(names) - len(missing)} already have proposals in {options.out}")
    jobs = [(readers[name], proposal_path(options.out, name), options.top_n) for name in missing]
    broken = 0
    for error in track(compute(jobs, min(options.workers, max(1, len(jobs)))), "proposals", total=len(jobs)):
        if error:
            broken += 1
            print(f"no proposals: {error}", file=sys.stderr)
    if annotations is not None:
        print(summarize(options.out, annotations))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
