"""VGG16 as SSD takes it: fc6 and fc7 as convolutions, the last pooling without a stride, and weights from ImageNet.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, network D;
Chen, Papandreou, Kokkinos, Murphy and Yuille, "Semantic Image Segmentation with Deep Convolutional Nets and Fully
Connected CRFs", ICLR 2015, section 3.1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from lightning_modules.components.pretrained import find_weights, load_weights

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def convolution(
    into: int, out: int, kernel: int, norm: bool, stride: int = 1, padding: int = 0, dilation: int = 1
) -> list[nn.Module]:
    """Convolution, batch normalization if asked for, ReLU."""
    norms = [nn.BatchNorm2d(out)] if norm else []
    return [nn.Conv2d(into, out, kernel, stride, padding, dilation), *norms, nn.ReLU(inplace=True)]


def dilated_vgg16(width: float = 1.0, batch_norm: bool = False) -> tuple[nn.Sequential, int]:
    """The layers, float (B,3,H,W) to fc7 (B,1024*width,H/16,W/16), and the number of those up to conv4_3.

    Layers are numbered as in torchvision's VGG16, and fc6 and fc7 as in the authors' VGG16 with both reduced.

    Args:
        width: multiplies all channels.
        batch_norm: after each convolution.
    """
    channels = [max(1, round(layer * width)) if isinstance(layer, int) else layer for layer in VGG16]
    layers = list(make_layers(channels, batch_norm))
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    # SSD300's 75 cells become 38.
    layers[pools[2]] = nn.MaxPool2d(2, 2, ceil_mode=True)
    layers[pools[4]] = nn.MaxPool2d(3, 1, padding=1)
    conv5, fc7 = max(1, round(512 * width)), max(1, round(1024 * width))
    layers += convolution(conv5, fc7, 3, batch_norm, padding=6, dilation=6)
    layers += convolution(fc7, fc7, 1, batch_norm)
    return nn.Sequential(*layers), pools[3]


def load_vgg16(network: nn.Module, weights: str, *others: str) -> None:
    """Loads ImageNet's weights, or a checkpoint of ours, into a network whose ``features`` are a `dilated_vgg16`.

    Args:
        network: what is loaded into.
        weights: see `find_weights`.
        others: modules of the network beside the features, which keep what they have where the file has nothing.
    """
    features = network.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    name = "vgg16_bn" if any(isinstance(layer, nn.BatchNorm2d) for layer in features) else "vgg16"
    fc6, fc7 = [i for i, layer in enumerate(features) if isinstance(layer, nn.Conv2d)][-2:]
    new = [f"features.{i}" for i in range(fc6, len(features))]
    path = find_weights(name, weights)
    load_weights(network, path, name, *others, *new, convert=lambda state: from_vgg16(state, fc6, fc7))


def from_vgg16(state: dict[str, Tensor], fc6: int, fc7: int) -> dict[str, Tensor]:
    """Names the weights of a VGG16 as ours: torchvision's, or the authors' reduced one, which has numbers alone.

    Of a whole VGG16, fc6 and fc7 become convolutions: every fourth unit, and every third place of 7x7. In torchvision's
    file of features alone they are no numbers; then both begin anew.

    Args:
        state: name to tensor.
        fc6, fc7: places of the convolutions in ``features``.
    """
    state = {f"features.{key}" if key[0].isdigit() else key: value for key, value in state.items()}
    classifier = {key: state.pop(key) for key in list(state) if key.startswith("classifier.")}
    if classifier and classifier["classifier.0.weight"].isfinite().all():
        state[f"features.{fc6}.weight"] = classifier["classifier.0.weight"].view(4096, 512, 7, 7)[::4, :, ::3, ::3]
        state[f"features.{fc6}.bias"] = classifier["classifier.0.bias"][::4]
        state[f"features.{fc7}.weight"] = classifier["classifier.3.weight"][::4, ::4, None, None]
        state[f"features.{fc7}.bias"] = classifier["classifier.3.bias"][::4]
    return state
