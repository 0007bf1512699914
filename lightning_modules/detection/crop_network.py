"""Crops of one size for R-CNN, and the classification networks that process one crop at a time.

- AlexNet as published by torchvision (Krizhevsky, "One Weird Trick for Parallelizing Convolutional Neural Networks",
  2014), for which weights exist. The paper uses the network of 2012, which is about as large.
- VGG16 (Simonyan and Zisserman, ICLR 2015); the authors' code reaches 66.0 mAP with it on VOC2007.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import make_layers
from torchvision.ops import roi_align

from lightning_modules.components.initialization import he_normal
from lightning_modules.components.vgg import conv_relu, vgg16_plan

CropBackbone = Literal["alexnet", "vgg16", "small"]

# --- crops ------------------------------------------------------------------------------------------------------------


def warp_crops(images: Tensor, boxes: Tensor, crop_size: int, context: float) -> Tensor:
    """Crop boxes with context and warp them to squares: float32 (B * n, 3, crop_size, crop_size).

    Pixels outside of the image are 0, the mean color. Each pixel averages four bilinear samples. Caffe takes one, which
    aliases where boxes are larger than crops; averaging all pixels would take ten times as long.

    Args:
        images: normalized, float (B, 3, H, W).
        boxes: float (B, n, 4), xyxy in pixels.
        crop_size: side of the crops in pixels; the paper's is 227.
        context: pixels of the crop around the box on each side; the paper's is 16.
    """
    center, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    half = half * (crop_size / (crop_size - 2 * context))
    rois = torch.cat([center - half, center + half], 2)
    return roi_align(images.float().contiguous(), list(rois), crop_size, sampling_ratio=2, aligned=True)


# --- network ----------------------------------------------------------------------------------------------------------

#: Convolutions (channels, kernel, stride, padding) and max poolings (kernel, stride).
LAYERS: dict[str, Sequence[tuple[int, ...]]] = {
    "alexnet": ((64, 11, 4, 2), (3, 2), (192, 5, 1, 2), (3, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), (3, 2)),
    "small": ((32, 3, 1, 1), (2, 2), (64, 3, 1, 1), (2, 2), (128, 3, 1, 1), (2, 2)),
}
#: Side of pool5, and units of fc6 and fc7.
SIZES = {"alexnet": (6, 4096), "vgg16": (7, 4096), "small": (4, 256)}
#: Indices of fc6 and fc7 in torchvision's classifiers.
FULLY_CONNECTED = {"alexnet": ("1", "4"), "vgg16": ("0", "3")}


def build_features(backbone: CropBackbone, width_multiplier: float) -> nn.Sequential:
    """Build the convolutions and poolings up to pool5."""
    if backbone == "vgg16":
        return make_layers(vgg16_plan(width_multiplier), batch_norm=False)
    modules: list[nn.Module] = []
    channels = 3
    for layer in LAYERS[backbone]:
        if len(layer) == 2:
            modules.append(nn.MaxPool2d(*layer))
            continue
        out = max(1, round(layer[0] * width_multiplier))
        _, kernel, stride, padding = layer
        modules += conv_relu(channels, out, kernel, backbone == "small", stride, padding)
        channels = out
    return nn.Sequential(*modules)


class CropNetwork(nn.Module):
    """Classification network: convolutions up to pool5, fully connected fc6 and fc7, classifier of 1 + C classes.

    Args:
        backbone: ``alexnet`` or ``vgg16``, as in the paper, or ``small``: three convolutions with batch normalization
            for crops of 32 pixels, which can be trained from scratch.
        num_classes: number of classes without the background, C.
        width_multiplier: factor on all channels and units.
    """

    def __init__(self, backbone: CropBackbone, num_classes: int, width_multiplier: float = 1.0) -> None:
        super().__init__()
        self.side, units = SIZES[backbone]
        self.features = build_features(backbone, width_multiplier)
        channels = [layer.out_channels for layer in self.features if isinstance(layer, nn.Conv2d)][-1]
        self.pool5_size, self.fc7_size = channels * self.side**2, max(1, round(units * width_multiplier))
        self.fc6 = nn.Linear(self.pool5_size, self.fc7_size)
        self.fc7 = nn.Linear(self.fc7_size, self.fc7_size)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(self.fc7_size, 1 + num_classes)
        he_normal(self)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map normalized crops (N, 3, S, S) to pool5 (N, pool5_size) and fc7 (N, fc7_size)."""
        pool5 = F.adaptive_avg_pool2d(self.features(x), self.side).flatten(1)
        return pool5, self.dropout(F.relu(self.fc7(self.dropout(F.relu(self.fc6(pool5))))))


def rename_crop_weights(state: dict[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """Rename torchvision's weights to those of `CropNetwork`; our own keep their names, without the linear models.

    Args:
        state: weights by name.
        backbone: see `CropNetwork`.
    """
    renamed = {f"classifier.{n}": f"fc{6 + i}" for i, n in enumerate(FULLY_CONNECTED.get(backbone, ()))}
    parts = {key: key.rpartition(".") for key in state if not key.startswith(("svm.", "box_regressor."))}
    return {f"{renamed.get(module, module)}.{name}": state[key] for key, (module, _, name) in parts.items()}
