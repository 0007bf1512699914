"""Joints as heatmaps and back (Tompson et al. 2014; Newell et al. 2016): `encode` and `decode` are a pair.

Coordinates count from the middle of the first pixel, and a cell of a heatmap is ``stride`` pixels wide and high: the
middle of cell j lies at (j + 0.5) stride - 0.5. Half a cell left out moves every joint by up to half a stride.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def to_cells(keypoints: Tensor, stride: float) -> Tensor:
    """From pixels to cells, whose middles are at whole numbers."""
    return (keypoints + 0.5) / stride - 0.5


def to_pixels(cells: Tensor, stride: float) -> Tensor:
    """From cells to pixels; the inverse of `to_cells`."""
    return (cells + 0.5) * stride - 0.5


def shown(keypoints: Tensor, labeled: Tensor, size: tuple[int, int], stride: float) -> Tensor:
    """Which joints have a peak on a heatmap: labeled, and inside of it. Bool (B,K).

    Args:
        keypoints: float (B,K,2) in pixels.
        labeled: bool (B,K).
        size: (height, width) of the heatmaps in cells.
        stride: pixels a cell.
    """
    x, y = to_cells(keypoints, stride).unbind(-1)
    height, width = size
    return labeled & (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)


def encode(keypoints: Tensor, labeled: Tensor, size: tuple[int, int], stride: float, sigma: float) -> Tensor:
    """Gaussians about the joints, not normalized: float32 (B,K,h,w), 1 at the joint itself.

    The Gaussian stands at the joint's own place, not at the nearest cell's middle, so that its peak's neighbors say
    where in the cell the joint lies. A joint that is not labeled, or not inside, gives zeros; see `shown`.

    Args:
        keypoints, labeled, size, stride: see `shown`.
        sigma: standard deviation in cells.
    """
    cells = to_cells(keypoints.float(), stride)
    height, width = size
    columns = torch.arange(width, device=cells.device, dtype=torch.float32)
    rows = torch.arange(height, device=cells.device, dtype=torch.float32)
    # The Gaussian is the product of one along x and one along y.
    along_x = torch.exp(-0.5 * ((columns - cells[..., :1]) / sigma) ** 2)
    along_y = torch.exp(-0.5 * ((rows - cells[..., 1:]) / sigma) ** 2)
    maps = along_y[..., :, None] * along_x[..., None, :]
    return torch.where(shown(keypoints, labeled, size, stride)[..., None, None], maps, 0.0)


def decode(heatmaps: Tensor, stride: float, quarter: bool = True) -> tuple[Tensor, Tensor]:
    """The places of the heatmaps' peaks: keypoints float32 (B,K,2) in pixels, and scores float32 (B,K), their heights.

    Of what `encode` gave, the joint comes back to half a cell along each axis; with ``quarter`` to a quarter of a cell,
    but to half a cell in the outermost cells, which lack a neighbor.

    Args:
        heatmaps: float (B,K,h,w).
        stride: pixels a cell.
        quarter: move the peak by a quarter of a cell to the higher one of its neighbors, along x and along y (the
            authors' code).
    """
    heatmaps = heatmaps.float()
    height, width = heatmaps.shape[2:]
    scores, place = heatmaps.flatten(2).max(2)
    x, y = place % width, place // width
    cells = torch.stack([x, y], -1).float()
    if quarter:
        padded = F.pad(heatmaps, (1, 1, 1, 1)).flatten(2)
        middle = ((y + 1) * (width + 2) + x + 1)[..., None]
        inner = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
        neighbors = torch.cat([middle + 1, middle + width + 2, middle - 1, middle - width - 2], -1)
        right, down, left, up = padded.gather(2, neighbors).unbind(-1)
        slope = torch.stack([right - left, down - up], -1).sign()
        cells = cells + torch.where(inner[..., None], 0.25 * slope, 0.0)
    return to_pixels(cells, stride), scores


def mirror_partners(joint_names: Sequence[str]) -> list[int]:
    """The index of each joint's partner on the other side, its name with left and right exchanged; else its own."""
    names = list(joint_names)
    other = {"left": "right", "right": "left"}
    partners = []
    for i, name in enumerate(names):
        side, _, rest = name.partition("_")
        partner = f"{other.get(side)}_{rest}"
        partners.append(names.index(partner) if partner in names else i)
    return partners
