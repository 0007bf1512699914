"""Losses of style transfer: feature and Gram-matrix distances, total variation and the alpha norm.

All are computed in float32, also under autocast: sums of squares over an image exceed the range of float16.

Glossary: B images, C channels, H x W pixels, h x w cells of a feature map.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# --- Gram matrices ----------------------------------------------------------------------------------------------------


def gram_matrix(features: Tensor) -> Tensor:
    """Compute Gram matrices F F^T / (h w): float (B, C, h, w) to float32 (B, C, C).

    Gatys, Ecker and Bethge, "Texture Synthesis Using Convolutional Neural Networks", NeurIPS 2015, equation 1, which
    does not divide by h w. The division makes the matrix of a texture independent of the image's size.
    """
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().flatten(2)
        return flat @ flat.mT / flat.shape[2]


def texture_energy(gram: Tensor, target: Tensor) -> Tensor:
    """Compute sum (G - G')^2 / (4 C^2) per image (Gatys et al. 2015, equation 2).

    With `gram_matrix` this equals the paper's sum (F F^T - F' F'^T)^2 / (4 C^2 M^2), if both maps have M = h w cells.

    Args:
        gram: Gram matrices G, float32 (B, C, C).
        target: Gram matrices G', float32 (B, C, C).

    Returns:
        float32 (B,).
    """
    return (gram - target).square().sum((1, 2)) / (4 * gram.shape[1] ** 2)


def gram_distance(gram: Tensor, target: Tensor) -> Tensor:
    """Compute the mean of (G - G')^2 per image, which is 4 times `texture_energy`: float32 (B,)."""
    return (gram - target).square().mean((1, 2))


def gram_style_loss(features: Mapping[str, Tensor], targets: Mapping[str, Tensor], normalize: bool) -> Tensor:
    """Sum the Gram distances of several layers.

    Args:
        features: feature maps (B, C, h, w) by layer.
        targets: Gram matrices of the style, float32 (B, C, C) or (1, C, C), by layer. These layers are summed.
        normalize: divide the distance of each layer by the mean square of its target.

    Returns:
        float32 (B,).
    """
    distances = []
    for name, target in targets.items():
        distance = gram_distance(gram_matrix(features[name]), target)
        distances.append(divide_by_mean_square(distance, target) if normalize else distance)
    return torch.stack(distances).sum(0)


# --- features ---------------------------------------------------------------------------------------------------------


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared difference of activations per image.

    Gatys et al. 2016 (equation 1) define half the sum. Their code, Johnson et al. 2016 (equation 2) and later work use
    the mean, which does not depend on the image's size.

    Args:
        features: activations, float (B, ...).
        target: activations of the same shape.

    Returns:
        float32 (B,).
    """
    return (features.float() - target.float()).square().flatten(1).mean(1)


def divide_by_mean_square(distance: Tensor, target: Tensor) -> Tensor:
    """Divide a distance by the mean square of its target, which makes it independent of the features' scale.

    Args:
        distance: float32 (B,).
        target: float (B, ...), or (1, ...) for all images.

    Returns:
        float32 (B,).
    """
    return distance / target.float().square().flatten(1).mean(1).clamp(min=1e-8)


def moments_distance(features: Tensor, target: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Compute the mean squared differences of channel means and standard deviations, summed.

    Huang and Belongie 2017, equation 13.

    Args:
        features: float (B, C, h, w).
        target: float (B, C, h', w'); its size may differ.
        epsilon: added to the variances.

    Returns:
        float32 (B,).
    """
    (mean, std), (target_mean, target_std) = moments(features, epsilon), moments(target, epsilon)
    return (mean - target_mean).square().flatten(1).mean(1) + (std - target_std).square().flatten(1).mean(1)


def moments(features: Tensor, epsilon: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each channel over its cells.

    Args:
        features: float (B, C, h, w).
        epsilon: added to the variance.

    Returns:
        Mean and standard deviation, float32 (B, C, 1, 1) each.
    """
    variance, mean = torch.var_mean(features.float(), (2, 3), correction=0, keepdim=True)
    return mean, (variance + epsilon).sqrt()


# --- image priors -----------------------------------------------------------------------------------------------------


def total_variation(images: Tensor, beta: float = 2.0) -> Tensor:
    """Compute sum (dx^2 + dy^2)^(beta / 2) over pixels and channels per image.

    Mahendran and Vedaldi, "Understanding Deep Image Representations by Inverting Them", CVPR 2015, section 3. dx and dy
    are differences to the next pixel, 0 at the last one. For beta < 2 the gradient is infinite in constant regions;
    the squares are therefore clamped to 1e-10.

    Args:
        images: float (B, 3, H, W).
        beta: 2 sums squared differences; 1 preserves edges.

    Returns:
        float32 (B,).
    """
    x = images.float()
    squares = (
        F.pad(x[..., 1:] - x[..., :-1], (0, 1)).square() + F.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1)).square()
    )
    if beta < 2:
        squares = squares.clamp(min=1e-10)
    return (squares if beta == 2 else squares ** (beta / 2)).flatten(1).sum(1)


def alpha_norm(images: Tensor, alpha: float = 6.0) -> Tensor:
    """Compute sum |x|^alpha per image, a soft bound of the pixel values (Mahendran and Vedaldi 2015, section 3).

    Args:
        images: float (B, 3, H, W), centered at 0.
        alpha: exponent.

    Returns:
        float32 (B,).
    """
    return images.float().abs().pow(alpha).flatten(1).sum(1)
