"""Backbones of the R-CNN family: a trunk, which computes feature maps, and a head, which processes pooled RoIs.

- VGG-16 (Simonyan and Zisserman 2015): all convolutions, and fc6 and fc7.
- ResNet (He et al. 2016, appendix A): conv1 to conv4, and conv5.
- ResNet with a feature pyramid (Lin et al. 2017): the pyramid, and two fully connected layers.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, NamedTuple

import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.vgg import make_layers
from torchvision.ops import FrozenBatchNorm2d

from errors import UserError
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.vgg import vgg16_plan

Backbone = Literal["vgg16", "resnet50", "resnet101", "resnet50_fpn", "resnet101_fpn"]

# --- trunk ----------------------------------------------------------------------------------------------------------


class Trunk(NamedTuple):
    """The layers before RoI pooling.

    Attributes:
        layers: map normalized images (B, 3, H, W) to a feature map, or to a dict of feature maps, largest first.
        channels: channels of each feature map.
        strides: stride of each feature map in pixels.
    """

    layers: nn.Module
    channels: int
    strides: tuple[int, ...]


def make_trunk(
    backbone: Backbone,
    width_multiplier: float = 1.0,
    batch_norm: bool = False,
    freeze_backbone: bool = False,
    stride: Literal[8, 16] = 16,
) -> Trunk:
    """Build a trunk with random weights.

    Args:
        backbone: name of the network.
        width_multiplier: scales all channels of VGG-16 and of the pyramid, and those of a ResNet's 3x3 convolutions.
        batch_norm: add batch normalization to each convolution of VGG-16. A ResNet always has it.
        freeze_backbone: freeze the first two blocks, with the statistics of their batch normalization; in a ResNet
            those of all blocks.
        stride: stride of VGG-16; 8 removes its fourth pooling, for small objects.
    """
    if stride != 16 and backbone != "vgg16":
        raise UserError(
            f"stride: expected 16 for backbone {backbone}, found {stride}; use backbone vgg16 or a feature pyramid"
        )
    if batch_norm and backbone != "vgg16":
        raise UserError(f"batch_norm: expected false for backbone {backbone}, which always has it, found true")
    if backbone == "vgg16":
        plan = vgg16_plan(width_multiplier)
        layers = make_layers(plan, batch_norm)[:-1]
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        if stride == 8:
            layers[pools[3]] = nn.Identity()  # removing it would renumber the layers, which name the weights
        he_normal(layers)
        layers[: pools[1]].requires_grad_(not freeze_backbone)
        for i in range(pools[1]):
            norm = layers[i]
            if freeze_backbone and isinstance(norm, nn.BatchNorm2d):
                layers[i] = FrozenBatchNorm2d(norm.num_features, norm.eps)
        return Trunk(layers, int(plan[-2]), (stride,))
    resnet = _resnet(backbone, width_multiplier, freeze_backbone)
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    for name in ("conv1", "bn1", "layer1"):
        resnet.get_submodule(name).requires_grad_(not freeze_backbone)
    if backbone.endswith("_fpn"):
        channels = max(1, round(256 * width_multiplier))
        returned = {f"layer{i + 1}": str(i) for i in range(4)}
        pyramid = BackboneWithFPN(resnet, returned, [256, 512, 1024, 2048], channels)
        return Trunk(pyramid, channels, (4, 8, 16, 32, 64))
    return Trunk(nn.Sequential(OrderedDict((name, resnet.get_submodule(name)) for name in names)), 1024, (16,))


def _resnet(backbone: str, width_multiplier: float, freeze_backbone: bool) -> nn.Module:
    norm: type[nn.Module] = FrozenBatchNorm2d if freeze_backbone else nn.BatchNorm2d
    width = max(1, round(64 * width_multiplier))
    name = backbone.removesuffix("_fpn")
    return torchvision.models.get_model(name, weights=None, norm_layer=norm, width_per_group=width)


# --- head -----------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """The layers after RoI pooling.

    Attributes:
        layers: map pooled features (K, C, pool_size, pool_size) to (K, features).
        features: number of output features.
        pool_size: side of the pooled features in cells.
    """

    layers: nn.Module
    features: int
    pool_size: int


def make_head(
    backbone: Backbone, in_channels: int, width_multiplier: float = 1.0, freeze_backbone: bool = False
) -> Head:
    """Build a head with random weights.

    Args:
        backbone: see `make_trunk`.
        in_channels: channels of the feature maps.
        width_multiplier: see `make_trunk`; also scales the fully connected layers.
        freeze_backbone: see `make_trunk`.
    """
    if backbone.endswith("_fpn"):
        features = max(1, round(1024 * width_multiplier))
        return Head(TwoMLPHead(in_channels * 49, features), features, 7)
    if backbone != "vgg16":
        layer4 = _resnet(backbone, width_multiplier, freeze_backbone).get_submodule("layer4")
        return Head(
            nn.Sequential(OrderedDict(layer4=layer4, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())), 2048, 14
        )
    features = max(1, round(4096 * width_multiplier))
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    for name, in_features in (("6", in_channels * 49), ("7", features)):
        layers[f"fc{name}"] = nn.Linear(in_features, features)
        he_normal(layers[f"fc{name}"])
        layers[f"relu{name}"], layers[f"drop{name}"] = nn.ReLU(inplace=True), nn.Dropout()
    return Head(nn.Sequential(layers), features, 7)


def feature_maps(output: Tensor | dict[str, Tensor]) -> list[Tensor]:
    """Return the output of a trunk as a list of float32 feature maps (B, C, h, w), one per stride."""
    return [m.float() for m in (output.values() if isinstance(output, dict) else [output])]
