"""DeepPose's cascade: boxes around joints, what images show in them, and errors of one stage that the next learns from.

Toshev and Szegedy, "DeepPose: Human Pose Estimation via Deep Neural Networks", CVPR 2014, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 0.1  # of the image's side: what a shorter torso counts as; most are about a quarter of it


def diameters(keypoints: Tensor, torso: tuple[int, int], least: float) -> Tensor:
    """diam(y), the distance from the left shoulder to the right hip, at least ``least``: float (B,) in pixels.

    Args:
        keypoints: float (B,K,2).
        torso: the indices of these two.
        least: in pixels.
    """
    a, b = torso
    return torch.linalg.vector_norm(keypoints[:, a] - keypoints[:, b], dim=-1).clamp_min(least)


def cut(images: Tensor, center: Tensor, side: Tensor, size: int) -> Tensor:
    """Squares of images, resized by bilinear interpolation: float32 (B,n,3,size,size); 0 beyond an image.

    Pixel j of a crop shows what lies at center + ((j + 0.5) / size - 0.5) side.

    Args:
        images: float (B,3,H,W).
        center: float (B,n,2) in pixels.
        side: float (B,) in pixels.
        size: of the crops in pixels.
    """
    height, width = images.shape[2:]
    line = (torch.arange(size, device=images.device) + 0.5) / size - 0.5
    x, y = (center[..., i, None] + line * side[:, None, None] for i in (0, 1))  # (B,n,size) each
    x, y = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None, :], y[:, :, :, None]), -1)
    # One call takes all crops of an image, one below the other, so that the image need not be repeated.
    crops = F.grid_sample(images.float(), grid.flatten(1, 2).float(), align_corners=False)
    return crops.unflatten(2, (-1, size)).transpose(1, 2)


def moments_of(found: Tensor, true: Tensor, counted: Tensor, diameter: Tensor) -> Tensor:
    """Of each joint's errors in diameters: how many there are, their sums and their squares' sums, float64 (K,5).

    Args:
        found, true: float (B,K,2).
        counted: bool (B,K).
        diameter: float (B,), of the true pose.
    """
    error = ((found - true) / diameter[:, None, None]).double()
    row = torch.cat([torch.ones_like(error[..., :1]), error, error.square()], -1)
    return torch.where(counted[..., None], row, 0).sum(0)


def gaussian_of(moments: Tensor) -> Tensor:
    """Mean and standard deviation of each joint's errors, along x and y, in diameters: float32 (2,K,2).

    Both are 0 where there is no error. See `moments_of`.
    """
    count = moments[:, :1].clamp_min(1)
    mean = moments[:, 1:3] / count
    variance = moments[:, 3:] / count - mean.square()
    return torch.stack([mean, variance.clamp_min(0).sqrt()]).float()
