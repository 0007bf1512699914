"""Stacked Hourglass: Newell, Yang and Deng, "Stacked Hourglass Networks for Human Pose Estimation", ECCV 2016.

Each hourglass pools the features down to a low resolution, restores it, and predicts one heatmap per joint. The next
hourglass refines the features and heatmaps of the previous one. Every stack is supervised. Constants are those of the
authors' code (pose-hg-train).

Shapes: B images, S stacks, K joints, C channels; heatmaps of h x w cells.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.pose.joints import MPII_JOINTS, flip_indices
from lightning_modules.pose.keypoint_codec import decode, encode, inside_heatmap
from lightning_modules.pose.metrics import choose_metric, pose_metrics, update_pose_metrics

STRIDE = 4  # pixels per heatmap cell

# --- network --------------------------------------------------------------------------------------------------------


class PreActBottleneck(nn.Module):
    """Pre-activation bottleneck; a 1x1 convolution on the skip connection adapts the number of channels.

    Args:
        in_channels: input channels.
        channels: output channels.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        layers: list[nn.Module] = []
        for c, out, kernel in ((in_channels, half, 1), (half, half, 3), (half, channels, 1)):
            layers += [nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, out, kernel, padding=kernel // 2)]
        self.layers = nn.Sequential(*layers)
        self.skip = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.layers(x)


class Hourglass(nn.Module):
    """Recursive hourglass: max pooling, an inner hourglass, nearest-neighbor upsampling, and a skip branch.

    It maps (B, C, h, w) to the same shape.

    Args:
        depth: number of poolings.
        channels: C.
    """

    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        self.skip = PreActBottleneck(channels, channels)
        self.down = PreActBottleneck(channels, channels)
        self.inner = Hourglass(depth - 1, channels) if depth > 1 else PreActBottleneck(channels, channels)
        self.up = PreActBottleneck(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        low = self.up(self.inner(self.down(F.max_pool2d(x, 2))))
        return self.skip(x) + F.interpolate(low, scale_factor=2.0, mode="nearest")


class StackedHourglassNetwork(nn.Module):
    """Map normalized images, float (B, 3, H, W), to heatmaps of all stacks, float32 (S, B, K, H/4, W/4).

    With 16 joints and 256 channels, 1 stack has 3,426,448 parameters, 2 have 6,570,400 and 8 have 25,434,112.

    Args:
        num_joints: number of joints, K.
        num_stacks: number of stacks, S.
        channels: channels of the hourglasses, a multiple of 4.
        depth: number of poolings in each hourglass.
    """

    def __init__(self, num_joints: int = 16, num_stacks: int = 8, channels: int = 256, depth: int = 4) -> None:
        super().__init__()
        for name, value in (("num_joints", num_joints), ("num_stacks", num_stacks), ("depth", depth)):
            if value < 1:
                raise UserError(f"{name}: expected 1 or more, found {value}")
        if channels < 4 or channels % 4:
            raise UserError(f"channels: expected a multiple of 4, found {channels}")
        self.divisor = STRIDE * 2**depth
        quarter, half = channels // 4, channels // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, quarter, 7, stride=2, padding=3),
            nn.BatchNorm2d(quarter),
            nn.ReLU(inplace=True),
            PreActBottleneck(quarter, half),
            nn.MaxPool2d(2),
            PreActBottleneck(half, half),
            PreActBottleneck(half, channels),
        )
        self.hourglasses = nn.ModuleList(Hourglass(depth, channels) for _ in range(num_stacks))
        self.features = nn.ModuleList(
            nn.Sequential(
                PreActBottleneck(channels, channels),
                nn.Conv2d(channels, channels, 1),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            )
            for _ in range(num_stacks)
        )
        self.heatmaps = nn.ModuleList(nn.Conv2d(channels, num_joints, 1) for _ in range(num_stacks))
        # Features and heatmaps of a stack are merged into the input of the next one.
        self.merge_features = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(num_stacks - 1))
        self.merge_heatmaps = nn.ModuleList(nn.Conv2d(num_joints, channels, 1) for _ in range(num_stacks - 1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % self.divisor or width % self.divisor:
            raise UserError(
                f"image: expected sides that are multiples of {self.divisor}, found {height}x{width}; "
                "set --data.image_size, or a smaller --model.depth"
            )
        x = self.stem(x)
        heatmaps: list[Tensor] = []
        for i, hourglass in enumerate(self.hourglasses):
            features = self.features[i](hourglass(x))
            # In float32: bfloat16 often makes the cells around a peak equal.
            with torch.autocast(features.device.type, enabled=False):
                heatmaps.append(self.heatmaps[i](features.float()))
            if i + 1 < len(self.hourglasses):
                x = x + self.merge_features[i](features) + self.merge_heatmaps[i](heatmaps[-1])
        return torch.stack(heatmaps)


# --- loss -----------------------------------------------------------------------------------------------------------


def heatmap_losses(heatmaps: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Compute the mean squared error of each stack.

    Args:
        heatmaps: float (S, B, K, h, w).
        target: float (B, K, h, w).
        counted: heatmaps that count, bool (B, K).

    Returns:
        float32 (S,), 0 if no heatmap counts.
    """
    squares = (heatmaps.float() - target).square().mean((3, 4))
    return (squares * counted).sum((1, 2)) / counted.sum().clamp(min=1)


# --- module ---------------------------------------------------------------------------------------------------------


class StackedHourglass(VisionModule):
    """Stacked Hourglass: pose estimation of one person by a heatmap per joint.

    Batch: see pose in the batch contract (``datamodules/base.py``). Predictions: ``keypoints`` float32 (B, K, 2) in
    pixels of the given images; ``scores`` float32 (B, K), the heights of the last stack's peaks, about 1 for a certain
    joint; ``heatmaps`` float32 (B, S, K, h, w) of all stacks. Metrics: those of `pose_metrics`, in pixels of the images
    on disk.

    Args:
        joint_names: K names, MPII's 16 by default; ``train.py`` takes them from the data.
        num_stacks: number of hourglasses.
        channels: channels of the hourglasses, a multiple of 4.
        depth: number of poolings in each hourglass; the images' sides must be multiples of 4 * 2^depth.
        metric: ``pckh`` for MPII, ``pck`` for LSP; data without head boxes has only ``pck``.
        head_boxes: whether the data has head boxes; ``train.py`` takes it from the data.
        sigma: standard deviation of the target Gaussians in cells of 4 pixels: 1.75 in the authors' code, 1 in the
            paper.
        missing: target of joints that are not labeled or not inside of the crop: an ``empty`` heatmap (the authors'
            code), or ``ignore`` them in the loss.
        flip_test: average the heatmaps with those of the horizontally flipped image.
        optimizer: makes the optimizer from parameter groups. Default: the authors' RMSprop.
        **kwargs: see `VisionModule`.
    """

    monitor = ("val/pckh/total", "max")

    def __init__(
        self,
        joint_names: list[str] | None = None,
        num_stacks: int = 8,
        channels: int = 256,
        depth: int = 4,
        metric: Literal["pckh", "pck"] = "pckh",
        head_boxes: bool = True,
        sigma: float = 1.75,
        missing: Literal["empty", "ignore"] = "empty",
        flip_test: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.RMSprop(params, lr=2.5e-4, alpha=0.99, eps=1e-8),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if not sigma > 0:
            raise UserError(f"sigma: expected more than 0, found {sigma}")
        if missing not in ("empty", "ignore"):
            raise UserError(f"missing: expected empty or ignore, found {missing}")
        self.joint_names = list(joint_names or MPII_JOINTS)
        self.metric = choose_metric(metric, self.joint_names, head_boxes)
        self.sigma, self.missing, self.flip_test = sigma, missing, flip_test
        self.monitor = (f"val/{self.metric}/total", "max")
        self.flip_indices = flip_indices(self.joint_names)
        self.network = StackedHourglassNetwork(len(self.joint_names), num_stacks, channels, depth)

    def heatmaps(self, images: Tensor | list[Tensor]) -> Tensor:
        """Return heatmaps of all stacks, float32 (S, B, K, H/4, W/4), of uint8 images (B, 3, H, W)."""
        if not isinstance(images, Tensor):
            raise UserError("image: expected crops of one person each, found full images; set --data.crop person")
        return self.network(self.preprocess(images))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        heatmaps = self.heatmaps(batch["image"])
        size = (heatmaps.shape[3], heatmaps.shape[4])
        target = encode(batch["keypoints"], batch["labeled"], size, STRIDE, self.sigma)
        inside = inside_heatmap(batch["keypoints"], batch["labeled"], size, STRIDE)
        counted = inside if self.missing == "ignore" else torch.ones_like(inside)
        return {f"stack_{i + 1}": loss for i, loss in enumerate(heatmap_losses(heatmaps, target, counted))}

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        heatmaps = self.heatmaps(images)
        if self.flip_test:
            assert isinstance(images, Tensor)
            flipped = self.heatmaps(images.flip(3)).flip(4)[:, :, self.flip_indices]
            heatmaps = (heatmaps + flipped) / 2
        keypoints, scores = decode(heatmaps[-1], STRIDE)
        return {"keypoints": keypoints, "scores": scores, "heatmaps": heatmaps.transpose(0, 1)}

    def build_metrics(self) -> MetricCollection:
        return pose_metrics(self.joint_names, self.metric)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        update_pose_metrics(metrics, predictions, batch)
