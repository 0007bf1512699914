"""Permutohedral lattice: against the paper in loops and exact filters; the fused mean field against the plain one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.segmentation import permutohedral
from lightning_modules.segmentation.crf import DenseCRF, mean_field
from lightning_modules.segmentation.permutohedral import Lattice, find_simplices
from tests.lightning_modules.segmentation.test_crf import by_row, by_the_formula, exact, features_of, noisy, scene


def matrix(lattice: Lattice) -> Tensor:
    """The matrix of a lattice, float64 (N, N)."""
    return (lattice @ torch.eye(lattice.read.rows)).double()


def by_the_paper(features: np.ndarray) -> np.ndarray:
    """Adams et al. 2010, section 3, point by point in float64 with a dict of corners: the filter's matrix (N, N)."""
    n, d = features.shape
    corners: dict[tuple[int, ...], int] = {}
    weighted_corners: list[list[tuple[int, float]]] = []
    for point in features:
        c = [point[i] * math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
        x = [sum(c[i:]) - (i * c[i - 1] if i else 0) for i in range(d + 1)]
        nearest = [(d + 1) * round(value / (d + 1)) for value in x]
        excess = sum(nearest) // (d + 1)
        upwards = sorted(range(d + 1), key=lambda i: x[i] - nearest[i])
        for i in upwards[: max(excess, 0)]:
            nearest[i] -= d + 1
        for i in upwards[len(upwards) + min(excess, 0) :]:
            nearest[i] += d + 1
        upwards = sorted(range(d + 1), key=lambda i: x[i] - nearest[i])
        simplex = [
            [nearest[i] + k - (d + 1 if upwards.index(i) < k else 0) for i in range(d + 1)] for k in range(d + 1)
        ]
        weights = np.linalg.lstsq(np.array([[*corner, 1] for corner in simplex]).T, np.array([*x, 1]), rcond=None)[0]
        assert weights.min() > -1e-9
        weighted_corners.append(
            [(corners.setdefault(tuple(k), len(corners)), w) for k, w in zip(simplex, weights, strict=True)]
        )
    splat = np.zeros((len(corners), n))
    for i, entries in enumerate(weighted_corners):
        for corner, weight in entries:
            splat[corner, i] += weight
    values = splat
    for j in range(d + 1):
        blurred = values.copy()
        for corner, number in corners.items():
            for sign in (1, -1):
                neighbor = corners.get(tuple(x + sign * (d if i == j else -1) for i, x in enumerate(corner)))
                if neighbor is not None:
                    blurred[number] += values[neighbor] / 2
        values = blurred
    return splat.T @ values / (1 + 2.0**-d)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 6])
def test_the_lattice_is_the_papers(d: int) -> None:
    joined = 0.0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        features = (rng.normal(0, rng.choice([0.3, 1, 4]), (30, d)) + rng.uniform(-50, 50, d)).astype(np.float32)
        expected = by_the_paper(features.astype(np.float64))
        found = matrix(Lattice.of(torch.from_numpy(features.T.copy()))).numpy()
        np.testing.assert_allclose(found, expected, atol=2e-4)
        joined += (expected > 0.01).sum() - len(features)
    assert joined > 1000  # the lattices are dense enough that points share corners


def test_barycentric_coordinates() -> None:
    """The weights are in 0..1 and sum to 1, and the weighted mean of the corners is the point."""
    features = torch.from_numpy(np.random.default_rng(0).normal(0, 20, (5, 500))).float()
    base, rank, weights = find_simplices(features)
    assert weights.min() > -1e-5
    torch.testing.assert_close(weights.sum(0), torch.ones(500), atol=1e-5, rtol=0)
    assert base.sum(0).eq(0).all()
    assert rank.sort(0).values.eq(torch.arange(6)[:, None]).all()
    mean = sum(weights[r] * (6 * base + r - 6 * (rank > 5 - r)) for r in range(6))
    first = features[4] * math.sqrt(2 / 3) * 6 / math.sqrt(30)
    torch.testing.assert_close(mean[5], -5 * first, atol=1e-3, rtol=0)
    torch.testing.assert_close(mean.sum(0), torch.zeros(500), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("xy", "rgb", "off", "short"),
    [(3, None, 0.11, 0.2), (4, None, 0.11, 0.2), (8, 20, 0.13, 0.55), (20, 13, 0.13, 0.6), (67, 3, 0.3, 0.7)],
)
def test_near_the_exact_gaussian(xy: float, rgb: float | None, off: float, short: float) -> None:
    """The lattice's error grows where few colors are similar, because many lattice points do not exist."""
    for seed in range(2):
        image, _ = scene(24, 32, seed)
        features = features_of(image, xy, rgb)
        expected, kernel = exact(features), matrix(Lattice.of(features))
        assert (by_row(kernel) - by_row(expected)).norm() < off * by_row(expected).norm()
        assert 1 - short < kernel.sum() / expected.sum() < 1
        values = torch.rand(24 * 32, 3, generator=torch.Generator().manual_seed(seed)).double()
        pair = torch.stack([(by_row(k) @ values).flatten() for k in (kernel, expected)])
        assert torch.corrcoef(pair)[0, 1] > 0.97


