"""Several attributes of one image: Sarker et al., "CuisineNet: Food Attributes Classification using Multi-scale
Convolution Network", CCIA 2018 (arXiv:1805.12081).

Taken from the paper: a residual trunk; convolutions of several kernel sizes on its features; a weighted aggregation of
these scales; one negative log-likelihood over all attributes together. It gives 65% (validation) and 62% (test) as its
average F1 over cuisine and flavour on its Yummly48K, which it does not publish.

Ours, where its abstract leaves the details open: the kernel sizes 1, 3 and 5; a 1x1 convolution to 256 channels before
them; the last two stages of the trunk instead of the last alone, so that small things count too; weights that depend on
the image, by additive attention over the scales (Bahdanau, Cho and Bengio 2015); heads for course and ingredients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import VisionModule
from lightning_modules.classification.image_classifier import balanced_weights
from lightning_modules.classification.metrics import AttributeMetrics
from lightning_modules.components.networks import build_network
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.resnet_cifar import ResNetCifar

MISSING = -100  # the label of an attribute that a sample does not have
INGREDIENTS = "ingredients"

# --- network ------------------------------------------------------------------------------------------------------

Trunk = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "resnet110_cifar",
]  # fmt: skip


class MultiScale(nn.Module):
    """Features of several scales, and their weighted mean.

    Every map is brought to ``channels`` by a 1x1 convolution, then convolved with each kernel size, each with batch
    normalization and ReLU, and averaged over its area: vectors v_s, one for each of the S = maps x kernel sizes scales.
    Their weights are a_s = softmax_s(u . tanh(W v_s + b)), and the result is sum_s a_s v_s.

    Args:
        in_channels: of each map.
        channels: of the result.
        kernel_sizes: odd.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(_convolution(c, channels, 1) for c in in_channels)
        self.convolve = nn.ModuleList(
            _convolution(channels, channels, size) for _ in in_channels for size in kernel_sizes
        )
        self.attention = nn.Sequential(nn.Linear(channels, channels), nn.Tanh(), nn.Linear(channels, 1, bias=False))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps float (N,C_m,H_m,W_m) to the aggregated features (N,channels) and the scales' weights (N,S)."""
        reduced = [reduce(x) for reduce, x in zip(self.reduce, maps, strict=True)]
        sizes = len(self.convolve) // len(reduced)
        scales = torch.stack([f(reduced[i // sizes]).mean((2, 3)) for i, f in enumerate(self.convolve)], dim=1)
        weights = self.attention(scales).squeeze(2).softmax(1)
        return (weights.unsqueeze(2) * scales).sum(1), weights


def _convolution(in_channels: int, channels: int, size: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class AttributeNetwork(nn.Module):
    """A residual trunk, `MultiScale` over its last two stages, and a linear head for each output.

    Args:
        trunk: name of a ResNet.
        outputs: {name: number of outputs}, one head each.
        width: first channels of a CIFAR ResNet.
        channels, kernel_sizes: of `MultiScale`.
    """

    def __init__(
        self,
        trunk: Trunk,
        outputs: Mapping[str, int],
        width: int = 16,
        channels: int = 256,
        kernel_sizes: Sequence[int] = (1, 3, 5),
    ) -> None:
        super().__init__()
        self.trunk = build_network(trunk, 1, width)
        last: int = self.trunk.fc.in_features  # type: ignore[assignment,union-attr]
        self.trunk.fc = nn.Identity()
        self.scales = MultiScale((last // 2, last), channels, kernel_sizes)
        self.heads = nn.ModuleDict({name: nn.Linear(channels, count) for name, count in outputs.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalized images float (N,3,H,W) to {name: logits (N, outputs)}."""
        features, _ = self.scales(self.maps(x))
        return {name: head(features) for name, head in self.heads.items()}

    def maps(self, x: Tensor) -> list[Tensor]:
        """What the trunk's last two stages give."""
        trunk: Any = self.trunk
        x = F.relu(trunk.bn1(trunk.conv1(x)))
        if isinstance(trunk, ResNetCifar):
            x = trunk.stage1(x)
            stages = (trunk.stage2, trunk.stage3)
        else:
            x = trunk.layer2(trunk.layer1(trunk.maxpool(x)))
            stages = (trunk.layer3, trunk.layer4)
        first = stages[0](x)
        return [first, stages[1](first)]


# --- loss ---------------------------------------------------------------------------------------------------------


def masked_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """CE = -(1/n) sum_i log softmax(f(x_i))_{y_i} over the n samples that have a label; 0 where none has one.

    With class weights w every term counts w_{y_i} and n is their sum. In float32. The zero keeps the graph, so that on
    many ranks every parameter has a gradient.

    Args:
        logits: f(x), (N,C) of any float type.
        labels: int64 (N,) in 0..C-1, or -100 where missing.
        weights: float (C,).
    """
    known = labels != MISSING
    total = F.cross_entropy(logits.float(), labels, weights, ignore_index=MISSING, reduction="sum")
    counted = known.float() if weights is None else known * weights[labels.clamp(min=0)]
    return total / _or_one(counted.sum())


def masked_binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """BCE = -(1/nV) sum_i sum_v t log s + (1-t) log (1-s), s = sigmoid(f(x_i)_v), over the n samples with targets.

    0 where none has targets. In float32.

    Args:
        logits: f(x), (N,V) of any float type.
        targets: uint8 (N,V), t of 0 and 1, or a row of 255 where missing.
    """
    known = targets != 255
    t = (targets == 1).float()
    terms = F.binary_cross_entropy_with_logits(logits.float(), t, reduction="none")
    return (terms * known).sum() / _or_one(known.sum())


def _or_one(count: Tensor) -> Tensor:
    """The divisor of a mean over what may be nothing, without asking the device for its value."""
    return torch.where(count > 0, count, torch.ones_like(count))


# --- module -------------------------------------------------------------------------------------------------------


class AttributeClassifier(VisionModule):
    """One network, several attributes of an image, each of its own classes, and its ingredients.

    The loss is L = sum_k w_k CE_k over the attributes, plus w BCE of the ingredients; missing labels are left out, so
    that on many ranks each takes the mean over the labels that it has.

    Batch: ``image`` uint8 (B,3,H,W), ``labels`` {attribute: int64 (B,), -100 where missing}, and with ingredients
    ``ingredients`` uint8 (B,V) of 0 and 1, a row of 255 where missing. Prediction: {``attributes``: {attribute:
    probabilities float32 (B,C)}}, and with ingredients ``ingredients`` float32 (B,V), a probability each. Metrics: see
    `AttributeMetrics`.

    Args:
        network: the trunk.
        attributes: {attribute: class names}; ``train.py`` takes them from the data.
        ingredient_names: V names, none to leave that head out; ``train.py`` takes them from the data.
        weights: of the trunk. None to train from scratch; DEFAULT (or IMAGENET1K_V1, ...) for torchvision's ImageNet
            weights; or a file: a state dict, or a checkpoint of `ImageClassifier`.
        width: channels of a CIFAR ResNet's first stage.
        channels: of the features that all heads see.
        kernel_sizes: of the multi-scale convolutions, odd.
        attribute_weights: {attribute, or ``ingredients``: w_k}; 1 where it is not named.
        class_weights: {attribute: one factor a class}; ``balanced``, for an attribute or for all of them, takes
            N / (C n_c) from the training data's counts n_c, so that every class weighs the same.
        head_lr_scale: multiplies the learning rate of all that is not the trunk.
        kwargs: optimizer, schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/mean_macro_f1", "max")

    def __init__(
        self,
        network: Trunk = "resnet50",
        attributes: dict[str, list[str]] | None = None,
        ingredient_names: list[str] | None = None,
        weights: str | None = None,
        width: int = 16,
        channels: int = 256,
        kernel_sizes: Sequence[int] = (1, 3, 5),
        attribute_weights: dict[str, float] | None = None,
        class_weights: dict[str, list[float] | Literal["balanced"]] | Literal["balanced"] | None = None,
        head_lr_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.attributes = attributes or {}
        self.ingredient_names = ingredient_names or []
        _check(self.attributes, attribute_weights, class_weights, kernel_sizes, bool(self.ingredient_names))
        self.attribute_weights = attribute_weights or {}
        self.class_weights = class_weights
        self.head_lr_scale = head_lr_scale
        names = self.attributes | ({INGREDIENTS: self.ingredient_names} if self.ingredient_names else {})
        self.class_names = names
        outputs = {name: len(classes) for name, classes in names.items()}
        self.network = AttributeNetwork(network, outputs, width, channels, kernel_sizes)
        if weights is not None:
            load_weights(self.network.trunk, find_weights(network, weights), network, "fc")
        # Constants, no buffers: see VisionModule.
        self._class_weights: dict[str, Tensor] = {}
        for name in self.attributes:
            given = class_weights.get(name) if isinstance(class_weights, dict) else None
            if isinstance(given, list):
                self._class_weights[name] = torch.tensor(given)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A weighted term for each attribute, under its name, and ``ingredients``."""
        logits = self.network(self.preprocess(batch["image"]))
        self._class_weights = {name: w.to(batch["image"].device) for name, w in self._class_weights.items()}
        terms = {
            name: masked_cross_entropy(logits[name], batch["labels"][name], self._class_weights.get(name))
            for name in self.attributes
        }
        if INGREDIENTS in logits:
            terms[INGREDIENTS] = masked_binary_cross_entropy(logits[INGREDIENTS], batch["ingredients"])
        return {name: self.attribute_weights.get(name, 1.0) * term for name, term in terms.items()}

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Any]:
        """The probabilities of every class of every attribute, and of every ingredient; see the class."""
        logits = self.network(self.preprocess(images if isinstance(images, Tensor) else torch.stack(images)))
        predictions: dict[str, Any] = {
            "attributes": {name: logits[name].float().softmax(1) for name in self.attributes}
        }
        if INGREDIENTS in logits:
            predictions[INGREDIENTS] = logits[INGREDIENTS].float().sigmoid()
        return predictions

    def build_metrics(self) -> MetricCollection:
        counts = {name: len(names) for name, names in self.attributes.items()}
        return MetricCollection({"attributes": AttributeMetrics(counts, len(self.ingredient_names))})

    def update_metrics(self, metrics: MetricCollection, predictions: dict[str, Any], batch: dict[str, Any]) -> None:
        ingredients = (predictions[INGREDIENTS], batch[INGREDIENTS]) if INGREDIENTS in predictions else (None, None)
        metrics.update(predictions["attributes"], batch["labels"], *ingredients)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trunk, and the rest with ``head_lr_scale``; one group where that is 1."""
        if self.head_lr_scale == 1:
            return super().parameter_groups()
        rest = [*self.network.scales.parameters(), *self.network.heads.parameters()]
        return [
            {"params": list(self.network.trunk.parameters())},
            {"params": rest, "lr_scale": self.head_lr_scale},
        ]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self._balance()

    def _balance(self) -> None:
        chosen = self.class_weights
        names = [n for n in self.attributes if chosen == "balanced" or (chosen and chosen.get(n) == "balanced")]
        if not names:
            return
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "attribute_labels"):
            raise UserError("class_weights: balanced needs a datamodule with attribute_labels: give lists")
        labels = data.attribute_labels("train")
        for name in names:
            self._class_weights[name] = balanced_weights(labels[name], len(self.attributes[name]))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Checks the labels while they are still on the CPU: on a GPU a wrong one ends in an unreadable assertion."""
        if not isinstance(batch, dict) or "labels" not in batch:
            return batch
        for name, classes in self.attributes.items():
            if name not in batch["labels"]:
                raise UserError(f"labels: expected {', '.join(self.attributes)}, found {', '.join(batch['labels'])}")
            label = batch["labels"][name]
            if not label.is_cuda and (((label < 0) & (label != MISSING)) | (label >= len(classes))).any():
                raise UserError(
                    f"labels: {name}: expected 0..{len(classes) - 1} or {MISSING} where missing, found {label.min()} "
                    f"to {label.max()}: are these the classes that the model was made for?"
                )
        count = len(self.ingredient_names)
        if count and (found := len(batch.get(INGREDIENTS, [[]])[0])) != count:
            raise UserError(f"ingredients: expected {count} a sample, found {found}: give --data.ingredients {count}")
        return batch


def _check(
    attributes: dict[str, list[str]],
    attribute_weights: dict[str, float] | None,
    class_weights: Any,
    kernel_sizes: Sequence[int],
    ingredients: bool,
) -> None:
    """Raises ValueError for the first argument of `AttributeClassifier` that does not fit the others."""
    if not attributes or not all(attributes.values()):
        found = {name: len(names) for name, names in attributes.items()}
        raise UserError(f"attributes: expected one or more, each with classes, found {found}: does the data have any?")
    if INGREDIENTS in attributes:
        raise UserError(f"attributes: {INGREDIENTS} have a head of their own: give ingredient_names")
    if not kernel_sizes or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
        raise UserError(f"kernel_sizes: expected odd ones, found {list(kernel_sizes)}")
    named = class_weights if isinstance(class_weights, dict) else {}
    known = {*attributes, INGREDIENTS} if ingredients else {*attributes}
    for option, given, allowed in (
        ("attribute_weights", attribute_weights or {}, known),
        ("class_weights", named, {*attributes}),
    ):
        if unknown := sorted(set(given) - allowed):
            raise UserError(f"{option}: expected names among {', '.join(sorted(allowed))}, found {unknown[0]}")
    if any(w < 0 for w in (attribute_weights or {}).values()):
        raise UserError(f"attribute_weights: expected 0 or more, found {attribute_weights}")
    for name, values in named.items():
        if values != "balanced" and len(values) != len(attributes[name]):
            raise UserError(
                f"class_weights: {name}: expected {len(attributes[name])}, one a class, found {len(values)}"
            )
