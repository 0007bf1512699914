"""Anchor boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def make_anchors(
    sizes: Sequence[float], ratios: Sequence[float], stride: int, shape: Sequence[int], device: torch.device
) -> Tensor:
    """Make the anchors of one feature map, centered on its cells.

    The authors' anchors are centered likewise, but their sides are rounded to whole pixels.

    Args:
        sizes: square roots of the anchor areas in pixels.
        ratios: aspect ratios, height / width.
        stride: distance between neighboring cells in pixels.
        shape: (height, width) of the feature map.
        device: device of the result.

    Returns:
        Anchors, float32 (height * width * k, 4), xyxy in pixels, in the order row, column, ratio, size.
    """
    half = [[s / math.sqrt(r) / 2, s * math.sqrt(r) / 2] for r in ratios for s in sizes]
    extent = torch.tensor(half).to(device, non_blocking=True)
    rows, columns = shape
    y, x = ((torch.arange(n, device=device) + 0.5) * stride for n in (rows, columns))
    center = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], -1)[:, :, None]
    return torch.cat([center - extent, center + extent], -1).view(-1, 4)
