"""Articulated people: random 3D poses, drawn with shading, clothes and occlusion, and their annotations.

Coordinates of a body: x right, y down, z towards the camera, as seen; the pelvis is the origin and the height is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from datamodules.synthetic.drawing import (
    add_noise,
    draw_background,
    draw_clutter,
    hsv_to_rgb,
    random_color,
    random_shape,
)

# Joints, in the order of MPII_JOINTS; pairs are (right, left).
RIGHT, LEFT = 0, 1
ANKLE, KNEE, HIP = (0, 5), (1, 4), (2, 3)
WRIST, ELBOW, SHOULDER = (10, 15), (11, 14), (12, 13)
PELVIS, THORAX, UPPER_NECK, HEAD_TOP = 6, 7, 8, 9

# Lengths, relative to the height.
SPINE_LENGTH, NECK_LENGTH, HEAD_LENGTH = 0.27, 0.05, 0.15
UPPER_ARM_LENGTH, FOREARM_LENGTH, THIGH_LENGTH, SHANK_LENGTH, FOOT_LENGTH = 0.17, 0.15, 0.24, 0.24, 0.08
HALF_SHOULDER_WIDTH, HALF_HIP_WIDTH = 0.115, 0.06

# Body parts; pairs are (right, left).
TRUNK_PART, HEAD_PART, NECK_PART = 0, 1, 2
SHANK_PARTS, THIGH_PARTS, FOREARM_PARTS, UPPER_ARM_PARTS = (3, 4), (5, 6), (7, 8), (9, 10)
PARTS_PER_PERSON = 100  # stride of the persons in PeopleCanvas.part_ids

# The parts that meet at each joint; the joint is visible if one of them is visible at its position.
PARTS_AT_JOINT: dict[int, tuple[int, ...]] = {
    PELVIS: (TRUNK_PART,),
    THORAX: (TRUNK_PART, NECK_PART),
    UPPER_NECK: (HEAD_PART, NECK_PART),
    HEAD_TOP: (HEAD_PART,),
}
for _side in (RIGHT, LEFT):
    PARTS_AT_JOINT[ANKLE[_side]] = (SHANK_PARTS[_side],)
    PARTS_AT_JOINT[KNEE[_side]] = (SHANK_PARTS[_side], THIGH_PARTS[_side])
    PARTS_AT_JOINT[HIP[_side]] = (THIGH_PARTS[_side], TRUNK_PART)
    PARTS_AT_JOINT[WRIST[_side]] = (FOREARM_PARTS[_side],)
    PARTS_AT_JOINT[ELBOW[_side]] = (FOREARM_PARTS[_side], UPPER_ARM_PARTS[_side])
    PARTS_AT_JOINT[SHOULDER[_side]] = (UPPER_ARM_PARTS[_side], TRUNK_PART)


class PosedBody(NamedTuple):
    """A body in some pose.

    Attributes:
        joints: float64 (16, 3).
        head: center of the head, float64 (3,).
        face: direction in which the face looks, unit vector, float64 (3,).
        across: direction from the head's right to its left, unit vector, float64 (3,).
        front: direction out of the chest, unit vector, float64 (3,).
        toes: of the right and the left foot, float64 (2, 3).
    """

    joints: np.ndarray
    head: np.ndarray
    face: np.ndarray
    across: np.ndarray
    front: np.ndarray
    toes: np.ndarray

    @property
    def torso(self) -> np.ndarray:
        """Midpoint of pelvis and thorax in the image plane, float64 (2,)."""
        return (self.joints[PELVIS, :2] + self.joints[THORAX, :2]) / 2


class PlacedBody(NamedTuple):
    """A body at a position in an image.

    Attributes:
        body: the body.
        position: of the pelvis in pixels, float64 (2,).
        height: of the upright person in pixels.
    """

    body: PosedBody
    position: np.ndarray
    height: float

    def project(self, points: np.ndarray) -> np.ndarray:
        """Project points of the body, (..., 3), to pixels, (..., 2)."""
        return self.position + self.height * points[..., :2]


class DrawnPerson(NamedTuple):
    """The annotation of a person in an image.

    Attributes:
        points: joints in pixels, float64 (16, 2); the center of the first pixel is (0, 0).
        visible: whether a joint is not occluded, bool (16,).
        head_box: (x1, y1, x2, y2) in pixels, float64 (4,).
        center: of the torso in pixels, float64 (2,).
        height: of the upright person in pixels.
    """

    points: np.ndarray
    visible: np.ndarray
    head_box: np.ndarray
    center: np.ndarray
    height: float


# --- scenes -----------------------------------------------------------------------------------------------------------


def draw_people_scene(
    size: int, rng: np.random.Generator, difficulty: float = 1.0
) -> tuple[np.ndarray, list[DrawnPerson]]:
    """Draw an image of one to four people.

    Args:
        size: shorter side in pixels.
        rng: source of all randomness.
        difficulty: 0 to 1, as in `write_mpii`.

    Returns:
        RGB image, uint8 (H, W, 3), and the annotations of the people.
    """
    height, width = random_shape(size, rng)
    canvas = PeopleCanvas(draw_background(height, width, rng))
    for _ in range(rng.integers(3, 8)):
        draw_clutter(canvas.image, rng)
    for _ in range(rng.integers(3, 9)):  # capsules that resemble limbs
        a = rng.uniform(0, [width, height])
        b = a + rng.normal(0, 0.25 * size, 2)
        radii = size * rng.uniform(0.01, 0.05), size * rng.uniform(0.01, 0.05)
        _draw_capsule_object(canvas, a, b, radii, rng)
    count = int(rng.choice([1, 2, 3, 4], p=[0.45, 0.3, 0.15, 0.1])) if rng.random() < difficulty else 1
    mean_height = size * rng.uniform(0.55, 0.95) * (1.0, 0.85, 0.75, 0.7)[count - 1]
    people: list[PlacedBody] = []
    for _ in range(20):
        if len(people) == count:
            break
        body, body_height = sample_pose(rng, difficulty), mean_height * rng.uniform(0.85, 1.15)
        # Some people are so close to the border that it cuts them off.
        extent = body.joints[:, :2] * body_height * (0.6 if rng.random() < 0.3 * difficulty else 1.0)
        low, high = -extent.min(0), np.array([width, height]) - 1 - extent.max(0)
        middle = (low + high) / 2
        position = np.where(low < high, rng.uniform(np.minimum(low, high), np.maximum(low, high)), middle)
        torso = position + body.torso * body_height
        distances = [np.linalg.norm(torso - other.position - other.body.torso * other.height) for other in people]
        if all(distance > 0.3 * body_height for distance in distances):
            people.append(PlacedBody(body, position, body_height))
    people.sort(key=lambda person: person.height)
    for i, person in enumerate(people):
        draw_person(canvas, person, 1 + i, rng)
    for _ in range(rng.binomial(2, 0.5 * difficulty)):
        person = people[rng.integers(len(people))]
        joint = person.project(person.body.joints[rng.integers(16)])
        _draw_occluder(canvas, joint + rng.normal(0, 0.05 * person.height, 2), person.height, rng)
    annotations = [_annotate(canvas, person, 1 + i) for i, person in enumerate(people)]
    return add_noise(canvas.image, rng), annotations


def _draw_capsule_object(
    canvas: PeopleCanvas, a: np.ndarray, b: np.ndarray, radii: tuple[float, float], rng: np.random.Generator
) -> None:
    """Draw a capsule in a random color; one in three is striped."""
    color = random_color(rng)
    stripes = (random_color(rng), float(rng.uniform(2, 6))) if rng.random() < 0.33 else None
    canvas.capsule(a, b, radii, color, stripes=stripes)


def _draw_occluder(canvas: PeopleCanvas, center: np.ndarray, person_height: float, rng: np.random.Generator) -> None:
    """Draw a stick or a polygon in front of a person."""
    if rng.random() < 0.4:
        half = rng.normal(0, 0.35 * person_height, 2)
        radius = person_height * rng.uniform(0.02, 0.06)
        _draw_capsule_object(canvas, center - half, center + half, (radius, radius), rng)
        return
    angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(4, 9))))
    radii = person_height * rng.uniform(0.06, 0.17) * rng.uniform(0.6, 1.2, len(angles))
    vertices = center + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    canvas.polygon(vertices, random_color(rng), rng.normal(0, 1, 2), 0.35)


def _annotate(canvas: PeopleCanvas, person: PlacedBody, number: int) -> DrawnPerson:
    """Annotate person ``number``; the canvas must be complete."""
    body = person.body
    points = person.project(body.joints)
    pixels = np.rint(points).astype(int).clip(0, np.array(canvas.part_ids.shape[::-1]) - 1)
    owner, part = np.divmod(canvas.part_ids[pixels[:, 1], pixels[:, 0]], PARTS_PER_PERSON)
    visible = np.array([bool(owner[j] == number and part[j] in PARTS_AT_JOINT[j]) for j in range(16)])
    head = person.project(body.head)
    extent = np.array([0.055, 0.055])
    extent = extent + 0.02 * np.abs(body.joints[HEAD_TOP, :2] - body.joints[UPPER_NECK, :2]) / HEAD_LENGTH
    head_box = np.concatenate([head - extent * person.height, head + extent * person.height])
    return DrawnPerson(points, visible, head_box, person.position + person.height * body.torso, person.height)


# --- poses ------------------------------------------------------------------------------------------------------------


def sample_pose(rng: np.random.Generator, difficulty: float = 1.0) -> PosedBody:
    """Sample a pose and a viewpoint.

    Args:
        rng: source of all randomness.
        difficulty: 0 to 1; at 0, everybody stands upright and faces the camera.

    Returns:
        The posed body, as seen by the camera.
    """
    postures = ["upright", "bent", "sitting", "lying", "leaping"]
    posture = str(rng.choice(postures, p=[0.5, 0.15, 0.15, 0.08, 0.12])) if rng.random() < difficulty else "upright"
    # Axes of the body: x to its left, y up, z to its front. The trunk bends forward, leans and twists on the hips.
    bend = {"bent": rng.uniform(45, 110), "sitting": rng.normal(5, 15)}.get(posture, rng.normal(8, 12))
    trunk = rotation_about("y", rng.normal(0, 15)) @ rotation_about("x", bend) @ rotation_about("z", rng.normal(0, 10))
    joints = np.zeros((16, 3))
    toes = np.zeros((2, 3))
    joints[THORAX] = trunk @ [0, SPINE_LENGTH, 0]
    neck = trunk @ rotation_about("x", rng.normal(10, 12)) @ rotation_about("z", rng.normal(0, 8))
    joints[UPPER_NECK] = joints[THORAX] + neck @ [0, NECK_LENGTH, 0]
    nod, tilt, turn = rng.normal(0, 12), rng.normal(0, 10), rng.normal(0, 25)
    skull = neck @ rotation_about("x", nod) @ rotation_about("z", tilt) @ rotation_about("y", turn)
    joints[HEAD_TOP] = joints[UPPER_NECK] + skull @ [0, HEAD_LENGTH, 0]
    for side, sign in ((RIGHT, -1.0), (LEFT, 1.0)):
        joints[SHOULDER[side]] = joints[THORAX] + trunk @ [sign * HALF_SHOULDER_WIDTH, -0.02, 0]
        joints[HIP[side]] = [sign * HALF_HIP_WIDTH, -0.01, 0]
        arm = trunk @ rotation_about("z", sign * _sample_arm_raise(rng)) @ rotation_about("y", rng.normal(0, 50))
        upper_arm = arm @ rotation_about("x", -rng.uniform(-30, 60))
        joints[ELBOW[side]] = joints[SHOULDER[side]] + upper_arm @ [0, -UPPER_ARM_LENGTH, 0]
        twist, flexion = rng.normal(0, 40), min(145.0, abs(rng.normal(0, 60)))
        forearm = upper_arm @ rotation_about("y", twist) @ rotation_about("x", -flexion)
        joints[WRIST[side]] = joints[ELBOW[side]] + forearm @ [0, -FOREARM_LENGTH, 0]
        # A negative spread crosses the legs.
        forward, spread, knee = {
            "sitting": (rng.normal(85, 12), rng.normal(8, 10), rng.normal(85, 20)),
            "leaping": (rng.normal(20, 45), rng.normal(15, 25), abs(rng.normal(0, 60))),
            "lying": (rng.normal(15, 30), rng.normal(5, 12), abs(rng.normal(0, 45))),
        }.get(posture, (rng.normal(5, 22), rng.normal(3, 11), abs(rng.normal(0, 25))))
        thigh = rotation_about("z", sign * spread) @ rotation_about("x", -forward)
        thigh = thigh @ rotation_about("y", sign * rng.normal(10, 15))
        joints[KNEE[side]] = joints[HIP[side]] + thigh @ [0, -THIGH_LENGTH, 0]
        shank = thigh @ rotation_about("x", float(np.clip(knee, 0, 140)))
        joints[ANKLE[side]] = joints[KNEE[side]] + shank @ [0, -SHANK_LENGTH, 0]
        toes[side] = joints[ANKLE[side]] + shank @ rotation_about("x", rng.normal(15, 15)) @ [0, -0.02, FOOT_LENGTH]
    if posture == "lying":
        roll = rng.choice([-1, 1]) * rng.normal(85, 20)
    else:
        roll = rng.normal(0, 30 if posture == "leaping" else 9)
    elevation, azimuth = rng.normal(0, 10), difficulty * rng.uniform(-180, 180)
    # Axes of the camera: y down.
    view = np.diag([1.0, -1.0, 1.0]) @ rotation_about("z", roll) @ rotation_about("x", elevation)
    view = view @ rotation_about("y", azimuth)
    head = (joints[UPPER_NECK] + joints[HEAD_TOP]) / 2
    face, across, front = view @ skull @ [0, 0, 1], view @ skull @ [1, 0, 0], view @ trunk @ [0, 0, 1]
    return PosedBody(joints @ view.T, view @ head, face, across, front, toes @ view.T)


def _sample_arm_raise(rng: np.random.Generator) -> float:
    """Sample the angle in degrees between a hanging arm and a raised one."""
    low, high = ((-10, 30), (60, 110), (130, 185), (30, 60))[rng.choice(4, p=[0.4, 0.2, 0.25, 0.15])]
    return float(rng.uniform(low, high))


def rotation_about(axis: str, degrees: float) -> np.ndarray:
    """Return the right-handed rotation about the axis ``x``, ``y`` or ``z``, float64 (3, 3)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


