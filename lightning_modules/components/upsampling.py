"""Four ways to make a map twice as large, as the lecture shows them.

- nearest neighbor: each value four times;
- bed of nails: each value in the upper left corner of four, the others 0;
- max unpooling: each value where the maximum was when the map was made smaller (Zeiler and Fergus 2014);
- transposed convolution: each value times a kernel that is learned, added up where kernels overlap (Long et al. 2015).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError

Upsampling = Literal["nearest", "bed_of_nails", "max_unpooling", "transposed_convolution"]


def nearest(x: Tensor) -> Tensor:
    """float (B,C,h,w) to (B,C,2h,2w)."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def bed_of_nails(x: Tensor) -> Tensor:
    """float (B,C,h,w) to (B,C,2h,2w)."""
    nail = x.new_zeros(x.shape[1], 1, 2, 2)
    nail[:, :, 0, 0] = 1
    return F.conv_transpose2d(x, nail, stride=2, groups=x.shape[1])


def max_unpooling(x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
    """float (B,C,h,w) to (B,C,height,width).

    Args:
        x: the map.
        switches: int64 (B,C,h,w), where the maxima were: what ``max_pool2d`` returns as indices.
        size: (height, width) of the map that was pooled, which may have been odd.
    """
    return F.max_unpool2d(x, switches, [2, 2], output_size=size)


class Upsample(nn.Module):
    """One of the four, to be chosen by name.

    Args:
        kind: see above.
        channels: C, of which a transposed convolution learns a kernel 4x4 for each pair.
    """

    def __init__(self, kind: Upsampling, channels: int) -> None:
        super().__init__()
        if kind not in ("nearest", "bed_of_nails", "max_unpooling", "transposed_convolution"):
            expected = "nearest, bed_of_nails, max_unpooling or transposed_convolution"
            raise UserError(f"upsampling: expected {expected}, found {kind}")
        self.kind = kind
        learns = kind == "transposed_convolution"
        self.transposed = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False) if learns else None

    def forward(self, x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
        """As `max_unpooling`, whatever the kind: the others do not look at the switches, and are cut to the size."""
        if self.kind == "max_unpooling":
            return max_unpooling(x, switches, size)
        if self.transposed is not None:
            larger = self.transposed(x)
        else:
            larger = nearest(x) if self.kind == "nearest" else bed_of_nails(x)
        # An odd map was pooled with a last row of its own.
        return larger[:, :, : size[0], : size[1]]
