"""Anchor boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def make_anchors(
    sizes: Sequence[float], ratios: Sequence[float], stride: int, shape: Sequence[int], device: torch.device
) -> Tensor:
    """The anchors of one map: float32 (rows*columns*k,4) xyxy in pixels, by row, column, ratio and size.

    They are centerd on the cells, as the authors' (whose sides are rounded to whole pixels).

    Args:
        sizes: roots of their areas in pixels.
        ratios: heights / widths.
        stride: pixels from one cell to the next.
        shape: rows and columns of the map.
        device: of the result.
    """
    half = [[s / math.sqrt(r) / 2, s * math.sqrt(r) / 2] for r in ratios for s in sizes]
    extent = torch.tensor(half).to(device, non_blocking=True)
    rows, columns = shape
    y, x = ((torch.arange(n, device=device) + 0.5) * stride for n in (rows, columns))
    center = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], -1)[:, :, None]
    return torch.cat([center - extent, center + extent], -1).view(-1, 4)
