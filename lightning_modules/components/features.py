"""Activations of VGG and AlexNet by the layer names of the papers: relu1_1, pool4, fc6, ..."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from errors import UserError
from lightning_modules.base import IMAGENET_MEAN, IMAGENET_STD
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.unsaved import Constant

FeatureBackbone = Literal["vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "alexnet"]
RANDOM = "random"
RANDOM_SEED = 2015  # all processes and all runs have the same random weights
# Torchvision's VGG-16 with the authors' own features expects pixels of 0..255 minus their mean.
CAFFE_MEAN, CAFFE_STD = (0.48235, 0.45882, 0.40784), (1 / 255,) * 3
MIN_FILTER_MEAN = 0.05  # smallest mean activation of a filter in `rescale_filters`, relative to its layer's mean


def layer_names(backbone: FeatureBackbone) -> list[str]:
    """Return the names of all layers in forward order."""
    return [*_build_layers(backbone, torch.device("meta")), "prob", "logprob"]


def _build_layers(backbone: FeatureBackbone, device: torch.device, weights: str | None = None) -> dict[str, nn.Module]:
    """Build all layers; none works in place, and the values are undefined without weights."""
    if backbone not in get_args(FeatureBackbone):
        raise UserError(f"backbone: expected {', '.join(get_args(FeatureBackbone))}, found {backbone}")
    with torch.device("meta"):
        network = torchvision.models.get_model(backbone, weights=None)
    network.to_empty(device=device)
    if weights is not None:
        path = find_weights(backbone, weights, "try untrained features with --model.weights random")
        # Marks a last layer that the file does not have, see `Features`.
        nn.init.constant_(network.classifier[6].weight, torch.nan)  # type: ignore[index]
        fc6 = next(name for name, m in network.named_modules() if isinstance(m, nn.Linear))

        def match_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
            if f"{fc6}.weight" not in state:  # a file of convolutions alone
                network.classifier = nn.Sequential()
                return {key: value for key, value in state.items() if not key.startswith("classifier.")}
            last = state.get("classifier.6.weight")
            if last is not None and last.ndim == 2:
                network.classifier[6] = nn.Linear(last.shape[1], last.shape[0], device=device)  # type: ignore[index,operator]
            return state

        load_weights(network, path, backbone, "classifier.6", convert=match_classifier)
    layers: dict[str, nn.Module] = {}
    block, number, suffix = 1, 0, ""
    for module in network.features:  # type: ignore[union-attr]
        if isinstance(module, nn.Conv2d):
            number += 1
            suffix = f"{block}_{number}" if backbone != "alexnet" else f"{number}"
            layers[f"conv{suffix}"] = module
        elif isinstance(module, nn.BatchNorm2d):
            convolution = layers[f"conv{suffix}"]
            assert isinstance(convolution, nn.Conv2d)
            layers[f"conv{suffix}"] = nn.utils.fuse_conv_bn_eval(convolution.eval(), module.eval())
        elif isinstance(module, nn.ReLU):
            layers[f"relu{suffix}"] = nn.ReLU()
        elif isinstance(module, nn.MaxPool2d):
            layers[f"pool{block if backbone != 'alexnet' else number}"] = module
            block, number = block + 1, 0 if backbone != "alexnet" else number
    linear = [module for module in network.classifier if isinstance(module, nn.Linear)]  # type: ignore[union-attr]
    flatten = nn.Sequential(network.avgpool, nn.Flatten())
    for number, module in zip((6, 7, 8), linear, strict=False):  # none without a classifier
        layers[f"fc{number}"] = nn.Sequential(*([flatten] if number == 6 else []), module)
        if number < 8:
            layers[f"relu{number}"] = nn.ReLU()
    return layers


class Features(nn.Module):
    """Extract activations with a frozen network; it ends after the last requested layer.

    Fully connected layers see, as in torchvision, a feature map that is averaged to 7x7 (AlexNet: 6x6), its size for
    images of 224 pixels.

    Args:
        layers: names of layers, see `layer_names`: VGG's ``conv1_1``, ``relu1_1``, ``pool1`` ..., AlexNet's ``conv1``,
            ``relu1``, ``pool1`` ..., and ``fc6``, ``relu6``, ``fc7``, ``relu7``, ``fc8``, ``prob`` and ``logprob`` of
            both. ``conv`` and ``fc`` are activations before ReLU.
        backbone: name of the network. Batch normalization is fused into the convolutions.
        weights: DEFAULT or a name of torchvision's weights; a file: a state dict, or a checkpoint of `ImageClassifier`;
            or ``random``: He initialization with biases 0, each layer's output rescaled to a standard deviation of 1.
        pooling: ``average`` replaces max pooling (Gatys et al. 2015).
        padding: ``reflect`` replaces zero padding, which leaves traces at the borders of an image.

    Raises:
        UserError: unknown layer or backbone, or the weights do not exist or do not fit.
    """

    #: Whether the weights are random; predictions of such features are marked.
    random: bool

    def __init__(
        self,
        layers: Sequence[str],
        backbone: FeatureBackbone = "vgg19",
        weights: str = "DEFAULT",
        pooling: Literal["max", "average"] = "max",
        padding: Literal["zeros", "reflect"] = "zeros",
    ) -> None:
        super().__init__()
        names = layer_names(backbone)
        unknown = [name for name in layers if name not in names]
        if unknown or not layers:
            raise UserError(
                f"layers: expected some of {', '.join(names)} of {backbone}, found {unknown[0] if unknown else 'none'}"
            )
        self.random = weights == RANDOM
        built = _build_layers(backbone, torch.device("cpu"), None if self.random else weights)
        end = max(names.index(name) for name in layers) + 1
        if "fc6" in names[:end] and "fc6" not in built:
            raise UserError(f"layers: expected layers before fc6, which {weights} does not have, found {layers[-1]}")
        self.requested = list(layers)
        self.layers = nn.ModuleDict({name: built[name] for name in names[:end] if name in built})
        for name in self.layers:
            module = self.layers[name]
            if isinstance(module, nn.MaxPool2d) and pooling == "average":
                self.layers[name] = nn.AvgPool2d(module.kernel_size, module.stride)
            elif isinstance(module, nn.Conv2d) and padding == "reflect":
                module.padding_mode = padding
                module._reversed_padding_repeated_twice = [module.padding[0]] * 4  # type: ignore[list-item]
        self.normalization = (IMAGENET_MEAN, IMAGENET_STD) if self.random else _read_normalization(backbone, weights)
        if self.random:
            self._randomize()
        elif "fc8" in self.layers and not self.layers["fc8"][-1].weight.isfinite().all():  # type: ignore[index]
            raise UserError(f"layers: expected layers before fc8, which {weights} does not have, found fc8")
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Features:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map RGB images, float (B, 3, H, W) in 0..1, to {layer: (B, C, h, w) or (B, C)} in the requested order."""
        x = self._normalize(images)
        activations: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            x = layer(x)
            if name in self.requested:
                activations[name] = x
        for name, function in (("prob", torch.softmax), ("logprob", F.log_softmax)):
            if name in self.requested:
                activations[name] = function(x.float(), 1)
        return {name: activations[name] for name in self.requested}

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of pixels in 0..1 that the weights expect; not part of the state dict."""
        return self._mean.value.flatten().tolist(), self._std.value.flatten().tolist()

    @normalization.setter
    def normalization(self, mean_and_std: tuple[Sequence[float], Sequence[float]]) -> None:
        device = next(self.parameters()).device
        self._mean, self._std = (Constant(torch.tensor(v, device=device).view(1, 3, 1, 1)) for v in mean_and_std)

    def _normalize(self, images: Tensor) -> Tensor:
        return (images - self._mean.value) / self._std.value

    # --- weights --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _randomize(self) -> None:
        generator = torch.Generator().manual_seed(RANDOM_SEED)
        x = torch.randn(2, 3, 224, 224, generator=generator)
        for layer in self.layers.values():
            he_normal(layer, generator=generator)
            y = layer(x)
            for part in layer.modules():
                if isinstance(part, (nn.Conv2d, nn.Linear)):
                    part.weight /= y.std()
                    y = y / y.std()
            x = y

    @torch.no_grad()
    def rescale_filters(self, images: Tensor) -> None:
        """Rescale each filter to a mean activation of 1 over images and positions (Gatys et al. 2015, section 3).

        The next layer is scaled by the inverse, so that the network computes the same function. Means below
        `MIN_FILTER_MEAN` of the layer's mean are raised to that: a filter that barely responds to these images would
        otherwise dominate as soon as another image activates it. Only convolutions are rescaled.

        Args:
            images: float (B, 3, H, W) in 0..1; several images, or a large one.
        """
        convolutions = {name: layer for name, layer in self.layers.items() if isinstance(layer, nn.Conv2d)}
        x = self._normalize(images)
        scales: list[Tensor] = []
        for name, layer in self.layers.items():
            if not isinstance(layer, (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d)):
                break
            x = layer(x)
            if name in convolutions:
                mean = x.clamp(min=0).mean((0, 2, 3))
                scales.append(mean.clamp(min=max(MIN_FILTER_MEAN * float(mean.mean()), 1e-6)))
        for layer, scale in zip(convolutions.values(), scales, strict=True):
            layer.weight /= scale[:, None, None, None]
            assert layer.bias is not None
            layer.bias /= scale
        for (_, following), scale in zip(pairwise(convolutions.values()), scales[:-1], strict=True):
            following.weight *= scale[None, :, None, None]
        if "fc6" in self.layers:
            linear = self.layers["fc6"][-1]  # type: ignore[index]
            linear.weight *= scales[-1].repeat_interleave(linear.in_features // len(scales[-1]))


def _read_normalization(backbone: str, weights: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of the pixels in 0..1 that the weights were trained with."""
    if weights == "IMAGENET1K_FEATURES":
        return CAFFE_MEAN, CAFFE_STD
    try:
        content = torch.load(find_weights(backbone, weights), map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # old files cannot be memory-mapped
        content = {}
    hparams = content.get("hyper_parameters", {}) if isinstance(content, dict) else {}
    return hparams.get("mean") or IMAGENET_MEAN, hparams.get("std") or IMAGENET_STD
