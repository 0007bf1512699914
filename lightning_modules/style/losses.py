"""What style transfer minimizes: distances of activations, of their Gram matrices, and how rough an image is.

Everything is float32, also under autocast: sums of squares over an image leave float16's range.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gram(features: Tensor) -> Tensor:
    """G = F F^T / M of each image's N maps of M places: float (B,N,h,w) to float32 (B,N,N).

    Gatys, Ecker and Bethge, "Texture Synthesis Using Convolutional Neural Networks", NeurIPS 2015, equation 1, there
    without the division, which makes the matrix of a texture the same at any size.
    """
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().flatten(2)
        return flat @ flat.mT / flat.shape[2]


def texture_energy(found: Tensor, target: Tensor) -> Tensor:
    """E = sum (G - G')^2 / (4 N^2) of each image (Gatys et al. 2015, equation 2): float32 (B,).

    With G as `gram` has it this is the lecture's sum (F F^T - F' F'^T)^2 / (4 N^2 M^2), where both have M places.

    Args:
        found, target: Gram matrices float32 (B,N,N).
    """
    return (found - target).square().sum((1, 2)) / (4 * found.shape[1] ** 2)


def gram_distance(found: Tensor, target: Tensor) -> Tensor:
    """The mean square of G - G', which is four times `texture_energy`: float32 (B,)."""
    return (found - target).square().mean((1, 2))


def feature_distance(found: Tensor, target: Tensor) -> Tensor:
    """The mean square of the activations' difference, of each image: float32 (B,).

    Gatys et al. 2016 (equation 1) have half the sum; their code, Johnson et al. 2016 (equation 2) and their successors
    the mean, which does not grow with the image.

    Args:
        found, target: float (B, ...).
    """
    return (found.float() - target.float()).square().flatten(1).mean(1)


def relative_to(distance: Tensor, target: Tensor) -> Tensor:
    """A distance in parts of the mean square of what was compared with, so that it knows no scale: float32 (B,).

    Args:
        distance: float32 (B,).
        target: float (B, ...), or (1, ...) for all of them.
    """
    return distance / target.float().square().flatten(1).mean(1).clamp(min=1e-8)


def moments_distance(found: Tensor, target: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Mean squares of the differences of each map's mean and deviation, added (Huang and Belongie 2017, equation 13).

    Args:
        found, target: float (B,N,h,w), of any two sizes.
        epsilon: added to the variances.

    Returns:
        float32 (B,).
    """
    (mean, deviation), (true_mean, true_deviation) = moments(found, epsilon), moments(target, epsilon)
    return (mean - true_mean).square().flatten(1).mean(1) + (deviation - true_deviation).square().flatten(1).mean(1)


def moments(features: Tensor, epsilon: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each map over its places, float32 (B,N,1,1) each.

    Args:
        features: float (B,N,h,w).
        epsilon: added to the variance.
    """
    variance, mean = torch.var_mean(features.float(), (2, 3), correction=0, keepdim=True)
    return mean, (variance + epsilon).sqrt()


def total_variation(images: Tensor, beta: float = 2.0) -> Tensor:
    """sum (dx^2 + dy^2)^(beta/2) over places and channels of each image: float32 (B,).

    Mahendran and Vedaldi, "Understanding Deep Image Representations by Inverting Them", CVPR 2015, section 3; dx and dy
    are differences to the next pixel, 0 at the last one. Below beta = 2 the slope has no end where nothing changes, and
    squares are kept above 1e-10.

    Args:
        images: float (B,3,H,W).
        beta: 2 is the sum of squared differences; 1 keeps edges sharp.
    """
    x = images.float()
    squares = (
        F.pad(x[..., 1:] - x[..., :-1], (0, 1)).square() + F.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1)).square()
    )
    if beta < 2:
        squares = squares.clamp(min=1e-10)
    return (squares if beta == 2 else squares ** (beta / 2)).flatten(1).sum(1)


def alpha_norm(images: Tensor, alpha: float = 6.0) -> Tensor:
    """sum |x|^alpha of each image, which keeps pixels within a range (ibid.): float32 (B,).

    Args:
        images: float (B,3,H,W), 0 in the middle of the range.
        alpha: an even number bounds all pixels softly.
    """
    return images.float().abs().pow(alpha).flatten(1).sum(1)
