"""Texture synthesis: the paper's energy, and the range of the pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule

from lightning_modules.style.texture_synthesis import TextureSynthesis
from tests.lightning_modules.style.optimized_image import SMALL, gram_in_float64, prepare


def test_texture_is_the_papers_energy(image_paths: dict[str, str]) -> None:
    for normalize in (False, True):
        module = TextureSynthesis(["conv1_1", "pool1"], normalize, **SMALL)
        batch = prepare(module, image_paths)
        assert module.image is not None
        assert module.features is not None
        found, source = (module.features(x) for x in (module.image.detach(), batch["image"].float() / 255))
        for name, term in module.losses(batch).items():
            n = found[name].shape[1]
            target = gram_in_float64(source, name)
            energy = ((gram_in_float64(found, name) - target) ** 2).sum() / (4 * n**2)
            if normalize:
                energy /= (target**2).sum() / (4 * n**2)
            assert float(term) == pytest.approx(energy, rel=1e-3)


def test_an_image_has_its_own_texture(image_paths: dict[str, str]) -> None:
    module = TextureSynthesis(["pool1"], init="content", **SMALL)
    batch = prepare(module, image_paths)
    assert all(float(term) < 1e-6 for term in module.losses(batch).values())


def test_pixels_are_clamped_to_the_range_of_the_texture(
    image_paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = TextureSynthesis(["pool1"], **SMALL)
    batch = prepare(module, image_paths)
    assert module.image is not None

    def step(*args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            assert module.image is not None
            module.image.mul_(9).sub_(4)

    monkeypatch.setattr(LightningModule, "optimizer_step", step)
    module.optimizer_step(0, 0, None)
    content = batch["image"].float() / 255
    for c in range(3):
        assert float(module.image[0, c].min()) == pytest.approx(float(content[0, c].min()))
        assert float(module.image[0, c].max()) == pytest.approx(float(content[0, c].max()))


def test_prediction_needs_an_optimized_image() -> None:
    with pytest.raises(ValueError, match="expected the checkpoint of an optimized image, found none; set --ckpt_path"):
        TextureSynthesis(**SMALL).predict(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
