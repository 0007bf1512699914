"""Read the images of a dataset in parallel and collect what `tools.check` reports."""

from __future__ import annotations

import hashlib
import inspect
import multiprocessing
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from rich.progress import track

from datamodules.base import Split, VisionDataModule
from datamodules.image_dataset import PackedStrings
from datamodules.images import EncodedImage
from datamodules.orientation import Size
from errors import BrokenImageError, UserError

SPLITS: tuple[Split, ...] = ("train", "val", "test")
MAX_LINES = 20  # of one kind of problem; more are only counted

T = TypeVar("T")
Item = TypeVar("Item")


class ImageFacts(NamedTuple):
    """Facts about one image.

    Attributes:
        mode: pixel format (``RGB``, ``L``, ``CMYK``, ...); empty if unreadable.
        height: in pixels.
        width: in pixels.
        digest: hash of the decoded pixels, 16 bytes.
        error: why the image cannot be read; empty if it can.
        warning: irregularity of a file that can be read; empty if there is none.
        orientation: EXIF orientation, 1 to 8; 1 if there is none.
        upright: whether the EXIF orientation is applied.
    """

    mode: str
    height: int
    width: int
    digest: bytes
    error: str = ""
    warning: str = ""
    orientation: int = 1
    upright: bool = False


def read_facts(image_and_size: tuple[str, Size | None], exif_orientation: bool) -> ImageFacts:
    """Decode one image as training does; see `EncodedImage` for its annotated size and ``exif_orientation``."""
    path, annotated_size = image_and_size
    try:
        image = EncodedImage(path, exif_orientation, annotated_size)
        pixels = image.decode()
    except BrokenImageError as error:
        return ImageFacts("", 0, 0, b"", error=error.reason)
    digest = hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes(), digest_size=16).digest()
    orientation, warning = image.header.orientation, image.warning or ""
    return ImageFacts(image.mode, image.height, image.width, digest, "", warning, orientation, image.upright)


