"""Read annotations of MPII Human Pose: the released MATLAB file, its JSON conversions, and head boxes."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from datamodules.pose.joints import MPII_JOINTS
from datamodules.pose.people import Person, read_mat
from datamodules.text import load_json
from errors import DatasetError

RELEASE_FILE = "mpii_human_pose_v1_u12_1.mat"

HEAD_SIZE_SCALE = 0.6  # PCKh's unit relative to the diagonal of the head box (the benchmark's evaluation code)
PIXELS_PER_SCALE = 200  # height in pixels of a person with scale 1
# The crop is 1.25 times the person's height, and its center is 15 * scale pixels lower to include the feet
# (pose-hg-train).
CROP_SCALE, CENTER_SHIFT = 1.25, 15

_JSON_KEYS = ("image", "center", "scale", "joints", "joints_vis")
_JSON_FORM = "{image, center, scale, joints of 16 pairs, joints_vis of 16}"


class PersonAnnotation(NamedTuple):
    """A person of a file, and the annotation that it lacks; empty if none."""

    person: Person
    missing: str


def to_person(
    image: str,
    number: int,
    objpos: tuple[float, float] | None,
    scale: float | None,
    points: dict[int, tuple[float, float]],
    head_size: float | None,
) -> PersonAnnotation:
    """Convert values of a file, which count from 1.

    Args:
        image: path of the image relative to the dataset's root.
        number: index among the people of the image.
        objpos: (x, y) near the center of the person.
        scale: height of the person in units of 200 px.
        points: {joint: (x, y)} of the labeled joints.
        head_size: in pixels.
    """
    keypoints, labeled = np.zeros((len(MPII_JOINTS), 2)), np.zeros(len(MPII_JOINTS), bool)
    for joint, point in points.items():
        keypoints[joint], labeled[joint] = np.subtract(point, 1), True
    labeled &= np.isfinite(keypoints).all(1)
    if objpos is None or scale is None or not (np.isfinite([*objpos, scale]).all() and scale > 0):
        person = Person(image, number, (0.0, 0.0), 1.0, keypoints, labeled, float("nan"))
        return PersonAnnotation(person, "objpos or scale")
    center = objpos[0] - 1, objpos[1] - 1 + CENTER_SHIFT * scale
    head_size = head_size if head_size is not None and head_size > 0 else float("nan")
    person = Person(image, number, center, PIXELS_PER_SCALE * scale * CROP_SCALE, keypoints, labeled, head_size)
    return PersonAnnotation(person, "" if labeled.any() else "joints")


# --- the release ----------------------------------------------------------------------------------------------------


def read_release(path: str) -> dict[int, list[PersonAnnotation]]:
    """Read the people of the training images.

    A joint is labeled if it is among a person's points. ``is_visible`` does not matter: hidden joints are annotated
    and evaluated.

    Returns:
        {index of the image in the release: its people}.

    Raises:
        DatasetError: the file is not the release, or an annotation is invalid.
    """
    release = read_mat(path, "RELEASE", f"the struct RELEASE of MPII's {RELEASE_FILE}")
    images, training = _items(_get(release, "annolist")), np.atleast_1d(_get(release, "img_train"))
    if not images or len(images) != training.size:
        raise DatasetError(
            f"{path}: expected RELEASE.annolist and RELEASE.img_train of equal length, "
            f"found {len(images)} and {0 if training.dtype == object else training.size}"
        )
    people: dict[int, list[PersonAnnotation]] = {}
    for index in np.flatnonzero(training.ravel()).tolist():
        name = _get(_get(images[index], "image"), "name")
        if not isinstance(name, str):
            raise DatasetError(f"{path}: expected image.name in annolist({index + 1}), found none")
        rects = _items(_get(images[index], "annorect"))
        people[index] = [_from_rect(path, f"images/{name}", number, rect) for number, rect in enumerate(rects)]
    return people


def _from_rect(path: str, image: str, number: int, rect: Any) -> PersonAnnotation:
    points: dict[int, tuple[float, float]] = {}
    for point in _items(_get(_get(rect, "annopoints"), "point")):
        joint, x, y = (_number(_get(point, name)) for name in ("id", "x", "y"))
        if joint is None or joint not in range(len(MPII_JOINTS)):
            raise DatasetError(
                f"{path}: expected joint ids 0 to {len(MPII_JOINTS) - 1}, found {joint} (person {number + 1}, {image})"
            )
        if x is not None and y is not None:
            points.setdefault(int(joint), (x, y))
    objpos, scale = _get(rect, "objpos"), _number(_get(rect, "scale"))
    center = _number(_get(objpos, "x")), _number(_get(objpos, "y"))
    x1, y1, x2, y2 = (_number(_get(rect, name)) for name in ("x1", "y1", "x2", "y2"))
    has_head = x1 is not None and y1 is not None and x2 is not None and y2 is not None
    head_size = HEAD_SIZE_SCALE * float(np.hypot(x2 - x1, y2 - y1)) if has_head else None  # type: ignore[operator]
    return to_person(image, number, None if None in center else center, scale, points, head_size)  # type: ignore[arg-type]


def _get(struct: Any, name: str) -> Any:
    """Return a field; None if it is absent or empty, which any field of MPII's structs may be."""
    value = getattr(struct, name, None)
    return None if isinstance(value, np.ndarray) and not value.size else value


