"""Several attributes of one image: Sarker et al., "CuisineNet: Food Attributes Classification using Multi-scale
Convolution Network", CCIA 2018 (arXiv:1805.12081).

From the paper: a residual backbone, convolutions of several kernel sizes on its features, a weighted aggregation of
these scales, and one negative log-likelihood over all attributes. Its average F1 of cuisine and flavor is 65%
(validation) and 62% (test) on the authors' unpublished Yummly48K.

Ours, because the abstract does not specify it: kernel sizes 1, 3 and 5 after a 1x1 convolution to 256 channels; the
last two stages of the backbone instead of one, for small objects; aggregation weights by additive attention over the
scales (Bahdanau, Cho and Bengio 2015); heads for course and ingredients.
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
from lightning_modules.classification.base import balanced_weights, require_labels_in_range
from lightning_modules.classification.metrics import MISSING, UNKNOWN, AttributeMetrics
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.networks import build_network
from lightning_modules.components.parameter_groups import head_groups
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.resnet_cifar import ResNetCifar
from lightning_modules.components.unsaved import Constant

INGREDIENTS = "ingredients"

# --- network ------------------------------------------------------------------------------------------------------

ResNetName = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "resnet110_cifar",
]  # fmt: skip


class MultiScale(nn.Module):
    """Aggregate features of several scales by attention.

    A 1x1 convolution reduces each feature map to ``channels``. Each map is convolved with each kernel size and averaged
    over its area, which yields one vector v_s for each of the S = maps * kernel sizes scales. With the weights
    a_s = softmax_s(u . tanh(W v_s + b)) the result is sum_s a_s v_s.

    Args:
        in_channels: channels of each feature map.
        channels: channels of the result.
        kernel_sizes: odd kernel sizes.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(_conv_bn_relu(c, channels, 1) for c in in_channels)
        self.convolve = nn.ModuleList(
            _conv_bn_relu(channels, channels, size) for _ in in_channels for size in kernel_sizes
        )
        self.attention = nn.Sequential(nn.Linear(channels, channels), nn.Tanh(), nn.Linear(channels, 1, bias=False))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Map feature maps, float (N, C_m, H_m, W_m), to features (N, channels) and weights of the scales (N, S)."""
        reduced = [reduce(x) for reduce, x in zip(self.reduce, maps, strict=True)]
        sizes = len(self.convolve) // len(reduced)
        scales = torch.stack([f(reduced[i // sizes]).mean((2, 3)) for i, f in enumerate(self.convolve)], dim=1)
        weights = self.attention(scales).squeeze(2).softmax(1)
        return (weights.unsqueeze(2) * scales).sum(1), weights


def _conv_bn_relu(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    he_normal(convolution)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class AttributeNetwork(nn.Module):
    """A residual backbone, `MultiScale` over its last two stages, and a linear head for each output.

    Args:
        backbone: name of a ResNet.
        outputs: number of outputs of each head, by name.
        base_channels: channels of the first stage of a CIFAR ResNet.
        channels: channels of the aggregated features.
        kernel_sizes: odd kernel sizes of the multi-scale convolutions.
    """

    def __init__(
        self,
        backbone: ResNetName,
        outputs: Mapping[str, int],
        base_channels: int = 16,
        channels: int = 256,
        kernel_sizes: Sequence[int] = (1, 3, 5),
    ) -> None:
        super().__init__()
        self.backbone = build_network(backbone, 1, base_channels)
        last: int = self.backbone.fc.in_features  # type: ignore[assignment,union-attr]
        self.backbone.fc = nn.Identity()
        self.scales = MultiScale((last // 2, last), channels, kernel_sizes)
        self.heads = nn.ModuleDict({name: nn.Linear(channels, count) for name, count in outputs.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map normalized images, float (N, 3, H, W), to logits (N, outputs) of each head."""
        features, _ = self.scales(self.feature_maps(x))
        return {name: head(features) for name, head in self.heads.items()}

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the backbone's last two stages."""
        backbone: Any = self.backbone
        x = F.relu(backbone.bn1(backbone.conv1(x)))
        if isinstance(backbone, ResNetCifar):
            x = backbone.stage1(x)
            stages = (backbone.stage2, backbone.stage3)
        else:
            x = backbone.layer2(backbone.layer1(backbone.maxpool(x)))
            stages = (backbone.layer3, backbone.layer4)
        first = stages[0](x)
        return [first, stages[1](first)]


