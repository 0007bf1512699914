"""Encode joints as heatmaps and decode them (Tompson et al., NIPS 2014; Newell et al., ECCV 2016).

Pixel coordinates are 0 at the center of the first pixel. A heatmap cell covers ``stride`` x ``stride`` pixels, so the
center of cell j is at pixel (j + 0.5) * stride - 0.5. Omitting the half cell would shift joints by up to stride / 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixels_to_cells(keypoints: Tensor, stride: float) -> Tensor:
    """Convert pixel coordinates to cell coordinates; integers are centers of cells."""
    return (keypoints + 0.5) / stride - 0.5


def cells_to_pixels(cells: Tensor, stride: float) -> Tensor:
    """Convert cell coordinates to pixel coordinates, the inverse of `pixels_to_cells`."""
    return (cells + 0.5) * stride - 0.5


def inside_heatmap(keypoints: Tensor, labeled: Tensor, size: tuple[int, int], stride: float) -> Tensor:
    """Return which joints are labeled and inside of the heatmap.

    Args:
        keypoints: float (B, K, 2) in pixels.
        labeled: bool (B, K).
        size: (height, width) of the heatmaps in cells.
        stride: pixels per cell.

    Returns:
        bool (B, K).
    """
    x, y = pixels_to_cells(keypoints, stride).unbind(-1)
    height, width = size
    return labeled & (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)


def encode(keypoints: Tensor, labeled: Tensor, size: tuple[int, int], stride: float, sigma: float) -> Tensor:
    """Draw an unnormalized Gaussian at each joint.

    The Gaussian is centered on the exact position of the joint, not on the nearest cell, so that the neighbors of the
    peak encode the position within the cell. Joints that are not labeled or not inside yield zeros.

    Args:
        keypoints: float (B, K, 2) in pixels.
        labeled: bool (B, K).
        size: (height, width) of the heatmaps in cells, (h, w).
        stride: pixels per cell.
        sigma: standard deviation in cells.

    Returns:
        Heatmaps, float32 (B, K, h, w), in 0..1.
    """
    cells = pixels_to_cells(keypoints.float(), stride)
    height, width = size
    columns = torch.arange(width, device=cells.device, dtype=torch.float32)
    rows = torch.arange(height, device=cells.device, dtype=torch.float32)
    # A 2D Gaussian is the product of two 1D Gaussians.
    along_x = torch.exp(-0.5 * ((columns - cells[..., :1]) / sigma) ** 2)
    along_y = torch.exp(-0.5 * ((rows - cells[..., 1:]) / sigma) ** 2)
    heatmaps = along_y[..., :, None] * along_x[..., None, :]
    return torch.where(inside_heatmap(keypoints, labeled, size, stride)[..., None, None], heatmaps, 0.0)


def decode(heatmaps: Tensor, stride: float, quarter_shift: bool = True) -> tuple[Tensor, Tensor]:
    """Find the peak of each heatmap.

    The error for a heatmap of `encode` is at most half a cell along each axis. With ``quarter_shift`` it is at most a
    quarter of a cell, except in the outermost cells, which lack a neighbor.

    Args:
        heatmaps: float (B, K, h, w).
        stride: pixels per cell.
        quarter_shift: move the peak by 0.25 cells towards the higher neighbor, along x and along y (the authors' code).

    Returns:
        Keypoints, float32 (B, K, 2) in pixels, and scores, float32 (B, K), the heights of the peaks.
    """
    heatmaps = heatmaps.float()
    height, width = heatmaps.shape[2:]
    scores, index = heatmaps.flatten(2).max(2)
    x, y = index % width, index // width
    cells = torch.stack([x, y], -1).float()
    if quarter_shift:
        padded = F.pad(heatmaps, (1, 1, 1, 1)).flatten(2)
        peak = ((y + 1) * (width + 2) + x + 1)[..., None]
        inner = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
        neighbors = torch.cat([peak + 1, peak + width + 2, peak - 1, peak - width - 2], -1)
        right, down, left, up = padded.gather(2, neighbors).unbind(-1)
        direction = torch.stack([right - left, down - up], -1).sign()
        cells = cells + torch.where(inner[..., None], 0.25 * direction, 0.0)
    return cells_to_pixels(cells, stride), scores
