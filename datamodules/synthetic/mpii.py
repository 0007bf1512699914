"""Draws a small dataset in MPII's layout: jointed people, shaded and clothed, among clutter, objects and each other."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import cv2
import numpy as np
from scipy.io import savemat

from datamodules.pose.joints import MPII_JOINTS
from datamodules.pose.mpii import VAL_LIST
from datamodules.pose.mpii_annotations import PIXELS_PER_SCALE, RELEASE_FILE
from datamodules.synthetic.drawing import any_color, background, clutter, color, save, with_noise
from errors import UserError

TEST_PICTURES = 2  # without joints, as the benchmark's test images are

RIGHT, LEFT = 0, 1
ANKLE, KNEE, HIP = (0, 5), (1, 4), (2, 3)  # indices of the right one and the left one
WRIST, ELBOW, SHOULDER = (10, 15), (11, 14), (12, 13)
PELVIS, THORAX, NECK, TOP = 6, 7, 8, 9

# Of a person's height.
SPINE, THROAT, HEAD_LENGTH = 0.27, 0.05, 0.15
UPPER_ARM, FOREARM, THIGH, SHANK, FOOT = 0.17, 0.15, 0.24, 0.24, 0.08
HALF_SHOULDERS, HALF_HIPS = 0.115, 0.06


class Body(NamedTuple):
    """A posed person of height 1, pelvis at the origin, as seen: x to the right, y down, z towards the viewer.

    Attributes:
        joints: float64 (16,3).
        head: float64 (3,), the middle of the head.
        face: float64 (3,), unit, where the face looks.
        across: float64 (3,), unit, from the head's right to its left.
        front: float64 (3,), unit, out of the chest.
        toes: float64 (2,3), of the right and the left foot.
    """

    joints: np.ndarray
    head: np.ndarray
    face: np.ndarray
    across: np.ndarray
    front: np.ndarray
    toes: np.ndarray


class Sitter(NamedTuple):
    """A person on an image.

    Attributes:
        points: float64 (16,2), joints in pixels, (0, 0) the middle of the first one.
        visible: bool (16,), whether a joint's own limbs are what is seen there.
        head_box: float64 (4,), x1, y1, x2, y2.
        center: float64 (2,).
        height: in pixels, were the person upright.
    """

    points: np.ndarray
    visible: np.ndarray
    head_box: np.ndarray
    center: np.ndarray
    height: float


def write_mpii(
    folder: str, train: int = 200, val: int = 50, size: int = 128, seed: int = 0, difficulty: float = 1.0
) -> list[str]:
    """Writes ``folder/images``, ``folder/mpii_human_pose_v1_u12_1.mat`` and ``folder/val.txt``, the images held out.

    An image shows one to four people. Each is a figure in space, so that limbs shorten and hide each other: standing,
    walking, sitting, bent over, lying, arms anywhere, legs crossed, seen from any side. Whoever is seen from behind
    has no face and the left on the left. Objects and other people hide joints; borders cut people off, and joints
    beyond them are not annotated. One hidden joint in five is not, either.

    As in the release, points are in any order, ``is_visible`` is a number, a text or empty, some people have no objpos
    and scale, and two test images have no joints. All is a function of the arguments alone.

    Args:
        folder: where; it is made if missing, and what was written there before stays.
        train, val: number of images.
        size: shorter side of the images in pixels, at least 32.
        seed: another seed draws other images.
        difficulty: 0..1. As it falls there are fewer people on an image and fewer objects before them, more of them
            stand upright, uncut and with their front to the viewer: a small network learns them in minutes.

    Returns:
        Names of the joints.

    Raises:
        ValueError: an argument is out of its range.
    """
    for name, value, low, high in (
        ("train", train, 1, 1_000_000),
        ("val", val, 1, 1_000_000),
        ("size", size, 32, 1024),
    ):
        if not low <= value <= high:
            raise UserError(f"{name}: expected {low} to {high}, found {value}")
    if not 0 <= difficulty <= 1:
        raise UserError(f"difficulty: expected 0 to 1, found {difficulty}")
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    total = train + val + TEST_PICTURES
    annolist = np.zeros(total, [(name, object) for name in ("image", "annorect", "frame_sec", "vididx")])
    for i in range(total):
        rng = np.random.default_rng((seed, i))
        picture, people = draw_scene(size, rng, difficulty)
        name = f"{i + 1:09d}.jpg"
        save(os.path.join(folder, "images", name), picture)
        rects = _test_rects(people) if i >= train + val else _rects(people, picture.shape[:2], rng)
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
    with open(os.path.join(folder, VAL_LIST), "w") as file:
        file.writelines(f"{i + 1:09d}.jpg\n" for i in range(train, train + val))
    return list(MPII_JOINTS)


# --- annotations --------------------------------------------------------------------------------------------------


def _rects(people: list[Sitter], shape: tuple[int, int], rng: np.random.Generator) -> Any:
    """The struct array annorect, counted from 1."""
    fields = ["x1", "y1", "x2", "y2", "annopoints", "scale", "objpos"]
    rects = np.zeros(len(people), [(name, object) for name in fields])
    for rect, person in zip(rects, people, strict=True):
        for name, value in zip(fields, np.rint(person.head_box + 1).tolist(), strict=False):
            rect[name] = value
        inside = ((person.points >= -0.5) & (person.points <= np.array(shape[::-1]) - 0.5)).all(1)
        known = np.flatnonzero(inside & (person.visible | (rng.random(16) > 0.2)))
        points = np.zeros(len(known), [(name, object) for name in ("x", "y", "id", "is_visible")])
        for point, joint in zip(points, rng.permutation(known).tolist(), strict=True):
            x, y = (round(float(value) + 1, 3) for value in person.points[joint])
            mark: Any = int(person.visible[joint])
            if joint in (NECK, TOP):
                mark = np.zeros((0, 0))
            elif rng.random() < 0.1:
                mark = str(mark)
            point["x"], point["y"], point["id"], point["is_visible"] = x, y, joint, mark
        empty = np.zeros((0, 0))
        rect["annopoints"] = {"point": points} if len(known) else empty
        placed = rng.random() > 0.03
        center = np.rint(person.center + person.height * rng.normal(0, 0.02, 2) + 1).tolist()
        rect["scale"] = person.height / PIXELS_PER_SCALE * float(rng.uniform(0.93, 1.07)) if placed else empty
        rect["objpos"] = {"x": center[0], "y": center[1]} if placed else empty
    return rects


def _test_rects(people: list[Sitter]) -> Any:
    rects = np.zeros(len(people), [("scale", object), ("objpos", object)])
    for rect, person in zip(rects, people, strict=True):
        x, y = np.rint(person.center + 1).tolist()
        rect["scale"], rect["objpos"] = person.height / PIXELS_PER_SCALE, {"x": x, "y": y}
    return rects


# --- scenes -------------------------------------------------------------------------------------------------------


def draw_scene(size: int, rng: np.random.Generator, difficulty: float = 1.0) -> tuple[np.ndarray, list[Sitter]]:
    """An image, uint8 (H,W,3) RGB, and who is on it."""
    longer = int(size * rng.uniform(1, 1.5))
    height, width = (size, longer) if rng.random() < 0.7 else (longer, size)
    canvas = Canvas(background(height, width, rng))
    for _ in range(rng.integers(3, 8)):
        clutter(canvas.pixels, rng)
    for _ in range(rng.integers(3, 9)):  # sticks that are no limbs
        a = rng.uniform(0, [width, height])
        b = a + rng.normal(0, 0.25 * size, 2)
        canvas.capsule(a, b, size * rng.uniform(0.01, 0.05), size * rng.uniform(0.01, 0.05), any_color(rng), rng)
    count = int(rng.choice([1, 2, 3, 4], p=[0.45, 0.3, 0.15, 0.1])) if rng.random() < difficulty else 1
    stature = size * rng.uniform(0.55, 0.95) * (1.0, 0.85, 0.75, 0.7)[count - 1]
    figures: list[tuple[Body, np.ndarray, float]] = []
    for _ in range(20):
        if len(figures) == count:
            break
        body, tall = pose(rng, difficulty), stature * rng.uniform(0.85, 1.15)
        # Some people stand so near the border that it cuts them off.
        reach = body.joints[:, :2] * tall * (0.6 if rng.random() < 0.3 * difficulty else 1.0)
        low, high = -reach.min(0), np.array([width, height]) - 1 - reach.max(0)
        middle = (low + high) / 2
        at = np.where(low < high, rng.uniform(np.minimum(low, high), np.maximum(low, high)), middle)
        torso = at + _torso(body) * tall
        if all(np.linalg.norm(torso - place - _torso(other) * t) > 0.3 * tall for other, place, t in figures):
            figures.append((body, at, tall))
    figures.sort(key=lambda figure: figure[2])
    for i, (body, at, tall) in enumerate(figures):
        draw_person(canvas, body, at, tall, 1 + i, rng)
    for _ in range(rng.binomial(2, 0.5 * difficulty)):
        body, at, tall = figures[rng.integers(len(figures))]
        _hide(canvas, at + tall * body.joints[rng.integers(16), :2] + rng.normal(0, 0.05 * tall, 2), tall, rng)
    sitters = [_sitter(canvas, body, at, tall, 1 + i) for i, (body, at, tall) in enumerate(figures)]
    return with_noise(canvas.pixels, rng), sitters


def _torso(body: Body) -> np.ndarray:
    return (body.joints[PELVIS, :2] + body.joints[THORAX, :2]) / 2


def _hide(canvas: Canvas, at: np.ndarray, tall: float, rng: np.random.Generator) -> None:
    """Puts an object in front."""
    if rng.random() < 0.4:
        span = rng.normal(0, 0.35 * tall, 2)
        breadth = tall * rng.uniform(0.02, 0.06)
        canvas.capsule(at - span, at + span, breadth, breadth, any_color(rng), rng)
        return
    angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(4, 9))))
    radii = tall * rng.uniform(0.06, 0.17) * rng.uniform(0.6, 1.2, len(angles))
    corners = at + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    canvas.polygon(corners, any_color(rng), rng.normal(0, 1, 2), 0.35, None)


def _sitter(canvas: Canvas, body: Body, at: np.ndarray, tall: float, person: int) -> Sitter:
    points = at + tall * body.joints[:, :2]
    inner = np.rint(points).astype(int).clip(0, np.array(canvas.owner.shape[::-1]) - 1)
    owner = canvas.owner[inner[:, 1], inner[:, 0]]
    visible = np.array([bool(owner[j] // 100 == person and owner[j] % 100 in PARTS_AT[j]) for j in range(16)])
    head = at + tall * body.head[:2]
    reach = np.array([0.055, 0.055]) + 0.02 * np.abs(body.joints[TOP, :2] - body.joints[NECK, :2]) / HEAD_LENGTH
    box = np.concatenate([head - reach * tall, head + reach * tall])
    return Sitter(points, visible, box, at + tall * _torso(body), tall)


# --- pose ---------------------------------------------------------------------------------------------------------


def pose(rng: np.random.Generator, difficulty: float = 1.0) -> Body:
    """A person in some posture, seen from some side."""
    kinds = ["upright", "bent", "sitting", "lying", "leaping"]
    kind = rng.choice(kinds, p=[0.5, 0.15, 0.15, 0.08, 0.12]) if rng.random() < difficulty else "upright"
    # The body's own axes: x to its left, y up, z to its front. The trunk bends forward, leans and twists on the hips.
    bend = {"bent": rng.uniform(45, 110), "sitting": rng.normal(5, 15)}.get(str(kind), rng.normal(8, 12))
    trunk = turn("y", rng.normal(0, 15)) @ turn("x", bend) @ turn("z", rng.normal(0, 10))
    joints = np.zeros((16, 3))
    toes = np.zeros((2, 3))
    joints[THORAX] = trunk @ [0, SPINE, 0]
    neck = trunk @ turn("x", rng.normal(10, 12)) @ turn("z", rng.normal(0, 8))
    joints[NECK] = joints[THORAX] + neck @ [0, THROAT, 0]
    skull = neck @ turn("x", rng.normal(0, 12)) @ turn("z", rng.normal(0, 10)) @ turn("y", rng.normal(0, 25))
    joints[TOP] = joints[NECK] + skull @ [0, HEAD_LENGTH, 0]
    for side, sign in ((RIGHT, -1.0), (LEFT, 1.0)):
        joints[SHOULDER[side]] = joints[THORAX] + trunk @ [sign * HALF_SHOULDERS, -0.02, 0]
        joints[HIP[side]] = [sign * HALF_HIPS, -0.01, 0]
        arm = trunk @ turn("z", sign * _raise(rng)) @ turn("y", rng.normal(0, 50))
        swing = arm @ turn("x", -rng.uniform(-30, 60))
        joints[ELBOW[side]] = joints[SHOULDER[side]] + swing @ [0, -UPPER_ARM, 0]
        lower = swing @ turn("y", rng.normal(0, 40)) @ turn("x", -min(145.0, abs(rng.normal(0, 60))))
        joints[WRIST[side]] = joints[ELBOW[side]] + lower @ [0, -FOREARM, 0]
        forward, spread, knee = {
            "sitting": (rng.normal(85, 12), rng.normal(8, 10), rng.normal(85, 20)),
            "leaping": (rng.normal(20, 45), rng.normal(15, 25), abs(rng.normal(0, 60))),
            "lying": (rng.normal(15, 30), rng.normal(5, 12), abs(rng.normal(0, 45))),
        }.get(str(kind), (rng.normal(5, 22), rng.normal(3, 11), abs(rng.normal(0, 25))))
        # Spread below zero crosses the legs.
        leg = turn("z", sign * spread) @ turn("x", -forward) @ turn("y", sign * rng.normal(10, 15))
        joints[KNEE[side]] = joints[HIP[side]] + leg @ [0, -THIGH, 0]
        shank = leg @ turn("x", float(np.clip(knee, 0, 140)))
        joints[ANKLE[side]] = joints[KNEE[side]] + shank @ [0, -SHANK, 0]
        toes[side] = joints[ANKLE[side]] + shank @ turn("x", rng.normal(15, 15)) @ [0, -0.02, FOOT]
    roll = (
        rng.choice([-1, 1]) * rng.normal(85, 20) if kind == "lying" else rng.normal(0, 30 if kind == "leaping" else 9)
    )
    # To the viewer's axes: y down, and seen from anywhere around, a little from above or below.
    seen = (
        np.diag([1.0, -1.0, 1.0])
        @ turn("z", roll)
        @ turn("x", rng.normal(0, 10))
        @ turn("y", difficulty * rng.uniform(-180, 180))
    )
    head = (joints[NECK] + joints[TOP]) / 2
    face, across, front = seen @ skull @ [0, 0, 1], seen @ skull @ [1, 0, 0], seen @ trunk @ [0, 0, 1]
    return Body(joints @ seen.T, seen @ head, face, across, front, toes @ seen.T)


def _raise(rng: np.random.Generator) -> float:
    """Degrees by which an arm is lifted sideways from where it hangs."""
    low, high = ((-10, 30), (60, 110), (130, 185), (30, 60))[rng.choice(4, p=[0.4, 0.2, 0.25, 0.15])]
    return float(rng.uniform(low, high))


def turn(axis: str, degrees: float) -> np.ndarray:
    """Right-handed rotation about one axis: float64 (3,3)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


