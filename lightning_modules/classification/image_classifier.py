"""One image, one class: the networks of ImageNet's history under one loss, with their pretrained weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import VisionModule
from lightning_modules.classification.metrics import ClassificationMetrics
from lightning_modules.components.networks import AUXILIARY, Network, build_network, traits
from lightning_modules.components.pretrained import find_weights, load_weights

# --- network ------------------------------------------------------------------------------------------------------


# --- loss ---------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """L = -(1/N) sum_i log softmax(f(x_i))_{y_i}, in float32.

    With label smoothing e (Szegedy et al. 2016, section 7) the target is 1-e+e/C at the true class, e/C at the others.
    With class weights w every term counts w_c and the sum is divided by that of w_{y_i}.

    Args:
        logits: f(x), (N,C) of any float type.
        labels: int64 (N,) in 0..C-1.
        smoothing: e.
        weights: float (C,).
    """
    return F.cross_entropy(logits.float(), labels, weights, label_smoothing=smoothing)


def balanced_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """N / (C n_c) for every class c of n_c samples: float32 (num_classes,), 1 for a class without any.

    N and C count the samples that have a class (0 or more) and the classes that have samples.
    """
    counts = torch.from_numpy(np.bincount(labels[labels >= 0], minlength=num_classes))
    weights = counts.sum() / ((counts > 0).sum() * counts)
    return torch.where(counts > 0, weights, 1.0).float()


def training_set_weights(trainer: pl.Trainer, num_classes: int) -> Tensor:
    """`balanced_weights` of the training set that the trainer's datamodule holds."""
    data = getattr(trainer, "datamodule", None)
    labels = data.labels("train") if data is not None else None
    if labels is None:
        raise UserError("class_weights: balanced needs a datamodule with one class a sample: give a list")
    return balanced_weights(labels, num_classes)


def check_labels(batch: Any, num_classes: int) -> None:
    """Raises ValueError for a ``label`` out of range, while it is still on the CPU: a GPU's assertion is unreadable."""
    label = batch.get("label") if isinstance(batch, dict) else None
    if label is not None and not label.is_cuda and ((label < 0) | (label >= num_classes)).any():
        raise UserError(
            f"label: expected 0..{num_classes - 1} (num_classes {num_classes}), found {label.min()} to {label.max()}: "
            "are these the classes that the model was made for?"
        )


# --- decoding -----------------------------------------------------------------------------------------------------


def ten_crops(images: Tensor, size: int) -> list[Tensor]:
    """Four corners, the center, and their reflections (Krizhevsky 2012, section 4.1): ten of (B,3,size,size)."""
    height, width = images.shape[-2:]
    if height <= size or width <= size:
        raise UserError(
            f"ten_crop: expected images larger than {size} pixels on both sides, found {height}x{width}: "
            f"set --data.eval_crop {256 if size in (224, 227) else round(size * 8 / 7)}"
        )
    bottom, right = height - size, width - size
    corners = ((0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2)))
    crops = [images[..., y : y + size, x : x + size] for y, x in corners]
    return crops + [crop.flip(-1) for crop in crops]


# --- module -------------------------------------------------------------------------------------------------------