# --- drawing ----------------------------------------------------------------------------------------------------------


class PeopleCanvas:
    """An image, and the body part that each pixel shows.

    Args:
        image: float64 (H, W, 3), RGB, 0 to 255; drawn on in place.

    Attributes:
        image: as given.
        part_ids: int32 (H, W), PARTS_PER_PERSON * person + part, with persons from 1; 0 for background.
        light: direction to the light, float64 (3,).
    """

    def __init__(self, image: np.ndarray) -> None:
        self.image, self.part_ids = image, np.zeros(image.shape[:2], np.int32)
        self.light = np.array([-0.4, -0.6, 0.7])

    def capsule(
        self,
        a: np.ndarray,
        b: np.ndarray,
        radii: tuple[float, float],
        color: np.ndarray,
        part_id: int = 0,
        stripes: tuple[np.ndarray, float] | None = None,
    ) -> None:
        """Draw a shaded limb.

        Args:
            a: first end, (x, y) in pixels.
            b: second end, (x, y) in pixels.
            radii: at both ends in pixels.
            color: RGB, 0 to 255.
            part_id: value for `part_ids`.
            stripes: second color, and number of stripes of it.
        """
        extent = max(radii) + 1
        window = self._window(np.minimum(a, b) - extent, np.maximum(a, b) + extent)
        if window is None:
            return
        rows, columns, x, y = window
        along = b - a
        squared_length = max(float(along @ along), 1e-6)
        t = np.clip(((x - a[0]) * along[0] + (y - a[1]) * along[1]) / squared_length, 0, 1)
        dx, dy = x - a[0] - t * along[0], y - a[1] - t * along[1]
        radius = radii[0] + t * (radii[1] - radii[0])
        distance = np.hypot(dx, dy)
        alpha = np.clip(radius - distance + 0.5, 0, 1)
        depth = np.sqrt(np.clip(1 - (distance / radius) ** 2, 0, 1))
        shade = 0.55 + 0.45 * np.clip((dx * self.light[0] + dy * self.light[1]) / radius + depth * self.light[2], 0, 1)
        surface: np.ndarray = color
        if stripes is not None:
            surface = np.where((np.sin(2 * math.pi * stripes[1] * t) > 0)[..., None], color, stripes[0])
        self._blend(rows, columns, surface * shade[..., None], alpha, part_id)

    def polygon(
        self,
        vertices: np.ndarray,
        color: np.ndarray,
        gradient: np.ndarray,
        contrast: float,
        part_id: int = 0,
        stripes: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Draw a flat polygon.

        Args:
            vertices: (N, 2), x and y in pixels.
            color: RGB, 0 to 255.
            gradient: direction (x, y) in which the polygon darkens.
            contrast: fraction of the color that is lost along the gradient.
            part_id: value for `part_ids`.
            stripes: second color, and wave vector (x, y) of the stripes.
        """
        window = self._window(vertices.min(0) - 1, vertices.max(0) + 1)
        if window is None:
            return
        rows, columns, x, y = window
        mask = np.zeros(x.shape, np.uint8)
        shifted = np.rint((vertices - [columns.start, rows.start]) * 16).astype(np.int32)
        cv2.fillPoly(mask, [shifted], 255, cv2.LINE_AA, shift=4)
        along = x * gradient[0] + y * gradient[1]
        along = (along - along.min()) / max(float(np.ptp(along)), 1e-6)
        surface: np.ndarray = color
        if stripes is not None:
            surface = np.where((np.sin(x * stripes[1][0] + y * stripes[1][1]) > 0)[..., None], color, stripes[0])
        self._blend(rows, columns, surface * (1 - contrast * along)[..., None], mask / 255, part_id)

    def _window(self, low: np.ndarray, high: np.ndarray) -> tuple[slice, slice, np.ndarray, np.ndarray] | None:
        """Return rows, columns and x and y of the pixels in a box; None if it is outside of the image."""
        limit = np.array(self.part_ids.shape[::-1])
        left, top = np.floor(low).astype(int).clip(0, limit).tolist()
        right, bottom = (np.ceil(high).astype(int) + 1).clip(0, limit).tolist()
        if right <= left or bottom <= top:
            return None
        y, x = np.ogrid[top:bottom, left:right]
        shape = bottom - top, right - left
        return slice(top, bottom), slice(left, right), np.broadcast_to(x, shape), np.broadcast_to(y, shape)

    def _blend(self, rows: slice, columns: slice, surface: np.ndarray, alpha: np.ndarray, part_id: int) -> None:
        window = self.image[rows, columns]
        window += (surface - window) * alpha[..., None]
        self.part_ids[rows, columns][alpha > 0.5] = part_id


class Appearance(NamedTuple):
    """Build and clothes of a person.

    Attributes:
        build: unit of the radii of the limbs in pixels.
        skin: RGB, 0 to 255, like all colors.
        hair: color.
        shirt: color.
        trousers: color.
        shoes: color.
        trim: color of the buttons and the yoke.
        sleeves: 0 for none, 1 for short, 2 for long ones.
        long_trousers: whether the shanks are covered.
        stripes: second color of the shirt, and number of stripes of it.
    """

    build: float
    skin: np.ndarray
    hair: np.ndarray
    shirt: np.ndarray
    trousers: np.ndarray
    shoes: np.ndarray
    trim: np.ndarray
    sleeves: int
    long_trousers: bool
    stripes: tuple[np.ndarray, float] | None


def sample_appearance(height: float, rng: np.random.Generator) -> Appearance:
    """Sample the appearance of a person of some height in pixels."""
    build = rng.uniform(0.85, 1.2) * height
    skin = hsv_to_rgb(rng.uniform(0.04, 0.09), rng.uniform(0.25, 0.6), rng.uniform(0.35, 1))
    hair = hsv_to_rgb(rng.uniform(0.03, 0.12), rng.uniform(0.1, 0.7), rng.uniform(0.05, 0.75))
    shirt, trousers, shoes, trim = (random_color(rng) for _ in range(4))
    sleeves, long_trousers = int(rng.choice(3)), bool(rng.choice(2))
    stripes = (random_color(rng), rng.uniform(1.5, 4)) if rng.random() < 0.3 else None
    return Appearance(build, skin, hair, shirt, trousers, shoes, trim, sleeves, long_trousers, stripes)


def draw_person(canvas: PeopleCanvas, person: PlacedBody, number: int, rng: np.random.Generator) -> None:
    """Draw person ``number`` in a random appearance, body parts that are farther away first."""
    joints, points = person.body.joints, person.project(person.body.joints)
    look = sample_appearance(person.height, rng)
    first_id = PARTS_PER_PERSON * number
    parts: list[tuple[float, Callable[[], None]]] = []  # depth, and the function that draws

    def limb(
        a: int,
        b: int,
        radii: tuple[float, float],
        color: np.ndarray,
        part: int,
        striped: bool = False,
        offset: float = 0.0,
    ) -> None:
        stripes, scaled = look.stripes if striped else None, (look.build * radii[0], look.build * radii[1])
        depth = (joints[a, 2] + joints[b, 2]) / 2 + offset
        parts.append((depth, lambda: canvas.capsule(points[a], points[b], scaled, color, first_id + part, stripes)))

    def extremity(
        start: np.ndarray, end: np.ndarray, depth: float, radii: tuple[float, float], color: np.ndarray, part: int
    ) -> None:
        a, b, scaled = person.project(start), person.project(end), (radii[0] * look.build, radii[1] * look.build)
        parts.append((depth, lambda: canvas.capsule(a, b, scaled, color, first_id + part)))

    for side in (RIGHT, LEFT):
        shank_color = look.trousers if look.long_trousers else look.skin
        upper_arm_color = look.shirt if look.sleeves else look.skin
        forearm_color = look.shirt if look.sleeves == 2 else look.skin
        limb(HIP[side], KNEE[side], (0.052, 0.036), look.trousers, THIGH_PARTS[side])
        limb(KNEE[side], ANKLE[side], (0.034, 0.022), shank_color, SHANK_PARTS[side], offset=0.002)
        limb(SHOULDER[side], ELBOW[side], (0.034, 0.026), upper_arm_color, UPPER_ARM_PARTS[side], True)
        limb(ELBOW[side], WRIST[side], (0.025, 0.018), forearm_color, FOREARM_PARTS[side], True, 0.002)
        wrist, ankle, toes = joints[WRIST[side]], joints[ANKLE[side]], person.body.toes[side]
        hand = wrist + 0.25 * (wrist - joints[ELBOW[side]])
        extremity(wrist, hand, hand[2], (0.018, 0.022), look.skin, FOREARM_PARTS[side])
        extremity(ankle, toes, (ankle[2] + toes[2]) / 2, (0.024, 0.018), look.shoes, SHANK_PARTS[side])
    trunk_depth = (joints[PELVIS, 2] + joints[THORAX, 2]) / 2
    parts.append((trunk_depth, lambda: _draw_trunk(canvas, person, look, first_id + TRUNK_PART)))
    limb(THORAX, UPPER_NECK, (0.03, 0.028), look.skin, NECK_PART)
    parts.append((person.body.head[2] + 0.01, lambda: _draw_head(canvas, person, look, first_id + HEAD_PART)))
    for _, draw in sorted(parts, key=lambda item: item[0]):
        draw()


def _draw_trunk(canvas: PeopleCanvas, person: PlacedBody, look: Appearance, part_id: int) -> None:
    """Draw the hull of shoulders and hips, with a placket on the front or a yoke on the back."""
    angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    build = look.build

    def hull(disks: list[tuple[np.ndarray, float]]) -> np.ndarray:
        points = np.concatenate([center + radius * build * circle for center, radius in disks])
        return cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)

    points = person.project(person.body.joints)
    shoulders, hips = [points[i] for i in SHOULDER], [points[i] for i in HIP]
    spine = points[THORAX] - points[PELVIS]
    stripes = None
    if look.stripes:
        stripes = look.stripes[0], spine / max(spine @ spine, 1.0) * 2 * math.pi * look.stripes[1]
    gradient = np.array([1.0, 0.6])
    canvas.polygon(hull([(p, 0.055) for p in hips]), look.trousers, gradient, 0.4, part_id)
    waist = [p + 0.15 * spine for p in hips]
    vertices = hull([*((p, 0.032) for p in shoulders), *((p, 0.048) for p in waist)])
    canvas.polygon(vertices, look.shirt, gradient, 0.4, part_id, stripes)
    front = person.body.front
    offset = 0.04 * build * front[:2]
    if front[2] > 0.15:
        a, b = points[THORAX] + offset, points[PELVIS] + 0.2 * spine + offset
        canvas.capsule(a, b, (0.008 * build, 0.008 * build), look.trim, part_id)
    elif front[2] < -0.15:
        a, b = (0.75 * p + 0.25 * points[PELVIS] - offset for p in shoulders)
        canvas.capsule(a, b, (0.012 * build, 0.012 * build), look.trim, part_id)


def _draw_head(canvas: PeopleCanvas, person: PlacedBody, look: Appearance, part_id: int) -> None:
    """Draw a head with hair, and a face with eyes and mouth if it is visible."""
    body = person.body
    axis = (body.joints[HEAD_TOP] - body.joints[UPPER_NECK]) / HEAD_LENGTH
    radius = 0.052 * look.build
    # The capsule extends from about the upper neck to the top of the head.
    low = body.head - 0.022 * axis
    high = body.head + (HEAD_LENGTH / 2 - 0.052 * look.build / person.height) * axis
    canvas.capsule(person.project(low), person.project(high), (0.88 * radius, radius), look.hair, part_id)
    if body.face[2] > -0.5:
        low, high = low + 0.028 * body.face - 0.008 * axis, low + 0.028 * body.face + 0.02 * axis
        canvas.capsule(person.project(low), person.project(high), (0.6 * radius, 0.72 * radius), look.skin, part_id)
    dark = np.array([25.0, 15.0, 15.0])
    for across, up, size in ((-0.02, 0.018, 0.007), (0.02, 0.018, 0.007), (0.0, -0.025, 0.008)):
        offset = 0.05 * body.face + across * body.across
        if offset[2] > 0.012:
            point = person.project(body.head + offset + up * axis)
            canvas.capsule(point, point, (size * person.height, size * person.height), dark, part_id)