class Report:
    """Collects problems and notes about a dataset.

    Args:
        num_workers: processes that read files.
        progress: show a progress bar on standard error.
        exif_orientation: apply the EXIF orientation where annotated sizes do not tell.

    Attributes:
        problems: lines about what to fix before a training run.
        notes: lines of statistics and minor irregularities.
    """

    def __init__(self, num_workers: int = 1, progress: bool = False, exif_orientation: bool = True) -> None:
        self.num_workers, self.progress, self.exif_orientation = num_workers, progress, exif_orientation
        self.problems: list[str] = []
        self.notes: list[str] = []
        # {digest: (title, class, name) of each image with these pixels}
        self._copies: dict[bytes, list[tuple[str, str, str]]] = defaultdict(list)

    def add_problems(self, lines: list[str], kind: str) -> None:
        """Add the first 20 lines of one kind and the number of all others."""
        self.problems += _shorten(lines, kind)

    def add_counts(self, names: Sequence[str], counts: np.ndarray) -> None:
        """Note the count of each name if there are at most 20 names."""
        if len(names) <= MAX_LINES:
            self.notes += [f"  {name}: {count}" for name, count in zip(names, counts, strict=True)]

    def map(self, function: Callable[[Item], T], items: Sequence[Item], title: str) -> list[T]:
        """Apply a picklable function to all items, in parallel and with a progress bar."""
        if self.num_workers <= 1:
            return list(self._track(map(function, items), len(items), title))
        # Ctrl-C reaches all processes of the group. Workers ignore it, and this process ends them.
        with multiprocessing.Pool(self.num_workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            return list(self._track(pool.imap(function, items, chunksize=32), len(items), title))

    def _track(self, results: Iterable[T], total: int, title: str) -> Iterable[T]:
        return track(results, title, total=total, transient=True) if self.progress else results

    def readable_splits(
        self,
        data: VisionDataModule,
        sets: Mapping[str, Sequence[str]],
        missing_sets: Callable[[Split], list[str]],
        read: Callable[[Split], T],
    ) -> Iterator[tuple[Split, T]]:
        """Read each different split, and report those that cannot be read.

        ``test`` often equals ``val``. If the user names the sets of a split, missing sets of the other splits' defaults
        are notes, not problems: a custom dataset has no VOC2007/test.

        Args:
            data: a datamodule with the options ``train``, ``val`` and ``test``.
            sets: the sets of each split.
            missing_sets: returns the sets of a split that do not exist.
            read: reads a split, or raises a UserError.

        Yields:
            The first of equal splits, and what ``read`` returns for it.
        """
        equal: dict[tuple[str, ...], list[Split]] = {}
        for split in SPLITS:
            equal.setdefault(tuple(sets[split]), []).append(split)
        notes, problems, given = [], [], False
        for splits in equal.values():
            is_default = all(_is_default(data, split) for split in splits)
            try:
                content = read(splits[0])
            except UserError as error:
                if is_default and (missing := missing_sets(splits[0])):
                    options = " and ".join(f"--data.{split}" for split in splits)
                    found = f"{' + '.join(missing)} (the default) not present"
                    notes.append(f"{', '.join(splits)}: {found}; set {options} if you need it")
                    problems.append(str(error))
                else:
                    self.problems.append(str(error))
                continue
            given = given or not is_default
            yield splits[0], content
        self.notes += notes if given else []
        self.problems += problems if not given else []

    def read_images(
        self,
        title: str,
        folder: str,
        names: PackedStrings,
        classes: Sequence[str] | None = None,
        annotated_sizes: Sequence[Size | None] | None = None,
    ) -> np.ndarray:
        """Decode all images of a split and report unreadable ones, pixel formats and sizes.

        Args:
            title: name of the split.
            folder: folder that the names are relative to.
            names: paths of N images.
            classes: N classes, for images that are in several of them; None if images have no class.
            annotated_sizes: N sizes (height, width) that the annotations give for the images, None for an image without
                one; None if there are no annotations.

        Returns:
            (height, width) of each image, int64 (N, 2); zero if unreadable.
        """
        images = [
            (os.path.join(folder, names[i]), annotated_sizes[i] if annotated_sizes else None) for i in range(len(names))
        ]
        facts = self.map(partial(read_facts, exif_orientation=self.exif_orientation), images, f"reading {title}")
        for i, fact in enumerate(facts):
            if not fact.error:
                self._copies[fact.digest].append((title, classes[i] if classes else "", names[i]))
        self.add_problems([f"{names[i]}: {f.error}" for i, f in enumerate(facts) if f.error], "unreadable images")
        warnings = [f"{names[i]}: readable, but: {f.warning}" for i, f in enumerate(facts) if f.warning]
        self.notes += _shorten(warnings, "irregular images")
        sizes = np.array([(fact.height, fact.width) for fact in facts], np.int64).reshape(-1, 2)
        readable = [not fact.error for fact in facts]
        if any(readable):
            modes = Counter(fact.mode for fact in facts if not fact.error)
            self.notes.append("  pixel formats: " + ", ".join(f"{mode} {count}" for mode, count in modes.most_common()))
            oriented = [fact.upright for fact in facts if fact.orientation != 1]
            if oriented:
                applied = f"applied to {sum(oriented)} of {len(oriented)} images that have one"
                self.notes.append(f"  EXIF orientation: {applied}")
            heights, widths = sizes[readable].T
            extent = f"{widths.min()}x{heights.min()} to {widths.max()}x{heights.max()}"
            self.notes.append(f"  width x height: {extent}, median {np.median(widths):g}x{np.median(heights):g}")
        return sizes

    def add_duplicates(self) -> None:
        """Report identical images in several splits or classes, and count the others."""
        across_splits: list[str] = []
        across_classes: list[str] = []
        repeated = 0
        for copies in self._copies.values():
            names = ", ".join(name for _, _, name in copies[:4])
            if len({title for title, _, _ in copies}) > 1:
                across_splits.append(f"the same image in several splits: {names}")
            elif len({label for _, label, _ in copies}) > 1:
                across_classes.append(f"the same image in several classes: {names}")
            else:
                repeated += len(copies) - 1
        self.add_problems(across_splits, "images in several splits")
        self.add_problems(across_classes, "images in several classes")
        if repeated:
            subject = "1 image repeats" if repeated == 1 else f"{repeated} images repeat"
            self.notes.append(f"{subject} another of their class and split")


def _is_default(data: VisionDataModule, option: str) -> bool:
    """Return whether an option has its default, which is that of the first class that has the option."""
    for cls in type(data).__mro__:
        parameter = inspect.signature(vars(cls)["__init__"]).parameters.get(option) if "__init__" in vars(cls) else None
        if parameter is not None:
            return tuple(data.hparams[option]) == tuple(parameter.default)
    return False


def count_range(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Describe the smallest and largest count: ``3 (cat) to 90 (dog) per class``."""
    i, j = int(np.argmin(counts)), int(np.argmax(counts))
    if counts[i] == counts[j]:
        return f"{counts[i]} per class"
    return f"{counts[i]} ({classes[i]}) to {counts[j]} ({classes[j]}) per class"


def _shorten(lines: list[str], kind: str) -> list[str]:
    more = [f"{len(lines)} {kind} in total, {len(lines) - MAX_LINES} not shown"] if len(lines) > MAX_LINES else []
    return lines[:MAX_LINES] + more
