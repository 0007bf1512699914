"""Linear models of R-CNN on fixed features: support vector machines and ridge regression.

The objectives are those of the authors' code (rcnn_train.m, rcnn_train_bbox_regressor.m), for all classes at once. The
notation of the shapes is:

    N examples, D features, C classes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.components.unsaved import Constant

# --- linear models ----------------------------------------------------------------------------------------------------


class LinearModel(nn.Linear):
    """Linear functions of fixed features, which are scaled to a mean norm of 20 (rcnn_scale_features.m).

    The parameters refer to centered features, because gradient descent then converges much faster. The objectives refer
    to the parameters of `uncentered`.

    Mean and norm are measured once. They are not buffers, because weight averaging would mix them with their initial
    values; `RCNN` saves them.

    Args:
        in_features: number of features, D.
        out_features: number of outputs.
        initial_output: output for the mean features before training.
    """

    def __init__(self, in_features: int, out_features: int, initial_output: float = 0.0) -> None:
        super().__init__(in_features, out_features)
        self.measured = False
        self.mean, self.norm = Constant(torch.zeros(in_features)), Constant(torch.ones(()))
        nn.init.zeros_(self.weight)
        # The bias is the weight of a constant feature of 20: it is learned as fast as the other weights together.
        nn.init.constant_(self.bias, initial_output / 20)

    def measure(self, features: Tensor, valid: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
        """Measure mean and mean norm of the features, unless that has been done.

        Args:
            features: float (N, D).
            valid: examples to include, bool (N,).
            reduce: sums a tensor over all ranks.
        """
        if self.measured:
            return
        features = torch.where(valid[:, None], features.float(), 0)
        count = valid.sum().float()[None]
        sums = reduce(torch.cat([features.sum(0), features.norm(dim=1).sum()[None], count]))
        sums = sums / sums[-1].clamp_min(1)
        # Any norm is right if all features are 0.
        self.set_scaling(sums[:-2], torch.where(sums[-2] > 0, sums[-2], 20.0))

    def set_scaling(self, mean: Tensor, norm: Tensor) -> None:
        """Set the mean (D,) and the mean norm () of the features."""
        device = self.weight.device
        self.mean.value, self.norm.value, self.measured = mean.to(device), norm.to(device), True

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., D) to float32 (..., out_features)."""
        with torch.autocast(features.device.type, enabled=False):
            scaled = (features.float() - self.mean.value) * (20 / self.norm.value)
            return F.linear(scaled, self.weight, 20 * self.bias)

    def uncentered(self) -> tuple[Tensor, Tensor]:
        """Return weights (out_features, D) and biases (out_features,) for features that are scaled but not centered."""
        # An elementwise product: autocast would round a matrix product.
        shift = (self.weight * self.mean.value * (20 / self.norm.value)).sum(1)
        return self.weight, 20 * self.bias - shift


# --- support vector machines ------------------------------------------------------------------------------------------


def svm_objective(
    scores: Tensor, sign: Tensor, weight: Tensor, parameters: tuple[Tensor, Tensor], cost: float
) -> Tensor:
    """Compute the objective of a linear support vector machine per class: float32 (C,).

        1/2 |w|^2 + 1/2 (b / 10)^2 + cost * sum of weight * max(0, 1 - sign * score)

    This is liblinear's solver 3 as the authors call it; the bias is the weight of a constant feature of 10. Easy
    negatives, beyond the margin, do not contribute, so that training on all negatives equals hard negative mining.

    Args:
        scores: float (N, C).
        sign: 1 for positives, -1 for negatives, 0 for ignored examples, float (N, C).
        weight: weight of each example, float (N, C).
        parameters: w, float (C, D), and b, float (C,); see `LinearModel.uncentered`.
        cost: the authors' C.
    """
    w, b = parameters
    hinge = torch.where(sign == 0, 0, (1 - sign * scores).clamp_min(0))
    return w.square().sum(1) / 2 + (b / 10).square() / 2 + cost * (weight * hinge).sum(0)


# --- box regression ---------------------------------------------------------------------------------------------------


class DeltaWhitening(NamedTuple):
    """Whitening of the regression deltas of each class.

    Attributes:
        mean: mean deltas, float32 (C, 4).
        whiten: matrices that decorrelate the centered deltas, float32 (C, 4, 4).
        unwhiten: inverse matrices, float32 (C, 4, 4).
    """

    mean: Tensor
    whiten: Tensor
    unwhiten: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DeltaWhitening:
        """Compute the whitening from moments (C, 22), see `delta_moments`.

        0.001 is added to the eigenvalues of the covariance, as in the authors' code (rcnn_train_bbox_regressor.m).
        """
        count, sums, products, _ = moments.double().split([1, 4, 16, 1], dim=1)
        mean = sums / count.clamp_min(1)
        covariance = (products / count.clamp_min(1)).unflatten(1, (4, 4)) - mean[:, :, None] * mean[:, None]
        values, vectors = torch.linalg.eigh(covariance)
        root = (values.clamp_min(0) + 0.001).sqrt()[:, None]
        return cls(mean.float(), ((vectors / root) @ vectors.mT).float(), ((vectors * root) @ vectors.mT).float())


def ridge_objective(
    prediction: Tensor,
    target: Tensor,
    label: Tensor,
    weight: Tensor,
    parameters: tuple[Tensor, Tensor],
    ridge_lambda: float,
    scale: float,
) -> Tensor:
    """Compute the objective of ridge regression per class (equation 5): float32 (C,).

        scale * sum of weight * |target - prediction|^2 + ridge_lambda * (|w|^2 + |b|^2)

    The sum is over the examples of the class. The bias is regularized as in the authors' code.

    Args:
        prediction: float (N, C, 4).
        target: whitened deltas, float (N, C, 4).
        label: class of each example, int64 (N,).
        weight: float (N,), 0 for padding.
        parameters: w, float (4C, D), and b, float (4C,); see `LinearModel.uncentered`.
        ridge_lambda: lambda of the paper.
        scale: factor from this batch to the whole training set.
    """
    one_hot = F.one_hot(label, prediction.shape[1])
    errors = (one_hot[..., None] * (prediction - target)).square().sum(2)
    w, b = parameters
    squared_norm = (w.square().sum(1) + b.square()).unflatten(0, (-1, 4)).sum(1)
    return scale * (torch.where(weight > 0, weight, 0)[:, None] * errors).sum(0) + ridge_lambda * squared_norm
