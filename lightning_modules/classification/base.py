"""Base class of the classifiers: loss, class weights and metrics."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import VisionModule
from lightning_modules.classification.metrics import ClassificationMetrics
from lightning_modules.components.unsaved import Constant


def smoothed_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Compute L = -(1/N) sum_i log softmax(f(x_i))_{y_i} in float32.

    With label smoothing e (Szegedy et al. 2016, section 7) the target is 1 - e + e/C for the true class and e/C for the
    others. With class weights w, each term is multiplied by w_c and the sum divided by the sum of w_{y_i}.

    Args:
        logits: f(x), float (N, C).
        labels: int64 (N,) in 0..C-1.
        smoothing: e, in 0..1.
        weights: class weights, float (C,).
    """
    return F.cross_entropy(logits.float(), labels, weights, label_smoothing=smoothing)


def balanced_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Compute class weights N / (C n_c) from the number of samples n_c of each class.

    Args:
        labels: int (M,); negative labels are ignored.
        num_classes: length of the result.

    Returns:
        Weights, float32 (num_classes,), 1 for a class without samples. C counts only classes with samples.
    """
    counts = torch.from_numpy(np.bincount(labels[labels >= 0], minlength=num_classes))
    weights = counts.sum() / ((counts > 0).sum() * counts)
    return torch.where(counts > 0, weights, 1.0).float()


def require_labels_in_range(option: str, labels: Tensor, num_classes: int, missing: int | None = None) -> None:
    """Raise a UserError for labels outside of 0..C-1, before a GPU would fail with an unreadable assertion.

    Args:
        option: key of the batch, for the message.
        labels: int64 (N,); labels on a GPU are not checked.
        num_classes: C.
        missing: label of samples without a class.
    """
    if labels.is_cuda:
        return
    known = labels if missing is None else labels[labels != missing]
    if ((known < 0) | (known >= num_classes)).any():
        raise UserError(
            f"{option}: expected 0..{num_classes - 1} (num_classes {num_classes})"
            f"{'' if missing is None else f' or {missing} if missing'}, found {labels.min()} to {labels.max()}; "
            "check that the model was made for the classes of this data"
        )


class Classifier(VisionModule):
    """Base class of systems that assign one of C classes to an image.

    Batch: ``image`` uint8 (B, 3, H, W), ``label`` int64 (B,) in 0..C-1. Prediction: ``probabilities`` float32 (B, C).
    Metrics: those of `ClassificationMetrics`.

    Args:
        num_classes: number of classes, C; ``train.py`` takes it from the data.
        class_names: one name per class; ``train.py`` takes them from the data.
        class_weights: one factor per class in the training loss, for data with rare classes; ``balanced`` uses
            N / (C n_c) with the n_c training samples of each class.
        **kwargs: see `VisionModule`.
    """

    monitor: tuple[str, Literal["max", "min"]] | None = ("val/top1", "max")

    def __init__(
        self,
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        class_weights: list[float] | Literal["balanced"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise UserError(f"num_classes: expected 1 or more, found {num_classes}; check that the data has classes")
        for name, values in (("class_names", class_names), ("class_weights", class_weights)):
            if values not in (None, "balanced") and len(values) != num_classes:
                raise UserError(f"{name}: expected {num_classes}, one per class, found {len(values)}")
        self.num_classes, self.class_names = num_classes, class_names
        self.balanced = class_weights == "balanced"
        self.class_weights: Constant | None = None
        if isinstance(class_weights, list):
            self.class_weights = Constant(torch.tensor(class_weights))

    def cross_entropy(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the cross entropy with the class weights."""
        weights = None if self.class_weights is None else self.class_weights.value
        return smoothed_cross_entropy(logits, labels, smoothing, weights)

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"classification": ClassificationMetrics(self.num_classes)})

    def update_metrics(self, metrics: MetricCollection, predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
        metrics.update(predictions["probabilities"], batch["label"])

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.balanced:
            data = getattr(self.trainer, "datamodule", None)
            labels = data.labels("train") if data is not None else None
            if labels is None:
                raise UserError("class_weights: balanced needs a datamodule with one class per sample; give a list")
            self.class_weights = Constant(balanced_weights(labels, self.num_classes))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, dict) and "label" in batch:
            require_labels_in_range("label", batch["label"], self.num_classes)
        return batch
