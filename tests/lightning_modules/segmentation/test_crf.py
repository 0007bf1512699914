"""Dense CRF: the lattice against the paper's in loops and exact filters, the mean field in loops, pydensecrf2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.segmentation import crf
from lightning_modules.segmentation.crf import DEEPLAB, DenseCRF, Lattice, mean_field, simplices

#: pydensecrf2 1.1's answer to an image of 12 x 16 pixels and three classes, made once with::
#:
#:     d = DenseCRF2D(16, 12, 3); d.setUnaryEnergy(unary.reshape(3, -1))
#:     d.addPairwiseGaussian(sxy=2, compat=2, kernel=CONST_KERNEL, normalization=...)
#:     d.addPairwiseBilateral(sxy=6, srgb=9, rgbim=image.transpose(1, 2, 0), compat=1.5, kernel=CONST_KERNEL, ...)
#:     d.inference(10)
#:
#: for NORMALIZE_AFTER and NORMALIZE_SYMMETRIC; the energies are of random probabilities, the image is noise on ramps.
GOLDEN = Path(__file__).with_name("pydensecrf2.npz")


def scene(height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A disc on two halves, uint8 (3,H,W) with some noise, and its classes int64 (H,W): 0, 1 and 2 for the disc."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    classes = (x > 0.4 * width).long()
    classes[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (height / 3) ** 2] = 2
    colors = torch.tensor([[60, 90, 140], [150, 100, 60], [90, 180, 90]]).float()
    image = colors[classes].permute(2, 0, 1) + 4 * torch.randn(3, height, width, generator=generator)
    return image.round().clamp(0, 255).byte(), classes


def noisy(classes: Tensor, seed: int = 0) -> Tensor:
    """Probabilities float32 (3,H,W) that are right more often than not."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.one_hot(classes, 3).permute(2, 0, 1).float()
    return (truth + torch.randn(truth.shape, generator=generator)).softmax(0)


def features_of(image: Tensor, xy: float, rgb: float | None) -> Tensor:
    y, x = torch.meshgrid(torch.arange(image.shape[1]), torch.arange(image.shape[2]), indexing="ij")
    place = torch.stack([x, y]).flatten(1).float() / xy
    return place if rgb is None else torch.cat([place, image.flatten(1).float() / rgb])


def exact(features: Tensor) -> Tensor:
    """The Gaussian of all pairs, float64 (N,N)."""
    points = features.T.double()
    return (-torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square() / 2).exp()


def matrix(lattice: Lattice) -> Tensor:
    """All of what a lattice does, float64 (N,N)."""
    return lattice(torch.eye(lattice.read.rows)).double()


def by_row(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum(1, keepdim=True)


# --- permutohedral lattice --------------------------------------------------------------------------------------------


def by_the_paper(features: np.ndarray) -> np.ndarray:
    """Adams et al. 2010, section 3, point by point in float64 with a table of corners: the filter's matrix (N,N)."""
    n, d = features.shape
    corners: dict[tuple[int, ...], int] = {}
    places: list[list[tuple[int, float]]] = []
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
        places.append([(corners.setdefault(tuple(k), len(corners)), w) for k, w in zip(simplex, weights, strict=True)])
    splat = np.zeros((len(corners), n))
    for i, place in enumerate(places):
        for corner, weight in place:
            splat[corner, i] += weight
    values = splat
    for j in range(d + 1):
        blurred = values.copy()
        for corner, number in corners.items():
            for sign in (1, -1):
                there = corners.get(tuple(x + sign * (d if i == j else -1) for i, x in enumerate(corner)))
                if there is not None:
                    blurred[number] += values[there] / 2
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
    assert joined > 1000  # else the lattices would have been so large that nothing was next to anything


def test_barycentric_coordinates() -> None:
    """Weights of 0..1 that add up to 1 and with which the corners' mean is the point."""
    features = torch.from_numpy(np.random.default_rng(0).normal(0, 20, (5, 500))).float()
    base, rank, weights = simplices(features)
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
    """Within the lattice's own error; it grows where few colors are alike, so that many corners are not there."""
    for seed in range(2):
        image, _ = scene(24, 32, seed)
        features = features_of(image, xy, rgb)
        wanted, kernel = exact(features), matrix(Lattice.of(features))
        assert (by_row(kernel) - by_row(wanted)).norm() < off * by_row(wanted).norm()
        assert 1 - short < kernel.sum() / wanted.sum() < 1
        values = torch.rand(24 * 32, 3, generator=torch.Generator().manual_seed(seed)).double()
        pair = torch.stack([(by_row(k) @ values).flatten() for k in (kernel, wanted)])
        assert torch.corrcoef(pair)[0, 1] > 0.97


def test_linear_and_the_same_in_any_order() -> None:
    image, _ = scene(12, 16)
    features = features_of(image, 5, 15)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 192, 4, generator=generator)
    lattice = Lattice.of(features)
    torch.testing.assert_close(lattice(2 * a - 3 * b), 2 * lattice(a) - 3 * lattice(b), atol=1e-4, rtol=1e-4)
    order = torch.randperm(192, generator=generator)
    torch.testing.assert_close(Lattice.of(features[:, order])(a[order]), lattice(a)[order])
    for name in ("after", "symmetric"):
        torch.testing.assert_close(lattice.normalized(name)(a), lattice.normalized(name, 3.0)(a) / 3)


