"""Check folders of content images and style images."""

from __future__ import annotations

from datamodules.image_dataset import PackedStrings
from datamodules.style.style_images import PairedDataset, StyleImages
from tools.dataset_checks.report import Report


def check_styles(data: StyleImages, report: Report) -> None:
    """Read all content images and style images once."""
    train, val = data.dataset("train"), data.dataset("val")
    assert isinstance(train, PairedDataset)
    assert isinstance(val, PairedDataset)
    checked: set[str] = set()
    for kind, title, paths in (
        ("content", "content images for training", train.contents),
        ("content", "content images for validation", val.contents),
        ("style", "style images", train.styles),
        ("style", "style images for validation", val.styles),
    ):
        # Few content images, and usually the style images, serve both splits.
        new = [paths[i] for i in range(len(paths)) if paths[i] not in checked]
        checked.update(new)
        if new:
            report.notes.append(f"{title}: {len(new)} images")
            report.read_images(title, "", PackedStrings(new), [kind] * len(new))
