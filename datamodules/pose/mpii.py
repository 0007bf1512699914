"""MPII Human Pose (Andriluka et al. 2014): the release's .mat with all its irregularities, and its JSON conversions."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from datamodules.base import Split
from datamodules.folders import some, tree
from datamodules.pose.base import People, Person, PoseData, read_mat
from errors import DatasetError, UserError

MPII_JOINTS = [
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax",
    "upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow",
    "left_wrist",
]  # fmt: skip

MAT = "mpii_human_pose_v1_u12_1.mat"
VAL_LIST = "val.txt"
SHARE = 10  # one of so many images is held out where nothing says which

HEAD = 0.6  # of the diagonal of the head's box is PCKh's unit (the benchmark's own evaluation code)
PERSON = 200  # pixels that a person of scale 1 is high
# The square is a quarter larger than the person and lies a little lower, so that feet are in it (pose-hg-train).
ENLARGE, LOWER = 1.25, 15


class Annotation(NamedTuple):
    """A person of a file, and what it lacks to be used, or nothing."""

    person: Person
    lacks: str


def to_person(
    image: str,
    number: int,
    objpos: tuple[float, float] | None,
    scale: float | None,
    points: dict[int, tuple[float, float]],
    head_size: float | None,
) -> Annotation:
    """From what a file says, counted from 1, to a `Person`.

    Args:
        image: path of the image relative to the dataset's root.
        number: which of the image's people this is.
        objpos: (x, y) of about the middle of the person.
        scale: height of the person in 200 pixels.
        points: {joint: (x, y)} of those that are annotated.
        head_size: in pixels.
    """
    keypoints, labeled = np.zeros((len(MPII_JOINTS), 2)), np.zeros(len(MPII_JOINTS), bool)
    for joint, point in points.items():
        keypoints[joint], labeled[joint] = np.subtract(point, 1), True
    labeled &= np.isfinite(keypoints).all(1)
    if objpos is None or scale is None or not (np.isfinite([*objpos, scale]).all() and scale > 0):
        return Annotation(Person(image, number, (0.0, 0.0), 1.0, keypoints, labeled, float("nan")), "objpos or scale")
    center = objpos[0] - 1, objpos[1] - 1 + LOWER * scale
    head = head_size if head_size is not None and head_size > 0 else float("nan")
    person = Person(image, number, center, PERSON * scale * ENLARGE, keypoints, labeled, head)
    return Annotation(person, "" if labeled.any() else "joints")


# --- the release --------------------------------------------------------------------------------------------------


def read_release(path: str) -> dict[int, list[Annotation]]:
    """All people of the training images: {index of the image in the release: its people}.

    A joint is labeled where it is among a person's points, whatever their ``is_visible`` says: hidden joints are
    annotated, and count.

    Raises:
        DatasetError: the file is not MATLAB's, not MPII's, or an annotation is not as expected.
    """
    release = read_mat(path, "RELEASE", f"the struct RELEASE of MPII's {MAT}")
    pictures, training = _items(_get(release, "annolist")), np.atleast_1d(_get(release, "img_train"))
    if not pictures or len(pictures) != training.size:
        raise DatasetError(
            f"{path}: expected RELEASE.annolist and RELEASE.img_train of MPII's {MAT}, of one length, "
            f"found {len(pictures)} and {0 if training.dtype == object else training.size}"
        )
    people: dict[int, list[Annotation]] = {}
    for index in np.flatnonzero(training.ravel()).tolist():
        image = _get(_get(pictures[index], "image"), "name")
        if not isinstance(image, str):
            raise DatasetError(f"{path}: annolist({index + 1}) has no image.name")
        found = _items(_get(pictures[index], "annorect"))
        try:
            people[index] = [_person(f"images/{image}", number, rect) for number, rect in enumerate(found)]
        except ValueError as error:
            raise DatasetError(f"{path}: {image}: {error}") from None
    return people


def _person(image: str, number: int, rect: Any) -> Annotation:
    points: dict[int, tuple[float, float]] = {}
    for point in _items(_get(_get(rect, "annopoints"), "point")):
        joint, x, y = (_number(_get(point, name)) for name in ("id", "x", "y"))
        if joint is None or joint not in range(len(MPII_JOINTS)):
            raise UserError(f"person {number + 1} has a joint with the id {joint}, expected 0 to 15")
        if x is not None and y is not None:
            points.setdefault(int(joint), (x, y))
    objpos, scale = _get(rect, "objpos"), _number(_get(rect, "scale"))
    center = _number(_get(objpos, "x")), _number(_get(objpos, "y"))
    x1, y1, x2, y2 = (_number(_get(rect, name)) for name in ("x1", "y1", "x2", "y2"))
    head = None if x1 is None or y1 is None or x2 is None or y2 is None else HEAD * float(np.hypot(x2 - x1, y2 - y1))
    return to_person(image, number, None if None in center else center, scale, points, head)  # type: ignore[arg-type]


def _get(struct: Any, name: str) -> Any:
    """A field; None where it is absent or empty, as it may be in any of MPII's structs."""
    value = getattr(struct, name, None)
    return None if isinstance(value, np.ndarray) and not value.size else value


