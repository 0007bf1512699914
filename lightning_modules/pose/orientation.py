"""Orientation of a rigid body, regressed from an image: the lecture's step from boxes to poses.

The network predicts a quaternion, or two columns of the rotation matrix. The losses compare rotations: q and -q are the
same rotation, so a loss on the four components would punish correct answers.
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
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.networks import AUX_HEADS, NetworkName, build_network, network_config
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.pose.rotations import geodesic_distance, quaternion_to_matrix, rotation_6d_to_matrix

# --- network ------------------------------------------------------------------------------------------------------

# Outputs of each head, and the function that maps them to a matrix.
HEADS = {"quaternion": (4, quaternion_to_matrix), "6d": (6, rotation_6d_to_matrix)}


class SmallNetwork(nn.Module):
    """Eight 3x3 convolutions, every other one with stride 2, and two fully connected layers on a 4x4 feature map.

    Classification networks end in global average pooling, which discards positions that the orientation depends on.

    Args:
        outputs: number of outputs.
        base_channels: channels of the first two convolutions; they double after every two.
    """

    def __init__(self, outputs: int, base_channels: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in range(4):
            out = base_channels * 2**step
            for c, stride in ((channels, 2), (out, 1)):
                layers += [nn.Conv2d(c, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4))
        self.head = nn.Sequential(nn.Linear(16 * channels, 512), nn.ReLU(inplace=True), nn.Linear(512, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images, float (B, 3, H, W), to (B, outputs)."""
        return self.head(self.features(x).flatten(1))


# --- loss ---------------------------------------------------------------------------------------------------------


def chordal_loss(rotation: Tensor, target: Tensor) -> Tensor:
    """Compute the mean of sin^2(t/2) for the angles t between rotations: 0 for equal ones, 1 for half a turn.

    It equals 1 - <q, q'>^2 for unit quaternions and |R - R'|^2 / 8 (Frobenius norm) for matrices.

    Args:
        rotation: predicted rotations, float (B, 3, 3).
        target: true rotations, float (B, 3, 3).
    """
    return (rotation - target).square().sum((-2, -1)).mean() / 8


def sine_loss(rotation: Tensor, target: Tensor) -> Tensor:
    """Compute the mean of sin(t/2) for the angles t between rotations.

    Its gradient is as large for small errors as for medium ones, and vanishes at half a turn, where all directions are
    equal. The gradient of the angle itself does not vanish there, which slows down early learning several times.

    Args:
        rotation: predicted rotations, float (B, 3, 3).
        target: true rotations, float (B, 3, 3).
    """
    # The clamp avoids the infinite derivative of the root at 0.
    return ((rotation - target).square().sum((-2, -1)) / 8).clamp(min=1e-7).sqrt().mean()


LOSSES = {"chordal": chordal_loss, "sine": sine_loss}


# --- metrics ------------------------------------------------------------------------------------------------------


class OrientationError(Metric):
    """Angles between predicted and true rotations over a whole set.

    ``compute`` returns float32 scalars: ``median_error`` and ``mean_error`` in degrees, ``acc_10`` and ``acc_30``, the
    fraction of samples with an error of at most 10 and 30 degrees (30 as in Tulsiani and Malik, CVPR 2015). The median
    of an even number of samples is the lower of the two middle values, as in torch.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.angles: list[Tensor]
        self.add_state("angles", [], dist_reduce_fx="cat")

    def update(self, rotation: Tensor, target: Tensor) -> None:
        """Add a batch of predicted and true rotations, float (B, 3, 3) each."""
        self.angles.append(geodesic_distance(rotation.float(), target.float()) * 180 / math.pi)

    def compute(self) -> dict[str, Tensor]:
        """Return the results listed above."""
        angles = dim_zero_cat(self.angles)
        return {
            "median_error": angles.median(),
            "mean_error": angles.mean(),
            "acc_10": (angles <= 10).float().mean(),
            "acc_30": (angles <= 30).float().mean(),
        }


# --- module -------------------------------------------------------------------------------------------------------


class OrientationRegressor(VisionModule):
    """A network that regresses the rotation of the body in an image.

    Batch: ``image`` uint8 (B, 3, H, W), ``rotation`` float32 (B, 3, 3), from the body's axes to the camera's (x right,
    y down, z away). Prediction: ``rotation`` float32 (B, 3, 3). Metrics: those of `OrientationError`.

    Args:
        backbone: ``small`` (`SmallNetwork`), or any network of `ImageClassifier`; the head replaces its last layer.
        head: ``quaternion``, or ``6d`` for the continuous representation of Zhou et al., CVPR 2019.
        loss: ``chordal``, sin^2 of half the angle, or ``sine``, its square root.
        weights: None trains from scratch; DEFAULT or a name loads torchvision's ImageNet weights; a file is a state
            dict, or a checkpoint of `ImageClassifier` or `OrientationRegressor`.
        base_channels: channels of the first stage; None for 32 with ``small`` and 16 with a CIFAR ResNet.
        optimizer: makes the optimizer from parameter groups.
        mean: mean of the pixels in 0..1 per RGB channel; None for the value of the backbone.
        std: standard deviation of the pixels in 0..1 per RGB channel; None for the value of the backbone.
        **kwargs: see `VisionModule`.
    """

    monitor = ("val/median_error", "min")

    def __init__(
        self,
        backbone: NetworkName | Literal["small"] = "small",
        head: Literal["quaternion", "6d"] = "quaternion",
        loss: Literal["chordal", "sine"] = "chordal",
        weights: str | None = None,
        base_channels: int | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        config = network_config(backbone)
        super().__init__(optimizer=optimizer, mean=mean or config.mean, std=std or config.std, **kwargs)
        outputs, self.to_matrix = HEADS[head]
        self.loss = LOSSES[loss]
        self.network: nn.Module
        if backbone == "small":
            self.network = SmallNetwork(outputs, base_channels or 32)
        else:
            self.network = build_network(backbone, outputs, base_channels or 16)
        if weights is not None:
            head_name = "head.2" if backbone == "small" else config.head
            load_weights(self.network, find_weights(backbone, weights), backbone, head_name.split(".")[0], *AUX_HEADS)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"rotation": self.loss(self._rotations(batch["image"]), batch["rotation"])}

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Return ``rotation`` float32 (B, 3, 3) of uint8 images (B, 3, H, W), or a list of (3, H, W) of one size."""
        return {"rotation": self._rotations(require_equal_size(images))}

    def _rotations(self, images: Tensor) -> Tensor:
        # In float32: bfloat16 has three digits, half a degree.
        return self.to_matrix(self.network(self.preprocess(images)).float())

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"orientation": OrientationError()})

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions["rotation"], batch["rotation"])
