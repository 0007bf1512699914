"""Dense CRF: exact kernels and mean field against loops, the lattice against exact inference and pydensecrf2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.segmentation.crf import (
    DEEPLAB_CRFS,
    DenseCRF,
    gaussian_kernel,
    mean_field,
    normalize_kernel,
)

#: Result of pydensecrf2 1.1 for an image of 12 x 16 pixels and three classes, computed with::
#:
#:     d = DenseCRF2D(16, 12, 3); d.setUnaryEnergy(unary.reshape(3, -1))
#:     d.addPairwiseGaussian(sxy=2, compat=2, kernel=CONST_KERNEL, normalization=...)
#:     d.addPairwiseBilateral(sxy=6, srgb=9, rgbim=image.transpose(1, 2, 0), compat=1.5, kernel=CONST_KERNEL, ...)
#:     d.inference(10)
#:
#: for NORMALIZE_AFTER and NORMALIZE_SYMMETRIC; the energies are of random probabilities, the image is noise on ramps.
GOLDEN = Path(__file__).with_name("pydensecrf2.npz")


def scene(height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a disc on two halves, uint8 (3, H, W) with noise, and its classes int64 (H, W); 2 is the disc."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    classes = (x > 0.4 * width).long()
    classes[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (height / 3) ** 2] = 2
    colors = torch.tensor([[60, 90, 140], [150, 100, 60], [90, 180, 90]]).float()
    image = colors[classes].permute(2, 0, 1) + 4 * torch.randn(3, height, width, generator=generator)
    return image.round().clamp(0, 255).byte(), classes


def noisy(classes: Tensor, seed: int = 0) -> Tensor:
    """Draw probabilities float32 (3, H, W) whose maximum is the correct class in most pixels."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.nn.functional.one_hot(classes, 3).permute(2, 0, 1).float()
    return (target + torch.randn(target.shape, generator=generator)).softmax(0)


def features_of(image: Tensor, xy: float, rgb: float | None) -> Tensor:
    y, x = torch.meshgrid(torch.arange(image.shape[1]), torch.arange(image.shape[2]), indexing="ij")
    place = torch.stack([x, y]).flatten(1).float() / xy
    return place if rgb is None else torch.cat([place, image.flatten(1).float() / rgb])


def exact(features: Tensor) -> Tensor:
    """The Gaussian of all pairs, float64 (N, N)."""
    points = features.T.double()
    return (-torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square() / 2).exp()


def by_row(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum(1, keepdim=True)


# --- mean field -------------------------------------------------------------------------------------------------------


def by_the_formula(unary: np.ndarray, kernels: list[np.ndarray], iterations: int) -> np.ndarray:
    """Algorithm 1 with mu(l, l') = [l != l'], class by class: unary (N, C), kernels (N, N)."""
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
def test_exact_inference_is_the_formula(normalization: Any) -> None:
    for seed in range(4):
        image, classes = scene(10, 13, seed)
        unary = -noisy(classes, seed).log()
        kernels = []
        for weight, xy, rgb in ((2.0, 2.0, None), (1.5, 6.0, 9.0)):
            features = features_of(image, xy, rgb)
            kernel = exact(features)
            torch.testing.assert_close(gaussian_kernel(features).double(), kernel, atol=1e-6, rtol=1e-5)
            norm = kernel.sum(1)
            scale = (1 / norm)[:, None] if normalization == "after" else torch.outer(norm, norm) ** -0.5
            torch.testing.assert_close(normalize_kernel(kernel, normalization), scale * kernel)
            kernels.append((weight * scale * kernel).numpy())
        expected = by_the_formula(unary.flatten(1).T.double().numpy(), kernels, 5)
        found = DenseCRF(1.5, 6.0, 9.0, 2.0, 2.0, 5, normalization, exact=True).infer(unary, image)
        np.testing.assert_allclose(found.flatten(1).T.numpy(), expected, atol=1e-5)


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
    for name, system in DEEPLAB_CRFS.items():
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


def test_a_batch_equals_its_images() -> None:
    scenes = [scene(11, 14, seed) for seed in range(3)]
    images, probabilities = torch.stack([i for i, _ in scenes]), torch.stack([noisy(c) for _, c in scenes])
    found = DenseCRF()(probabilities, images)
    for one, p, image in zip(found, probabilities, images, strict=True):
        assert torch.equal(one, DenseCRF()(p, image))


def test_no_iterations_or_kernels_change_nothing() -> None:
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
        ({"normalization": "before"}, "expected normalization after or symmetric, found before"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseCRF(**options)


def test_images_that_do_not_fit() -> None:
    image, probabilities = torch.zeros(3, 8, 9, dtype=torch.uint8), torch.full((2, 8, 9), 0.5)
    with pytest.raises(ValueError, match="original size 8x8, found 9x8; set --data.eval_image_size null"):
        DenseCRF()(probabilities[..., :8], image)
    with pytest.raises(ValueError, match=r"expected an image uint8 \(3, H, W\), found torch.float32"):
        DenseCRF()(probabilities, image.float())
    with pytest.raises(ValueError, match=r"expected probabilities \(C, H, W\), found \(1, 2, 8, 9\)"):
        DenseCRF()(probabilities[None], image)
    image[0, 0, 0] = 255
    with pytest.raises(ValueError, match="use larger standard deviations"):
        DenseCRF(theta_alpha=1e-4, theta_beta=1e-4)(probabilities, image)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_does_the_same() -> None:
    image, classes = scene(40, 50)
    probabilities = noisy(classes)
    for system in DEEPLAB_CRFS.values():
        found = system(probabilities.cuda(), image.cuda())
        torch.testing.assert_close(found.cpu(), system(probabilities, image), atol=1e-3, rtol=0)
