"""What R-CNN shows its proposals to: crops of one size, and classification networks that see one crop at a time.

AlexNet as torchvision has it (Krizhevsky 2014, "one weird trick"), of which there are weights; the paper's is that of
2012, of about the same size. VGG16 (Simonyan and Zisserman 2015), with which the authors' code came to 66.0 on VOC2007.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

Backbone = Literal["alexnet", "vgg16", "small"]

# --- crops ------------------------------------------------------------------------------------------------------------


def warp(images: Tensor, boxes: Tensor, side: int, context: float) -> Tensor:
    """What boxes show, with what is around them, warped to a square: float32 (B*n,3,side,side).

    A box is enlarged about its center so that ``context`` pixels of the square lie around it on each side. Outside of
    the image is 0, the mean color. Each pixel is the mean of four that are interpolated; Caffe takes one, which
    is coarse where crops are smaller than boxes; as many as there are pixels would take ten times as long.

    Args:
        images: normalized float (B,3,H,W).
        boxes: float (B,n,4) xyxy in pixels.
        side, context: the paper's 227 and 16.
    """
    center, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    half = half * (side / (side - 2 * context))
    number = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None]
    rois = torch.cat([number.expand(-1, boxes.shape[1], 1), center - half, center + half], 2).flatten(0, 1)
    return roi_align(images.float().contiguous(), rois, side, sampling_ratio=2, aligned=True)


# --- network ----------------------------------------------------------------------------------------------------------

# (channels, kernel, stride, padding) of convolutions, (kernel, stride) of pooling; the side of the map that pool5 is;
# units of fc6 and fc7. AlexNet is torchvision's, of which there are weights.
P2, P3 = (2, 2), (3, 2)
_VGG = [[(c, 3, 1, 1)] * n + [P2] for c, n in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))]
LAYERS: dict[str, tuple[Sequence[tuple[int, ...]], int, int]] = {
    "alexnet": (
        ((64, 11, 4, 2), P3, (192, 5, 1, 2), P3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), P3),
        6,
        4096,
    ),
    "vgg16": ([layer for block in _VGG for layer in block], 7, 4096),
    "small": (((32, 3, 1, 1), P2, (64, 3, 1, 1), P2, (128, 3, 1, 1), P2), 4, 256),
}
# Where torchvision's classifiers have fc6 and fc7.
FULLY_CONNECTED = {"alexnet": ("1", "4"), "vgg16": ("0", "3")}


class CropNetwork(nn.Module):
    """What sees a crop: convolutions up to pool5, the fully connected fc6 and fc7, and a classifier of 1+C classes.

    Args:
        backbone: ``alexnet`` and ``vgg16`` are the paper's; ``small``, three convolutions with batch normalization,
            sees crops of 32 pixels and learns from scratch.
        num_classes: C.
        width: multiplies all channels and units.
    """

    def __init__(self, backbone: Backbone, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        layers, self.side, units = LAYERS[backbone]
        modules: list[nn.Module] = []
        channels = 3
        for layer in layers:
            if len(layer) == 2:
                modules.append(nn.MaxPool2d(*layer))
                continue
            out = max(1, round(layer[0] * width))
            _, kernel, stride, padding = layer
            modules.append(nn.Conv2d(channels, out, kernel, stride, padding))
            modules += [nn.BatchNorm2d(out)] if backbone == "small" else []
            modules.append(nn.ReLU(inplace=True))
            channels = out
        self.features = nn.Sequential(*modules)
        self.pool5_size, self.fc7_size = channels * self.side**2, max(1, round(units * width))
        self.fc6 = nn.Linear(self.pool5_size, self.fc7_size)
        self.fc7 = nn.Linear(self.fc7_size, self.fc7_size)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(self.fc7_size, 1 + num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized crops float (N,3,S,S) to what pool5 and fc7 say, float (N,pool5_size) and (N,fc7_size)."""
        pool5 = F.adaptive_avg_pool2d(self.features(x), self.side).flatten(1)
        return pool5, self.dropout(F.relu(self.fc7(self.dropout(F.relu(self.fc6(pool5))))))


def from_imagenet(state: dict[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """Names torchvision's weights of a classifier as ours; those that are ours keep their names, machines are left out.

    Args:
        state: name to tensor.
        backbone: see `CropNetwork`.
    """
    ours = {f"classifier.{n}": f"fc{6 + i}" for i, n in enumerate(FULLY_CONNECTED.get(backbone, ()))}
    parts = {key: key.rpartition(".") for key in state if not key.startswith(("svm.", "box."))}
    return {f"{ours.get(module, module)}.{name}": state[key] for key, (module, _, name) in parts.items()}
