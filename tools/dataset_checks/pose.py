"""Check a dataset of people and their joints."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from datamodules.base import Split
from datamodules.pose.base import PoseData
from datamodules.pose.lsp import LSP
from datamodules.pose.people import People
from errors import UserError
from tools.dataset_checks.report import SPLITS, Report


def _readable_splits(data: PoseData, report: Report) -> Iterator[tuple[Split, People]]:
    if isinstance(data, LSP):
        yield from report.readable_splits(data, data.sets, data.missing_sets, data.people)
        return
    for split in SPLITS:
        try:
            yield split, data.people(split)
        except UserError as error:
            if str(error) not in report.problems:
                report.problems.append(str(error))


def check_people(data: PoseData, report: Report) -> None:
    """Count people and labeled joints, and joints outside the image."""
    report.notes.append(f"{len(data.joint_names)} joints")
    checked: set[tuple[str, ...]] = set()  # MPII's test split equals val
    for split, people in _readable_splits(data, report):
        if not len(people):
            report.notes.append(f"{split}: no people")
            continue
        ids = tuple(people.person_id(i) for i in range(len(people)))
        if ids in checked:
            continue
        checked.add(ids)
        joints, per_person = people.labeled.sum(0), people.labeled.sum(1)
        report.notes.append(
            f"{split}: {len(people.images)} images, {len(people)} people, {joints.sum()} labeled joints, "
            f"{per_person.min()} to {per_person.max()} per person, "
            f"{np.isfinite(people.head_size).sum()} people with a head box"
        )
        report.add_counts(data.joint_names, joints)
        report.notes += [f"{split}: {line}" for line in people.warnings()]
        sizes = report.read_images(split, data.folder, people.images)[people.image_index]
        # The image extends half a pixel beyond the centers of its outermost pixels.
        limits = sizes[:, None, ::-1] - 0.5
        readable = (sizes > 0).any(1)[:, None]
        outside = people.labeled & ((people.keypoints < -0.5) | (people.keypoints > limits)).any(-1) & readable
        if outside.any():
            report.notes.append(f"  {outside.sum()} joints of {outside.any(1).sum()} people lie outside the image")
