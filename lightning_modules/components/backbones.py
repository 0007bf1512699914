"""What the R-CNN family looks at images with: layers before the regions are cut out, and layers after.

VGG16 (Simonyan and Zisserman 2015): all convolutions before, fc6 and fc7 after. ResNet (He et al. 2016, appendix A):
conv1 to conv4 before, conv5 after. ResNet with a feature pyramid (Lin et al. 2017): the pyramid before, two fully
connected layers after.
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
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.vgg import vgg16_plan

Backbone = Literal["vgg16", "resnet50", "resnet101", "resnet50_fpn", "resnet101_fpn"]

# --- before the regions ---------------------------------------------------------------------------------------------


class Trunk(NamedTuple):
    """The layers before the regions.

    Attributes:
        layers: normalized images float (B,3,H,W) to a map, or to a dict of maps by falling size.
        channels: of each map.
        strides: pixels from one cell of each map to the next.
    """

    layers: nn.Module
    channels: int
    strides: tuple[int, ...]


def make_trunk(
    backbone: Backbone, width: float = 1.0, batch_norm: bool = False, frozen: bool = False, stride: Literal[8, 16] = 16
) -> Trunk:
    """The layers, with random weights.

    Args:
        backbone: see above.
        width: multiplies the channels: VGG16's and the pyramid's all, a ResNet's of the 3x3 convolutions.
        batch_norm: after each convolution of VGG16.
        frozen: what the authors do with pretrained weights: the first two blocks do not learn, nor does a ResNet's
            batch normalization.
        stride: of VGG16; 8 leaves out the last pooling but one, for small objects.
    """
    if stride != 16 and backbone != "vgg16":
        raise UserError(f"stride: expected 16 for {backbone}, found {stride}: take vgg16, or a feature pyramid")
    if backbone == "vgg16":
        plan = vgg16_plan(width)
        layers = make_layers(plan, batch_norm)[:-1]
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        if stride == 8:
            layers[pools[3]] = nn.Identity()  # the others keep their numbers, which name the weights
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        layers[: pools[1]].requires_grad_(not frozen)
        return Trunk(layers, int(plan[-2]), (stride,))
    resnet = _resnet(backbone, width, frozen)
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    for name in ("conv1", "bn1", "layer1"):
        resnet.get_submodule(name).requires_grad_(not frozen)
    if backbone.endswith("_fpn"):
        channels = max(1, round(256 * width))
        parts = {f"layer{i + 1}": str(i) for i in range(4)}
        pyramid = BackboneWithFPN(resnet, parts, [256, 512, 1024, 2048], channels)
        return Trunk(pyramid, channels, (4, 8, 16, 32, 64))
    return Trunk(nn.Sequential(OrderedDict((name, resnet.get_submodule(name)) for name in names)), 1024, (16,))


def _resnet(backbone: str, width: float, frozen: bool) -> nn.Module:
    norm: type[nn.Module] = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    name = backbone.removesuffix("_fpn")
    narrow = max(1, round(64 * width))
    return torchvision.models.get_model(name, weights=None, norm_layer=norm, width_per_group=narrow)


def maps_of(output: Tensor | dict[str, Tensor]) -> list[Tensor]:
    """What a trunk's layers give, as a list of maps (B,C,h,w) in single precision, one a stride."""
    return [m.float() for m in (output.values() if isinstance(output, dict) else [output])]


# --- after the regions ----------------------------------------------------------------------------------------------


def make_head(
    backbone: Backbone, channels: int, width: float = 1.0, frozen: bool = False
) -> tuple[nn.Module, int, int]:
    """The layers, float (K,C,s,s) to (K,D), with random weights; D; and the side s that regions are pooled to.

    Args:
        backbone, width, frozen: as in `make_trunk`.
        channels: C, of the maps.
    """
    if backbone.endswith("_fpn"):
        out = max(1, round(1024 * width))
        return TwoMLPHead(channels * 49, out), out, 7
    if backbone != "vgg16":
        conv5 = _resnet(backbone, width, frozen).get_submodule("layer4")
        mean = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return nn.Sequential(OrderedDict({"layer4": conv5, **mean})), 2048, 14
    out = max(1, round(4096 * width))
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    for name, into in (("6", channels * 49), ("7", out)):
        layers[f"fc{name}"] = nn.Linear(into, out)
        nn.init.kaiming_normal_(layers[f"fc{name}"].weight, nonlinearity="relu")  # type: ignore[arg-type]
        nn.init.zeros_(layers[f"fc{name}"].bias)  # type: ignore[arg-type]
        layers[f"relu{name}"], layers[f"drop{name}"] = nn.ReLU(inplace=True), nn.Dropout()
    return nn.Sequential(layers), out, 7


# --- pretrained weights ---------------------------------------------------------------------------------------------


def load_backbone(network: nn.Module, backbone: Backbone, batch_norm: bool, weights: str) -> None:
    """Loads ImageNet's weights, or a checkpoint of ours, into ``trunk`` and ``roi.head`` of a network.

    Args:
        network: its other modules keep what they have where the file has nothing.
        backbone, batch_norm: see `make_trunk`.
        weights: see `find_weights`.
    """
    name = backbone.removesuffix("_fpn") + ("_bn" if backbone == "vgg16" and batch_norm else "")
    path = find_weights(name, weights)
    others = ("rpn", "roi", "trunk.fpn")
    load_weights(network, path, name, *others, convert=lambda state: from_imagenet(state, backbone))


def from_imagenet(state: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Names torchvision's weights of a classifier as ours; those that are ours keep their names.

    Args:
        state: name to tensor.
        backbone: see `make_trunk`.
    """
    if any(key.startswith("trunk.") for key in state):
        return state
    if backbone == "vgg16":
        places = {"features": "trunk", "classifier.0": "roi.head.fc6", "classifier.3": "roi.head.fc7"}
    else:
        pyramid = backbone.endswith("_fpn")
        places = {name: f"trunk.body.{name}" if pyramid else f"trunk.{name}" for name in ("conv1", "bn1")}
        places |= {f"layer{i}": f"trunk.body.layer{i}" if pyramid else f"trunk.layer{i}" for i in range(1, 5)}
        places |= {} if pyramid else {"layer4": "roi.head.layer4"}
    renamed = {}
    for key, value in state.items():
        ours = next((f"{new}{key[len(old) :]}" for old, new in places.items() if key.startswith(f"{old}.")), None)
        # Frozen batch normalization counts no batches; torchvision's file of VGG16's features has no numbers for fc6
        # and fc7; the classifier proper is nobody's.
        if ours is not None and not key.endswith("num_batches_tracked") and value.isfinite().all():
            renamed[ours] = value
    return renamed
