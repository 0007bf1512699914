"""Image classification networks by name."""

from __future__ import annotations

from typing import Any, Literal

import torchvision
from torch import nn

from errors import UserError
from lightning_modules.base import IMAGENET_MEAN, IMAGENET_STD
from lightning_modules.components.alexnet import AlexNet2012
from lightning_modules.components.resnet_cifar import ResNetCifar

Network = Literal[
    "alexnet", "alexnet_2012", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "googlenet", "inception_v3",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "resnet110_cifar",
]  # fmt: skip


# Where a network is not like the ResNets, with a last layer "fc", 224 pixels, ImageNet's mean and deviation. The 2012
# AlexNet subtracts the mean on a scale of 0..255. The authors' Inception weights take pixels on -1..1, to which
# torchvision brings them by `transform_input`, undoing ImageNet's normalization; here they are normalized once.
TRAITS: dict[str, dict[str, Any]] = {
    "alexnet": {"head": "classifier.6"},
    "alexnet_2012": {"head": "fc8", "input_size": 227, "std": (1 / 255,) * 3},
    "vgg": {"head": "classifier.6"},
    "googlenet": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "aux_weight": 0.3},
    "inception_v3": {"input_size": 299, "mean": (0.5,) * 3, "std": (0.5,) * 3, "aux_weight": 0.4},
    "_cifar": {"input_size": 32},
}


AUXILIARY = ("aux1", "aux2", "AuxLogits")


def traits(network: str) -> dict[str, Any]:
    """Last layer's name, input size, mean, std and auxiliary weight of a network."""
    common = {"head": "fc", "input_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "aux_weight": 0.0}
    family = "_cifar" if network.endswith("_cifar") else "vgg" if network.startswith("vgg") else network
    return common | TRAITS.get(family, {})


def build_network(
    network: Network, num_classes: int, width: int = 16, dropout: float | None = None, auxiliary: bool = False
) -> nn.Module:
    """A new network: normalized images float (N,3,H,W) to logits (N,C), in training with GoogLeNet's auxiliary logits.

    Args:
        network: its name.
        num_classes: outputs of the last layer.
        width: first channels of a CIFAR ResNet.
        dropout: before the last layers; None takes torchvision's (AlexNet, VGG, Inception 0.5, GoogLeNet 0.2).
        auxiliary: with the auxiliary heads of GoogLeNet and Inception-v3.
    """
    options: dict[str, Any] = {} if dropout is None else {"dropout": dropout}
    if options and network.startswith("resnet"):
        raise UserError(f"dropout: {network} has none, found {dropout}: leave it out")
    if width != 16 and not network.endswith("_cifar"):
        raise UserError(f"width: only the CIFAR ResNets have one, found {width} for {network}: leave it out")
    if network == "alexnet_2012":
        return AlexNet2012(num_classes, **options)
    if network.endswith("_cifar"):
        return ResNetCifar(int(network[len("resnet") : -len("_cifar")]), num_classes, width)
    if network in ("googlenet", "inception_v3"):
        # Torchvision's truncated normals take seconds; behind batch normalization the scale of the weights cancels.
        options |= {"aux_logits": auxiliary, "init_weights": False, "transform_input": False}
    return torchvision.models.get_model(network, weights=None, num_classes=num_classes, **options)
