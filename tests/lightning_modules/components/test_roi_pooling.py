"""RoI pooling: the lecture's two worked examples, and the conventions of torchvision's two operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align, roi_pool


def pool_by_hand(features: np.ndarray, left: int, top: int, bins: tuple[int, int]) -> np.ndarray:
    """The greatest value in each of 7x7 bins of ``bins`` (width, height) cells."""
    result = np.empty((len(features), 7, 7), np.float32)
    for row in range(7):
        for column in range(7):
            y, x = top + row * bins[1], left + column * bins[0]
            result[:, row, column] = features[:, y : y + bins[1], x : x + bins[0]].max((1, 2))
    return result


def random_features(height: int, width: int) -> torch.Tensor:
    """float32 (1,3,height,width), all values different."""
    generator = torch.Generator().manual_seed(height)
    return torch.randperm(3 * height * width, generator=generator).float().view(1, 3, height, width)


@pytest.mark.parametrize(("width", "height", "bins"), [(21, 14, (3, 2)), (35, 42, (5, 6))], ids=["21x14", "35x42"])
def test_the_lectures_examples(width: int, height: int, bins: tuple[int, int]) -> None:
    """A region of 21x14 cells becomes 7x7 by bins of 3x2, one of 35x42 by bins of 5x6.

    The last column and row belong to the box: 21 cells from 0 are those from 0 to 20.
    """
    features = random_features(50, 60)
    for left, top in ((0, 0), (8, 5), (60 - width, 50 - height)):
        box = torch.tensor([[left, top, left + width - 1, top + height - 1]], dtype=torch.float32)
        pooled = roi_pool(features, [box], 7)[0]
        np.testing.assert_array_equal(pooled.numpy(), pool_by_hand(features[0].numpy(), left, top, bins))


def test_a_continuous_box_is_one_cell_too_large() -> None:
    features = random_features(50, 60)
    expected = pool_by_hand(features[0].numpy(), 0, 0, (3, 2))
    pooled = roi_pool(features, [torch.tensor([[0.0, 0, 21, 14]])], 7)[0].numpy()
    assert (pooled != expected).any()


def test_boxes_are_in_pixels_and_features_in_cells_of_a_stride() -> None:
    """VGG16's features are at 1/16: pixels 0 to 335 across are cells 0 to 21, rounded."""
    features = random_features(50, 60)
    pixels = roi_pool(features, [torch.tensor([[16.0 * 4, 16 * 3, 16 * 24, 16 * 16]])], 7, spatial_scale=1 / 16)
    cells = roi_pool(features, [torch.tensor([[4.0, 3, 24, 16]])], 7)
    torch.testing.assert_close(pixels, cells, rtol=0, atol=0)
    np.testing.assert_array_equal(cells[0].numpy(), pool_by_hand(features[0].numpy(), 4, 3, (3, 2)))


def test_the_gradient_goes_to_the_greatest_cell_of_each_bin_alone() -> None:
    features = random_features(14, 21).requires_grad_()
    roi_pool(features, [torch.tensor([[0.0, 0, 20, 13]])], 7).sum().backward()
    blocks = features.grad[0].view(3, 7, 2, 7, 3).transpose(2, 3).reshape(3, 49, 6)  # type: ignore[index]
    values = features.detach()[0].view(3, 7, 2, 7, 3).transpose(2, 3).reshape(3, 49, 6)
    torch.testing.assert_close(blocks, torch.nn.functional.one_hot(values.argmax(2), 6).float())


def test_roi_align_rounds_nothing() -> None:
    """Of features that rise evenly each bin's value is that at its center, for any box; a cell's center is at +0.5."""
    x = torch.arange(60, dtype=torch.float32) + 0.5
    features = (x[None, :] + 100 * x[:50, None])[None, None]
    left, top, width, height = 3.3, 7.9, 16.1, 23.45
    box = torch.tensor([[left, top, left + width, top + height]])
    aligned = roi_align(features, [box], 7, sampling_ratio=2, aligned=True)[0, 0]
    center = (torch.arange(7) + 0.5) / 7
    torch.testing.assert_close(aligned, left + width * center[None, :] + 100 * (top + height * center[:, None]))
