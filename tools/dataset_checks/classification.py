"""Check a dataset with one class per image."""

from __future__ import annotations

from datamodules.classification.base import ClassificationData
from errors import UserError
from tools.dataset_checks.report import SPLITS, Report, count_range


def check_classes(data: ClassificationData, report: Report) -> None:
    """Count images per class, and compare the folders to the expected tree.

    Raises:
        UserError: no split can be read.
    """
    report.notes.append(f"{len(data.classes or ())} classes")
    checked: set[str] = set()
    errors: dict[str, UserError] = {}
    readable = False
    for split in SPLITS:
        title, missing = data.source_name(split), data.missing_source(split)
        if title in checked:
            continue
        checked.add(title)
        if missing:
            report.notes.append(f"{split}: {missing}")
            continue
        try:
            report.problems += data.problems(split)
            report.notes += [line for line in data.notes(split) if line not in report.notes]
            listing = data.listing(split)
        except UserError as error:
            errors[str(error)] = error
            continue
        readable = True
        if len(listing.names):
            counts = listing.counts
            report.notes.append(f"{title}: {counts.sum()} images, {count_range(counts, listing.classes)}")
            report.add_counts(listing.classes, counts)
            classes = [listing.classes[label] for label in listing.labels]
            report.read_images(title, data.folder, listing.names, classes)
    if errors and not readable:
        raise next(iter(errors.values()))
    report.problems += errors
