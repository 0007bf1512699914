"""Neural style: the loss of the authors' code, rescaled filters, options."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_modules.components.features import Features
from lightning_modules.style.neural_style import NeuralStyle
from tests.lightning_modules.style.optimized_image import SMALL, gram_in_float64, prepare


def test_neural_style_is_the_authors_loss(image_paths: dict[str, str]) -> None:
    module = NeuralStyle(["relu2_2"], ["relu1_1", "relu2_1"], 2.0, 3.0, 5.0, **SMALL, init="noise")
    batch = prepare(module, image_paths)
    assert module.image is not None
    assert module.features is not None
    found = module.features(module.image.detach())
    content, style = (module.features(batch[key].float() / 255) for key in ("image", "style"))
    energy = sum(
        1000 / found[name].shape[1] ** 2 * ((gram_in_float64(found, name) - gram_in_float64(style, name)) ** 2).mean()
        for name in ("relu1_1", "relu2_1")
    )
    terms = {name: term.item() for name, term in module.losses(batch).items()}
    assert terms["content"] == pytest.approx(
        2 * float((found["relu2_2"] - content["relu2_2"]).square().mean()), rel=1e-4
    )
    assert terms["style"] == pytest.approx(3 * energy, rel=1e-3)
    x = module.image.detach()[0].double().numpy()
    tv = (np.diff(x, axis=1) ** 2).sum() + (np.diff(x, axis=2) ** 2).sum()
    assert terms["tv"] == pytest.approx(5 * tv / x.size, rel=1e-4)


def test_filters_are_rescaled_on_the_style(image_paths: dict[str, str]) -> None:
    """Pretrained filters have a mean activation of 1 on the style; random ones are not rescaled."""
    random, pretrained = (NeuralStyle(["relu2_2"], ["relu1_1"], **SMALL) for _ in range(2))
    pretrained.setup_features()
    assert pretrained.features is not None
    assert isinstance(pretrained.features.network, Features)
    pretrained.features.network.random = False
    for module, rescaled in ((pretrained, True), (random, False)):
        batch = prepare(module, image_paths)
        assert module.features is not None
        means = module.features(batch["style"].float() / 255)["relu1_1"].mean((0, 2, 3))
        assert bool(((means - 1).abs() < 1e-3).sum() > 32) is rescaled


def test_features_keep_their_memory_format(image_paths: dict[str, str]) -> None:
    """The image is NCHW, the weights of the feature extractor are NHWC, in every stage."""
    module = NeuralStyle(["relu2_2"], ["relu1_1"], **SMALL)
    prepare(module, image_paths)
    module.setup("validate")
    assert module.image is not None
    assert module.image.is_contiguous()
    assert module.features is not None
    weights = [p for p in module.features.network.parameters() if p.ndim == 4 and p.shape[1] > 3]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert list(module.state_dict()) == ["image"]


def test_bad_input(image_paths: dict[str, str]) -> None:
    module = NeuralStyle(["relu1_1"], ["relu1_1"], **SMALL)
    with pytest.raises(ValueError, match="style: expected a style image, found none; set --data.style IMAGE"):
        prepare(module, {**image_paths, "style": None})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="style_weight: expected 0 or more, found -1"):
        NeuralStyle(style_weight=-1)
