"""Probabilities averaged over scales and flips, map sizes, and refinement by a CRF."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.segmentation.deeplab import DeepLab
from lightning_modules.segmentation.multi_scale import PixelDecoder


def as_floats(images: Tensor) -> Tensor:
    return images.float()


def test_probabilities_are_averaged_over_scales_and_flips() -> None:
    torch.manual_seed(0)
    seen: list[tuple[int, ...]] = []

    def network(x: Tensor) -> Tensor:
        """Class 0 is red minus the column, class 1 is green."""
        seen.append(tuple(x.shape[2:]))
        return torch.stack([x[:, 0] - torch.arange(x.shape[3]), x[:, 1]], 1)

    pixels = torch.randint(0, 20, (2, 3, 6, 8)).float()
    sizes = [(6, 8), (9, 12)]
    plain = PixelDecoder().probabilities(network, pixels, sizes)
    torch.testing.assert_close(plain[0], network(pixels)[0].softmax(0))
    assert plain[1].shape == (2, 9, 12)
    flipped = PixelDecoder(flip=True).probabilities(network, pixels, sizes)
    other = network(pixels.flip(3)).flip(3).softmax(1)
    torch.testing.assert_close(flipped[0], (plain[0] + other[0]) / 2)
    seen.clear()
    several = PixelDecoder((0.5, 1, 1.5), flip=True).probabilities(network, pixels, sizes)
    assert seen == [(3, 4)] * 2 + [(6, 8)] * 2 + [(9, 12)] * 2
    torch.testing.assert_close(several[1].sum(0), torch.ones(9, 12))
    each = [PixelDecoder((scale,), flip=True).probabilities(network, pixels, sizes)[1] for scale in (0.5, 1, 1.5)]
    torch.testing.assert_close(several[1], sum(each) / 3)  # type: ignore[arg-type]


def test_maps_have_the_sizes_asked_for() -> None:
    def network(x: Tensor) -> Tensor:
        return torch.stack([255 - x[:, 0], x[:, 0]], 1)

    images = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    images[1, :, :, 3:] = 255
    maps = PixelDecoder()(network, as_floats, images)
    assert maps[0].tolist() == [[0] * 6] * 4
    assert maps[1].tolist() == [[0, 0, 0, 1, 1, 1]] * 4
    assert maps[0].dtype == torch.int64
    maps = PixelDecoder()(network, as_floats, [images[0], images[1, :, :2]], [(4, 6), (4, 12)])
    assert maps[1].tolist() == [[0] * 6 + [1] * 6] * 4
    for scales in ([], [0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="eval_scales: expected one or more factors above 0"):
            PixelDecoder(scales)


@pytest.mark.parametrize("crf", ["largefov", "vgg16", "resnet101"])
def test_a_crf_follows_the_edges_of_the_image(crf: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    target = (torch.arange(32) < 13).expand(24, -1).long()
    image = torch.where(target.bool(), 200, 60).expand(3, -1, -1).to(torch.uint8)
    noisy = torch.stack([1.0 - target, target.float()]) + torch.randn(2, 24, 32, generator=generator)

    def network(x: Tensor) -> Tensor:
        return noisy[None]

    (before,) = PixelDecoder()(network, as_floats, image[None])
    (after,) = PixelDecoder(crf=crf)(network, as_floats, image[None])
    assert (before == target).float().mean() < 0.85
    assert (after == target).float().mean() > 0.95
    with pytest.raises(ValueError, match="crf: expected images at their original size 64x48, found 32x24; set"):
        PixelDecoder(crf=crf)(network, as_floats, image[None], [(48, 64)])


def test_settings_are_named() -> None:
    with pytest.raises(ValueError, match="crf: expected one of largefov, vgg16, resnet101, found vgg"):
        DeepLab(variant="largefov", width_multiplier=0.03, crf="vgg")
