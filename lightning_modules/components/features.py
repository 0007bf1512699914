"""What VGG and AlexNet see in an image, by the names that papers give it: relu1_1, pool4, fc6 and so on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from errors import UserError
from lightning_modules.base import IMAGENET_MEAN, IMAGENET_STD
from lightning_modules.components.pretrained import find_weights, load_weights

FeatureNetwork = Literal["vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "alexnet"]
RANDOM = "random"
# Torchvision's VGG16 with the authors' own features takes pixels of 0..255 without their mean.
CAFFE_MEAN, CAFFE_STD = (0.48235, 0.45882, 0.40784), (1 / 255,) * 3
RARE = 0.05
SEED = 2015  # of random weights: all processes, and all runs, have the same


def layer_names(network: FeatureNetwork) -> list[str]:
    """The names of all layers, in the order in which an image goes through them."""
    return [*_layers(network, torch.device("meta")), "prob", "logprob"]


def _layers(network: FeatureNetwork, device: torch.device, weights: str | None = None) -> dict[str, nn.Module]:
    """All layers, none of which works in place. Values are undefined where no weights are given."""
    if network not in ("vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "alexnet"):
        raise UserError(f"features: expected vgg16, vgg16_bn, vgg19, vgg19_bn or alexnet, found {network}")
    with torch.device("meta"):
        whole = torchvision.models.get_model(network, weights=None)
    whole.to_empty(device=device)
    if weights is not None:
        path = find_weights(network, weights, "see it work with untrained features: --model.weights random")
        # A file may lack the last layer; then there is no fc8 of it, see `Features`.
        nn.init.constant_(whole.classifier[6].weight, torch.nan)  # type: ignore[index]

        def with_its_classes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            """A classifier of ours has as many as its data had."""
            last = state.get("classifier.6.weight")
            if last is not None and last.ndim == 2:
                whole.classifier[6] = nn.Linear(last.shape[1], last.shape[0], device=device)  # type: ignore[index,operator]
            return state

        load_weights(whole, path, network, "classifier.6", convert=with_its_classes)
    layers: dict[str, nn.Module] = {}
    block, number, last = 1, 0, ""
    for module in whole.features:  # type: ignore[union-attr]
        if isinstance(module, nn.Conv2d):
            number += 1
            last = f"{block}_{number}" if network != "alexnet" else f"{number}"
            layers[f"conv{last}"] = module
        elif isinstance(module, nn.BatchNorm2d):
            convolution = layers[f"conv{last}"]
            assert isinstance(convolution, nn.Conv2d)
            layers[f"conv{last}"] = nn.utils.fuse_conv_bn_eval(convolution.eval(), module.eval())
        elif isinstance(module, nn.ReLU):
            layers[f"relu{last}"] = nn.ReLU()
        elif isinstance(module, nn.MaxPool2d):
            layers[f"pool{block if network != 'alexnet' else number}"] = module
            block, number = block + 1, 0 if network != "alexnet" else number
    linear = [module for module in whole.classifier if isinstance(module, nn.Linear)]  # type: ignore[union-attr]
    flatten = nn.Sequential(whole.avgpool, nn.Flatten())
    for number, module in zip((6, 7, 8), linear, strict=True):
        layers[f"fc{number}"] = nn.Sequential(*([flatten] if number == 6 else []), module)
        if number < 8:
            layers[f"relu{number}"] = nn.ReLU()
    return layers


class Features(nn.Module):
    """Activations of a network that does not learn: float (B,3,H,W), RGB in 0..1, to {layer: (B,C,h,w) or (B,C)}.

    It ends after the last layer that is asked for. Fully connected layers see, as torchvision's do, a map that is
    averaged to 7x7 (AlexNet: 6x6), which of 224 pixels it is.

    Args:
        layers: which, see `layer_names`: VGG's ``conv1_1``, ``relu1_1``, ``pool1`` ..., AlexNet's ``conv1``, ``relu1``,
            ``pool1`` ..., and ``fc6``, ``relu6``, ``fc7``, ``relu7``, ``fc8``, ``prob`` and ``logprob`` of either.
            ``conv`` and ``fc`` are before their ReLU.
        network: whose. Batch normalization becomes part of the convolutions.
        weights: DEFAULT or a name of torchvision's; a file: a state dict, or a checkpoint of our `ImageClassifier`; or
            ``random``: He et al.'s normal distribution, biases 0, each layer's output rescaled to a deviation of 1.
        pooling: ``average`` in place of the maximum, as Gatys et al. have it.
        padding: ``reflect`` in place of zeros, which show at an image's borders.

    Raises:
        ValueError: there is no such layer or network, or the weights are another's.
        FileNotFoundError, RuntimeError: there are no such weights; the message says what to fetch.
    """

    #: Whether these are random features, which images made from them should say.
    random: bool

    def __init__(
        self,
        layers: Sequence[str],
        network: FeatureNetwork = "vgg19",
        weights: str = "DEFAULT",
        pooling: Literal["max", "average"] = "max",
        padding: Literal["zeros", "reflect"] = "zeros",
    ) -> None:
        super().__init__()
        names = layer_names(network)
        wrong = [name for name in layers if name not in names]
        if wrong or not layers:
            raise UserError(
                f"layers: expected some of {', '.join(names)} of {network}, found {wrong[0] if wrong else 'none'}"
            )
        self.random = weights == RANDOM
        found = _layers(network, torch.device("cpu"), None if self.random else weights)
        end = max(names.index(name) for name in layers) + 1
        self.wanted = list(layers)
        self.layers = nn.ModuleDict({name: found[name] for name in names[:end] if name in found})
        for name in self.layers:
            module = self.layers[name]
            if isinstance(module, nn.MaxPool2d) and pooling == "average":
                self.layers[name] = nn.AvgPool2d(module.kernel_size, module.stride)
            elif isinstance(module, nn.Conv2d) and padding == "reflect":
                module.padding_mode = padding
                module._reversed_padding_repeated_twice = [module.padding[0]] * 4  # type: ignore[list-item]
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if self.random else _normalization(network, weights)
        if self.random:
            self._randomize()
        else:
            if "fc8" in self.layers and not self.layers["fc8"][-1].weight.isfinite().all():  # type: ignore[index]
                raise UserError(f"layers: expected some before fc8, which {weights} does not have")
        # Plain attributes: buffers would be averaged and broadcast.
        self._mean, self._std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Features:
        """Stays as it is: there is nothing to train."""
        return super().train(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        x = (images - self._mean) / self._std
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            x = layer(x)
            if name in self.wanted:
                found[name] = x
        for name, last in (("prob", torch.softmax), ("logprob", F.log_softmax)):
            if name in self.wanted:
                found[name] = last(x.float(), 1)
        return {name: found[name] for name in self.wanted}

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of pixels on 0..1, with which the weights were trained; no part of the state dict."""
        return self._mean.flatten().tolist(), self._std.flatten().tolist()

    @normalization.setter
    def normalization(self, given: tuple[Sequence[float], Sequence[float]]) -> None:
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1) for values in given)

    # --- weights --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _randomize(self) -> None:
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(2, 3, 224, 224, generator=generator)
        for layer in self.layers.values():
            parts = [part for part in layer.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
            for part in parts:
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]
            y = layer(x)
            if parts:
                parts[0].weight /= y.std()
                y = y / y.std()
            x = y

    @torch.no_grad()
    def rescale(self, images: Tensor) -> None:
        """Gives each filter a mean activation of 1 over images and places (Gatys et al. 2015, section 3).

        What a layer has more its successor takes less, so that the network still computes the same. Filters that see
        next to nothing in these images, less than a `RARE` part of their layer's mean, count as seeing that: they
        would drown all others as soon as another image has what they look for. Convolutions only.

        Args:
            images: float (B,3,H,W) in 0..1; several, or one large one.
        """
        convolutions = {name: layer for name, layer in self.layers.items() if isinstance(layer, nn.Conv2d)}
        x = (images - self._mean.to(images.device)) / self._std.to(images.device)
        scales: list[Tensor] = []
        for name, layer in self.layers.items():
            if not isinstance(layer, (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d)):
                break
            x = layer(x)
            if name in convolutions:
                mean = x.clamp(min=0).mean((0, 2, 3))
                scales.append(mean.clamp(min=max(RARE * float(mean.mean()), 1e-6)))
        for layer, scale in zip(convolutions.values(), scales, strict=True):
            layer.weight /= scale[:, None, None, None]
            assert layer.bias is not None
            layer.bias /= scale
        for (_, after), scale in zip(pairwise(convolutions.values()), scales[:-1], strict=True):
            after.weight *= scale[None, :, None, None]
        if "fc6" in self.layers:
            linear = self.layers["fc6"][-1]  # type: ignore[index]
            linear.weight *= scales[-1].repeat_interleave(linear.in_features // len(scales[-1]))


def _normalization(network: str, weights: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the pixels that the weights were trained with, on a scale of 0..1."""
    if weights == "IMAGENET1K_FEATURES":
        return CAFFE_MEAN, CAFFE_STD
    try:
        given = torch.load(find_weights(network, weights), map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written before files could be mapped
        given = {}
    options = given.get("hyper_parameters", {}) if isinstance(given, dict) else {}
    return options.get("mean") or IMAGENET_MEAN, options.get("std") or IMAGENET_STD
