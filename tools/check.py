"""Examines a dataset before a long run: ``python -m tools.check --data ImageNet --data.root DIR``.

Every image is read, and every mask. The report counts images, objects or pixels a class and split, people and their
joints, kinds and sizes; it names what cannot be read, what lies in two splits and what differs from the expected tree.
The exit status is 1 where there is a problem.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.progress import track

from cli.messages import FriendlyParser
from datamodules import import_all
from datamodules.base import Split
from datamodules.classification.base import ClassificationData
from datamodules.detection.voc import VOCDetection
from datamodules.folders import PackedStrings
from datamodules.images import EncodedImage, image_size
from datamodules.pose.base import PoseData
from datamodules.segmentation.masks import count_ids, masks_and_boxes, read_mask, read_objects
from datamodules.segmentation.voc import Files, MaskTree
from datamodules.style.style_images import PairedDataset, StyleImages
from datamodules.transforms import VOID
from errors import BrokenImageError, DatasetError

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SHOWN = 20  # lines of one kind; the rest is counted

T = TypeVar("T")


class Finding(NamedTuple):
    """What one image turned out to be.

    Attributes:
        mode: kind of pixels (``RGB``, ``L``, ``CMYK``, ...), empty if unreadable.
        height, width: in pixels.
        digest: 16 bytes that stand for the decoded pixels.
        error: why it cannot be read, or nothing.
        warning: what the decoder found odd in a file that it could read.
    """

    mode: str
    height: int
    width: int
    digest: bytes
    error: str = ""
    warning: str = ""


def examine(path: str) -> Finding:
    """Reads one image whole."""
    try:
        image = EncodedImage(path)
        pixels = image.decode()
    except BrokenImageError as error:
        return Finding("", 0, 0, b"", error=error.reason)
    digest = hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes(), digest_size=16).digest()
    return Finding(image.mode, image.height, image.width, digest, warning=image.warning or "")


@dataclass
class Report:
    """What was found.

    Attributes:
        problems: lines that say what has to be put right before a run.
        notes: lines that a user should know.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Sizes = list[tuple[int, int]]  # (height, width)
Owners = dict[bytes, list[tuple[str, str, str]]]  # of a digest: split, class, name


def check(
    data: ClassificationData | VOCDetection | MaskTree | PoseData | StyleImages,
    workers: int = 1,
    progress: bool = False,
) -> Report:
    """Examines all splits of a dataset.

    Args:
        data: the dataset.
        workers: processes that read.
        progress: show a bar on stderr.

    Raises:
        DatasetError: the tree is not of this kind at all; there is nothing to examine.
    """
    report = Report()
    owners: Owners = defaultdict(list)
    read = partial(_read_pictures, report=report, owners=owners, workers=workers, progress=progress)
    if isinstance(data, VOCDetection):
        _check_objects(data, report, read)
    elif isinstance(data, MaskTree):
        _check_masks(data, report, read, workers, progress)
    elif isinstance(data, PoseData):
        _check_people(data, report, read)
    elif isinstance(data, StyleImages):
        _check_styles(data, report, read)
    else:
        _check_classes(data, report, read)
    _check_duplicates(owners, report)
    return report


def _check_styles(data: StyleImages, report: Report, read: Callable[..., Sizes]) -> None:
    train, val = data.dataset("train"), data.dataset("val")
    assert isinstance(train, PairedDataset)
    assert isinstance(val, PairedDataset)
    seen: set[str] = set()
    for kind, title, paths in (
        ("content", "contents to train on", train.contents),
        ("content", "contents to validate on", val.contents),
        ("style", "styles", train.styles),
        ("style", "styles to validate on", val.styles),
    ):
        # Few contents, and styles as a rule, are the same in both.
        new = [paths[i] for i in range(len(paths)) if paths[i] not in seen]
        seen.update(new)
        if new:
            report.notes.append(f"{title}: {len(new)} images")
            read("", PackedStrings(new), [kind] * len(new), title)


def _check_classes(data: ClassificationData, report: Report, read: Callable[..., Sizes]) -> None:
    report.notes.append(f"{len(data.classes or ())} classes")
    seen: set[str] = set()
    for split in SPLITS:
        title, absent = data.title(split), data.absent(split)
        if title in seen:
            continue
        seen.add(title)
        if absent:
            report.notes.append(f"{split}: {absent}")
            continue
        report.problems += data.problems(split)
        report.notes += [line for line in data.oddities(split) if line not in report.notes]
        listing = data.listing(split)
        if len(listing.names):
            report.notes.append(f"{title}: {listing.counts.sum()} images, {_spread(listing.counts, listing.classes)}")
            report.notes += _counts(listing.counts, listing.classes)
            classes = [listing.classes[label] for label in listing.labels]
            read(data.folder, listing.names, classes, title)


