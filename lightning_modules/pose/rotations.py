"""Rotations of a rigid body as matrices, unit quaternions, Euler angles and six numbers, all on batches.

A matrix R takes a column vector of the body to the camera: x_camera = R x_body. A quaternion is (w, x, y, z), of length
1; q and -q are one rotation, and what is made here has w >= 0. Euler angles are (yaw, pitch, roll) in radians,
intrinsic ZYX: about the body's z axis, then about the y axis so turned, then about the x axis so turned,
R = Rz(yaw) Ry(pitch) Rx(roll).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """float (...,4) of any length but 0 to (...,3,3)."""
    w, x, y, z = F.normalize(quaternion, dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """float (...,3,3) to (...,4) with w >= 0 (Shepperd 1978).

    Of four ways to write it, each of which divides by one of the components, that one is taken whose divisor is the
    greatest: it is 1/2 at least, so that half turns, where w is 0, lose nothing.
    """
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    # Row k is 4 times the k-th component, times the quaternion.
    ways = torch.stack(
        [
            torch.stack([1 + a + e + i, h - f, c - g, d - b], -1),
            torch.stack([h - f, 1 + a - e - i, b + d, c + g], -1),
            torch.stack([c - g, b + d, 1 - a + e - i, f + h], -1),
            torch.stack([d - b, c + g, f + h, 1 - a - e + i], -1),
        ],
        -2,
    )
    best = ways.diagonal(dim1=-2, dim2=-1).argmax(-1)
    chosen = ways.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    return canonical(F.normalize(chosen, dim=-1))


def canonical(quaternion: Tensor) -> Tensor:
    """Of q and -q, float (...,4), the one with w >= 0."""
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def euler_to_matrix(euler: Tensor) -> Tensor:
    """(yaw, pitch, roll), float (...,3) in radians, to (...,3,3)."""
    (cy, cp, cr), (sy, sp, sr) = euler.cos().unbind(-1), euler.sin().unbind(-1)
    rows = (
        (cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr),
        (sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr),
        (-sp, cp * sr, cp * cr),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_euler(matrix: Tensor) -> Tensor:
    """float (...,3,3) to (yaw, pitch, roll), (...,3) in radians: yaw and roll in -pi..pi, pitch in -pi/2..pi/2.

    In gimbal lock, at a pitch of pi/2 or -pi/2, only yaw - roll or yaw + roll is determined: the roll is set to 0. The
    yaw is what the roll leaves over, so that the angles give the matrix there and close to it too.
    """
    cosine = torch.hypot(matrix[..., 2, 1], matrix[..., 2, 2])
    locked = cosine < 10 * torch.finfo(matrix.dtype).eps
    roll = torch.where(locked, 0.0, torch.atan2(matrix[..., 2, 1], matrix[..., 2, 2]))
    # Turned back by the roll, the second column is (-sin yaw, cos yaw, 0).
    second = roll.cos()[..., None] * matrix[..., 1] - roll.sin()[..., None] * matrix[..., 2]
    yaw = torch.atan2(-second[..., 0], second[..., 1])
    return torch.stack([yaw, torch.atan2(-matrix[..., 2, 0], cosine), roll], -1)


def euler_to_quaternion(euler: Tensor) -> Tensor:
    """(yaw, pitch, roll), float (...,3) in radians, to (...,4) with w >= 0."""
    (cy, cp, cr), (sy, sp, sr) = (euler / 2).cos().unbind(-1), (euler / 2).sin().unbind(-1)
    parts = (
        cy * cp * cr + sy * sp * sr,
        cy * cp * sr - sy * sp * cr,
        cy * sp * cr + sy * cp * sr,
        sy * cp * cr - cy * sp * sr,
    )
    return canonical(torch.stack(parts, -1))


def quaternion_to_euler(quaternion: Tensor) -> Tensor:
    """float (...,4) to (yaw, pitch, roll), see `matrix_to_euler`."""
    return matrix_to_euler(quaternion_to_matrix(quaternion))


def six_to_matrix(six: Tensor) -> Tensor:
    """Two columns that need be neither of length 1 nor at right angles, float (...,6), to (...,3,3).

    Gram and Schmidt's way; the third column is their cross product (Zhou et al., CVPR 2019, equation 15). Unlike three
    or four numbers six can follow every turn without a jump.
    """
    first = F.normalize(six[..., :3], dim=-1)
    second = six[..., 3:] - (first * six[..., 3:]).sum(-1, keepdim=True) * first
    second = F.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def geodesic(matrix: Tensor, other: Tensor) -> Tensor:
    """The angle of the turn between two rotations, float (...,3,3) each: (...) in radians, 0..pi.

    By the tangent of half the angle. The arc cosine of the trace, which is often taken, cannot tell small angles apart.
    """
    # Not by @, which autocast would round to three digits.
    between = (matrix.mT[..., None] * other[..., None, :, :]).sum(-2)
    q = matrix_to_quaternion(between)
    return 2 * torch.atan2(q[..., 1:].norm(dim=-1), q[..., 0])
