"""Synthetic dataset in the layout of MPII: articulated people in front of clutter, behind objects and each other."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from scipy.io import savemat

from datamodules.pose.joints import MPII_JOINTS
from datamodules.pose.mpii import VAL_LIST
from datamodules.pose.mpii_annotations import PIXELS_PER_SCALE, RELEASE_FILE
from datamodules.synthetic.drawing import require_range, save_jpeg, write_lines
from datamodules.synthetic.people import HEAD_TOP, UPPER_NECK, DrawnPerson, draw_people_scene

NUM_TEST_IMAGES = 2  # without joints, like the test images of the benchmark
HIDDEN_JOINT_UNLABELED = 0.2  # probability


def write_mpii(
    folder: str, train: int = 200, val: int = 50, size: int = 128, seed: int = 0, difficulty: float = 1.0
) -> list[str]:
    """Write ``folder/images``, ``folder/mpii_human_pose_v1_u12_1.mat`` and ``folder/val.txt``, the validation images.

    An image shows one to four people. Each is a figure in 3D, whose limbs foreshorten and occlude each other: standing,
    sitting, bent over, lying or leaping, seen from any side. From behind, no face is visible and left joints are on the
    left. Objects and other people occlude joints, and borders cut people off. Joints outside the image are not
    annotated, and neither is one occluded joint in five.

    As in the release, the joints have no fixed order, ``is_visible`` is a number, a string or empty, some people have
    no ``objpos`` and ``scale``, and two test images have no joints. The files depend only on the arguments.

    Args:
        folder: output folder, created if missing; existing files stay.
        train: number of training images.
        val: number of validation images.
        size: shorter side of the images in pixels, at least 32; the longer one is up to 1.5 times as long.
        seed: another seed draws other images.
        difficulty: 0 to 1. Lower values have fewer people per image and fewer occluding objects, and more people who
            stand upright, face the camera and are not cut off. A small network learns them in minutes.

    Returns:
        Names of the joints.

    Raises:
        UserError: an argument is out of range.
    """
    require_range("train", train, 1, 1_000_000)
    require_range("val", val, 1, 1_000_000)
    require_range("size", size, 32, 1024)
    require_range("difficulty", difficulty, 0, 1)
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    total = train + val + NUM_TEST_IMAGES
    annolist = np.zeros(total, [(name, object) for name in ("image", "annorect", "frame_sec", "vididx")])
    for i in range(total):
        rng = np.random.default_rng((seed, i))
        image, people = draw_people_scene(size, rng, difficulty)
        name = f"{i + 1:09d}.jpg"
        save_jpeg(os.path.join(folder, "images", name), image)
        rects = _test_rects(people) if i >= train + val else _rects(people, image.shape[:2], rng)
        annolist[i] = ({"name": name}, rects, np.zeros((0, 0)), np.zeros((0, 0)))
    single_person = np.empty((total, 1), object)
    single_person[:, 0] = [np.zeros((0, 0))] * total
    release = {
        "annolist": annolist,
        "img_train": (np.arange(total) < train + val).astype(np.uint8),
        "version": "12",
        "single_person": single_person,
    }
    savemat(os.path.join(folder, RELEASE_FILE), {"RELEASE": release}, do_compression=True)
    write_lines(os.path.join(folder, VAL_LIST), [f"{i + 1:09d}.jpg" for i in range(train, train + val)])
    return list(MPII_JOINTS)


def _rects(people: list[DrawnPerson], shape: tuple[int, int], rng: np.random.Generator) -> Any:
    """Return the struct array annorect; coordinates are counted from 1."""
    fields = ["x1", "y1", "x2", "y2", "annopoints", "scale", "objpos"]
    rects = np.zeros(len(people), [(name, object) for name in fields])
    empty = np.zeros((0, 0))
    for rect, person in zip(rects, people, strict=True):
        for name, value in zip(fields, np.rint(person.head_box + 1).tolist(), strict=False):
            rect[name] = value
        inside = ((person.points >= -0.5) & (person.points <= np.array(shape[::-1]) - 0.5)).all(1)
        annotated = np.flatnonzero(inside & (person.visible | (rng.random(16) > HIDDEN_JOINT_UNLABELED)))
        points = np.zeros(len(annotated), [(name, object) for name in ("x", "y", "id", "is_visible")])
        for point, joint in zip(points, rng.permutation(annotated).tolist(), strict=True):
            x, y = (round(float(value) + 1, 3) for value in person.points[joint])
            is_visible: Any = int(person.visible[joint])
            if joint in (UPPER_NECK, HEAD_TOP):
                is_visible = empty
            elif rng.random() < 0.1:
                is_visible = str(is_visible)
            point["x"], point["y"], point["id"], point["is_visible"] = x, y, joint, is_visible
        rect["annopoints"] = {"point": points} if len(annotated) else empty
        has_position = rng.random() > 0.03
        center = np.rint(person.center + person.height * rng.normal(0, 0.02, 2) + 1).tolist()
        rect["scale"] = person.height / PIXELS_PER_SCALE * float(rng.uniform(0.93, 1.07)) if has_position else empty
        rect["objpos"] = {"x": center[0], "y": center[1]} if has_position else empty
    return rects


def _test_rects(people: list[DrawnPerson]) -> Any:
    """Return the struct array annorect of a test image: positions and scales without joints."""
    rects = np.zeros(len(people), [("scale", object), ("objpos", object)])
    for rect, person in zip(rects, people, strict=True):
        x, y = np.rint(person.center + 1).tolist()
        rect["scale"], rect["objpos"] = person.height / PIXELS_PER_SCALE, {"x": x, "y": y}
    return rects
