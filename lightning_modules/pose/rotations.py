"""Rotations as matrices, unit quaternions, Euler angles and the 6D representation, with any batch dimensions.

A matrix R maps the body's coordinates to the camera's: x_camera = R x_body. Quaternions are (w, x, y, z); q and -q are
the same rotation, and the functions return the one with w >= 0. Euler angles are (yaw, pitch, roll) in radians,
intrinsic ZYX: R = Rz(yaw) Ry(pitch) Rx(roll).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Convert quaternions of any nonzero norm, float (..., 4), to matrices (..., 3, 3)."""
    w, x, y, z = F.normalize(quaternion, dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Convert matrices, float (..., 3, 3), to quaternions (..., 4) with w >= 0 (Shepperd 1978).

    Four formulas exist, each of which divides by one component. The one with the largest divisor, at least 1/2, is
    selected, so that half turns (w = 0) are exact.
    """
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    # Row k is the quaternion times 4 times its k-th component.
    candidates = torch.stack(
        [
            torch.stack([1 + a + e + i, h - f, c - g, d - b], -1),
            torch.stack([h - f, 1 + a - e - i, b + d, c + g], -1),
            torch.stack([c - g, b + d, 1 - a + e - i, f + h], -1),
            torch.stack([d - b, c + g, f + h, 1 - a - e + i], -1),
        ],
        -2,
    )
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
    selected = candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    return standardize_quaternion(F.normalize(selected, dim=-1))


def standardize_quaternion(quaternion: Tensor) -> Tensor:
    """Return q or -q, float (..., 4), whichever has w >= 0."""
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def euler_to_matrix(euler: Tensor) -> Tensor:
    """Convert (yaw, pitch, roll), float (..., 3) in radians, to matrices (..., 3, 3)."""
    (cy, cp, cr), (sy, sp, sr) = euler.cos().unbind(-1), euler.sin().unbind(-1)
    rows = (
        (cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr),
        (sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr),
        (-sp, cp * sr, cp * cr),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_euler(matrix: Tensor) -> Tensor:
    """Convert matrices, float (..., 3, 3), to (yaw, pitch, roll), (..., 3) in radians.

    Yaw and roll are in -pi..pi, pitch in -pi/2..pi/2. In gimbal lock, at a pitch of +-pi/2, only yaw - roll or
    yaw + roll is determined, and roll is set to 0. Yaw is computed from the rotation without roll, so that the angles
    reproduce the matrix in gimbal lock and close to it.
    """
    cosine = torch.hypot(matrix[..., 2, 1], matrix[..., 2, 2])
    locked = cosine < 10 * torch.finfo(matrix.dtype).eps
    roll = torch.where(locked, 0.0, torch.atan2(matrix[..., 2, 1], matrix[..., 2, 2]))
    # Without roll the second column is (-sin yaw, cos yaw, 0).
    second = roll.cos()[..., None] * matrix[..., 1] - roll.sin()[..., None] * matrix[..., 2]
    yaw = torch.atan2(-second[..., 0], second[..., 1])
    return torch.stack([yaw, torch.atan2(-matrix[..., 2, 0], cosine), roll], -1)


def euler_to_quaternion(euler: Tensor) -> Tensor:
    """Convert (yaw, pitch, roll), float (..., 3) in radians, to quaternions (..., 4) with w >= 0."""
    (cy, cp, cr), (sy, sp, sr) = (euler / 2).cos().unbind(-1), (euler / 2).sin().unbind(-1)
    parts = (
        cy * cp * cr + sy * sp * sr,
        cy * cp * sr - sy * sp * cr,
        cy * sp * cr + sy * cp * sr,
        sy * cp * cr - cy * sp * sr,
    )
    return standardize_quaternion(torch.stack(parts, -1))


def quaternion_to_euler(quaternion: Tensor) -> Tensor:
    """Convert quaternions, float (..., 4), to (yaw, pitch, roll), see `matrix_to_euler`."""
    return matrix_to_euler(quaternion_to_matrix(quaternion))


def rotation_6d_to_matrix(rotation_6d: Tensor) -> Tensor:
    """Convert two 3D vectors, float (..., 6), to matrices (..., 3, 3) by Gram-Schmidt (Zhou et al., CVPR 2019, eq. 15).

    The vectors become the first two columns, and their cross product the third. They need not be orthonormal. Unlike
    quaternions and Euler angles this representation is continuous.
    """
    first = F.normalize(rotation_6d[..., :3], dim=-1)
    second = rotation_6d[..., 3:] - (first * rotation_6d[..., 3:]).sum(-1, keepdim=True) * first
    second = F.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def geodesic_distance(matrix: Tensor, other: Tensor) -> Tensor:
    """Compute the angle of the rotation between two rotations, float (..., 3, 3) each: (...) in radians, 0..pi.

    It uses the tangent of half the angle. The arc cosine of the trace loses small angles.
    """
    # No matmul: autocast would compute it in bfloat16.
    relative = (matrix.mT[..., None] * other[..., None, :, :]).sum(-2)
    q = matrix_to_quaternion(relative)
    return 2 * torch.atan2(q[..., 1:].norm(dim=-1), q[..., 0])