def _items(value: Any) -> list[Any]:
    """The structs of an array, which is none at all where it was empty and a bare struct where it held one."""
    return [] if value is None else list(np.atleast_1d(value).ravel())


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


# --- conversions --------------------------------------------------------------------------------------------------


def read_json(path: str, head_sizes: np.ndarray | None) -> list[Annotation]:
    """The people of a conversion: a list of {image, center, scale, joints (16,2), joints_vis (16)}, counted from 1.

    ``joints_vis`` means labeled there.

    Args:
        path: the file.
        head_sizes: float (N,), one a person in the file's order; None where there are none.

    Raises:
        DatasetError: the file is not of this form; one line names the person and what is wrong.
    """
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: expected a JSON conversion of MPII, found {error}") from None
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"{path}: expected a list of {_FORM}, found {str(entries)[:60]}")
    if head_sizes is not None and len(head_sizes) != len(entries):
        raise DatasetError(
            f"{path}: expected a head box for each of its {len(entries)} people, found {len(head_sizes)}"
        )
    numbers: Counter[str] = Counter()
    people = []
    for i, entry in enumerate(entries):
        where = f"{path}: person {i + 1}"
        missing = [key for key in _KEYS if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise DatasetError(f"{where} has no {' and no '.join(missing)}: expected {_FORM}")
        try:
            image = f"images/{entry['image']}"
            joints = np.array(entry["joints"], np.float64).reshape(len(MPII_JOINTS), 2)
            labeled = np.array(entry["joints_vis"], np.float64).reshape(len(MPII_JOINTS)) > 0
            x, y = (float(value) for value in entry["center"])
            scale = float(entry["scale"])
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{where} is not as expected, {_FORM}: {error}") from None
        points = {int(joint): (joints[joint, 0], joints[joint, 1]) for joint in np.flatnonzero(labeled)}
        # Conversions write -1 for a person without objpos.
        objpos = None if x == -1 or scale <= 0 else (x, y)
        head = None if head_sizes is None else float(head_sizes[i])
        people.append(to_person(image, numbers[image], objpos, scale, points, head))
        numbers[image] += 1
    return people


_KEYS = ("image", "center", "scale", "joints", "joints_vis")
_FORM = "{image, center, scale, joints of 16 pairs, joints_vis of 16}"


def read_head_sizes(path: str) -> np.ndarray:
    """PCKh's unit of each person, float64 (N,), from ``headboxes_src`` (2,2,N) of the conversions' gt_valid.mat, or
    from ``headboxes`` (N,2,2), two corners, of an .npz.

    Raises:
        DatasetError: the file is neither.
    """
    if path.endswith(".npz"):
        try:
            boxes = np.load(path)["headboxes"]
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{path}: expected headboxes (N,2,2), found {error}") from None
    else:
        boxes = np.moveaxis(np.asarray(read_mat(path, "headboxes_src", "headboxes_src (2,2,N)")), -1, 0)
    if boxes.ndim != 3 or boxes.shape[1:] != (2, 2):
        raise DatasetError(f"{path}: expected a head box of two corners a person, found an array {boxes.shape}")
    return HEAD * np.hypot(*(boxes[:, 1] - boxes[:, 0]).astype(np.float64).T)


# --- datamodule ---------------------------------------------------------------------------------------------------


class MPII(PoseData):
    """MPII's release, or one of its JSON conversions::

        root/images/<image>.jpg
        root/mpii_human_pose_v1_u12_1.mat       the release
        root/annot/{train,valid}.json           or the conversions: 22,246 and 2,958 people

    Joints of the benchmark's test images are withheld, so that figures are on people held out of its training
    images; ``test`` is ``val``. The release does not say which; an image is never on both sides:

    - with conversions, those of ``valid.json``, the 2,958 people that the field measures on;
    - with the release, those that ``val`` names: a text file with one image a line, or a .mat with RELEASE_img_index
      and RELEASE_person_index, as the published evaluation code for those 2,958 people has (the rest of the people on
      their images is left out of both sides);
    - else those of root/val.txt where there is one, else those on images the CRC-32 of whose name is a multiple of
      ten.

    Left out and counted are people without objpos or scale or joints, and in validation those without a head box.

    Args:
        root: folder of ``images``. Only prediction can do without.
        train: the .mat, or a conversion's .json, absolute or relative to root; null for the files above.
        val: the list (see above), or a conversion's .json, for which ``train`` is one too.
        headboxes: with conversions, which lack them: the heads' boxes of val's people in its order, gt_valid.mat or
            an .npz (see `read_head_sizes`). Without it head sizes are nan, and there is no PCKh.
        crop, image_size, scale, rotation, hflip, color, images: see `PoseData`.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the files are not as described.
        ValueError: an argument is out of its range.
    """

    joint_names = MPII_JOINTS

    def __init__(
        self,
        root: str | None = None,
        train: str | None = None,
        val: str | None = None,
        headboxes: str | None = None,
        crop: Literal["person", "picture"] = "person",
        image_size: int | tuple[int, int] | None = 256,
        scale: float = 0.25,
        rotation: float = 30.0,
        hflip: float = 0.5,
        color: float = 0.4,
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, crop, image_size, scale, rotation, hflip, color, images, **kwargs)
        self.given_train, self.given_val, self.headboxes = train, val, headboxes

    def people(self, split: Split) -> People:
        evaluated = split != "train"
        kept, skipped = [], Counter[str]()
        for person, lacks in self._annotations(evaluated):
            if evaluated and self._has_heads and not lacks and not np.isfinite(person.head_size):
                lacks = "a head box"
            if lacks:
                skipped[lacks] += 1
            else:
                kept.append(person)
        return People.gather(kept, len(MPII_JOINTS), skipped)

    def _annotations(self, evaluated: bool) -> Iterator[Annotation]:
        if self._file.endswith(".json"):
            yield from self._conversions[evaluated]
        else:
            pictures, people = self._held_out
            for index, found in self._release.items():
                if evaluated and index in pictures:
                    yield from (item for item in found if people is None or (index, item.person.number) in people)
                elif not evaluated and index not in pictures:
                    yield from found

    @property
    def _has_heads(self) -> bool:
        return self.headboxes is not None or not self._file.endswith(".json")

    @cached_property
    def _file(self) -> str:
        """The .mat, or the conversion for training."""
        if self.given_train is not None:
            return self._path(self.given_train)
        for name in (MAT, f"mpii_human_pose_v1_u12_2/{MAT}", "annot/train.json"):
            if os.path.isfile(self._path(name)):
                return self._path(name)
        raise DatasetError(
            f"MPII: no annotations\nexpected\n  {self.root}/\n    images/<image>.jpg\n    {MAT}, or "
            f"annot/train.json and annot/valid.json\nfound\n{tree(self.folder)}"
        )

    def _path(self, name: str) -> str:
        path = os.path.join(self.folder, name)
        return path if os.path.exists(path) or not os.path.exists(name) else name

    @cached_property
    def _release(self) -> dict[int, list[Annotation]]:
        return read_release(self._file)

    @cached_property
    def _conversions(self) -> tuple[list[Annotation], list[Annotation]]:
        if self.given_train is not None and self.given_val is None:
            raise DatasetError(f"MPII: val: expected a .json of the people held out of {self._file}, found nothing")
        heads = None if self.headboxes is None else read_head_sizes(self._path(self.headboxes))
        if heads is None:
            rank_zero_warn("MPII: the JSON conversions have no head boxes: no PCKh without --data.headboxes FILE")
        train = read_json(self._file, None)
        val = read_json(self._path(self.given_val or "annot/valid.json"), heads)
        images = {item.person.image for item in train}
        both = sorted({item.person.image for item in val} & images)
        if both:
            rank_zero_warn(f"MPII: {some(both, 'picture')} in both train and val")
        return train, val

    @cached_property
    def _held_out(self) -> tuple[set[int], set[tuple[int, int]] | None]:
        """Indices of the images, and of which of their people, (image, person); None for all of them."""
        path = self.given_val and self._path(self.given_val)
        if path and path.endswith(".mat"):
            images, people = (
                np.atleast_1d(read_mat(path, f"RELEASE_{kind}_index", f"RELEASE_{kind}_index")).astype(int).ravel() - 1
                for kind in ("img", "person")
            )
            chosen = set(zip(images.tolist(), people.tolist(), strict=True))
            unknown = [f"{i + 1}/{k + 1}" for i, k in sorted(chosen) if not 0 <= k < len(self._release.get(i, ()))]
            if unknown:
                raise DatasetError(f"{path}: {self._file} does not have {some(unknown, 'picture/person', 'of them')}")
            return set(images.tolist()), chosen
        if path or os.path.isfile(self._path(VAL_LIST)):
            return self._listed(path or self._path(VAL_LIST)), None
        names = ((index, self._name(index)) for index in self._release if self._release[index])
        return {index for index, name in names if zlib.crc32(name.encode()) % SHARE == 0}, None

    def _name(self, index: int) -> str:
        return os.path.basename(self._release[index][0].person.image)

    def _listed(self, path: str) -> set[int]:
        try:
            with open(path, encoding="utf-8") as file:
                names = [os.path.basename(line.strip()) for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"MPII: val: expected a list of images, found {error}") from None
        place = {self._name(index): index for index in self._release if self._release[index]}
        unknown = [name for name in names if name not in place]
        if unknown:
            raise DatasetError(f"{path}: {some(unknown, 'name')} that no training image with people has")
        return {place[name] for name in names}
