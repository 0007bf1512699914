"""Linear models of R-CNN on fixed features: support vector machines and ridge regression.

The objectives are those of the authors' code (rcnn_train.m, rcnn_train_bbox_regressor.m), and so is the way to minimize
them: a solver with a tolerance, not an optimizer with a learning rate. All classes are solved at once. The notation of
the shapes is:

    N examples, D features, C classes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.components.unsaved import Constant

BIAS_FEATURE = 10.0  # the bias of a support vector machine is the weight of this constant feature

# --- linear models ----------------------------------------------------------------------------------------------------


class LinearModel(nn.Linear):
    """Linear functions of fixed features, which are scaled to a mean norm of 20 (rcnn_scale_features.m).

    The norm is measured once per run. It is not a buffer, because weight averaging would mix it with its initial value;
    `RCNN` saves it.

    Args:
        in_features: number of features, D.
        out_features: number of outputs.
        initial_output: output before training.
    """

    def __init__(self, in_features: int, out_features: int, initial_output: float = 0.0) -> None:
        super().__init__(in_features, out_features)
        self.measured = False
        self.norm = Constant(torch.ones(()))
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, initial_output)

    def measure(self, features: Tensor, valid: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
        """Measure the mean norm of the features, unless that has been done.

        Args:
            features: float (N, D).
            valid: examples to include, bool (N,).
            reduce: sums a tensor over all ranks.
        """
        if self.measured:
            return
        norms = torch.where(valid, features.float().norm(dim=1), 0)
        total, count = reduce(torch.stack([norms.sum(), valid.sum().float()]))
        # Any norm is right if all features are 0.
        self.set_norm(torch.where(total > 0, total / count.clamp_min(1), 20.0))

    def set_norm(self, norm: Tensor) -> None:
        """Set the mean norm () of the features."""
        self.norm.value, self.measured = norm.to(self.weight.device), True

    def scale(self, features: Tensor) -> Tensor:
        """Scale features (..., D) to a mean norm of 20: float32."""
        return features.float() * (20 / self.norm.value)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., D) to float32 (..., out_features)."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(self.scale(features), self.weight, self.bias)

    @torch.no_grad()
    def assign(self, weight: Tensor, bias: Tensor) -> None:
        """Set the parameters: weight (out_features, D) and bias (out_features,)."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)


# --- support vector machines ------------------------------------------------------------------------------------------


def svm_objective(scores: Tensor, sign: Tensor, weight: Tensor, w: Tensor, b: Tensor, cost: float) -> Tensor:
    """Compute the objective of a linear support vector machine per class: float32 (C,).

        1/2 |w|^2 + 1/2 (b / 10)^2 + cost * sum of weight * max(0, 1 - sign * score)

    This is liblinear's solver 3 as the authors call it; the bias is the weight of a constant feature of 10. Easy
    negatives, beyond the margin, do not contribute, so that training on all negatives equals hard negative mining.

    Args:
        scores: float (N, C).
        sign: 1 for positives, -1 for negatives, 0 for ignored examples, float (N, C).
        weight: weight of each example, float (N, C).
        w: weights of the machines, float (C, D).
        b: biases of the machines, float (C,).
        cost: the authors' C.
    """
    hinge = torch.where(sign == 0, 0, (1 - sign * scores).clamp_min(0))
    return w.square().sum(1) / 2 + (b / BIAS_FEATURE).square() / 2 + cost * (weight * hinge).sum(0)


class HardExamples(NamedTuple):
    """The examples that the support vector machines are solved on.

    Attributes:
        features: scaled features, float16 (N, D).
        signed_weights: sign times weight of each example for each class, 0 for ignored ones, float32 (N, C).
    """

    features: Tensor
    signed_weights: Tensor

    def keep_hardest(self, scores: Tensor, size: int) -> HardExamples:
        """Keep up to ``size`` examples, those with the largest hinge loss of any class first.

        Examples of equal loss, such as all those beyond the margin, are drawn at random.

        Args:
            scores: scores of the examples, float (N, C).
            size: number of examples that are kept.
        """
        sign = self.signed_weights.sign()
        hinge = torch.where(sign == 0, -1, (1 - sign * scores).clamp_min(0)).amax(1)
        kept = (hinge + 1e-3 * torch.rand_like(hinge)).topk(min(size, len(hinge))).indices
        return HardExamples(self.features[kept], self.signed_weights[kept])