def test_linear_and_the_same_in_any_order() -> None:
    image, _ = scene(12, 16)
    features = features_of(image, 5, 15)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 192, 4, generator=generator)
    lattice = Lattice.of(features)
    torch.testing.assert_close(lattice @ (2 * a - 3 * b), 2 * (lattice @ a) - 3 * (lattice @ b), atol=1e-4, rtol=1e-4)
    order = torch.randperm(192, generator=generator)
    torch.testing.assert_close(Lattice.of(features[:, order]) @ a[order], (lattice @ a)[order])
    for name in ("after", "symmetric"):
        torch.testing.assert_close(lattice.normalized(name) @ a, lattice.normalized(name, 3.0) @ a / 3)


def test_translation_by_a_lattice_vector_changes_nothing() -> None:
    """Features that are translated by (d, -1, ..., -1) on the hyperplane fall into translated simplices."""
    d = 5
    features = torch.from_numpy(np.random.default_rng(1).normal(0, 0.7, (d, 60))).float()
    scale = [math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
    elevate = np.array([[scale[k] * ((k >= i) - i * (k == i - 1)) for k in range(d)] for i in range(d + 1)])
    for j in range(d + 1):
        step = np.linalg.lstsq(elevate, np.array([float(d if i == j else -1) for i in range(d + 1)]), rcond=None)[0]
        moved = features + torch.from_numpy(step).float()[:, None]
        torch.testing.assert_close(matrix(Lattice.of(moved)), matrix(Lattice.of(features)), atol=1e-4, rtol=0)


def test_rows_sum_to_one() -> None:
    image, _ = scene(12, 16)
    lattice = Lattice.of(features_of(image, 5, 15))
    kernel, ones = matrix(lattice), torch.ones(192, 1)
    torch.testing.assert_close(lattice.normalized("after") @ ones, ones)
    root = kernel.sum(1).rsqrt()
    found = matrix(lattice.normalized("symmetric", 2.0))
    torch.testing.assert_close(found, 2 * root[:, None] * kernel * root, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["after", "symmetric"])
@pytest.mark.parametrize("block", [7, 10_000])
def test_the_mean_field_is_the_formula(normalization: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the matrices of the lattices, for any block size; the fused mean field equals the plain one."""
    monkeypatch.setattr(permutohedral, "BLOCK", block)
    for seed in range(4):
        image, classes = scene(10, 13, seed)
        unary = -noisy(classes, seed).log()
        system = DenseCRF(1.5, 6.0, 9.0, 2.0, 2.0, 5, normalization)
        kernels = []
        for weight, xy, rgb in ((2.0, 2.0, None), (1.5, 6.0, 9.0)):
            kernel = matrix(Lattice.of(features_of(image, xy, rgb))).numpy()
            norm = kernel.sum(1)
            scale = (1 / norm)[:, None] if normalization == "after" else np.outer(norm, norm) ** -0.5
            kernels.append(weight * scale * kernel)
        expected = by_the_formula(unary.flatten(1).T.double().numpy(), kernels, 5)
        found = system.infer(unary, image).flatten(1).T.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
        lattices = system.lattices(image)
        plain = mean_field(unary.flatten(1).T.contiguous(), lattices, 5).numpy()
        np.testing.assert_allclose(found, plain, atol=1e-5)
        assert np.abs(expected - noisy(classes, seed).flatten(1).T.numpy()).max() > 0.3  # it changes the result
