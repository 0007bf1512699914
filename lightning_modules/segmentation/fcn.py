"""FCN: Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, and Shelhamer,
Long and Darrell, PAMI 2017.

A classifier's fully connected layers become convolutions, so that it says of every 32nd pixel what it shows; bilinear
interpolation makes that an image again. FCN-16s and FCN-8s add what layers with finer places say.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.vgg import make_layers

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.vgg import conv_relu, vgg16_plan
from lightning_modules.segmentation.metrics import segmentation_metrics
from lightning_modules.segmentation.scores import CROP_ADVICE, cross_entropy, of_each, sizes_of, to_maps

Variant = Literal["32s", "16s", "8s", "8s-atonce"]

# --- network --------------------------------------------------------------------------------------------------------


class Upsampling(nn.ConvTranspose2d):
    """Bilinear interpolation as a transposed convolution that does not learn, each class by itself.

    Args:
        classes: C.
        factor: how many times larger; the kernel is twice as wide.
        aligned: cut off what the kernel reaches beyond the image, so that a map comes out ``factor`` times as large;
            else it is left, as with the authors, who crop later.
    """

    def __init__(self, classes: int, factor: int, aligned: bool) -> None:
        super().__init__(classes, classes, 2 * factor, factor, factor // 2 if aligned else 0, bias=False)
        self.weight.requires_grad_(False)
        ramp = 1 - (torch.arange(2 * factor) - (factor - 0.5)).abs() / factor
        with torch.no_grad():
            self.weight.zero_()
            self.weight[range(classes), range(classes)] = ramp[:, None] * ramp


class FCNNetwork(nn.Module):
    """FCN-32s, 16s and 8s: normalized images float (B,3,H,W) to logits float32 (B,C,H,W).

    On VGG16 the parameters, and those that learn, are for 21 classes: 32s 136,152,917 and 134,346,581; 16s 134,815,994
    and 134,357,354; 8s 134,489,759 and 134,362,751.

    Args:
        variant: ``8s-atonce`` is trained in one go, for which what comes from finer layers is scaled down.
        num_classes: C.
        backbone: ``vgg16``, or the name of any other of torchvision's networks that has maps at strides 8, 16 and 32.
        width: multiplies VGG16's channels.
        batch_norm: after each convolution of VGG16.
        pad: zeros around the first convolution of VGG16. The authors' 100 leave fc6 something to look at in the
            corners, and are what their crops are for; 1 takes a third of the time on small images, and pads fc6.
    """

    def __init__(
        self,
        variant: Variant = "8s",
        num_classes: int = 21,
        backbone: str = "vgg16",
        width: float = 1.0,
        batch_norm: bool = False,
        pad: Literal[1, 100] = 100,
    ) -> None:
        super().__init__()
        self.padded = pad == 100 and backbone == "vgg16"
        channels = self._make_vgg16(width, batch_norm) if backbone == "vgg16" else self._make_other(backbone)
        finer = {"32s": [], "16s": ["pool4"]}.get(variant, ["pool4", "pool3"])
        self.score_fr = nn.Conv2d(channels["top"], num_classes, 1)
        self.score = nn.ModuleDict({name: nn.Conv2d(channels[name], num_classes, 1) for name in finer})
        self.up = nn.ModuleDict({name: Upsampling(num_classes, 2, not self.padded) for name in finer})
        self.upscore = Upsampling(num_classes, 32 >> len(finer), not self.padded)
        self.scales = {"pool4": 1e-2, "pool3": 1e-4} if variant == "8s-atonce" else {}
        # How far inside what is above it a map lies, with the authors' padding.
        self.crops = {"pool4": 5, "pool3": 9, "picture": {"32s": 19, "16s": 27}.get(variant, 31)}
        for layer in (self.score_fr, *self.score.values()):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def _make_vgg16(self, width: float, batch_norm: bool) -> dict[str, int]:
        plan = vgg16_plan(width)
        self.features = make_layers(plan, batch_norm)
        pools = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        for i in pools:
            self.features[i] = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.taps = {pools[2]: "pool3", pools[3]: "pool4"}
        first = self.features[0]
        assert isinstance(first, nn.Conv2d)
        first.padding = (100, 100) if self.padded else (1, 1)
        out = max(1, round(4096 * width))
        self.fc6 = nn.Sequential(*conv_relu(int(plan[-2]), out, 7, batch_norm, padding=0 if self.padded else 3))
        self.fc7 = nn.Sequential(*conv_relu(out, out, 1, batch_norm))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        return {"pool3": int(plan[8]), "pool4": int(plan[12]), "top": out}

    def _make_other(self, backbone: str) -> dict[str, int]:
        """The last map of each stride of one of torchvision's networks."""
        network = torchvision.models.get_model(backbone, weights=None)
        picture = torch.zeros(1, 3, 256, 256)
        last: dict[int, tuple[str, int]] = {}
        names = sorted(set(get_graph_node_names(network)[0]) & set(get_graph_node_names(network)[1]))
        with torch.no_grad():
            maps = create_feature_extractor(network.eval(), names)(picture)
        for name in get_graph_node_names(network)[1]:
            m = maps.get(name)
            if isinstance(m, Tensor) and m.ndim == 4 and m.shape[2] == m.shape[3] and 256 % m.shape[2] == 0:
                last[256 // m.shape[2]] = name, m.shape[1]
        if not {8, 16, 32} <= last.keys():
            raise UserError(
                f"backbone: expected a network with maps at strides 8, 16 and 32, found {backbone}'s {sorted(last)}"
            )
        parts = dict(zip(("pool3", "pool4", "top"), (last[stride] for stride in (8, 16, 32)), strict=True))
        self.features = create_feature_extractor(network.train(), {name: part for part, (name, _) in parts.items()})
        return {part: channels for part, (_, channels) in parts.items()}

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """What is scored: ``pool3``, ``pool4`` and ``top``, fc7 or a backbone's last map."""
        if not isinstance(self.features, nn.Sequential):
            return self.features(x)
        found = {}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found[self.taps[i]] = x
        # Every element by itself, as in Caffe, not whole channels.
        x = F.dropout(self.fc6(x), 0.5, self.training)
        return {**found, "top": F.dropout(self.fc7(x), 0.5, self.training)}

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        # Then every map has half the cells of the one before, however a backbone rounds.
        maps = self.maps(x if self.padded else F.pad(x, (0, -width % 32, 0, -height % 32)))
        scores = self.score_fr(maps["top"])
        for name, score in self.score.items():
            finer = score(maps[name] * self.scales.get(name, 1.0))
            scores = self.up[name](scores)
            if self.padded:
                finer = crop(finer, self.crops[name], scores.shape[2:])
            scores = scores[:, :, : finer.shape[2], : finer.shape[3]] + finer
        scores = self.upscore(scores)
        return crop(scores, self.crops["picture"] if self.padded else 0, (height, width)).float()


def crop(x: Tensor, offset: int, size: tuple[int, ...]) -> Tensor:
    """The part (B,C,height,width) of a map that begins ``offset`` inside of it."""
    return x[:, :, offset : offset + size[0], offset : offset + size[1]]


# --- pretrained weights ---------------------------------------------------------------------------------------------


def from_vgg16(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes torchvision's VGG16 as ours: fc6 and fc7 become convolutions. Ours keep their names."""
    if any(key.startswith("fc6.") for key in state):
        return state
    ours = {k: v for k, v in state.items() if k.startswith("features.")}
    for old, new, side in (("classifier.0", "fc6.0", 7), ("classifier.3", "fc7.0", 1)):
        # Torchvision's file of features alone has no numbers there.
        if f"{old}.weight" in state and state[f"{old}.weight"].isfinite().all():
            ours[f"{new}.weight"] = state[f"{old}.weight"].unflatten(1, (-1, side, side))
            ours[f"{new}.bias"] = state[f"{old}.bias"]
    return ours


def from_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts another backbone's weights where they are ours; ours keep their names."""
    return state if "score_fr.bias" in state else {f"features.{key}": value for key, value in state.items()}


# --- module ---------------------------------------------------------------------------------------------------------


class FCN(VisionModule):
    """FCN. Batch: see segmentation in the batch contract. Predictions: a map of class ids int64 (h,w) an image.

    Metrics: see `SegmentationMetrics`; images are scored at their own size, to which the scores are resized.

    Args:
        variant, backbone, width, batch_norm, pad: see `FCNNetwork`.
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        weights: None to train from scratch; DEFAULT or a name of torchvision's weights for the backbone; or a file: of
            these, or the checkpoint of the stage before (32s for 16s, 16s for 8s), whose layers are all taken.
        summed: the loss is the sum over the pixels, with the authors' rates of 1e-10 and less, in place of the mean.
        optimizer: see `VisionModule`; the authors' for the mean: their rate of 1e-10 for the sum over an image is
            1.9e-5 for its mean. Biases learn at twice the rate and do not decay.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/miou", "max")

    def __init__(
        self,
        variant: Variant = "8s",
        num_classes: int = 21,
        class_names: list[str] | None = None,
        backbone: str = "vgg16",
        width: float = 1.0,
        batch_norm: bool = False,
        pad: Literal[1, 100] = 100,
        weights: str | None = None,
        summed: bool = False,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=2e-5, momentum=0.99, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if variant not in ("32s", "16s", "8s", "8s-atonce"):
            raise UserError(f"variant: expected 32s, 16s, 8s or 8s-atonce, found {variant}")
        self.num_classes, self.class_names, self.summed = num_classes, class_names, summed
        self.network = FCNNetwork(variant, num_classes, backbone, width, batch_norm, pad)
        if weights is not None:
            name = backbone + ("_bn" if backbone == "vgg16" and batch_norm else "")
            # Of another backbone its own classifier, which is nobody's.
            free = ["score_fr", "score", "up", "upscore", "fc6", "fc7"]
            free += [f"features.{head}" for head in ("fc", "classifier", "head", "heads") if backbone != "vgg16"]
            convert = from_vgg16 if backbone == "vgg16" else from_backbone
            load_weights(self.network, find_weights(name, weights), name, *free, convert=convert)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        scores = self.network(self.preprocess(require_equal_size(batch["image"], CROP_ADVICE)))
        return {"cross_entropy": cross_entropy(scores, batch["mask"], self.summed)}

    def scores(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """Logits float32 (C,h,w) of each image, uint8 (B,3,h,w) or a list of (3,h,w)."""
        return of_each(lambda x: self.network(self.preprocess(x)), images)

    def predict(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        return to_maps(self.scores(images))

    def predict_batch(self, batch: dict[str, Any]) -> list[Tensor]:
        return to_maps(self.scores(batch["image"]), sizes_of(batch))

    def build_metrics(self) -> MetricCollection:
        return segmentation_metrics(self.num_classes)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["original_mask"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)
