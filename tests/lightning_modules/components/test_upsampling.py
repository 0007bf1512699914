"""Upsampling: the worked examples of the lecture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.components.upsampling import UpsamplingLayer, bed_of_nails, max_unpooling, nearest_neighbor

SMALL = torch.tensor([[[[1.0, 2], [3, 4]]]])


def test_nearest_neighbor() -> None:
    assert nearest_neighbor(SMALL)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_bed_of_nails() -> None:
    assert bed_of_nails(SMALL)[0, 0].tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]
    two = torch.cat([SMALL, SMALL * 10], 1)
    assert bed_of_nails(two)[0, 1, 2].tolist() == [30, 0, 40, 0]


def test_max_unpooling_uses_the_positions_of_the_maxima() -> None:
    large = torch.tensor([[[[1.0, 2, 6, 3], [3, 5, 2, 1], [1, 2, 2, 1], [7, 3, 4, 8]]]])
    pooled, switches = F.max_pool2d(large, 2, return_indices=True)
    assert pooled.flatten().tolist() == [5, 6, 7, 8]
    assert switches.flatten().tolist() == [5, 2, 12, 15]
    unpooled = max_unpooling(SMALL, switches, (4, 4))
    assert unpooled[0, 0].tolist() == [[0, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0], [3, 0, 0, 4]]


def test_transposed_convolution_adds_where_kernels_overlap() -> None:
    """The lecture's example: inputs a, b and filter x, y, z with stride 2 give ax, ay, az + bx, by, bz."""
    a, b, x, y, z = 2.0, 3.0, 5.0, 7.0, 11.0
    found = F.conv_transpose1d(torch.tensor([[[a, b]]]), torch.tensor([[[x, y, z]]]), stride=2)
    assert found.flatten().tolist() == [a * x, a * y, a * z + b * x, b * y, b * z]
    # In two dimensions: a kernel of 4 with stride 2, so that two kernels overlap along each axis.
    layer = UpsamplingLayer("transposed_convolution", 1)
    assert layer.transposed is not None
    torch.nn.init.ones_(layer.transposed.weight)
    found = layer(SMALL, torch.zeros(0), (4, 4))
    assert found[0, 0].tolist() == [[1, 3, 3, 2], [4, 10, 10, 6], [4, 10, 10, 6], [3, 7, 7, 4]]


def test_method_is_checked() -> None:
    with pytest.raises(ValueError, match="upsampling: expected nearest, bed_of_nails"):
        UpsamplingLayer("bilinear", 3)  # type: ignore[arg-type]
