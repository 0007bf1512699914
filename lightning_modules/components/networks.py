"""Image classification networks by name: torchvision's, the AlexNet of 2012 and the CIFAR ResNets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torchvision
from torch import nn

from errors import UserError
from lightning_modules.base import IMAGENET_MEAN, IMAGENET_STD
from lightning_modules.components.alexnet import AlexNet2012
from lightning_modules.components.resnet_cifar import ResNetCifar

NetworkName = Literal[
    "alexnet", "alexnet_2012", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "googlenet", "inception_v3",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "resnet110_cifar",
]  # fmt: skip

AUX_HEADS = ("aux1", "aux2", "AuxLogits")  # modules of GoogLeNet and Inception-v3


class NetworkConfig(NamedTuple):
    """Properties of a network; the defaults are those of the ImageNet ResNets."""

    head: str = "fc"  # module name of the last layer
    input_size: int = 224  # pixels
    mean: Sequence[float] = IMAGENET_MEAN  # of pixels in 0..1
    std: Sequence[float] = IMAGENET_STD
    aux_loss_weight: float = 0.0


def network_config(backbone: str) -> NetworkConfig:
    """Return the properties of a network."""
    if backbone.endswith("_cifar"):
        return NetworkConfig(input_size=32)
    if backbone == "alexnet" or backbone.startswith("vgg"):
        return NetworkConfig(head="classifier.6")
    if backbone == "alexnet_2012":  # only the mean is subtracted; pixels stay on a scale of 0..255
        return NetworkConfig(head="fc8", input_size=227, std=(1 / 255,) * 3)
    # The authors' Inception weights expect pixels in -1..1. Torchvision's `transform_input` undoes ImageNet's
    # normalization for that; here the images are normalized once.
    half = (0.5,) * 3
    if backbone == "googlenet":
        return NetworkConfig(mean=half, std=half, aux_loss_weight=0.3)
    if backbone == "inception_v3":
        return NetworkConfig(input_size=299, mean=half, std=half, aux_loss_weight=0.4)
    return NetworkConfig()


def build_network(
    backbone: NetworkName,
    num_classes: int,
    base_channels: int = 16,
    dropout: float | None = None,
    aux_logits: bool = False,
) -> nn.Module:
    """Build a network with new weights; it maps normalized images, float (N, 3, H, W), to logits (N, C).

    Args:
        backbone: name of the network.
        num_classes: outputs of the last layer, C.
        base_channels: channels of the first stage of a CIFAR ResNet.
        dropout: dropout before the last layers; None for torchvision's (AlexNet, VGG, Inception 0.5, GoogLeNet 0.2).
        aux_logits: add the auxiliary heads of GoogLeNet and Inception-v3; in training they return logits, too.
    """
    options: dict[str, Any] = {} if dropout is None else {"dropout": dropout}
    if options and backbone.startswith("resnet"):
        raise UserError(f"dropout: expected null for {backbone}, which has no dropout, found {dropout}")
    if base_channels != 16 and not backbone.endswith("_cifar"):
        raise UserError(f"base_channels: expected 16 for {backbone} (only CIFAR ResNets vary), found {base_channels}")
    if backbone == "alexnet_2012":
        return AlexNet2012(num_classes, **options)
    if backbone.endswith("_cifar"):
        return ResNetCifar(int(backbone[len("resnet") : -len("_cifar")]), num_classes, base_channels)
    if backbone in ("googlenet", "inception_v3"):
        # Torchvision's truncated normals take seconds, and batch normalization cancels the scale of the weights.
        options |= {"aux_logits": aux_logits, "init_weights": False, "transform_input": False}
    return torchvision.models.get_model(backbone, weights=None, num_classes=num_classes, **options)
