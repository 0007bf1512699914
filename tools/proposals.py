"""Compute Selective Search proposals for a dataset: ``python -m tools.proposals --root VOCdevkit --out DIR``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

import cv2
import numpy as np
import torch
from rich.progress import track
from torchvision.ops import box_iou

from datamodules.detection.voc import Annotations
from datamodules.images import read_image
from datamodules.proposals import path_of, read_boxes, read_proposals, write_boxes
from errors import BrokenImageError, DatasetError, UserError


def is_found(objects: np.ndarray, boxes: np.ndarray, iou: float = 0.5) -> np.ndarray:
    """Whether some box overlaps each object by ``iou`` or more: bool (M,) for float32 (M,4) and (N,4) xyxy."""
    return (box_iou(torch.from_numpy(objects), torch.from_numpy(boxes)) >= iou).any(1).numpy()


def propose(picture: str, path: str, top: int) -> None:
    """Computes an image's boxes and writes them."""
    # The one place where a datamodule's file asks for a system's: no loader comes here, they read what was written.
    from lightning_modules.components.selective_search import selective_search

    write_boxes(path, selective_search(read_image(picture), top), top)


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def compute(jobs: Sequence[tuple[str, str, int]], workers: int) -> Iterator[str | None]:
    """Runs `propose` on each; yields, as they are done, None or what is wrong with the image.

    Raises:
        RuntimeError: a worker ended before its work did.
    """
    if workers == 1:
        for job in jobs:
            yield _error_of(job)
        return
    # On Ctrl-C what waits is canceled; the few images that were handed to the workers are finished and written.
    # Fresh processes: a forked one inherits locks that this one's threads may hold.
    fresh = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, fresh, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        for future in as_completed([pool.submit(_error_of, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was ended from outside, for want of memory perhaps: --workers with a smaller number; "
            "the same command goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _error_of(job: tuple[str, str, int]) -> str | None:
    try:
        propose(*job)
    except BrokenImageError as error:
        return str(error)
    return None


def left_to_do(folder: str, names: Sequence[str], top: int) -> tuple[list[str], list[str]]:
    """Images whose boxes must be computed, and what is wrong with the files of those of them that have one."""
    jobs, remarks = [], []
    for name in names:
        try:
            found = read_boxes(path_of(folder, name))[1]
            if found == top:
                continue
            remarks.append(f"{path_of(folder, name)}: at most {found} boxes were asked for, now {top}")
        except FileNotFoundError:
            pass
        except DatasetError as error:
            remarks.append(str(error))
        jobs.append(name)
    return jobs, remarks


def summary(folder: str, annotations: Annotations) -> str:
    """How many boxes there are, and the part of the objects, but for the difficult ones, that one of them overlaps."""
    boxes, found = 0, []
    for i in range(len(annotations.images)):
        with suppress(FileNotFoundError):
            proposals = read_proposals(folder, annotations.images[i])
            objects = np.arange(annotations.start[i], annotations.start[i + 1])
            objects = objects[~annotations.difficult[objects]]
            found.append(is_found(annotations.boxes[objects], proposals))
            boxes += len(proposals)
    hits = np.concatenate([np.zeros(0, bool), *found])
    recall = f", recall {hits.mean():.4f} of {len(hits)} objects at IoU 0.5" if len(hits) else ""
    return f"{len(found)} images, {boxes / max(1, len(found)):.1f} boxes each on average{recall}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes what is missing; returns the exit status."""
    from datamodules.detection.voc import VOCDetection
    from datamodules.segmentation.voc import VOCSegmentation

    parser = argparse.ArgumentParser(prog="python -m tools.proposals", description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True, help="the folder VOCdevkit, or the one that it lies in")
    parser.add_argument("--sets", nargs="+", default=["VOC2007/trainval", "VOC2012/trainval", "VOC2007/test"])
    parser.add_argument("--out", required=True, help="folder for the boxes: --data.proposals of a training run")
    parser.add_argument("--classes", nargs="+", help="names in label order, or a file of them; default: VOC's")
    parser.add_argument("--top", type=int, default=2000, help="boxes of an image at most; default: %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one a core")
    parser.add_argument("--masks", action="store_true", help="sets of ImageSets/Segmentation and SBD, for DeconvNet")
    parser.add_argument("--sbd", help="with --masks: benchmark_RELEASE; default: the one beside VOCdevkit")
    parser.add_argument("--picture", help="PNG to draw the first image's regions in, as they grow")
    options = parser.parse_args(arguments)
    classes = options.classes
    if classes is not None and len(classes) == 1 and os.path.isfile(classes[0]):
        classes = classes[0]
    try:
        for name in ("top", "workers"):
            if getattr(options, name) < 1:
                raise UserError(f"{name}: expected 1 or more, found {getattr(options, name)}")
        annotations: Annotations | None = None
        if options.masks:
            masks = VOCSegmentation(options.root, train=options.sets, sbd=options.sbd)
            devkit, images = masks.devkit, masks.files("train").pictures
        else:
            data = VOCDetection(options.root, train=options.sets, classes=classes)
            annotations = data.annotations("train")
            devkit, images = data.devkit, annotations.images
        names = list(dict.fromkeys(images[i] for i in range(len(images))))
        if options.picture:
            draw(os.path.join(devkit, names[0]), options.picture)
        left, remarks = left_to_do(options.out, names, options.top)
        for line in remarks:
            print(f"computed anew: {line}", file=sys.stderr)
        jobs = [(os.path.join(devkit, name), path_of(options.out, name), options.top) for name in left]
        print(f"{len(names)} images, {len(names) - len(left)} have their boxes in {options.out} already")
        broken = 0
        try:
            for error in track(compute(jobs, min(options.workers, max(1, len(jobs)))), "proposals", total=len(jobs)):
                if error:
                    broken += 1
                    print(f"no boxes: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("stopped: the same command goes on", file=sys.stderr)
            return 130
        if annotations is not None:
            print(summary(options.out, annotations))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if broken else 0


def draw(picture: str, path: str) -> None:
    """Draws an image's regions as they grow, see `selective_search.draw_growth`, as a PNG."""
    from lightning_modules.components.selective_search import draw_growth

    coded, data = cv2.imencode(".png", cv2.cvtColor(draw_growth(read_image(picture)), cv2.COLOR_RGB2BGR))
    assert coded
    with open(path, "wb") as file:
        file.write(data.tobytes())
    print(f"{path}: the regions of {picture}")


if __name__ == "__main__":
    sys.exit(main())
