"""Losses of style transfer against loops and values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_modules.style.losses import (
    alpha_norm,
    divide_by_mean_square,
    feature_distance,
    gram_distance,
    gram_matrix,
    gram_style_loss,
    moments,
    moments_distance,
    texture_energy,
    total_variation,
)


def two(seed: int, shape: tuple[int, ...] = (2, 5, 3, 4)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, shape), rng.normal(0.5, 1, shape)


@pytest.mark.parametrize("seed", range(100))
def test_energy_by_loops_in_both_normalizations(seed: int) -> None:
    """G_ij = sum_k F_ik F_jk with 1/(4 N^2 M^2), and G divided by M with 1/(4 N^2)."""
    one, other = two(seed)
    n, m = 5, 12
    expected = []
    for f, p in zip(one.reshape(2, n, m), other.reshape(2, n, m), strict=True):
        total, divided = 0.0, 0.0
        for i in range(n):
            for j in range(n):
                g = sum(f[i, k] * f[j, k] for k in range(m))
                a = sum(p[i, k] * p[j, k] for k in range(m))
                total += (g - a) ** 2
                divided += (g / m - a / m) ** 2
        assert total / (4 * n**2 * m**2) == pytest.approx(divided / (4 * n**2))
        expected.append(total / (4 * n**2 * m**2))
    found = texture_energy(*(gram_matrix(torch.from_numpy(x)) for x in (one, other)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    mean = gram_distance(*(gram_matrix(torch.from_numpy(x)) for x in (one, other)))
    torch.testing.assert_close(mean, 4 * found)


@pytest.mark.parametrize("seed", range(100))
def test_content_by_loops(seed: int) -> None:
    one, other = two(seed)
    expected = [
        sum((a - b) ** 2 for a, b in zip(f.flat, p.flat, strict=True)) / 60 for f, p in zip(one, other, strict=True)
    ]
    found = feature_distance(torch.from_numpy(one), torch.from_numpy(other))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(100))
def test_moments_by_loops(seed: int) -> None:
    one, other = two(seed)[0], two(seed + 1, (2, 5, 6, 2))[1]
    expected = []
    for f, p in zip(one.reshape(2, 5, -1), other.reshape(2, 5, -1), strict=True):
        total = 0.0
        for i in range(5):
            (a, b), (c, d) = (
                (sum(x[i]) / 12, math.sqrt(sum((x[i] - sum(x[i]) / 12) ** 2) / 12 + 1e-5)) for x in (f, p)
            )
            total += (a - c) ** 2 + (b - d) ** 2
        expected.append(total / 5)
    found = moments_distance(torch.from_numpy(one), torch.from_numpy(other))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_normalized_distance_by_hand() -> None:
    """The mean squares of the targets are (1 + 9) / 2 and (4 + 4) / 2; one target may serve all images."""
    distance, target = torch.tensor([10.0, 2.0]), torch.tensor([[1.0, 3.0], [2.0, -2.0]])
    assert divide_by_mean_square(distance, target).tolist() == [2, 0.5]
    assert divide_by_mean_square(distance, target[:1]).tolist() == pytest.approx([2, 0.4])
    assert divide_by_mean_square(distance, torch.zeros(2, 2)).isfinite().all()


def test_style_loss_sums_the_layers_of_the_targets() -> None:
    """Constant maps x of one channel have the Gram matrix x^2: (4 - 1)^2 + (9 - 2)^2, relative 9 / 1 + 49 / 4."""
    features = {name: torch.full((2, 1, 3, 3), value) for name, value in (("a", 2.0), ("b", 3.0), ("c", 5.0))}
    targets = {"a": torch.full((1, 1, 1), 1.0), "b": torch.full((1, 1, 1), 2.0)}
    assert gram_style_loss(features, targets, normalize=False).tolist() == [58, 58]
    assert gram_style_loss(features, targets, normalize=True).tolist() == [21.25, 21.25]


def test_moments_of_a_flat_map_are_finite() -> None:
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    mean, deviation = moments(x)
    (mean.sum() + deviation.sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_total_variation_by_hand() -> None:
    """1 3 / 2 7: the differences are (2, 1), (0, 4), (5, 0), (0, 0)."""
    image = torch.tensor([[1.0, 3.0], [2.0, 7.0]]).expand(1, 3, 2, 2)
    assert float(total_variation(image)) == pytest.approx(3 * (5 + 16 + 25))
    assert float(total_variation(image, beta=1)) == pytest.approx(3 * (math.sqrt(5) + 4 + 5), rel=1e-4)
    assert float(total_variation(image, beta=3)) == pytest.approx(3 * (5**1.5 + 64 + 125), rel=1e-5)


@pytest.mark.parametrize("beta", [1, 1.5, 2, 3])
def test_total_variation_of_a_flat_image_has_a_finite_gradient(beta: float) -> None:
    x = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    total_variation(x, beta).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_alpha_norm() -> None:
    assert float(alpha_norm(torch.tensor([2.0, -1.0, 0.5]).view(1, 3, 1, 1))) == pytest.approx(64 + 1 + 0.5**6)


def test_gram_matrices_stay_in_float32_under_autocast() -> None:
    x = torch.full((1, 2, 64, 64), 300.0).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = gram_matrix(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((1, 2, 2), 90000.0)), "beyond the range of float16"
