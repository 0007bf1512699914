"""What R-CNN learns from features that stand still: support vector machines and ridge regressions, both linear.

The objectives are those of the authors' code (rcnn_train.m, rcnn_train_bbox_regressor.m), all classes at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- linear functions of features -------------------------------------------------------------------------------------


class Readout(nn.Linear):
    """Linear functions of features that stand still, which are scaled to a mean norm of 20 (rcnn_scale_features.m).

    They are learned as functions of the features less their mean, at which gradient descent arrives far sooner; `plain`
    gives the weights and biases as if they were not, which the objectives speak of.

    Mean and norm are measured once. They are no buffers, since weight averages would average them with what was there
    before: `RCNN` puts them into the checkpoint.
    """

    def __init__(self, size: int, outputs: int, value: float = 0.0) -> None:
        super().__init__(size, outputs)
        self.measured, self.mean, self.norm = False, torch.zeros(size), torch.ones(())
        nn.init.zeros_(self.weight)
        # As if it were the weight of a feature of 20, so that it moves as fast as what the others add up to.
        nn.init.constant_(self.bias, value / 20)

    def measure(self, features: Tensor, counted: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
        """Takes mean and mean norm of features (N,D) where ``counted``, bool (N,), unless it has them already;
        ``reduce`` adds up the ranks."""
        if self.measured:
            return
        features = torch.where(counted[:, None], features.float(), 0)
        count = counted.sum().float()[None]
        sums = reduce(torch.cat([features.sum(0), features.norm(dim=1).sum()[None], count]))
        sums = sums / sums[-1].clamp_min(1)
        # Where all are 0 the norm is as good as any.
        self.mean, self.norm = sums[:-2], torch.where(sums[-2] > 0, sums[-2], 20.0)
        self.measured = True

    def forward(self, features: Tensor) -> Tensor:
        """Features float (...,D) to float32 (...,outputs)."""
        self.mean, self.norm = self.mean.to(features.device), self.norm.to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear((features.float() - self.mean) * (20 / self.norm), self.weight, 20 * self.bias)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Weights (outputs,D) and biases (outputs,) for features that are scaled only."""
        # No product of matrices, which autocast would round.
        return self.weight, 20 * self.bias - (self.weight * self.mean * (20 / self.norm)).sum(1)


# --- support vector machines ------------------------------------------------------------------------------------------


def svm_objective(scores: Tensor, side: Tensor, weight: Tensor, plain: tuple[Tensor, Tensor], cost: float) -> Tensor:
    """What a linear support vector machine minimizes, for each class: float32 (C,).

        1/2 |w|^2 + 1/2 (b / 10)^2 + cost * sum of weight * max(0, 1 - side * score)

    as the authors have it from liblinear (solver 3, the bias being the weight of a feature of 10). Of the negatives
    only those within the margin, the hard ones, have a part in it.

    Args:
        scores, side, weight: float (N,C), see `sides_of`.
        plain: w float (C,D) and b float (C,).
        cost: the authors' C.
    """
    w, b = plain
    hinge = torch.where(side == 0, 0, (1 - side * scores).clamp_min(0))
    return w.square().sum(1) / 2 + (b / 10).square() / 2 + cost * (weight * hinge).sum(0)


# --- box regression ---------------------------------------------------------------------------------------------------


class Whitening(NamedTuple):
    """Of each class the mean of its offsets (C,4), and the matrices (C,4,4) that make them uncorrelated and undo it."""

    mean: Tensor
    forth: Tensor
    back: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> Whitening:
        """Takes moments (C,22), see `moments_of`; the 0.001 is the authors' (rcnn_train_bbox_regressor.m)."""
        count, sums, products, _ = moments.double().split([1, 4, 16, 1], dim=1)
        mean = sums / count.clamp_min(1)
        covariance = (products / count.clamp_min(1)).unflatten(1, (4, 4)) - mean[:, :, None] * mean[:, None]
        values, vectors = torch.linalg.eigh(covariance)
        root = (values.clamp_min(0) + 0.001).sqrt()[:, None]
        return cls(mean.float(), ((vectors / root) @ vectors.mT).float(), ((vectors * root) @ vectors.mT).float())


def ridge_objective(
    found: Tensor,
    wanted: Tensor,
    label: Tensor,
    weight: Tensor,
    plain: tuple[Tensor, Tensor],
    ridge: float,
    share: float,
) -> Tensor:
    """What ridge regression minimizes, for each class: float32 (C,).

        share * sum of weight * |wanted - found|^2 + ridge * (|w|^2 + |b|^2)

    over the examples of the class (the paper's equation 5; the bias has its part in the ridge as in the authors' code).

    Args:
        found: float (N,C,4).
        wanted: float (N,C,4), whitened offsets, each class's way.
        label: int64 (N,).
        weight: float (N,), 0 where there is no example.
        plain: w float (4C,D) and b float (4C,).
        ridge: lambda.
        share: see above.
    """
    shown = F.one_hot(label, found.shape[1])
    errors = (shown[..., None] * (found - wanted)).square().sum(2)
    w, b = plain
    size = (w.square().sum(1) + b.square()).unflatten(0, (-1, 4)).sum(1)
    return share * (torch.where(weight > 0, weight, 0)[:, None] * errors).sum(0) + ridge * size
