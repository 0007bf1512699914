"""MPII Human Pose.

Andriluka et al., "2D Human Pose Estimation: New Benchmark and State of the Art Analysis", CVPR 2014.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from datamodules.base import Split
from datamodules.folders import draw_tree, match_ids, summarize_names
from datamodules.pose.base import PoseData
from datamodules.pose.joints import MPII_JOINTS
from datamodules.pose.mpii_annotations import (
    RELEASE_FILE,
    PersonAnnotation,
    read_head_sizes,
    read_json,
    read_release,
)
from datamodules.pose.people import People, read_mat
from datamodules.text import read_lines
from errors import DatasetError

VAL_LIST = "val.txt"
VAL_MODULUS = 10  # without a list, one image in ten is held out


class MPII(PoseData):
    """MPII's release, or one of its JSON conversions::

        root/images/<image>.jpg
        root/mpii_human_pose_v1_u12_1.mat       the release
        root/annot/{train,valid}.json           or the conversions: 22,246 and 2,958 people

    The joints of the benchmark's test images are not public. Evaluation therefore uses held-out training images, and
    ``test`` equals ``val``. No image is in both train and val. The held-out images are:

    - with conversions, those of ``valid.json``: the 2,958 people that papers report on;
    - with the release, those of ``val``: a text file with one image per line, or a .mat with RELEASE_img_index and
      RELEASE_person_index as in the published evaluation code for those 2,958 people (other people on their images are
      in neither split);
    - otherwise those of root/val.txt, or without it the images whose name has a CRC-32 that is a multiple of ten.

    People without objpos, scale or joints are skipped; in validation also those without a head box.

    Args:
        root: parent of ``images``. Only prediction works without it.
        train: the .mat, or the .json of a conversion, absolute or relative to root; null searches the files above.
        val: the list of held-out images (see above), or a .json if ``train`` is one.
        headboxes: head boxes of the people of a conversion's val, in its order: gt_valid.mat or an .npz (see
            `read_head_sizes`). Without it head sizes are nan, and the model measures PCK in place of PCKh.
        **kwargs: see `PoseData`.

    Raises:
        UserError: an option is out of range, or the files differ from the layout.
    """

    joint_names = MPII_JOINTS

    def __init__(
        self,
        root: str | None = None,
        train: str | None = None,
        val: str | None = None,
        headboxes: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.train, self.val, self.headboxes = train, val, headboxes

    def source_name(self, split: Split) -> str | None:
        return "training images" if split == "train" else "held-out training images"

    def people(self, split: Split) -> People:
        evaluation = split != "train"
        requires_head = evaluation and (self.headboxes is not None or not self._uses_json)
        kept, skipped = [], Counter[str]()
        for person, missing in self._annotations(evaluation):
            if requires_head and not missing and not np.isfinite(person.head_size):
                missing = "a head box"
            if missing:
                skipped[missing] += 1
            else:
                kept.append(person)
        return People.pack(kept, len(MPII_JOINTS), skipped)

    def _annotations(self, evaluation: bool) -> Iterator[PersonAnnotation]:
        if self._uses_json:
            yield from self._conversions[evaluation]
            return
        images, people = self._held_out
        for index, found in self._release.items():
            if evaluation and index in images:
                yield from (item for item in found if people is None or (index, item.person.number) in people)
            elif not evaluation and index not in images:
                yield from found

    # --- files --------------------------------------------------------------------------------------------------------

    @cached_property
    def _train_path(self) -> str:
        if self.train is not None:
            return self._path(self.train)
        for name in (RELEASE_FILE, f"mpii_human_pose_v1_u12_2/{RELEASE_FILE}", "annot/train.json"):
            if os.path.isfile(self._path(name)):
                return self._path(name)
        raise DatasetError(
            f"MPII: no annotations\nexpected\n  {self.root}/\n    images/<image>.jpg\n    {RELEASE_FILE}, or "
            f"annot/train.json and annot/valid.json\nfound\n{draw_tree(self.folder)}"
        )

    @property
    def _uses_json(self) -> bool:
        return self._train_path.endswith(".json")

    def _path(self, name: str) -> str:
        path = os.path.join(self.folder, name)
        return path if os.path.exists(path) or not os.path.exists(name) else name

    @cached_property
    def _conversions(self) -> tuple[list[PersonAnnotation], list[PersonAnnotation]]:
        if self.train is not None and self.val is None:
            raise DatasetError(f"val: expected a .json of the people held out of {self._train_path}, found none")
        head_sizes = None if self.headboxes is None else read_head_sizes(self._path(self.headboxes))
        if head_sizes is None:
            rank_zero_warn("MPII: the JSON conversions have no head boxes; set --data.headboxes FILE for PCKh")
        train = read_json(self._train_path, None)
        val = read_json(self._path(self.val or "annot/valid.json"), head_sizes)
        both = sorted({item.person.image for item in val} & {item.person.image for item in train})
        if both:
            rank_zero_warn(f"MPII: {summarize_names(both, 'image')} in both train and val")
        return train, val

    @cached_property
    def _release(self) -> dict[int, list[PersonAnnotation]]:
        return read_release(self._train_path)

    @cached_property
    def _held_out(self) -> tuple[set[int], set[tuple[int, int]] | None]:
        """Indices of the held-out images, and (image, person) of the people to evaluate; None for all people."""
        path = self.val and self._path(self.val)
        if path and path.endswith(".mat"):
            images, people = (
                np.atleast_1d(read_mat(path, f"RELEASE_{kind}_index", f"RELEASE_{kind}_index")).astype(int).ravel() - 1
                for kind in ("img", "person")
            )
            selected = set(zip(images.tolist(), people.tolist(), strict=True))
            unknown = [f"{i + 1}/{k + 1}" for i, k in sorted(selected) if not 0 <= k < len(self._release.get(i, ()))]
            if unknown:
                raise DatasetError(
                    f"{path}: expected people of {self._train_path}, found {summarize_names(unknown, 'image/person')}"
                )
            return set(images.tolist()), selected
        index_of = {
            os.path.basename(people[0].person.image): index for index, people in self._release.items() if people
        }
        if path or os.path.isfile(self._path(VAL_LIST)):
            return self._read_list(path or self._path(VAL_LIST), index_of), None
        return {index for name, index in index_of.items() if zlib.crc32(os.fsencode(name)) % VAL_MODULUS == 0}, None

    def _read_list(self, path: str, index_of: dict[str, int]) -> set[int]:
        if not os.path.isfile(path):
            raise DatasetError(f"val: expected a list of images, found {path}: No such file or directory")
        files = {os.path.splitext(name)[0]: [name] for name in index_of}
        lines = (os.path.basename(line) for line in read_lines(path, file_names=True))
        names = [files[name][0] if name in files else name for name in match_ids(lines, files)]
        unknown = [name for name in names if name not in index_of]
        if unknown:
            raise DatasetError(
                f"{path}: expected training images with people, found {summarize_names(unknown, 'name')}"
            )
        return {index_of[name] for name in names}