# --- loss ---------------------------------------------------------------------------------------------------------


def masked_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute CE = -(1/n) sum_i log softmax(f(x_i))_{y_i} over the n samples with a label, in float32.

    With class weights w each term is multiplied by w_{y_i}, and n is their sum. Without labels the result is 0 with a
    gradient of 0, so that under DDP every parameter has a gradient.

    Args:
        logits: f(x), float (N, C).
        labels: int64 (N,) in 0..C-1, or -100 if missing.
        weights: class weights, float (C,).
    """
    known = labels != MISSING
    total = F.cross_entropy(logits.float(), labels, weights, ignore_index=MISSING, reduction="sum")
    counted = known.float() if weights is None else known * weights[labels.clamp(min=0)]
    return total / _nonzero(counted.sum())


def masked_binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute BCE = -(1/nV) sum_i sum_v t log s + (1 - t) log (1 - s) over the n samples with targets, in float32.

    Here s = sigmoid(f(x_i)_v). Without targets the result is 0 with a gradient of 0.

    Args:
        logits: f(x), float (N, V).
        targets: t, uint8 (N, V) of 0 and 1; a row of 255 is missing.
    """
    known = targets != UNKNOWN
    t = (targets == 1).float()
    terms = F.binary_cross_entropy_with_logits(logits.float(), t, reduction="none")
    return (terms * known).sum() / _nonzero(known.sum())


def _nonzero(count: Tensor) -> Tensor:
    """Replace 0 by 1, without a synchronization with the device."""
    return torch.where(count > 0, count, torch.ones_like(count))


# --- module -------------------------------------------------------------------------------------------------------


