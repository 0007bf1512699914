"""Stacked Hourglass: Newell, Yang and Deng, "Stacked Hourglass Networks for Human Pose Estimation", ECCV 2016.

A network that goes down to the whole person and up again to its pixels gives a heatmap a joint; the next one sees them
and corrects them, and each is told the truth. Constants are those of the authors' code (pose-hg-train).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.pose.keypoint_codec import decode, encode, mirror_partners, shown
from lightning_modules.pose.metrics import MPII_JOINTS, pose_metrics, update_pose_metrics

STRIDE = 4  # pixels a cell of the heatmaps

# --- network --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A bottleneck, normalized before each convolution. Where channels change, a plain convolution carries them over.

    Args:
        channels, out: in and out.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c, o, kernel in ((channels, out // 2, 1), (out // 2, out // 2, 3), (out // 2, out, 1)):
            layers += [nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, o, kernel, padding=kernel // 2)]
        self.layers = nn.Sequential(*layers)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.layers(x)


class Hourglass(nn.Module):
    """Half the size, and half again, then back by nearest neighbors, what each size has seen added: (B,C,h,w) to same.

    Args:
        depth: how often the size is halved.
        features: C.
    """

    def __init__(self, depth: int, features: int) -> None:
        super().__init__()
        self.across = Residual(features, features)
        self.down = Residual(features, features)
        self.inner = Hourglass(depth - 1, features) if depth > 1 else Residual(features, features)
        self.up = Residual(features, features)

    def forward(self, x: Tensor) -> Tensor:
        low = self.up(self.inner(self.down(F.max_pool2d(x, 2))))
        return self.across(x) + F.interpolate(low, scale_factor=2.0, mode="nearest")


class StackedHourglassNetwork(nn.Module):
    """Normalized images float (B,3,H,W) to heatmaps float32 (S,B,K,H/4,W/4), of each stack.

    With 16 joints and 256 features, 1 stack has 3,426,448 parameters, 2 have 6,570,400 and 8 have 25,434,112.

    Args:
        joints: K.
        stacks: S.
        features: channels of the hourglasses.
        depth: of each hourglass.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, joints: int = 16, stacks: int = 8, features: int = 256, depth: int = 4) -> None:
        super().__init__()
        for name, value in (("joints", joints), ("stacks", stacks), ("depth", depth)):
            if value < 1:
                raise UserError(f"{name}: expected 1 or more, found {value}")
        if features < 4 or features % 4:
            raise UserError(f"features: expected a multiple of 4, found {features}")
        self.side = STRIDE * 2**depth
        quarter, half = features // 4, features // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, quarter, 7, stride=2, padding=3),
            nn.BatchNorm2d(quarter),
            nn.ReLU(inplace=True),
            Residual(quarter, half),
            nn.MaxPool2d(2),
            Residual(half, half),
            Residual(half, features),
        )
        self.hourglasses = nn.ModuleList(Hourglass(depth, features) for _ in range(stacks))
        self.lines = nn.ModuleList(
            nn.Sequential(
                Residual(features, features),
                nn.Conv2d(features, features, 1),
                nn.BatchNorm2d(features),
                nn.ReLU(inplace=True),
            )
            for _ in range(stacks)
        )
        self.heatmaps = nn.ModuleList(nn.Conv2d(features, joints, 1) for _ in range(stacks))
        # What the next stack gets to see of this one's features and of its heatmaps.
        self.merge_features = nn.ModuleList(nn.Conv2d(features, features, 1) for _ in range(stacks - 1))
        self.merge_heatmaps = nn.ModuleList(nn.Conv2d(joints, features, 1) for _ in range(stacks - 1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % self.side or width % self.side:
            raise UserError(
                f"image: expected sides that {self.side} divides (stride {STRIDE}, then halved again and again), found "
                f"{height}x{width}: choose --data.image_size, or a smaller --model.depth"
            )
        x = self.stem(x)
        found = []
        for i, (hourglass, line, heatmap) in enumerate(zip(self.hourglasses, self.lines, self.heatmaps, strict=True)):
            features = line(hourglass(x))
            # In bfloat16 neighboring cells about a peak would often be equal.
            with torch.autocast(features.device.type, enabled=False):
                found.append(heatmap(features.float()))
            if i + 1 < len(self.hourglasses):
                x = x + self.merge_features[i](features) + self.merge_heatmaps[i](found[-1])
        return torch.stack(found)


# --- loss -----------------------------------------------------------------------------------------------------------


def heatmap_losses(found: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """The mean squared difference of each stack's heatmaps: float32 (S,); 0 where none counts.

    Args:
        found: float (S,B,K,h,w).
        target: float (B,K,h,w).
        counted: bool (B,K), the heatmaps that count.
    """
    squares = (found.float() - target).square().mean((3, 4))
    return (squares * counted).sum((1, 2)) / counted.sum().clamp(min=1)


# --- module ---------------------------------------------------------------------------------------------------------


class StackedHourglass(VisionModule):
    """Stacked Hourglass. Batch: see pose in the batch contract.

    Predictions: ``keypoints`` float32 (B,K,2) in the pixels of the image given, ``scores`` float32 (B,K), the heights
    of the last stack's peaks, about 1 where it is sure; and ``heatmaps`` float32 (B,S,K,h,w) of every stack.

    Metrics: see `pose_metrics`, in the pixels of the images on disk.

    Args:
        joint_names: K names; ``train.py`` takes them from the data. MPII's 16 by default.
        stacks, features, depth: see `StackedHourglassNetwork`; the images' sides must be multiples of 4 * 2^depth.
        metric: ``pckh`` for MPII, ``pck`` for LSP.
        sigma: of the Gaussians, in cells of 4 pixels: 1.75 in the authors' code, 1 in the paper.
        missing: joints that are not labeled, or not inside of the crop, are trained towards an empty heatmap
            (``empty``, the authors' code) or do not count (``ignore``).
        flip_test: average the heatmaps with those of the mirrored image.
        optimizer: see `VisionModule`; the authors'.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.

    Raises:
        ValueError: an argument is out of its range.
    """

    monitor = ("val/pckh/total", "max")

    def __init__(
        self,
        joint_names: list[str] | None = None,
        stacks: int = 8,
        features: int = 256,
        depth: int = 4,
        metric: Literal["pckh", "pck"] = "pckh",
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
        self.metric, self.sigma, self.missing, self.flip_test = metric, sigma, missing, flip_test
        self.monitor = (f"val/{metric}/total", "max")
        self.partners = mirror_partners(self.joint_names)
        self.network = StackedHourglassNetwork(len(self.joint_names), stacks, features, depth)

    def heatmaps(self, images: Tensor | list[Tensor]) -> Tensor:
        """Of uint8 (B,3,H,W): float32 (S,B,K,H/4,W/4)."""
        if not isinstance(images, Tensor):
            raise UserError("image: expected crops of one person each, found whole images: --data.crop person")
        return self.network(self.preprocess(images))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        found = self.heatmaps(batch["image"])
        size = (found.shape[3], found.shape[4])
        target = encode(batch["keypoints"], batch["labeled"], size, STRIDE, self.sigma)
        inside = shown(batch["keypoints"], batch["labeled"], size, STRIDE)
        counted = inside if self.missing == "ignore" else torch.ones_like(inside)
        stacks = heatmap_losses(found, target, counted)
        return {f"stack_{i + 1}": loss for i, loss in enumerate(stacks)}

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        heatmaps = self.heatmaps(images)
        if self.flip_test:
            assert isinstance(images, Tensor)
            mirrored = self.heatmaps(images.flip(3)).flip(4)[:, :, self.partners]
            heatmaps = (heatmaps + mirrored) / 2
        keypoints, scores = decode(heatmaps[-1], STRIDE)
        return {"keypoints": keypoints, "scores": scores, "heatmaps": heatmaps.transpose(0, 1)}

    def build_metrics(self) -> MetricCollection:
        return pose_metrics(self.joint_names, self.metric)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        update_pose_metrics(metrics, predictions, batch)
