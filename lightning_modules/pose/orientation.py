"""The orientation of a rigid body, regressed from its image: the lecture's first step from boxes to poses.

A network ends in four numbers, a quaternion, or in six, two columns of the matrix. Both are compared with the truth as
rotations: q and -q are the same one, so that a loss on the four numbers themselves would punish right answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.networks import AUXILIARY, Network, build_network, traits
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.pose.rotations import geodesic, quaternion_to_matrix, six_to_matrix

# --- network ------------------------------------------------------------------------------------------------------

# How many numbers a head gives, and what makes a matrix of them.
HEADS = {"quaternion": (4, quaternion_to_matrix), "six": (6, six_to_matrix)}


class SmallNetwork(nn.Module):
    """Eight convolutions of 3x3, of which every other halves the side, and two fully connected layers.

    Those see the last map cell by cell, 4x4 of an image of 64 pixels. The mean over the map, with which networks for
    classes end, is made to forget what is where.

    Args:
        outputs: numbers that it gives.
        width: channels of the first two convolutions, doubled every two.
    """

    def __init__(self, outputs: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in range(4):
            out = width * 2**step
            for c, stride in ((channels, 2), (out, 1)):
                layers += [nn.Conv2d(c, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4))
        self.head = nn.Sequential(nn.Linear(16 * channels, 512), nn.ReLU(inplace=True), nn.Linear(512, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images float (B,3,H,W) to (B,outputs)."""
        return self.head(self.features(x).flatten(1))


# --- loss ---------------------------------------------------------------------------------------------------------


def chordal_loss(found: Tensor, truth: Tensor) -> Tensor:
    """sin^2(t/2) of the angle t between rotations, the mean: 0 where they agree, 1 for half a turn.

    Of unit quaternions this is 1 - <q, q'>^2, of matrices |R - R'|^2 / 8 in Frobenius's norm: the same number, so that
    heads of either kind have one loss.

    Args:
        found, truth: float (B,3,3).
    """
    return (found - truth).square().sum((-2, -1)).mean() / 8


def sine_loss(found: Tensor, truth: Tensor) -> Tensor:
    """sin(t/2) of the angle t between rotations, the mean: the root of the chordal loss of each.

    Its gradient is as long for small errors as for middling ones, and fades towards half a turn, where no direction is
    better than the others. Of the angle itself the gradient does not fade, and learning begins several times slower.
    The root is kept a little off 0, where its slope has no end.

    Args:
        found, truth: float (B,3,3).
    """
    return ((found - truth).square().sum((-2, -1)) / 8).clamp(min=1e-7).sqrt().mean()


LOSSES = {"chordal": chordal_loss, "sine": sine_loss}


# --- metrics ------------------------------------------------------------------------------------------------------


class OrientationError(Metric):
    """Angles between predicted and true rotations over a whole set, all ranks together.

    ``compute`` gives ``median_error`` and ``mean_error`` in degrees, ``acc_10`` and ``acc_30``, the part of the samples
    with an angle of up to 10 and 30 degrees (30 as in Tulsiani and Malik, CVPR 2015): float32 scalars. Of an even
    number of samples the median is the lower of the two in the middle, as torch has it.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.angles: list[Tensor]
        self.add_state("angles", [], dist_reduce_fx="cat")

    def update(self, found: Tensor, truth: Tensor) -> None:
        """Adds rotations, float (B,3,3) each."""
        self.angles.append(geodesic(found.float(), truth.float()) * 180 / math.pi)

    def compute(self) -> dict[str, Tensor]:
        angles = dim_zero_cat(self.angles)
        return {
            "median_error": angles.median(),
            "mean_error": angles.mean(),
            "acc_10": (angles <= 10).float().mean(),
            "acc_30": (angles <= 30).float().mean(),
        }


# --- module -------------------------------------------------------------------------------------------------------


class OrientationRegressor(VisionModule):
    """A network that gives the rotation of the body in its image.

    Batch: ``image`` uint8 (B,3,H,W), ``rotation`` float32 (B,3,3), from the body's axes to the camera's (x right, y
    down, z away). Prediction: {``rotation``: float32 (B,3,3)}. Metrics: see `OrientationError`.

    Args:
        network: ``small`` (`SmallNetwork`), or any of `ImageClassifier`'s; its last layer gives the head's numbers.
        head: ``quaternion``, or ``six`` numbers (Zhou et al., CVPR 2019), which can follow every turn without a jump.
        loss: ``chordal``, sin^2 of half the angle, or ``sine``, its root.
        weights: None to train from scratch; DEFAULT or a name of torchvision's ImageNet weights; or a file: a state
            dict, or the checkpoint of an `ImageClassifier` or of this.
        width: channels of the first stage of ``small``, None: 32, or of a CIFAR ResNet, None: 16.
        optimizer: see `VisionModule`.
        mean, std: None takes what the network was trained with.
        kwargs: schedule and channels_last of `VisionModule`.
    """

    monitor = ("val/median_error", "min")

    def __init__(
        self,
        network: Network | Literal["small"] = "small",
        head: Literal["quaternion", "six"] = "quaternion",
        loss: Literal["chordal", "sine"] = "chordal",
        weights: str | None = None,
        width: int | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        own = {**traits(network), "head": "head.2"} if network == "small" else traits(network)
        super().__init__(optimizer=optimizer, mean=mean or own["mean"], std=std or own["std"], **kwargs)
        numbers, self.to_matrix = HEADS[head]
        self.loss = LOSSES[loss]
        self.network: nn.Module
        if network == "small":
            self.network = SmallNetwork(numbers, width or 32)
        else:
            self.network = build_network(network, numbers, width or 16)
        if weights is not None:
            load_weights(self.network, find_weights(network, weights), network, own["head"], *AUXILIARY)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"rotation": self.loss(self._rotations(batch["image"]), batch["rotation"])}

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """``rotation`` float32 (B,3,3) for uint8 images (B,3,H,W), or a list of (3,H,W) of one size."""
        return {"rotation": self._rotations(images if isinstance(images, Tensor) else torch.stack(images))}

    def _rotations(self, images: Tensor) -> Tensor:
        # In float32: bfloat16 has three digits, half a degree.
        return self.to_matrix(self.network(self.preprocess(images)).float())

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"orientation": OrientationError()})

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions["rotation"], batch["rotation"])
