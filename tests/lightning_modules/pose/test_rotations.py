"""Rotations: all conversions against SciPy and back, half turns and gimbal lock included."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from lightning_modules.pose.rotations import (
    euler_to_matrix,
    euler_to_quaternion,
    geodesic_distance,
    matrix_to_euler,
    matrix_to_quaternion,
    quaternion_to_euler,
    quaternion_to_matrix,
    rotation_6d_to_matrix,
    standardize_quaternion,
)

GENERAL = Rotation.random(500, random_state=0)
# All rotations by multiples of 90 degrees, which contain half turns and both gimbal locks.
SQUARE = Rotation.from_euler("ZYX", list(itertools.product([0, 90, 180, 270], repeat=3)), degrees=True)
BOTH = Rotation.concatenate([GENERAL, SQUARE])


def matrices(rotation: Rotation = BOTH) -> Tensor:
    return torch.from_numpy(rotation.as_matrix())


def quaternions(rotation: Rotation = BOTH) -> Tensor:
    return torch.from_numpy(rotation.as_quat(scalar_first=True))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_quaternions_and_matrices_are_scipys() -> None:
    close(quaternion_to_matrix(quaternions()), matrices())
    found = matrix_to_quaternion(matrices())
    assert (found[:, 0] >= 0).all()
    # For a half turn q and -q both have w = 0.
    close((found * quaternions()).sum(-1).abs(), torch.ones(len(found), dtype=torch.float64))


def test_the_length_of_a_quaternion_does_not_matter() -> None:
    close(quaternion_to_matrix(quaternions() * 7), matrices())
    close(quaternion_to_matrix(-quaternions()), matrices())


def test_euler_angles_are_scipys() -> None:
    angles = torch.from_numpy(GENERAL.as_euler("ZYX"))
    close(matrix_to_euler(matrices(GENERAL)), angles)
    close(euler_to_matrix(angles), matrices(GENERAL))
    close(euler_to_quaternion(angles), standardize_quaternion(quaternions(GENERAL)))
    close(quaternion_to_euler(quaternions(GENERAL)), angles)


def test_yaw_turns_x_to_y_pitch_x_away_from_z_and_roll_leaves_it() -> None:
    nose = torch.tensor([1.0, 0.0, 0.0])
    quarter = math.pi / 2
    close(euler_to_matrix(torch.tensor([quarter, 0.0, 0.0])) @ nose, torch.tensor([0.0, 1.0, 0.0]), 1e-6)
    close(euler_to_matrix(torch.tensor([0.0, quarter, 0.0])) @ nose, torch.tensor([0.0, 0.0, -1.0]), 1e-6)
    close(euler_to_matrix(torch.tensor([0.0, 0.0, quarter])) @ nose, nose, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pitch", [math.pi / 2, -math.pi / 2])
def test_in_gimbal_lock_the_roll_is_zero_and_the_rotation_stays(dtype: torch.dtype, pitch: float) -> None:
    generator = torch.Generator().manual_seed(0)
    yaw, roll = (torch.rand(2, 200, generator=generator, dtype=dtype) - 0.5) * 2 * math.pi
    locked = euler_to_matrix(torch.stack([yaw, torch.full_like(yaw, pitch), roll], -1))
    found = matrix_to_euler(locked)
    assert (found[:, 2] == 0).all()
    close(euler_to_matrix(found), locked, 1e-12 if dtype == torch.float64 else 2e-6)
    # Only yaw - roll (looking up) or yaw + roll (looking down) is determined.
    only = yaw - roll if pitch > 0 else yaw + roll
    close((found[:, 0] - only).cos(), torch.ones_like(only), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_close_to_gimbal_lock_the_rotation_stays(dtype: torch.dtype, tolerance: float) -> None:
    away = torch.logspace(-12, -1, 100, dtype=torch.float64)
    yaw, roll = torch.full_like(away, 0.7), torch.full_like(away, -0.4)
    for sign in (1, -1):
        matrix = euler_to_matrix(torch.stack([yaw, sign * (math.pi / 2 - away), roll], -1)).to(dtype)
        close(euler_to_matrix(matrix_to_euler(matrix)), matrix, tolerance)


def test_single_precision_keeps_half_turns() -> None:
    half = Rotation.from_rotvec(math.pi * Rotation.random(300, random_state=1).apply([0.0, 0.0, 1.0]))
    matrix = matrices(half).float()
    close(quaternion_to_matrix(matrix_to_quaternion(matrix)), matrix, 1e-6)


def test_any_six_numbers_give_a_rotation() -> None:
    rotation_6d = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = rotation_6d_to_matrix(rotation_6d)
    close(found.mT @ found, torch.eye(3, dtype=torch.float64).expand_as(found))
    close(torch.linalg.det(found), torch.ones(500, dtype=torch.float64))
    # The first column has the direction of the first vector; the second lies in the plane of both.
    close(found[:, :, 0], rotation_6d[:, :3] / rotation_6d[:, :3].norm(dim=-1, keepdim=True))
    close((found[:, :, 2] * rotation_6d[:, 3:]).sum(-1), torch.zeros(500, dtype=torch.float64))
    rotations = matrices()
    close(rotation_6d_to_matrix(rotations[:, :, :2].mT.reshape(-1, 6)), rotations)


def test_the_geodesic_distance_is_the_angle_of_the_turn_between() -> None:
    a, b = GENERAL, Rotation.random(500, random_state=2)
    expected = torch.from_numpy((a.inv() * b).magnitude())
    close(geodesic_distance(matrices(a), matrices(b)), expected, 1e-9)
    angles = np.concatenate([np.logspace(-6, 0, 50), math.pi - np.logspace(-6, 0, 50)])
    axis = np.array([2.0, -1.0, 2.0]) / 3
    turned = matrices(Rotation.from_rotvec(angles[:, None] * axis))
    found = geodesic_distance(torch.eye(3, dtype=torch.float64).expand_as(turned), turned)
    close(found, torch.from_numpy(angles), 1e-9)
    # Single precision resolves 1e-6 radians; an arc cosine would return 0 or 0.0003.
    single = geodesic_distance(torch.eye(3).expand(100, 3, 3), turned.float())
    torch.testing.assert_close(single.double(), torch.from_numpy(angles), atol=1e-6, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(geodesic_distance(torch.eye(3).expand(100, 3, 3), turned.float()), single)