# --- drawing ------------------------------------------------------------------------------------------------------

TRUNK, SKULL, NECKPART, SHANKS, THIGHS, FOREARMS, UPPER_ARMS = 0, 1, 2, (3, 4), (5, 6), (7, 8), (9, 10)
# The parts that meet at each joint: what must be on top there for the joint to be seen.
PARTS_AT: dict[int, tuple[int, ...]] = {
    PELVIS: (TRUNK,),
    THORAX: (TRUNK, NECKPART),
    NECK: (SKULL, NECKPART),
    TOP: (SKULL,),
}
for _side in (RIGHT, LEFT):
    PARTS_AT[ANKLE[_side]] = (SHANKS[_side],)
    PARTS_AT[KNEE[_side]] = (SHANKS[_side], THIGHS[_side])
    PARTS_AT[HIP[_side]] = (THIGHS[_side], TRUNK)
    PARTS_AT[WRIST[_side]] = (FOREARMS[_side],)
    PARTS_AT[ELBOW[_side]] = (FOREARMS[_side], UPPER_ARMS[_side])
    PARTS_AT[SHOULDER[_side]] = (UPPER_ARMS[_side], TRUNK)


class Canvas:
    """An image in the making, and which part of whom each pixel shows.

    Attributes:
        pixels: float64 (H,W,3), RGB, 0..255.
        owner: int32 (H,W): 100 times the person's number and the part's; 0 for nobody.
        light: float64 (3,), where the light comes from.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.owner = pixels, np.zeros(pixels.shape[:2], np.int32)
        self.light = np.array([-0.4, -0.6, 0.7])

    def capsule(
        self,
        a: np.ndarray,
        b: np.ndarray,
        radius_a: float,
        radius_b: float,
        paint: np.ndarray,
        rng: np.random.Generator | None = None,
        owner: int = 0,
        stripes: tuple[np.ndarray, float] | None = None,
    ) -> None:
        """A limb from a to b, round in its shading, with radii at its ends; striped by a second color, so many times.

        With ``rng`` a third of them are striped in any color.
        """
        if rng is not None and rng.random() < 0.33:
            stripes = any_color(rng), float(rng.uniform(2, 6))
        reach = max(radius_a, radius_b) + 1
        window = self._window(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
        if window is None:
            return
        rows, columns, x, y = window
        along = b - a
        length = max(float(along @ along), 1e-6)
        t = np.clip(((x - a[0]) * along[0] + (y - a[1]) * along[1]) / length, 0, 1)
        dx, dy = x - a[0] - t * along[0], y - a[1] - t * along[1]
        radius = radius_a + t * (radius_b - radius_a)
        distance = np.hypot(dx, dy)
        alpha = np.clip(radius - distance + 0.5, 0, 1)
        up = np.sqrt(np.clip(1 - (distance / radius) ** 2, 0, 1))
        shade = 0.55 + 0.45 * np.clip((dx * self.light[0] + dy * self.light[1]) / radius + up * self.light[2], 0, 1)
        surface: np.ndarray = paint
        if stripes is not None:
            surface = np.where((np.sin(2 * math.pi * stripes[1] * t) > 0)[..., None], paint, stripes[0])
        self._blend(rows, columns, surface * shade[..., None], alpha, owner)

    def polygon(
        self,
        corners: np.ndarray,
        paint: np.ndarray,
        gradient: np.ndarray,
        depth: float,
        stripes: tuple[np.ndarray, np.ndarray] | None,
        owner: int = 0,
    ) -> None:
        """A flat piece that darkens by ``depth`` along a direction; striped by a second color along a wave vector."""
        window = self._window(corners.min(0) - 1, corners.max(0) + 1)
        if window is None:
            return
        rows, columns, x, y = window
        mask = np.zeros(x.shape, np.uint8)
        shifted = np.rint((corners - [columns.start, rows.start]) * 16).astype(np.int32)
        cv2.fillPoly(mask, [shifted], 255, cv2.LINE_AA, shift=4)
        along = x * gradient[0] + y * gradient[1]
        along = (along - along.min()) / max(float(np.ptp(along)), 1e-6)
        surface: np.ndarray = paint
        if stripes is not None:
            surface = np.where((np.sin(x * stripes[1][0] + y * stripes[1][1]) > 0)[..., None], paint, stripes[0])
        self._blend(rows, columns, surface * (1 - depth * along)[..., None], mask / 255, owner)

    def _window(self, low: np.ndarray, high: np.ndarray) -> tuple[slice, slice, np.ndarray, np.ndarray] | None:
        """The pixels between two corners: rows, columns, and the coordinates of both; None where there are none."""
        limit = np.array(self.owner.shape[::-1])
        left, top = np.floor(low).astype(int).clip(0, limit).tolist()
        right, bottom = (np.ceil(high).astype(int) + 1).clip(0, limit).tolist()
        if right <= left or bottom <= top:
            return None
        y, x = np.ogrid[top:bottom, left:right]
        shape = bottom - top, right - left
        return slice(top, bottom), slice(left, right), np.broadcast_to(x, shape), np.broadcast_to(y, shape)

    def _blend(self, rows: slice, columns: slice, surface: np.ndarray, alpha: np.ndarray, owner: int) -> None:
        part = self.pixels[rows, columns]
        part += (surface - part) * alpha[..., None]
        self.owner[rows, columns][alpha > 0.5] = owner


def draw_person(canvas: Canvas, body: Body, at: np.ndarray, tall: float, person: int, rng: np.random.Generator) -> None:
    """Draws one person, what is farther away first."""
    j = body.joints
    flat = at + tall * j[:, :2]
    build = rng.uniform(0.85, 1.2) * tall
    skin = color(rng.uniform(0.04, 0.09), rng.uniform(0.25, 0.6), rng.uniform(0.35, 1))
    hair = color(rng.uniform(0.03, 0.12), rng.uniform(0.1, 0.7), rng.uniform(0.05, 0.75))
    shirt, trousers, shoes, trim = (any_color(rng) for _ in range(4))
    sleeves, legs = rng.choice(3), rng.choice(2)  # how much of the limbs is clothed
    stripes = (any_color(rng), rng.uniform(1.5, 4)) if rng.random() < 0.3 else None
    code = 100 * person
    parts: list[tuple[float, Any]] = []

    def limb(
        a: int,
        b: int,
        radii: tuple[float, float],
        paint: np.ndarray,
        part: int,
        striped: bool = False,
        near: float = 0.0,
    ) -> None:
        def draw() -> None:
            pattern = stripes if striped else None
            canvas.capsule(flat[a], flat[b], build * radii[0], build * radii[1], paint, None, code + part, pattern)

        parts.append(((j[a, 2] + j[b, 2]) / 2 + near, draw))

    for side in (RIGHT, LEFT):
        limb(HIP[side], KNEE[side], (0.052, 0.036), trousers, THIGHS[side])
        limb(KNEE[side], ANKLE[side], (0.034, 0.022), trousers if legs else skin, SHANKS[side], near=0.002)
        limb(SHOULDER[side], ELBOW[side], (0.034, 0.026), shirt if sleeves else skin, UPPER_ARMS[side], True)
        limb(ELBOW[side], WRIST[side], (0.025, 0.018), shirt if sleeves == 2 else skin, FOREARMS[side], True, 0.002)
        _extremities(canvas, body, at, tall, build, side, skin, shoes, code, parts)

    def trunk() -> None:
        _trunk(canvas, body, flat, build, shirt, trim, trousers, stripes, code)

    parts.append(((j[PELVIS, 2] + j[THORAX, 2]) / 2, trunk))
    limb(THORAX, NECK, (0.03, 0.028), skin, NECKPART)

    def head() -> None:
        _head(canvas, body, at, tall, build, skin, hair, code + SKULL)

    parts.append((body.head[2] + 0.01, head))
    for _, draw in sorted(parts, key=lambda item: item[0]):
        draw()


def _extremities(
    canvas: Canvas,
    body: Body,
    at: np.ndarray,
    tall: float,
    build: float,
    side: int,
    skin: np.ndarray,
    shoes: np.ndarray,
    code: int,
    parts: list[tuple[float, Any]],
) -> None:
    """A hand, beyond the wrist, and a foot, from the ankle to the toes."""
    j = body.joints
    hand = j[WRIST[side]] + 0.25 * (j[WRIST[side]] - j[ELBOW[side]])
    wrist, tip = at + tall * j[WRIST[side], :2], at + tall * hand[:2]
    ankle, toes = at + tall * j[ANKLE[side], :2], at + tall * body.toes[side, :2]
    parts.append(
        (hand[2], lambda: canvas.capsule(wrist, tip, 0.018 * build, 0.022 * build, skin, None, code + FOREARMS[side]))
    )
    depth = (j[ANKLE[side], 2] + body.toes[side, 2]) / 2
    parts.append(
        (depth, lambda: canvas.capsule(ankle, toes, 0.024 * build, 0.018 * build, shoes, None, code + SHANKS[side]))
    )


def _trunk(
    canvas: Canvas,
    body: Body,
    flat: np.ndarray,
    build: float,
    shirt: np.ndarray,
    trim: np.ndarray,
    trousers: np.ndarray,
    stripes: tuple[np.ndarray, float] | None,
    code: int,
) -> None:
    """The hull of shoulders and hips; an opening with buttons on the front, a yoke on the back."""
    angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], 1)

    def hull(pieces: list[tuple[np.ndarray, float]]) -> np.ndarray:
        points = np.concatenate([center + radius * build * ring for center, radius in pieces])
        return cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)

    shoulders, hips = [flat[i] for i in SHOULDER], [flat[i] for i in HIP]
    up = flat[THORAX] - flat[PELVIS]
    waves = (stripes[0], up / max(up @ up, 1.0) * 2 * math.pi * stripes[1]) if stripes else None
    canvas.polygon(hull([(p, 0.055) for p in hips]), trousers, np.array([1.0, 0.6]), 0.4, None, code + TRUNK)
    waist = [flat[i] + 0.15 * up for i in HIP]
    body_hull = hull([*((p, 0.032) for p in shoulders), *((p, 0.048) for p in waist)])
    canvas.polygon(body_hull, shirt, np.array([1.0, 0.6]), 0.4, waves, code + TRUNK)
    front = body.front
    out = 0.04 * build * front[:2]
    if front[2] > 0.15:
        a, b = flat[THORAX] + out, flat[PELVIS] + 0.2 * up + out
        canvas.capsule(a, b, 0.008 * build, 0.008 * build, trim, None, code + TRUNK)
    elif front[2] < -0.15:
        a, b = (0.75 * p + 0.25 * flat[PELVIS] - out for p in shoulders)
        canvas.capsule(a, b, 0.012 * build, 0.012 * build, trim, None, code + TRUNK)


def _head(
    canvas: Canvas,
    body: Body,
    at: np.ndarray,
    tall: float,
    build: float,
    skin: np.ndarray,
    hair: np.ndarray,
    code: int,
) -> None:
    """A skull with hair, and on its front a face with eyes and a mouth."""
    j = body.joints
    axis = (j[TOP] - j[NECK]) / HEAD_LENGTH
    radius = 0.052 * build

    def place(point: np.ndarray) -> np.ndarray:
        return at + tall * point[:2]

    # The ends of the skull's capsule, so that it reaches from about the upper neck to the head's top.
    low, high = body.head - 0.022 * axis, body.head + (HEAD_LENGTH / 2 - 0.052 * build / tall) * axis
    canvas.capsule(place(low), place(high), 0.88 * radius, radius, hair, None, code)
    if body.face[2] > -0.5:
        low, high = low + 0.028 * body.face - 0.008 * axis, low + 0.028 * body.face + 0.02 * axis
        canvas.capsule(place(low), place(high), 0.6 * radius, 0.72 * radius, skin, None, code)
    dark = np.array([25.0, 15.0, 15.0])
    for across, up, size in ((-0.02, 0.018, 0.007), (0.02, 0.018, 0.007), (0.0, -0.025, 0.008)):
        out = 0.05 * body.face + across * body.across
        if out[2] > 0.012:
            spot = place(body.head + out + up * axis)
            canvas.capsule(spot, spot, size * tall, size * tall, dark, None, code)
