"""VGG-16 and its dilated form, in which fc6 and fc7 are convolutions and the last pooling has no stride.

- Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, network D.
- Chen, Papandreou, Kokkinos, Murphy and Yuille, "Semantic Image Segmentation with Deep Convolutional Nets and Fully
  Connected CRFs", ICLR 2015, section 3.1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from lightning_modules.components.pretrained import find_weights, load_weights

#: Channels of the 3x3 convolutions; M is max pooling by 2.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16_plan(width_multiplier: float = 1.0) -> list[int | str]:
    """Return `VGG16` with scaled channels, for torchvision's ``make_layers``."""
    return [max(1, round(layer * width_multiplier)) if isinstance(layer, int) else layer for layer in VGG16]


def conv_relu(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    batch_norm: bool,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> list[nn.Module]:
    """Return a convolution, batch normalization if asked for, and a ReLU."""
    norm = [nn.BatchNorm2d(out_channels)] if batch_norm else []
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation)
    return [conv, *norm, nn.ReLU(inplace=True)]


def dilated_vgg16(width_multiplier: float = 1.0, batch_norm: bool = False) -> tuple[nn.Sequential, int]:
    """Build the layers of VGG-16 up to a dilated fc7, and count those up to conv4_3.

    Layers are numbered as in torchvision's VGG-16; fc6 and fc7 as in the authors' VGG-16 with reduced fc6 and fc7.

    Args:
        width_multiplier: scales all channels.
        batch_norm: add batch normalization to each convolution.

    Returns:
        The layers, which map (B, 3, H, W) to (B, 1024 * width_multiplier, H / 16, W / 16), and the number of layers up
        to conv4_3.
    """
    plan = vgg16_plan(width_multiplier)
    layers = list(make_layers(plan, batch_norm))
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    # Round up, so that the 75 cells of SSD300 become 38.
    layers[pools[2]] = nn.MaxPool2d(2, 2, ceil_mode=True)
    layers[pools[4]] = nn.MaxPool2d(3, 1, padding=1)
    conv5, fc7 = int(plan[-2]), max(1, round(1024 * width_multiplier))
    layers += conv_relu(conv5, fc7, 3, batch_norm, padding=6, dilation=6)
    layers += conv_relu(fc7, fc7, 1, batch_norm)
    return nn.Sequential(*layers), pools[3]


def load_dilated_vgg16(network: nn.Module, weights: str, *others: str) -> None:
    """Load ImageNet weights, or one of our checkpoints, into a network whose ``features`` are a `dilated_vgg16`.

    Args:
        network: the network to load into.
        weights: see `find_weights`.
        others: modules beside ``features`` that keep their values if the file does not contain them.
    """
    features = network.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    name = "vgg16_bn" if any(isinstance(layer, nn.BatchNorm2d) for layer in features) else "vgg16"
    fc6, fc7 = [i for i, layer in enumerate(features) if isinstance(layer, nn.Conv2d)][-2:]
    new = [f"features.{i}" for i in range(fc6, len(features))]
    path = find_weights(name, weights)
    load_weights(network, path, name, *others, *new, convert=lambda state: reduce_vgg16_weights(state, fc6, fc7))


def classifier_as_convolutions(state: dict[str, Tensor], subsample: bool = False) -> dict[str, Tensor]:
    """Return fc6 and fc7 of torchvision's VGG-16 as convolutions.

    Args:
        state: torchvision's weights by name.
        subsample: take every fourth unit, and every third position of fc6's 7x7 kernel (Chen et al. 2015).

    Returns:
        ``fc6.weight``, ``fc6.bias``, ``fc7.weight`` and ``fc7.bias``. Empty if the classifier is missing, or nan, as in
        torchvision's file of features alone.
    """
    if "classifier.0.weight" not in state or not state["classifier.0.weight"].isfinite().all():
        return {}
    fc6, fc7 = state["classifier.0.weight"].unflatten(1, (-1, 7, 7)), state["classifier.3.weight"][:, :, None, None]
    biases = state["classifier.0.bias"], state["classifier.3.bias"]
    if subsample:
        fc6, fc7 = fc6[::4, :, ::3, ::3], fc7[::4, ::4]
        biases = biases[0][::4], biases[1][::4]
    return {"fc6.weight": fc6, "fc6.bias": biases[0], "fc7.weight": fc7, "fc7.bias": biases[1]}


def reduce_vgg16_weights(state: dict[str, Tensor], fc6: int, fc7: int) -> dict[str, Tensor]:
    """Rename VGG-16 weights to those of a `dilated_vgg16`, with subsampled fc6 and fc7.

    Accept torchvision's names, or the authors' reduced VGG-16, whose keys are the layer numbers alone.

    Args:
        state: weights by name.
        fc6: index of fc6 in ``features``.
        fc7: index of fc7 in ``features``.
    """
    renamed = {f"features.{key}" if key[0].isdigit() else key: value for key, value in state.items()}
    renamed = {key: value for key, value in renamed.items() if not key.startswith("classifier.")}
    index = {"fc6": fc6, "fc7": fc7}
    for name, value in classifier_as_convolutions(state, subsample=True).items():
        layer, parameter = name.split(".")
        renamed[f"features.{index[layer]}.{parameter}"] = value
    return renamed
