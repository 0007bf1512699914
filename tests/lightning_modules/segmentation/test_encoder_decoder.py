"""Encoder-decoder: a network with each upsampling method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_modules.segmentation.encoder_decoder import EncoderDecoder, EncoderDecoderNetwork

METHODS = ("nearest", "bed_of_nails", "max_unpooling", "transposed_convolution")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_scores_every_pixel_and_learns(method: Any) -> None:
    torch.manual_seed(0)
    module = EncoderDecoder(num_classes=3, upsampling=method, channels=(8, 12, 16))
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
    networks: dict[str, Any] = {method: EncoderDecoderNetwork(5, method, (8, 16)) for method in METHODS}  # type: ignore[arg-type]
    counts = {method: sum(p.numel() for p in network.parameters()) for method, network in networks.items()}
    assert len({counts[method] for method in METHODS[:3]}) == 1
    assert counts["transposed_convolution"] == counts["nearest"] + 16 * (8 * 8 + 16 * 16)
