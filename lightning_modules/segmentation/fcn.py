"""Fully convolutional networks (FCN-32s, FCN-16s, FCN-8s).

- Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015.
- Shelhamer, Long and Darrell, "Fully Convolutional Networks for Semantic Segmentation", PAMI 2017.

The fully connected layers of a classifier become convolutions, which score every 32nd pixel. Bilinear interpolation
upsamples the scores to the image. FCN-16s and FCN-8s add scores of the finer layers pool4 and pool3.

N images of H x W pixels, C classes.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.vgg import make_layers

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.image_batches import pad_to_multiple
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.vgg import classifier_as_convolutions, conv_relu, vgg16_plan
from lightning_modules.segmentation.base import SemanticSegmenter, cross_entropy
from lightning_modules.segmentation.cell_centers import cell_centers

Variant = Literal["32s", "16s", "8s", "8s-atonce"]

# --- network --------------------------------------------------------------------------------------------------------


class BilinearUpsampling(nn.ConvTranspose2d):
    """Bilinear interpolation as a frozen transposed convolution, applied to each channel separately.

    Args:
        channels: number of channels.
        factor: upsampling factor; the kernel is twice as large. Its border stays, and is cropped later.
        peak: position of cell 0 in the output, from factor - 1 to factor. Default: factor - 0.5, between two cells, as
            in the authors' code.
    """

    def __init__(self, channels: int, factor: int, peak: float | None = None) -> None:
        super().__init__(channels, channels, 2 * factor, factor, bias=False)
        self.weight.requires_grad_(False)
        peak = factor - 0.5 if peak is None else peak
        ramp = (1 - (torch.arange(2 * factor) - peak).abs() / factor).clamp_min(0)
        with torch.no_grad():
            self.weight.zero_()
            self.weight[range(channels), range(channels)] = ramp[:, None] * ramp


class FCNNetwork(nn.Module):
    """FCN: normalized images float (N, 3, H, W) to logits float32 (N, C, H, W).

    Parameters (and trained parameters) with VGG-16 and 21 classes: 32s 136,152,917 (134,346,581); 16s 134,815,994
    (134,357,354); 8s 134,489,759 (134,362,751).

    The arguments are described in `FCN`. With 100 pixels of padding fc6 needs none, and the authors' crops apply;
    with 1 fc6 is padded instead. Without the authors' crops, each map is upsampled so that its cells lie on the centers
    of their receptive fields (`cell_centers`).
    """

    def __init__(
        self,
        variant: Variant = "8s",
        num_classes: int = 21,
        backbone: str = "vgg16",
        width_multiplier: float = 1.0,
        batch_norm: bool = False,
        conv1_padding: Literal[1, 100] | None = None,
    ) -> None:
        super().__init__()
        self.caffe_padding = conv1_padding in (None, 100) and backbone == "vgg16"
        if backbone == "vgg16":
            channels = self._make_vgg16(width_multiplier, batch_norm)
        else:
            channels = self._make_backbone(backbone)
        skips = {"32s": [], "16s": ["pool4"]}.get(variant, ["pool4", "pool3"])
        self.score_fr = nn.Conv2d(channels["top"], num_classes, 1)
        self.score = nn.ModuleDict({name: nn.Conv2d(channels[name], num_classes, 1) for name in skips})
        self.scales = {"pool4": 1e-2, "pool3": 1e-4} if variant == "8s-atonce" else {}
        # The authors' crops: where each map begins inside the map that it is aligned with.
        self.crops = {"pool4": 5, "pool3": 9, "image": {"32s": 19, "16s": 27}.get(variant, 31)}
        peaks: dict[str, float | None] = dict.fromkeys((*skips, "image"))
        if not self.caffe_padding:
            self.crops, peaks = self._align(["top", *skips, "image"])
        self.up = nn.ModuleDict({name: BilinearUpsampling(num_classes, 2, peaks[name]) for name in skips})
        self.upscore = BilinearUpsampling(num_classes, 32 >> len(skips), peaks["image"])
        for layer in (self.score_fr, *self.score.values()):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def _make_vgg16(self, width_multiplier: float, batch_norm: bool) -> dict[str, int]:
        plan = vgg16_plan(width_multiplier)
        self.features = make_layers(plan, batch_norm)
        pools = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        for i in pools:
            self.features[i] = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.skip_layers = {pools[2]: "pool3", pools[3]: "pool4"}
        first = self.features[0]
        assert isinstance(first, nn.Conv2d)
        first.padding = (100, 100) if self.caffe_padding else (1, 1)
        hidden = max(1, round(4096 * width_multiplier))
        fc6_padding = 0 if self.caffe_padding else 3
        self.fc6 = nn.Sequential(*conv_relu(int(plan[-2]), hidden, 7, batch_norm, padding=fc6_padding))
        self.fc7 = nn.Sequential(*conv_relu(hidden, hidden, 1, batch_norm))
        he_normal(self)
        # Pooling by 2 and padded 3x3 convolutions: cell i of stride s covers pixels s i to s (i + 1) - 1.
        self.centers = {"pool3": (8, 3.5), "pool4": (16, 7.5), "top": (32, 15.5)}
        return {"pool3": int(plan[8]), "pool4": int(plan[12]), "top": hidden}

    def _make_backbone(self, backbone: str) -> dict[str, int]:
        """Take the last feature map at each of the strides 8, 16 and 32 of one of torchvision's networks."""
        network = torchvision.models.get_model(backbone, weights=None)
        train_nodes, eval_nodes = get_graph_node_names(network)
        with torch.no_grad():
            extractor = create_feature_extractor(network.eval(), sorted(set(train_nodes) & set(eval_nodes)))
            maps = extractor(torch.zeros(1, 3, 256, 256))
        last: dict[int, tuple[str, int]] = {}
        for name in eval_nodes:
            x = maps.get(name)
            if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == x.shape[3] and 256 % x.shape[2] == 0:
                last[256 // x.shape[2]] = name, x.shape[1]
        if not {8, 16, 32} <= last.keys():
            raise UserError(
                f"backbone: expected a network with feature maps at strides 8, 16 and 32, found {backbone} with "
                f"{sorted(last)}"
            )
        nodes = {"pool3": last[8], "pool4": last[16], "top": last[32]}
        self.features = create_feature_extractor(network.train(), {name: part for part, (name, _) in nodes.items()})
        self.centers = {}
        for (part, found), stride in zip(cell_centers(self.features).items(), (8, 16, 32), strict=True):
            if found is None or found[0] != stride or not 0 <= found[1] < stride:
                raise UserError(
                    f"backbone: expected a network whose cells have a known position, found {backbone}; use a ResNet"
                )
            self.centers[part] = found
        return {part: channels for part, (_, channels) in nodes.items()}

    def _align(self, maps: list[str]) -> tuple[dict[str, int], dict[str, float | None]]:
        """Return crop and peak of each upsampling, so that the cells of each map lie where the next map has them.

        Args:
            maps: names of the maps, coarsest first; the last is the image.
        """
        centers = {**self.centers, "image": (1, 0.0)}
        crops: dict[str, int] = {}
        peaks: dict[str, float | None] = {}
        for coarse, fine in pairwise(maps):
            (stride, start), (fine_stride, fine_start) = centers[coarse], centers[fine]
            position = (start - fine_start) / fine_stride  # of the coarse cell 0, in cells of the fine map
            crops[fine] = ceil(stride // fine_stride - 1 - position)
            peaks[fine] = position + crops[fine]
        return crops, peaks

    def feature_maps(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the maps that are scored: ``pool3``, ``pool4`` and ``top``, which is fc7 or the last feature map."""
        if not isinstance(self.features, nn.Sequential):
            return self.features(x)
        maps = {}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.skip_layers:
                maps[self.skip_layers[i]] = x
        # Like Caffe, drop single elements instead of channels.
        x = F.dropout(self.fc6(x), 0.5, self.training)
        return {**maps, "top": F.dropout(self.fc7(x), 0.5, self.training)}

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        # With sides of 32 k, each map has half the cells of the previous one in any backbone. If cell 0 lies on pixel
        # 0, as in a ResNet, sides of 32 k + 1 put the last cell on the last pixel.
        offset = 1 if not self.caffe_padding and self.centers["top"][1] == 0 else 0
        maps = self.feature_maps(x if self.caffe_padding else pad_to_multiple(x, 32, offset))
        logits = self.score_fr(maps["top"])
        for name, score in self.score.items():
            skip = score(maps[name] * self.scales.get(name, 1.0))
            logits = self.up[name](logits)
            if self.caffe_padding:
                skip = crop(skip, self.crops[name], logits.shape[2:])
                logits = crop(logits, 0, skip.shape[2:]) + skip
            else:
                logits = crop(logits, self.crops[name], skip.shape[2:]) + skip
        return crop(self.upscore(logits), self.crops["image"], (height, width)).float()


def crop(x: Tensor, offset: int, size: tuple[int, ...]) -> Tensor:
    """Crop (N, C, height, width) from a map, starting at row and column ``offset``."""
    return x[:, :, offset : offset + size[0], offset : offset + size[1]]


# --- pretrained weights ---------------------------------------------------------------------------------------------


def convert_vgg16_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename torchvision's VGG-16 weights, and reshape fc6 and fc7 to convolutions; return our own weights as is."""
    if any(key.startswith("fc6.") for key in state):
        return state
    converted = {key: value for key, value in state.items() if key.startswith("features.")}
    for name, value in classifier_as_convolutions(state).items():
        converted[name.replace(".", ".0.")] = value
    return converted


def convert_backbone_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prefix the weights of another backbone with ``features.``; return our own weights as is."""
    return state if "score_fr.bias" in state else {f"features.{key}": value for key, value in state.items()}


# --- module ---------------------------------------------------------------------------------------------------------


class FCN(SemanticSegmenter):
    """FCN-32s, FCN-16s and FCN-8s (Long et al. 2015). See `SemanticSegmenter` for batch, predictions and metrics.

    The authors train in stages: 32s from ImageNet weights, 16s from 32s, 8s from 16s. Biases have twice the learning
    rate and no weight decay.

    Args:
        variant: stride of the finest scores. ``8s-atonce`` is 8s trained in one stage, with the features of pool4 and
            pool3 scaled down.
        backbone: ``vgg16``, or any of torchvision's networks with feature maps at strides 8, 16 and 32.
        width_multiplier: scales the channels of VGG-16; other backbones have their own, and refuse it.
        batch_norm: add batch normalization to each convolution of VGG-16; refused for other backbones.
        conv1_padding: zero padding of the first convolution of VGG-16: 100 as in the authors' code, which null means,
            or 1, which takes a third of the time on small images. Refused for other backbones.
        weights: null to train from scratch; IMAGENET1K_V1, IMAGENET1K_V2 (ResNets only) or DEFAULT, the newest, for
            torchvision's weights of the backbone; or a file: such weights, or the checkpoint of the previous stage.
        loss_reduction: ``mean`` or ``sum`` over the pixels of the batch. The authors' learning rates (1e-10 and less)
            are for the sum.
        optimizer: makes the optimizer from parameter groups. The default is the authors', for the mean: their learning
            rate of 1e-10 for the sum over an image is 1.9e-5 for its mean.
        **kwargs: see `SemanticSegmenter`.
    """

    network: FCNNetwork

    def __init__(
        self,
        variant: Variant = "8s",
        backbone: str = "vgg16",
        width_multiplier: float = 1.0,
        batch_norm: bool = False,
        conv1_padding: Literal[1, 100] | None = None,
        weights: str | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=2e-5, momentum=0.99, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if variant not in ("32s", "16s", "8s", "8s-atonce"):
            raise UserError(f"variant: expected 32s, 16s, 8s or 8s-atonce, found {variant}")
        if backbone != "vgg16":
            given = {"width_multiplier": width_multiplier, "batch_norm": batch_norm, "conv1_padding": conv1_padding}
            for name, default in (("width_multiplier", 1.0), ("batch_norm", False), ("conv1_padding", None)):
                if given[name] != default:
                    expected = "null" if default is None else str(default).lower()
                    raise UserError(
                        f"{name}: expected {expected} for backbone {backbone}, found {given[name]}; use vgg16"
                    )
        self.loss_reduction = loss_reduction
        self.network = FCNNetwork(variant, self.num_classes, backbone, width_multiplier, batch_norm, conv1_padding)
        if weights is not None:
            name = backbone + ("_bn" if backbone == "vgg16" and batch_norm else "")
            new_layers = ["score_fr", "score", "up", "upscore", "fc6", "fc7"]
            if backbone != "vgg16":
                new_layers += [f"features.{head}" for head in ("fc", "classifier", "head", "heads")]
            convert = convert_vgg16_weights if backbone == "vgg16" else convert_backbone_weights
            load_weights(self.network, find_weights(name, weights), name, *new_layers, convert=convert)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits = self.pixel_logits(self.training_images(batch))
        return {"cross_entropy": cross_entropy(logits, batch["mask"], self.loss_reduction)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)
