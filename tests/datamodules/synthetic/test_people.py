"""Synthetic people: joints lie on the bodies, left and right are the person's, and poses vary."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.pose.joints import MPII_JOINTS
from datamodules.synthetic.drawing import draw_background
from datamodules.synthetic.people import (
    HEAD_TOP,
    HIP,
    LEFT,
    PARTS_AT_JOINT,
    PARTS_PER_PERSON,
    RIGHT,
    SHOULDER,
    UPPER_NECK,
    PeopleCanvas,
    PlacedBody,
    draw_people_scene,
    draw_person,
    rotation_about,
    sample_pose,
)


def test_joints_lie_on_their_bodies() -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        canvas, body = PeopleCanvas(np.zeros((200, 200, 3))), sample_pose(rng)
        person = PlacedBody(body, np.array([100.0, 100]), 100)
        draw_person(canvas, person, 1, rng)
        points = np.rint(person.project(body.joints)).astype(int)
        for joint, (x, y) in enumerate(points):
            # If another part occludes the joint, the part belongs to the same person.
            assert canvas.part_ids[y, x] // PARTS_PER_PERSON == 1 or joint == HEAD_TOP, (seed, MPII_JOINTS[joint])
        parts = [canvas.part_ids[y, x] % PARTS_PER_PERSON in PARTS_AT_JOINT[j] for j, (x, y) in enumerate(points)]
        assert np.mean(parts) > 0.3


def test_left_and_right_are_those_of_the_person() -> None:
    """The right shoulder is on the left of the image if the person faces the camera, and on the right from behind."""
    correct, facing = [], []
    for seed in range(300):
        body = sample_pose(np.random.default_rng(seed))
        up = body.joints[UPPER_NECK] - (body.joints[HIP[RIGHT]] + body.joints[HIP[LEFT]]) / 2
        if abs(body.front[2]) < 0.3 or up[1] > -0.15:
            continue
        right_on_left = body.joints[SHOULDER[RIGHT], 0] < body.joints[SHOULDER[LEFT], 0]
        correct.append(right_on_left == (body.front[2] > 0))
        facing.append(body.front[2] > 0)
    assert len(correct) > 80
    assert np.mean(correct) > 0.97
    assert 0.3 < np.mean(facing) < 0.7


def test_limbs_have_constant_lengths_and_rotations_are_orthogonal() -> None:
    for axis in "xyz":
        matrix = rotation_about(axis, 33)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1)
    np.testing.assert_allclose(rotation_about("z", 90) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    for seed in range(20):
        joints = sample_pose(np.random.default_rng(seed)).joints
        lengths = [
            np.linalg.norm(joints[a] - joints[b]) for a, b in ((0, 1), (5, 4), (1, 2), (10, 11), (14, 13), (8, 9))
        ]
        np.testing.assert_allclose(lengths, [0.24, 0.24, 0.24, 0.15, 0.17, 0.15])


def test_people_are_occluded_and_cut_off() -> None:
    scenes = [draw_people_scene(64, np.random.default_rng((1, i))) for i in range(40)]
    counts = [len(people) for _, people in scenes]
    assert set(counts) == {1, 2, 3, 4}
    everyone = [person for _, people in scenes for person in people]
    visible = np.mean([person.visible.mean() for person in everyone])
    assert 0.4 < visible < 0.9
    cut_off = [
        ((person.points < -0.5) | (person.points > np.array(image.shape[1::-1]) - 0.5)).any()
        for image, people in scenes
        for person in people
    ]
    assert 0.05 < np.mean(cut_off) < 0.6
    assert all(image.dtype == np.uint8 and min(image.shape[:2]) == 64 for image, _ in scenes)


def test_a_canvas_clips_at_its_borders() -> None:
    canvas = PeopleCanvas(draw_background(20, 30, np.random.default_rng(0)))
    before = canvas.image.copy()
    canvas.capsule(np.array([-50.0, 5]), np.array([-40.0, 5]), (3, 3), np.array([255.0, 0, 0]))
    assert (canvas.image == before).all()
    canvas.capsule(np.array([-5.0, 10]), np.array([40.0, 10]), (3, 3), np.array([255.0, 0, 0]), part_id=107)
    assert (canvas.part_ids[8:13] == 107).all()
    assert (canvas.part_ids[:6] == 0).all()
