"""Feature inversion: the paper's loss."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_modules.style.feature_inversion import SIGMA, FeatureInversion
from tests.lightning_modules.style.optimized_image import SMALL, prepare


def test_inversion_is_the_papers_loss(image_paths: dict[str, str]) -> None:
    """The loss is the paper's times (s / 255)^2; for 227 pixels s is the authors' constant."""
    assert abs(SIGMA * (3 * 227**2) ** 0.5 - 27098.1) < 0.01
    module = FeatureInversion("relu2_1", tv_weight=10, beta=2, alpha_weight=0.5, **SMALL)
    batch = prepare(module, image_paths)
    assert module.image is not None
    assert module.features is not None
    found, source = (
        module.features(x)["relu2_1"].double() for x in (module.image.detach(), batch["image"].float() / 255)
    )
    mean = np.array([0.485, 0.456, 0.406])[:, None, None]
    x = (module.image.detach()[0].double().numpy() - mean) * 255
    s2 = SIGMA**2 * x.size
    expected = {
        "feature": float((found - source).square().sum() / source.square().sum()),
        "tv": 10 / 2 * ((np.diff(x, axis=1) ** 2).sum() + (np.diff(x, axis=2) ** 2).sum()) / s2,
        "alpha": 0.5 / 2 * (x**6).sum() / s2,
    }
    for name, term in module.losses(batch).items():
        assert float(term) == pytest.approx(expected[name] * s2 / 255**2, rel=1e-3), name


def test_an_image_is_its_own_inversion(image_paths: dict[str, str]) -> None:
    module = FeatureInversion("relu2_1", 0, alpha_weight=0, init="content", **SMALL)
    batch = prepare(module, image_paths)
    assert all(float(term) < 1e-6 for term in module.losses(batch).values())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="beta: expected more than 0, found 0"):
        FeatureInversion(beta=0)