class AttributeClassifier(VisionModule):
    """One network that predicts several attributes of an image and its ingredients.

    The loss is L = sum_k w_k CE_k over the attributes, plus w BCE of the ingredients. Missing labels are ignored, and
    each rank averages over its own labels.

    Batch: ``image`` uint8 (B, 3, H, W), ``labels`` {attribute: int64 (B,), -100 if missing}, and with ingredients
    ``ingredients`` uint8 (B, V) of 0 and 1, a row of 255 if missing. Prediction: ``attributes`` {attribute:
    probabilities float32 (B, C)}, and with ingredients ``ingredients``, probabilities float32 (B, V). Metrics: those of
    `AttributeMetrics`.

    Args:
        backbone: name of a ResNet.
        attributes: class names of each attribute; ``train.py`` takes them from the data.
        ingredient_names: V names, empty without ingredients; ``train.py`` takes them from the data.
        weights: weights of the backbone. None trains from scratch; DEFAULT (or IMAGENET1K_V1, ...) loads torchvision's
            ImageNet weights; a file is a state dict, or a checkpoint of `ImageClassifier`.
        base_channels: channels of the first stage of a CIFAR ResNet.
        channels: channels of the aggregated features.
        kernel_sizes: odd kernel sizes of the multi-scale convolutions.
        attribute_weights: loss weights w_k by attribute or ``ingredients``; 1 if not given.
        class_weights: one factor per class, by attribute. ``balanced``, for one attribute or for all, uses N / (C n_c)
            with the n_c training samples of each class.
        head_lr_scale: factor of the learning rate of all layers after the backbone.
        **kwargs: see `VisionModule`.
    """

    monitor = ("val/mean_macro_f1", "max")

    def __init__(
        self,
        backbone: ResNetName = "resnet50",
        attributes: dict[str, list[str]] | None = None,
        ingredient_names: list[str] | None = None,
        weights: str | None = None,
        base_channels: int = 16,
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
        _check_arguments(self.attributes, attribute_weights, class_weights, kernel_sizes, bool(self.ingredient_names))
        self.attribute_weights = attribute_weights or {}
        self.head_lr_scale = head_lr_scale
        names = self.attributes | ({INGREDIENTS: self.ingredient_names} if self.ingredient_names else {})
        self.class_names = names
        outputs = {name: len(classes) for name, classes in names.items()}
        self.network = AttributeNetwork(backbone, outputs, base_channels, channels, kernel_sizes)
        if weights is not None:
            load_weights(self.network.backbone, find_weights(backbone, weights), backbone, "fc")
        by_name = dict.fromkeys(self.attributes, class_weights) if class_weights == "balanced" else class_weights or {}
        self.balanced = [name for name in self.attributes if by_name.get(name) == "balanced"]
        self.class_weights = nn.ModuleDict(
            {name: Constant(torch.tensor(values)) for name, values in by_name.items() if isinstance(values, list)}
        )

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return a weighted term for each attribute, under its name, and ``ingredients``."""
        logits = self.network(self.preprocess(batch["image"]))
        terms: dict[str, Tensor] = {}
        for name in self.attributes:
            weights = self.class_weights[name]() if name in self.class_weights else None
            terms[name] = masked_cross_entropy(logits[name], batch["labels"][name], weights)
        if INGREDIENTS in logits:
            terms[INGREDIENTS] = masked_binary_cross_entropy(logits[INGREDIENTS], batch["ingredients"])
        return {name: self.attribute_weights.get(name, 1.0) * term for name, term in terms.items()}

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Any]:
        """Return the probabilities of all classes of every attribute, and of every ingredient; see the class."""
        logits = self.network(self.preprocess(require_equal_size(images, "--data.eval_crop_size")))
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
        return head_groups(self, [self.network.scales, self.network.heads], self.head_lr_scale)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit" or not self.balanced:
            return
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "attribute_labels"):
            raise UserError("class_weights: balanced needs a datamodule with attribute_labels; give lists")
        labels = data.attribute_labels("train")
        for name in self.balanced:
            self.class_weights[name] = Constant(balanced_weights(labels[name], len(self.attributes[name])))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not isinstance(batch, dict) or "labels" not in batch:
            return batch
        for name, classes in self.attributes.items():
            if name not in batch["labels"]:
                raise UserError(f"labels: expected {', '.join(self.attributes)}, found {', '.join(batch['labels'])}")
            require_labels_in_range(f"labels: {name}", batch["labels"][name], len(classes), MISSING)
        count = len(self.ingredient_names)
        if count and (found := len(batch.get(INGREDIENTS, [[]])[0])) != count:
            advice = f"set --data.vocabulary_size {count}"
            raise UserError(f"ingredients: expected {count} per sample, found {found}; {advice}")
        return batch


def _check_arguments(
    attributes: dict[str, list[str]],
    attribute_weights: dict[str, float] | None,
    class_weights: Any,
    kernel_sizes: Sequence[int],
    ingredients: bool,
) -> None:
    """Raise a UserError if the arguments of `AttributeClassifier` contradict each other."""
    if not attributes or not all(attributes.values()):
        found = {name: len(names) for name, names in attributes.items()}
        raise UserError(
            f"attributes: expected one or more, each with classes, found {found}; check that the data has attributes"
        )
    if INGREDIENTS in attributes:
        raise UserError(f"attributes: expected no attribute named {INGREDIENTS}, found one; use ingredient_names")
    if not kernel_sizes or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
        raise UserError(f"kernel_sizes: expected odd numbers, found {list(kernel_sizes)}")
    by_name = class_weights if isinstance(class_weights, dict) else {}
    for option, given, allowed in (
        ("attribute_weights", attribute_weights or {}, {*attributes, INGREDIENTS} if ingredients else {*attributes}),
        ("class_weights", by_name, {*attributes}),
    ):
        if unknown := sorted(set(given) - allowed):
            raise UserError(f"{option}: expected names among {', '.join(sorted(allowed))}, found {unknown[0]}")
    if any(w < 0 for w in (attribute_weights or {}).values()):
        raise UserError(f"attribute_weights: expected 0 or more, found {attribute_weights}")
    for name, values in by_name.items():
        if values != "balanced" and len(values) != len(attributes[name]):
            raise UserError(
                f"class_weights: {name}: expected {len(attributes[name])}, one per class, found {len(values)}"
            )
