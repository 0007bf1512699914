"""Four ways to double the size of a feature map.

- Nearest neighbor: copy each value to a 2x2 block.
- Bed of nails: put each value in the upper left corner of a 2x2 block of zeros.
- Max unpooling: put each value where max pooling found its maximum (Zeiler and Fergus, "Visualizing and Understanding
  Convolutional Networks", ECCV 2014).
- Transposed convolution: multiply a learned kernel by each value, and add where kernels overlap (Long, Shelhamer and
  Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError

UpsamplingMethod = Literal["nearest", "bed_of_nails", "max_unpooling", "transposed_convolution"]


def nearest_neighbor(x: Tensor) -> Tensor:
    """Copy each value to a 2x2 block: float (N, C, h, w) to (N, C, 2h, 2w)."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def bed_of_nails(x: Tensor) -> Tensor:
    """Put each value in the upper left corner of a 2x2 block of zeros: float (N, C, h, w) to (N, C, 2h, 2w)."""
    nail = x.new_zeros(x.shape[1], 1, 2, 2)
    nail[:, :, 0, 0] = 1
    return F.conv_transpose2d(x, nail, stride=2, groups=x.shape[1])


def max_unpooling(x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
    """Put each value where max pooling by 2 found its maximum; the rest is 0.

    Args:
        x: feature map, float (N, C, h, w).
        switches: positions of the maxima, int64 (N, C, h, w): the indices that ``max_pool2d`` returns.
        size: (height, width) of the map before pooling; it may be odd.

    Returns:
        Feature map, float (N, C, height, width).
    """
    return F.max_unpool2d(x, switches, [2, 2], output_size=size)


class UpsamplingLayer(nn.Module):
    """Undo max pooling by 2 with one of the four methods.

    Args:
        method: name of the method; see `UpsamplingMethod`.
        channels: number of channels, C. The transposed convolution learns a 4x4 kernel for each pair of channels.
    """

    def __init__(self, method: UpsamplingMethod, channels: int) -> None:
        super().__init__()
        if method not in ("nearest", "bed_of_nails", "max_unpooling", "transposed_convolution"):
            expected = "nearest, bed_of_nails, max_unpooling or transposed_convolution"
            raise UserError(f"upsampling: expected {expected}, found {method}")
        self.method = method
        is_learned = method == "transposed_convolution"
        self.transposed = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False) if is_learned else None

    def forward(self, x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample to ``size``; see `max_unpooling`. Only max unpooling uses the switches."""
        if self.method == "max_unpooling":
            return max_unpooling(x, switches, size)
        if self.transposed is not None:
            larger = self.transposed(x)
        else:
            larger = nearest_neighbor(x) if self.method == "nearest" else bed_of_nails(x)
        # Pooling rounds odd sides up; drop the additional row and column.
        return larger[:, :, : size[0], : size[1]]
