"""Upsampling: the numbers that the lecture works out, and a network with each kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.components.upsampling import Upsample, bed_of_nails, max_unpooling, nearest
from lightning_modules.segmentation.encoder_decoder import EncoderDecoder, EncoderDecoderNetwork

KINDS = ("nearest", "bed_of_nails", "max_unpooling", "transposed_convolution")
SMALL = torch.tensor([[[[1.0, 2], [3, 4]]]])


def test_nearest_neighbor() -> None:
    assert nearest(SMALL)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_bed_of_nails() -> None:
    assert bed_of_nails(SMALL)[0, 0].tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]
    two = torch.cat([SMALL, SMALL * 10], 1)
    assert bed_of_nails(two)[0, 1, 2].tolist() == [30, 0, 40, 0]


def test_max_unpooling_remembers_the_places() -> None:
    large = torch.tensor([[[[1.0, 2, 6, 3], [3, 5, 2, 1], [1, 2, 2, 1], [7, 3, 4, 8]]]])
    pooled, switches = F.max_pool2d(large, 2, return_indices=True)
    assert pooled.flatten().tolist() == [5, 6, 7, 8]
    assert switches.flatten().tolist() == [5, 2, 12, 15]
    unpooled = max_unpooling(SMALL, switches, (4, 4))
    assert unpooled[0, 0].tolist() == [[0, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0], [3, 0, 0, 4]]


def test_transposed_convolution_adds_where_kernels_overlap() -> None:
    """The lecture's one-dimensional example: a and b, the filter x, y, z, stride 2: ax, ay, az + bx, by, bz."""
    a, b, x, y, z = 2.0, 3.0, 5.0, 7.0, 11.0
    found = F.conv_transpose1d(torch.tensor([[[a, b]]]), torch.tensor([[[x, y, z]]]), stride=2)
    assert found.flatten().tolist() == [a * x, a * y, a * z + b * x, b * y, b * z]
    # The network's kernel: four wide, so that each place is reached by two, and a map becomes twice as large.
    layer = Upsample("transposed_convolution", 1)
    assert layer.transposed is not None
    torch.nn.init.ones_(layer.transposed.weight)
    found = layer(SMALL, torch.zeros(0), (4, 4))
    assert found[0, 0].tolist() == [[1, 3, 3, 2], [4, 10, 10, 6], [4, 10, 10, 6], [3, 7, 7, 4]]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_every_pixel_a_score_and_learns(kind: Any) -> None:
    torch.manual_seed(0)
    module = EncoderDecoder(num_classes=3, upsampling=kind, channels=(8, 12, 16))
    with torch.inference_mode():
        for size in ((32, 40), (33, 47)):
            assert module.network.eval()(torch.randn(1, 3, *size)).shape == (1, 3, *size)
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(40):
        edge = torch.randint(8, 24, (4, 1, 1))
        bright = (torch.arange(32) < edge).expand(-1, 32, -1)
        image = torch.where(bright[:, None], 200, 40).expand(-1, 3, -1, -1).to(torch.uint8)
        batch = {"image": image, "mask": torch.where(bright, 1, 2)}
        optimizer.zero_grad()
        module.losses(batch)["cross_entropy"].backward()
        optimizer.step()
    with torch.inference_mode():
        found = torch.stack(module.eval().predict(image))
    assert (found == batch["mask"]).float().mean() > 0.9


def test_only_a_transposed_convolution_has_parameters() -> None:
    networks: dict[str, Any] = {kind: EncoderDecoderNetwork(5, kind, (8, 16)) for kind in KINDS}  # type: ignore[arg-type]
    counts = {kind: sum(p.numel() for p in network.parameters()) for kind, network in networks.items()}
    assert len({counts[kind] for kind in KINDS[:3]}) == 1
    assert counts["transposed_convolution"] == counts["nearest"] + 16 * (8 * 8 + 16 * 16)
    with pytest.raises(ValueError, match="upsampling: expected nearest, bed_of_nails"):
        Upsample("bilinear", 3)  # type: ignore[arg-type]
