"""Dense conditional random field (CRF).

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NIPS 2011. DeepLab
refines its predictions with it.

Every pair of pixels is connected: two pixels that are close and have similar colors should have the same class. A step
of mean-field inference is a Gaussian filter over all pixels, in position and color. This file sums over all pairs of
pixels; `permutohedral` approximates the sums in linear time.

N pixels of an image of H x W, C classes, features of dimension d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError
from lightning_modules.segmentation.permutohedral import Lattice, Normalization, lattice_mean_field


def gaussian_kernel(features: Tensor) -> Tensor:
    """Compute exp(-|f_i - f_j|^2 / 2) of all pairs, float32 (N, N).

    Args:
        features: features divided by the kernel's standard deviations, float32 (d, N).
    """
    distances = torch.cdist(features.T, features.T, compute_mode="donot_use_mm_for_euclid_dist")
    return (-distances.square() / 2).exp()


def normalize_kernel(kernel: Tensor, normalization: Normalization) -> Tensor:
    """Normalize a kernel K (N, N) by its row sums D = diag(K 1).

    Args:
        kernel: symmetric kernel, float (N, N).
        normalization: ``after`` is D^-1 K, whose rows sum to 1; ``symmetric`` is D^-1/2 K D^-1/2.
    """
    row_sums = kernel.sum(1)
    if normalization == "symmetric":
        return kernel * row_sums.rsqrt()[:, None] * row_sums.rsqrt()
    return kernel / row_sums[:, None]


def mean_field(unary: Tensor, kernels: Sequence[Tensor | Lattice], iterations: int) -> Tensor:
    """Run mean-field inference with the Potts model (algorithm 1): Q <- softmax(-unary + sum_m K_m Q).

    In the Potts model a pixel pays for the probability of all other classes at similar pixels. Up to a constant, which
    the softmax removes, this rewards the probability of the same class.

    Args:
        unary: negative log-probabilities of the network, float32 (N, C).
        kernels: normalized and weighted kernels, float32 (N, N), or lattices of N values.
        iterations: number of iterations.

    Returns:
        Probabilities Q, float32 (N, C).
    """
    q = (-unary).softmax(1)
    for _ in range(iterations):
        q = sum((kernel @ q for kernel in kernels), -unary).softmax(1)
    return q


@dataclass(frozen=True)
class DenseCRF:
    """Refine class probabilities by the positions and colors of the pixels (equation 3).

    Pixels i and j with positions p in pixels and colors I in 0..255 are connected by two kernels:

    - bilateral: exp(-|p_i - p_j|^2 / (2 theta_alpha^2) - |I_i - I_j|^2 / (2 theta_beta^2)),
    - gaussian: exp(-|p_i - p_j|^2 / (2 theta_gamma^2)).

    Each is normalized and multiplied by its weight. The defaults are DeepLab's for ResNet-101. Inference is
    deterministic and keeps no gradients.

    Args:
        bilateral_weight: weight of the bilateral kernel; 0 removes it.
        theta_alpha: standard deviation of the bilateral kernel in position, in pixels.
        theta_beta: standard deviation of the bilateral kernel in color, on the scale 0..255.
        gaussian_weight: weight of the gaussian kernel; 0 removes it.
        theta_gamma: standard deviation of the gaussian kernel, in pixels.
        iterations: number of mean-field iterations.
        normalization: see `normalize_kernel`; ``after`` is DeepLab's, ``symmetric`` is the default of pydensecrf.
        exact: sum over all pairs of pixels, which takes O(N^2) time and memory and suits images of a few thousand
            pixels. Otherwise filter with the permutohedral lattice, as in the authors' code.

    Raises:
        UserError: a standard deviation is not above 0, a weight or the number of iterations is negative, or the
            normalization is unknown.
    """

    bilateral_weight: float = 4.0
    theta_alpha: float = 67.0
    theta_beta: float = 3.0
    gaussian_weight: float = 3.0
    theta_gamma: float = 1.0
    iterations: int = 10
    normalization: Normalization = "after"
    exact: bool = False

    def __post_init__(self) -> None:
        if not all(theta > 0 for theta in (self.theta_alpha, self.theta_beta, self.theta_gamma)):
            raise UserError(f"dense CRF: expected standard deviations above 0, found {self}")
        if min(self.bilateral_weight, self.gaussian_weight, self.iterations) < 0:
            raise UserError(f"dense CRF: expected weights and iterations of 0 or more, found {self}")
        if self.normalization not in ("after", "symmetric"):
            raise UserError(f"dense CRF: expected normalization after or symmetric, found {self.normalization}")

    def __call__(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """Refine probabilities.

        Args:
            probabilities: float (C, H, W) or (B, C, H, W) in 0..1; values below 1e-5 count as 1e-5.
            image: uint8 (3, H, W) or (B, 3, H, W), at its original size.

        Returns:
            Probabilities, float32, of the same shape; they sum to 1 over the classes.

        Raises:
            UserError: probabilities and image differ in height or width, or have other shapes or types.
        """
        if probabilities.ndim == image.ndim == 4 and len(probabilities) == len(image):
            return torch.stack([self(p, i) for p, i in zip(probabilities, image, strict=True)])
        return self.infer(-probabilities.float().clamp_min(1e-5).log(), image)

    @torch.no_grad()
    def infer(self, unary: Tensor, image: Tensor) -> Tensor:
        """Refine the probabilities softmax(-unary) of one image.

        Args:
            unary: energies, float (C, H, W).
            image: uint8 (3, H, W).

        Returns:
            Probabilities, float32 (C, H, W).
        """
        if image.ndim != 3 or len(image) != 3 or image.dtype != torch.uint8:
            raise UserError(f"crf: expected an image uint8 (3, H, W), found {image.dtype} {tuple(image.shape)}")
        if unary.ndim != 3:
            raise UserError(f"crf: expected probabilities (C, H, W), found {tuple(unary.shape)}")
        if unary.shape[1:] != image.shape[1:]:
            raise UserError(
                f"crf: expected images at their original size {unary.shape[2]}x{unary.shape[1]}, found "
                f"{image.shape[2]}x{image.shape[1]}; set --data.eval_image_size null"
            )
        energies = unary.float().flatten(1).T.contiguous()
        if self.exact:
            kernels = [
                weight * normalize_kernel(gaussian_kernel(features), self.normalization)
                for weight, features in self.weighted_features(image)
            ]
            q = mean_field(energies, kernels, self.iterations)
        else:
            q = lattice_mean_field(energies, self.lattices(image), self.iterations)
        return q.T.reshape(unary.shape)

    def weighted_features(self, image: Tensor) -> list[tuple[float, Tensor]]:
        """Return the weight of each kernel and its features float32 (d, N), divided by the standard deviations."""
        y, x = torch.meshgrid(*(torch.arange(s, device=image.device) for s in image.shape[1:]), indexing="ij")
        position, color = torch.stack([x, y]).flatten(1).float(), image.flatten(1).float()
        kernels = [
            (self.gaussian_weight, position / self.theta_gamma),
            (self.bilateral_weight, torch.cat([position / self.theta_alpha, color / self.theta_beta])),
        ]
        return [(weight, features) for weight, features in kernels if weight]

    def lattices(self, image: Tensor) -> list[Lattice]:
        """Build a normalized and weighted lattice for each kernel of an image uint8 (3, H, W)."""
        return [
            Lattice.of(features).normalized(self.normalization, weight)
            for weight, features in self.weighted_features(image)
        ]


#: The settings that DeepLab's authors tuned on VOC: v1 LargeFOV, v2 on VGG-16 and v2 on ResNet-101.
DEEPLAB_CRFS = {
    "largefov": DenseCRF(4.0, 121.0, 5.0, 3.0, 3.0),
    "vgg16": DenseCRF(4.0, 65.0, 3.0, 2.0, 2.0),
    "resnet101": DenseCRF(4.0, 67.0, 3.0, 3.0, 1.0),
}