def _check_objects(data: VOCDetection, report: Report, read: Callable[..., Sizes]) -> None:
    report.notes.append(f"{len(data.class_names)} classes")
    seen: set[tuple[str, ...]] = set()
    for split in SPLITS:
        title = " + ".join(data.sets[split])
        if data.sets[split] in seen:
            continue
        seen.add(data.sets[split])
        try:
            annotations = data.annotations(split)
        except DatasetError as error:
            report.problems.append(str(error))
            continue
        counts = np.bincount(annotations.labels, minlength=len(data.class_names))
        report.notes.append(
            f"{title}: {len(annotations.images)} images, {counts.sum()} objects, "
            f"{_spread(counts, data.class_names)}, {annotations.difficult.sum()} of them difficult, "
            f"{(np.diff(annotations.start) == 0).sum()} images without one"
        )
        report.notes += _counts(counts, data.class_names)
        report.problems += [f"{title}: {line}" for line in annotations.remarks()]
        # The same image in two splits is a problem, whatever is on it.
        read(data.devkit, annotations.images, [""] * len(annotations.images), title)


class MaskFinding(NamedTuple):
    """What one image's masks turned out to be.

    Attributes:
        counts: int64 (256,), pixels of each id; of objects, how many there are of each label.
        error: what is wrong with them, or nothing.
    """

    counts: np.ndarray
    error: str = ""


def examine_masks(files: Files, root: str, classes: int) -> MaskFinding:
    """Reads one image's masks whole; of an image that cannot be read itself nothing is said here."""
    nothing = np.zeros(256, np.int64)
    try:
        size = image_size(os.path.join(root, files.picture))
    except BrokenImageError:
        return MaskFinding(nothing)
    path = os.path.join(root, files.classes)
    try:
        if not files.objects:
            return MaskFinding(count_ids(read_mask(path, classes, size)))
        _, _, labels = masks_and_boxes(*read_objects(os.path.join(root, files.objects), path, classes, size))
        return MaskFinding(np.bincount(labels, minlength=256))
    except (BrokenImageError, DatasetError) as error:
        return MaskFinding(nothing, str(error))


def _check_masks(data: MaskTree, report: Report, read: Callable[..., Sizes], workers: int, progress: bool) -> None:
    names = data.class_names
    report.notes.append(f"{len(names)} classes")
    seen: set[tuple[str, ...]] = set()
    for split in SPLITS:
        title = " + ".join(data.sets[split])
        if data.sets[split] in seen:
            continue
        seen.add(data.sets[split])
        try:
            files = data.files(split)
        except DatasetError as error:
            report.problems.append(str(error))
            continue
        examined = partial(examine_masks, root=data.devkit, classes=len(names))
        findings = _examine_all([files[i] for i in range(len(files))], workers, examined)
        found = list(_bar(findings, len(files), f"reading masks of {title}", progress))
        report.problems += _shorten([finding.error for finding in found if finding.error], "wrong masks")
        counts = np.stack([finding.counts for finding in found])
        totals, pictures = counts.sum(0), (counts > 0).sum(0)
        if data.with_objects:
            without = int((counts.sum(1) == 0).sum())
            report.notes.append(
                f"{title}: {len(files)} images, {totals.sum()} objects, {_spread(totals[: len(names)], names)}, "
                f"{without} images without one"
            )
            report.notes += _counts(totals[: len(names)], names)
        else:
            share = totals / max(1, totals.sum())
            report.notes.append(f"{title}: {len(files)} images, {totals.sum()} pixels, {share[VOID]:.2%} of them void")
            report.notes += [
                f"  {name}: {totals[i]} pixels ({share[i]:.2%}) in {pictures[i]} images" for i, name in enumerate(names)
            ]
        read(data.devkit, files.pictures, [""] * len(files), title)


def _check_people(data: PoseData, report: Report, read: Callable[..., Sizes]) -> None:
    names = data.joint_names
    report.notes.append(f"{len(names)} joints")
    # MPII's test split is its val, and LSP's usually is: what is the same is examined once.
    seen: set[tuple[str, ...]] = set()
    for split in SPLITS:
        try:
            people = data.people(split)
        except DatasetError as error:
            report.problems.append(str(error))
            continue
        held = tuple(people.name(i) for i in range(len(people)))
        if held in seen or not held:
            report.notes += [] if held else [f"{split}: no people"]
            continue
        seen.add(held)
        counts, each = people.labeled.sum(0), people.labeled.sum(1)
        heads = np.isfinite(people.head_size).sum()
        report.notes.append(
            f"{split}: {len(people.images)} images, {len(people)} people, {counts.sum()} labeled joints, "
            f"{each.min()} to {each.max()} a person, {heads} people with a head box"
        )
        report.notes += _counts(counts, names)
        report.notes += [f"{split}: {line}" for line in people.remarks()]
        sizes = np.array(read(data.folder, people.images, [""] * len(people.images), split))[people.picture]
        # What an image shows reaches half a pixel beyond the centers of its outermost ones.
        limits = sizes[:, None, ::-1] - 0.5
        outside = (
            people.labeled
            & ((people.keypoints < -0.5) | (people.keypoints > limits)).any(-1)
            & (sizes > 0).any(1)[:, None]
        )
        if outside.any():
            report.notes.append(f"  {outside.sum()} joints of {outside.any(1).sum()} people lie outside of the image")