class ImageClassifier(VisionModule):
    """A network that gives each image one of C classes, trained by cross entropy.

    Batch: ``image`` uint8 (B,3,H,W), ``label`` int64 (B,) in 0..C-1. Prediction: {``probabilities``: float32 (B,C)}.
    Metrics: see `ClassificationMetrics`. GoogLeNet and Inception-v3 train with auxiliary heads, whose weighted losses
    are the terms ``aux1``, ``aux2``; they are no part of a prediction.

    Args:
        network: its name. alexnet is torchvision's of 2014, alexnet_2012 the paper's; _cifar are those for 32x32.
        num_classes: number of classes C; ``train.py`` takes it from the data.
        class_names: one name a class, for tables and images; ``train.py`` takes them from the data.
        weights: None to train from scratch; DEFAULT (or IMAGENET1K_V1, ...) for torchvision's ImageNet weights; or a
            file: a state dict or one of our checkpoints. A head for another number of classes is initialized anew.
        width: channels of a CIFAR ResNet's first stage.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: one factor a class in the loss, for sets with rare classes; ``balanced`` takes N / (C n_c) from
            the training data's counts n_c, so that every class weighs the same and a sample weighs 1 on average.
        aux_weight: of each auxiliary loss, 0 leaves the heads out. None takes the network's own: 0.3 for GoogLeNet
            (Szegedy et al. 2015, section 5), 0.4 for Inception-v3 (the authors' TF-slim code; the paper gives none).
        dropout: None takes torchvision's; GoogLeNet's paper has 0.4 where torchvision has 0.2.
        input_size: side in pixels of what the network sees; None takes its own: 224, 227 for alexnet_2012, 299 for
            inception_v3, 32 for the CIFAR ResNets. Data come in that size, but larger for ``ten_crop``.
        ten_crop: average the softmax over ten crops of ``input_size`` in evaluation, at ten times the cost.
        freeze_trunk: train the last layer alone; the rest stays as it is, batch statistics and dropout included.
        head_lr_scale: multiplies the last layer's learning rate.
        mean, std: None takes what the network was trained with: 0.5 for GoogLeNet and Inception-v3, ImageNet's for the
            others, where alexnet_2012 takes the mean alone.
        kwargs: optimizer, schedule and channels_last of `VisionModule`.
    """

    monitor = ("val/top1", "max")

    def __init__(
        self,
        network: Network = "resnet50",
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        weights: str | None = None,
        width: int = 16,
        label_smoothing: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        aux_weight: float | None = None,
        dropout: float | None = None,
        input_size: int | None = None,
        ten_crop: bool = False,
        freeze_trunk: bool = False,
        head_lr_scale: float = 1.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        own = traits(network)
        super().__init__(mean=mean or own["mean"], std=std or own["std"], **kwargs)
        if num_classes < 1:
            raise UserError(f"num_classes: expected 1 or more, found {num_classes}: does the data have classes?")
        for name, values in (("class_names", class_names), ("class_weights", class_weights)):
            if values not in (None, "balanced") and len(values) != num_classes:
                raise UserError(f"{name}: expected {num_classes}, one a class, found {len(values)}")
        self.num_classes, self.class_names = num_classes, class_names
        self.label_smoothing, self.ten_crop = label_smoothing, ten_crop
        self.input_size = input_size or own["input_size"]
        self.aux_weight = own["aux_weight"] if aux_weight is None else aux_weight
        self.freeze_trunk, self.head_lr_scale = freeze_trunk, head_lr_scale
        # Constants, no buffer: see VisionModule.
        self.class_weights = class_weights
        self._class_weights = torch.tensor(class_weights) if isinstance(class_weights, list) else None
        # A frozen trunk learns nothing from auxiliary heads.
        auxiliary = self.aux_weight > 0 and not freeze_trunk
        self.network = build_network(network, num_classes, width, dropout, auxiliary)
        if weights is not None:
            load_weights(self.network, find_weights(network, weights), network, own["head"], *AUXILIARY)
        self.head: str = own["head"]
        if freeze_trunk:
            self.network.requires_grad_(False).get_submodule(self.head).requires_grad_(True)
        self.train()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``cross_entropy``, and in training the weighted ``aux1`` (the one nearest to the image) and ``aux2``."""
        outputs = self.network(self.preprocess(self._stacked(batch["image"])))
        # Torchvision names its tuples logits, aux_logits2, aux_logits1: the reverse is the order of the network.
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        terms = {"cross_entropy": self._cross_entropy(logits, batch["label"])}
        for i, aux_logits in enumerate(reversed(auxiliary), start=1):
            terms[f"aux{i}"] = self.aux_weight * self._cross_entropy(aux_logits, batch["label"])
        return terms

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """``probabilities`` float32 (B,C) for uint8 images (B,3,H,W), or a list of (3,H,W) of one size."""
        stacked = self._stacked(images)
        views = ten_crops(stacked, self.input_size) if self.ten_crop else [stacked]
        softmax = [self.network(self.preprocess(view)).float().softmax(1) for view in views]
        return {"probabilities": torch.stack(softmax).mean(0)}

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"classification": ClassificationMetrics(self.num_classes)})

    def update_metrics(self, metrics: MetricCollection, predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
        metrics.update(predictions["probabilities"], batch["label"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trunk, and the last layer with ``head_lr_scale``; one group where that is 1."""
        if self.head_lr_scale == 1:
            return super().parameter_groups()
        head = list(self.network.get_submodule(self.head).parameters())
        in_head = {id(p) for p in head}
        trunk = [p for p in self.parameters() if p.requires_grad and id(p) not in in_head]
        groups: list[dict[str, Any]] = [{"params": trunk}, {"params": head, "lr_scale": self.head_lr_scale}]
        return [group for group in groups if group["params"]]

    def train(self, mode: bool = True) -> ImageClassifier:
        """As ever, but a frozen trunk stays in evaluation mode, so that its batch statistics stay too."""
        super().train(mode)
        if self.freeze_trunk:
            self.network.eval().get_submodule(self.head).train(mode)
        return self

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.class_weights == "balanced":
            self._class_weights = training_set_weights(self.trainer, self.num_classes)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """See `check_labels`."""
        check_labels(batch, self.num_classes)
        return batch

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self._class_weights is not None:
            self._class_weights = self._class_weights.to(logits.device)
        return cross_entropy(logits, labels, self.label_smoothing, self._class_weights)

    @staticmethod
    def _stacked(images: Tensor | list[Tensor]) -> Tensor:
        if isinstance(images, Tensor):
            return images
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) != 1:
            raise UserError(
                f"images: expected one size in a batch, found {len(sizes)} ({', '.join(map(str, sorted(sizes)[:3]))}): "
                "set --data.eval_crop"
            )
        return torch.stack(images)