def _items(value: Any) -> list[Any]:
    """Return the structs of an array; squeezing turns an array of one into a bare struct."""
    return [] if value is None else list(np.atleast_1d(value).ravel())


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


# --- conversions ----------------------------------------------------------------------------------------------------


def read_json(path: str, head_sizes: np.ndarray | None) -> list[PersonAnnotation]:
    """Read a JSON conversion: a list of {image, center, scale, joints (16, 2), joints_vis (16)}, counted from 1.

    Args:
        path: the file; ``joints_vis`` means labeled in it.
        head_sizes: one per person, in the order of the file, float (N,); None if unknown.

    Raises:
        DatasetError: the file has another form; the message names the person.
    """
    entries = load_json(path, "a JSON conversion of MPII")
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"{path}: expected a list of {_JSON_FORM}, found {str(entries)[:60]}")
    if head_sizes is not None and len(head_sizes) != len(entries):
        raise DatasetError(
            f"{path}: expected a head box for each of its {len(entries)} people, found {len(head_sizes)}"
        )
    numbers: Counter[str] = Counter()
    people = []
    for i, entry in enumerate(entries):
        missing = [key for key in _JSON_KEYS if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise DatasetError(f"{path}: expected {_JSON_FORM}, found person {i + 1} without {', '.join(missing)}")
        try:
            image = f"images/{entry['image']}"
            joints = np.array(entry["joints"], np.float64).reshape(len(MPII_JOINTS), 2)
            labeled = np.array(entry["joints_vis"], np.float64).reshape(len(MPII_JOINTS)) > 0
            x, y = (float(value) for value in entry["center"])
            scale = float(entry["scale"])
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{path}: expected {_JSON_FORM}, found an invalid person {i + 1} ({error})") from None
        points = {int(joint): (joints[joint, 0], joints[joint, 1]) for joint in np.flatnonzero(labeled)}
        objpos = None if x == -1 or scale <= 0 else (x, y)  # conversions write -1 for a missing objpos
        head_size = None if head_sizes is None else float(head_sizes[i])
        people.append(to_person(image, numbers[image], objpos, scale, points, head_size))
        numbers[image] += 1
    return people


def read_head_sizes(path: str) -> np.ndarray:
    """Read PCKh's unit of each person in pixels, float64 (N,).

    Args:
        path: ``gt_valid.mat`` of the conversions with ``headboxes_src`` (2, 2, N), or an ``.npz`` with ``headboxes``
            (N, 2, 2), two corners each.

    Raises:
        DatasetError: the file has another form.
    """
    if path.endswith(".npz"):
        try:
            boxes = np.load(path)["headboxes"]
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{path}: expected headboxes (N, 2, 2), found {error}") from None
    else:
        boxes = np.moveaxis(np.asarray(read_mat(path, "headboxes_src", "headboxes_src (2, 2, N)")), -1, 0)
    if boxes.ndim != 3 or boxes.shape[1:] != (2, 2):
        raise DatasetError(f"{path}: expected two corners per head box, found an array of shape {boxes.shape}")
    return HEAD_SIZE_SCALE * np.hypot(*(boxes[:, 1] - boxes[:, 0]).astype(np.float64).T)