def _spread(counts: np.ndarray, classes: Sequence[str]) -> str:
    few, many = int(np.argmin(counts)), int(np.argmax(counts))
    least, most = (f"{counts[i]} ({classes[i]})" for i in (few, many))
    return f"{least} to {most} a class" if counts[few] < counts[many] else f"{counts[few]} a class"


def _counts(counts: np.ndarray, classes: Sequence[str]) -> list[str]:
    if len(classes) > SHOWN:
        return []
    return [f"  {name}: {count}" for name, count in zip(classes, counts, strict=True)]


def _read_pictures(
    folder: str,
    names: PackedStrings,
    classes: Sequence[str],
    title: str,
    report: Report,
    owners: Owners,
    workers: int,
    progress: bool,
) -> Sizes:
    """Examines images; gives the (height, width) of each, (0, 0) where it cannot be read."""
    modes: Counter[str] = Counter()
    sizes: Sizes = []
    each: Sizes = []
    broken: list[str] = []
    odd: list[str] = []
    paths = [os.path.join(folder, names[i]) for i in range(len(names))]
    for i, finding in enumerate(_bar(_examine_all(paths, workers, examine), len(paths), f"reading {title}", progress)):
        name = names[i]
        each.append((finding.height, finding.width))
        if finding.error:
            broken.append(f"{name}: {finding.error}")
            continue
        modes[finding.mode] += 1
        sizes.append((finding.height, finding.width))
        if finding.warning:
            odd.append(f"{name}: read, but the decoder says: {finding.warning}")
        owners[finding.digest].append((title, classes[i], name))
    report.problems += _shorten(broken, "unreadable images")
    report.notes += _shorten(odd, "odd images")
    if sizes:
        report.notes.append("  kinds: " + ", ".join(f"{mode} {count}" for mode, count in modes.most_common()))
        heights, widths = np.array(sizes).T
        spread = f"{widths.min()}x{heights.min()} to {widths.max()}x{heights.max()}"
        report.notes.append(f"  width x height: {spread}, median {np.median(widths):g}x{np.median(heights):g}")
    return each


def _check_duplicates(owners: Owners, report: Report) -> None:
    across: list[str] = []
    contrary: list[str] = []
    repeated = 0
    for copies in owners.values():
        if len(copies) < 2:
            continue
        names = ", ".join(name for _, _, name in copies[:4])
        if len({title for title, _, _ in copies}) > 1:
            across.append(f"the same image in several splits: {names}")
        elif len({label for _, label, _ in copies}) > 1:
            contrary.append(f"the same image in several classes: {names}")
        else:
            repeated += len(copies) - 1
    report.problems += _shorten(across, "images in several splits") + _shorten(contrary, "images in several classes")
    if repeated:
        report.notes.append(f"{repeated} images repeat another of their class and split")


def _shorten(lines: list[str], kind: str) -> list[str]:
    more = [f"{len(lines)} {kind} in all, {len(lines) - SHOWN} not shown"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


def _bar(findings: Iterator[T], total: int, title: str, progress: bool) -> Iterator[T]:
    if not progress:
        return findings
    return iter(track(findings, title, total=total, transient=True))


def _examine_all(items: list[Any], workers: int, function: Callable[[Any], T]) -> Iterator[T]:
    if workers <= 1:
        yield from map(function, items)
        return
    # Ctrl-C reaches the whole group of processes: the workers leave it to this one, which ends them.
    with multiprocessing.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap(function, items, chunksize=32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 clean, 1 problems, 2 nothing to examine, 130 interrupted."""
    import_all()
    parser = FriendlyParser(prog="python -m tools.check", description=__doc__, allow_abbrev=False)
    parser.add_subclass_arguments(
        (ClassificationData, VOCDetection, MaskTree, PoseData, StyleImages),
        "data",
        required=True,
        help="the dataset, as for train.py",
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that read")
    options = parser.parse_args(arguments)
    try:
        data = parser.instantiate(options).data
        report = check(data, options.workers, progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:  # jsonargparse wraps what the dataset's class raises
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        print(f"error: {cause}", file=sys.stderr)
        return 2
    for line in report.notes:
        print(line)
    for line in report.problems:
        print(f"PROBLEM {line}")
    print(f"{len(report.problems)} problems" if report.problems else "no problems")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