def solve_svms(
    examples: HardExamples, cost: float, tolerance: float = 1e-3, max_iterations: int = 1000, penalty: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Minimize `svm_objective` of all classes: w, float32 (C, D), and b, float32 (C,).

    The alternating direction method of multipliers (Boyd et al. 2011, section 5) splits the scores u from X w. All
    classes share the features, hence one Cholesky factor. The step for u has a closed form.

    Args:
        examples: N examples.
        cost: the authors' C.
        tolerance: largest duality gap of a class, relative to its objective; the iterations end there.
        max_iterations: largest number of iterations.
        penalty: weight of |u - X w|^2 / 2. Every value converges. The default converges fast for features of norm 20
            and costs of 0.001 to 0.1.
    """
    x = F.pad(examples.features.float(), (0, 1), value=BIAS_FEATURE)
    sign, bound = examples.signed_weights.sign(), cost * examples.signed_weights.abs()
    factor = torch.linalg.cholesky(x.mT @ x + torch.eye(x.shape[1], device=x.device) / penalty)
    w = x.new_zeros(x.shape[1], sign.shape[1])
    u, dual = torch.zeros_like(sign), torch.zeros_like(sign)  # the dual variables are in 0..bound
    for iteration in range(1, max_iterations + 1):
        w = torch.cholesky_solve(x.mT @ (u + sign * dual / penalty), factor)
        scores = x @ w
        # Over-relaxation (section 3.4.3) with 1.6.
        proposed = 1.6 * scores - 0.6 * u - sign * dual / penalty
        # The proximal step of the hinge loss moves towards the margin, by the weight of the example at most.
        step = (1 - sign * proposed).clamp_min(0).minimum(bound / penalty)
        u, dual = proposed + sign * step, penalty * step
        if iteration % 25 == 0:
            hinge = bound * (1 - sign * scores).clamp_min(0)
            objective = w.square().sum(0) / 2 + hinge.sum(0)
            lower_bound = dual.sum(0) - (x.mT @ (sign * dual)).square().sum(0) / 2
            if (objective - lower_bound <= tolerance * objective).all():
                break
    return w[:-1].mT.contiguous(), w[-1] * BIAS_FEATURE


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
        """Compute the whitening from moments (C, 21), see `delta_moments`.

        0.001 is added to the eigenvalues of the covariance, as in the authors' code (rcnn_train_bbox_regressor.m).
        """
        count, sums, products = moments.double().split([1, 4, 16], dim=1)
        mean = sums / count.clamp_min(1)
        covariance = (products / count.clamp_min(1)).unflatten(1, (4, 4)) - mean[:, :, None] * mean[:, None]
        values, vectors = torch.linalg.eigh(covariance)
        root = (values.clamp_min(0) + 0.001).sqrt()[:, None]
        return cls(mean.float(), ((vectors / root) @ vectors.mT).float(), ((vectors * root) @ vectors.mT).float())

    def apply(self, deltas: Tensor, label: Tensor) -> Tensor:
        """Whiten deltas, float (N, 4), of the classes int64 (N,): float (N, 4)."""
        return ((deltas - self.mean[label])[:, None] @ self.whiten[label])[:, 0]


def delta_moments(deltas: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count the examples (1) and sum deltas (4) and products of the deltas (16) of each class: float64 (C, 21).

    Args:
        deltas: float (N, 4).
        label: class of each example, int64 (N,).
        num_classes: number of classes, C.
    """
    deltas = deltas.double()
    products = (deltas[:, :, None] * deltas[:, None]).flatten(1)
    rows = torch.cat([torch.ones_like(deltas[:, :1]), deltas, products], dim=1)
    # A matrix product: index_add on a GPU sums in a random order.
    return F.one_hot(label, num_classes).double().mT @ rows


def solve_ridge(
    x: Tensor, y: Tensor, ridge_lambda: float, reduce: Callable[[Tensor], Tensor], max_iterations: int = 300
) -> Tensor:
    """Minimize |Y - X beta|^2 + lambda |beta|^2 over the examples of all ranks (equation 5): beta, float32 (D, 4).

    The conjugate gradient method solves the normal equations to a relative residual of 1e-5 without forming X'X, which
    takes 340 MB for AlexNet and 2.5 GB for VGG-16.

    Args:
        x: features of this rank, float32 (N, D).
        y: targets of this rank, float32 (N, 4).
        ridge_lambda: lambda of the paper.
        reduce: sums a tensor over all ranks.
        max_iterations: largest number of iterations.
    """
    right_side = reduce(x.mT @ y)
    beta, residual, direction = torch.zeros_like(right_side), right_side.clone(), right_side.clone()
    squared = residual.square().sum(0)
    limit = 1e-10 * squared
    for _ in range(max_iterations):
        if (squared <= limit).all():
            break
        product = reduce(x.mT @ (x @ direction)) + ridge_lambda * direction
        step = squared / (direction * product).sum(0).clamp_min(1e-30)
        beta, residual = beta + step * direction, residual - step * product
        before, squared = squared, residual.square().sum(0)
        direction = residual + squared / before.clamp_min(1e-30) * direction
    return beta