def test_a_step_of_the_lattice_changes_nothing() -> None:
    """Features moved by (d,-1,..,-1) on the hyperplane fall into the same simplices, moved."""
    d = 5
    features = torch.from_numpy(np.random.default_rng(1).normal(0, 0.7, (d, 60))).float()
    scale = [math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
    elevate = np.array([[scale[k] * ((k >= i) - i * (k == i - 1)) for k in range(d)] for i in range(d + 1)])
    for j in range(d + 1):
        step = np.linalg.lstsq(elevate, np.array([float(d if i == j else -1) for i in range(d + 1)]), rcond=None)[0]
        moved = features + torch.from_numpy(step).float()[:, None]
        torch.testing.assert_close(matrix(Lattice.of(moved)), matrix(Lattice.of(features)), atol=1e-4, rtol=0)


def test_rows_of_one() -> None:
    image, _ = scene(12, 16)
    lattice = Lattice.of(features_of(image, 5, 15))
    kernel, ones = matrix(lattice), torch.ones(192, 1)
    torch.testing.assert_close(lattice.normalized("after")(ones), ones)
    root = kernel.sum(1).rsqrt()
    found = matrix(lattice.normalized("symmetric", 2.0))
    torch.testing.assert_close(found, 2 * root[:, None] * kernel * root, atol=1e-6, rtol=1e-5)


# --- mean field -------------------------------------------------------------------------------------------------------


def by_the_formula(unary: np.ndarray, kernels: list[np.ndarray], iterations: int) -> np.ndarray:
    """Algorithm 1 with mu(l, l') = [l != l'], class by class: unary (N,C), kernels (N,N)."""
    q = np.exp(-unary) / np.exp(-unary).sum(1, keepdims=True)
    for _ in range(iterations):
        messages = [kernel @ q for kernel in kernels]
        energy = unary.copy()
        for label in range(unary.shape[1]):
            for other in range(unary.shape[1]):
                if other != label:
                    energy[:, label] += sum(message[:, other] for message in messages)
        q = np.exp(-energy)
        q /= q.sum(1, keepdims=True)
    return q


@pytest.mark.parametrize("normalization", ["after", "symmetric"])
@pytest.mark.parametrize("block", [7, 10_000])
def test_the_mean_field_is_the_formula(normalization: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lattices' own matrices, however the products are cut."""
    monkeypatch.setattr(crf, "BLOCK", block)
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
        assert np.abs(expected - noisy(classes, seed).flatten(1).T.numpy()).max() > 0.3  # it does something


def test_near_the_exact_mean_field() -> None:
    image, classes = scene(24, 32)
    probabilities = noisy(classes)
    system = DenseCRF(4.0, 20.0, 13.0, 2.0, 2.0)
    kernels = [2 * by_row(exact(features_of(image, 2, None))), 4 * by_row(exact(features_of(image, 20, 13)))]
    expected = by_the_formula(-probabilities.flatten(1).T.double().log().numpy(), [k.numpy() for k in kernels], 10)
    found = system(probabilities, image).flatten(1).T.numpy()
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.99
    assert np.abs(found - expected).mean() < 0.01


@pytest.mark.parametrize("normalization", ["after", "symmetric"])
def test_pydensecrf2(normalization: Any) -> None:
    golden = np.load(GOLDEN)
    unary, image = torch.from_numpy(golden["unary"]), torch.from_numpy(golden["image"])
    found = DenseCRF(1.5, 6.0, 9.0, 2.0, 2.0, 10, normalization).infer(unary, image)
    np.testing.assert_allclose(found.numpy(), golden[normalization], atol=1e-5)
    assert (golden["after"].argmax(0) != golden["unary"].argmin(0)).mean() > 0.2
    assert np.abs(golden["after"] - golden["symmetric"]).max() > 0.01


def test_it_cleans_a_noisy_segmentation() -> None:
    image, classes = scene(60, 80)
    probabilities = noisy(classes)
    before = (probabilities.argmax(0) == classes).float().mean()
    for name, system in DEEPLAB.items():
        after = (system(probabilities, image).argmax(0) == classes).float().mean()
        assert before < 0.7, name
        assert after > 0.97, name


# --- interface --------------------------------------------------------------------------------------------------------


def test_probabilities_come_out() -> None:
    image, classes = scene(20, 30)
    probabilities = noisy(classes)
    found = DenseCRF()(probabilities, image)
    assert found.shape == (3, 20, 30)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(0), torch.ones(20, 30))
    assert torch.equal(found, DenseCRF()(probabilities, image))
    assert not DenseCRF()(probabilities.requires_grad_(), image).requires_grad
    certain = torch.nn.functional.one_hot(classes, 3).permute(2, 0, 1).bfloat16()
    assert DenseCRF()(certain, image).isfinite().all()


def test_a_batch_is_its_pictures() -> None:
    pictures = [scene(11, 14, seed) for seed in range(3)]
    images, probabilities = torch.stack([i for i, _ in pictures]), torch.stack([noisy(c) for _, c in pictures])
    found = DenseCRF()(probabilities, images)
    for one, p, image in zip(found, probabilities, images, strict=True):
        assert torch.equal(one, DenseCRF()(p, image))


def test_nothing_to_say_changes_nothing() -> None:
    image, classes = scene(11, 14)
    probabilities = noisy(classes)
    for system in (DenseCRF(iterations=0), DenseCRF(bilateral_weight=0, gaussian_weight=0)):
        torch.testing.assert_close(system(probabilities, image), probabilities)
    without_color = DenseCRF(bilateral_weight=0)
    assert torch.equal(without_color(probabilities, image), without_color(probabilities, 255 - image))
    assert not torch.equal(DenseCRF()(probabilities, image), without_color(probabilities, image))


def test_one_pixel_and_one_color() -> None:
    assert DenseCRF()(torch.tensor([0.2, 0.8])[:, None, None], torch.zeros(3, 1, 1, dtype=torch.uint8)).argmax() == 1
    same = DenseCRF()(torch.full((4, 9, 9), 0.25), torch.full((3, 9, 9), 255, dtype=torch.uint8))
    torch.testing.assert_close(same, torch.full((4, 9, 9), 0.25))


def test_mean_field_without_kernels_is_a_softmax() -> None:
    unary = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_field(unary, [], 3), (-unary).softmax(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta_beta": 0.0}, "expected standard deviations above 0, found DenseCRF"),
        ({"theta_gamma": math.nan}, "expected standard deviations above 0, found DenseCRF"),
        ({"gaussian_weight": -1.0}, "expected weights and iterations of 0 or more, found"),
        ({"normalization": "before"}, "expected the normalization after or symmetric, found before"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseCRF(**options)


def test_pictures_that_do_not_fit() -> None:
    image, probabilities = torch.zeros(3, 8, 9, dtype=torch.uint8), torch.full((2, 8, 9), 0.5)
    with pytest.raises(ValueError, match=r"of one size, found \(2, 8, 8\) and \(3, 8, 9\): resize the classes"):
        DenseCRF()(probabilities[..., :8], image)
    with pytest.raises(ValueError, match=r"expected an image uint8 \(3,H,W\), found torch.float32"):
        DenseCRF()(probabilities, image.float())
    with pytest.raises(ValueError, match="of one size"):
        DenseCRF()(probabilities[None], image)
    image[0, 0, 0] = 255
    with pytest.raises(ValueError, match="take larger standard deviations"):
        DenseCRF(theta_alpha=1e-4, theta_beta=1e-4)(probabilities, image)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_does_the_same() -> None:
    image, classes = scene(40, 50)
    probabilities = noisy(classes)
    for system in DEEPLAB.values():
        found = system(probabilities.cuda(), image.cuda())
        torch.testing.assert_close(found.cpu(), system(probabilities, image), atol=1e-3, rtol=0)
