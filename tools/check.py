"""Check a dataset before a long run: ``python -m tools.check --data ImageNet --data.root DIR``.

Read every image and every mask. Report the number of images, objects or pixels per class and split, people and their
joints, pixel formats and image sizes. Name files that cannot be read, images that are in two splits, and differences
from the expected directory tree. The exit status is 1 if there are problems.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl

from cli.command import command
from cli.messages import FriendlyParser
from datamodules import import_all
from datamodules.classification.base import ClassificationData
from datamodules.detection.voc import VOCDetection
from datamodules.pose.base import PoseData
from datamodules.segmentation.base import VOCMaskData
from datamodules.style.style_images import StyleImages
from tools.dataset_checks.classification import check_classes
from tools.dataset_checks.pose import check_people
from tools.dataset_checks.report import Report
from tools.dataset_checks.style import check_styles
from tools.dataset_checks.voc import check_masks, check_objects

CHECKS: dict[type[pl.LightningDataModule], Callable[[Any, Report], None]] = {
    ClassificationData: check_classes,
    VOCDetection: check_objects,
    VOCMaskData: check_masks,
    PoseData: check_people,
    StyleImages: check_styles,
}


def check(data: pl.LightningDataModule, num_workers: int = 1, progress: bool = False) -> Report:
    """Check all splits of a dataset.

    Args:
        data: a datamodule of one of the classes in `CHECKS`.
        num_workers: processes that read files.
        progress: show a progress bar on standard error.

    Raises:
        DatasetError: no split can be read.
    """
    report = Report(num_workers, progress, getattr(data, "exif_orientation", True))
    check_kind = next(function for kind, function in CHECKS.items() if isinstance(data, kind))
    check_kind(data, report)
    report.add_duplicates()
    return report


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return the exit status: 0 without problems, 1 with problems, 2 if nothing could be checked."""
    import_all()
    parser = FriendlyParser(prog="python -m tools.check", description=__doc__, allow_abbrev=False)
    parser.add_subclass_arguments(tuple(CHECKS), "data", required=True, help="the dataset, as for train.py")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that read files")
    options = parser.parse_args(arguments)
    # Not by the parser, which tries the data with all kinds of `CHECKS` and hides the error of the right one.
    module, _, name = options.data.class_path.rpartition(".")
    data = getattr(importlib.import_module(module), name)(**options.data.init_args.as_dict())
    report = check(data, options.workers, progress=sys.stderr.isatty())
    for line in report.notes:
        print(line)
    for line in report.problems:
        print(f"PROBLEM {line}")
    count = len(report.problems)
    print(f"{count} problem{'s' if count > 1 else ''}" if count else "no problems")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
