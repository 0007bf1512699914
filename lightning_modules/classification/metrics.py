"""Classification metrics over a whole set, exact on any number of ranks and for any batch size."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

MISSING = -100  # label of an attribute that a sample does not have
UNKNOWN = 255  # fills the row of a sample without ingredients


class ClassificationMetrics(Metric):
    """Accuracies, confusion matrix and mean loss.

    ``compute`` returns, all nan without samples:

    - ``top1``, ``top5``: fraction of samples whose class has the largest probability, or one of the five largest. They
      are micro-averaged: every sample has the same weight. ``top5`` needs more than five classes.
    - ``mean_class_accuracy``: mean of the per-class accuracies; classes without samples are ignored.
    - ``macro_f1``: mean of the per-class F1, 2 TP / (2 TP + FP + FN); classes without samples and predictions are
      ignored.
    - ``per_class_accuracy``: float32 (C,), nan for a class without samples.
    - ``confusion_matrix``: int64 (C, C), rows are the true classes, columns the predicted ones.
    - ``loss``: mean negative log-likelihood, without label smoothing or class weights.

    Args:
        num_classes: number of classes, C.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    array_results: ClassVar = {"per_class_accuracy": 1, "confusion_matrix": 2}

    confusion: Tensor
    top5_hits: Tensor
    negative_log_likelihood: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("top5_hits", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("negative_log_likelihood", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            probabilities: float32 (B, C).
            labels: int64 (B,) in 0..C-1.
        """
        cells = labels * self.num_classes + probabilities.argmax(1)
        # Not in place: the state may be an inference tensor.
        self.confusion = self.confusion + _bincount_like(cells, self.confusion)
        if self.num_classes > 5:
            self.top5_hits = self.top5_hits + (probabilities.topk(5).indices == labels[:, None]).sum()
        self.negative_log_likelihood = self.negative_log_likelihood - _log_likelihood(probabilities, labels).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the results listed above."""
        samples = self.confusion.sum()
        correct = self.confusion.diagonal()
        per_class = correct / self.confusion.sum(1)
        results = {
            "top1": correct.sum() / samples,
            "mean_class_accuracy": per_class.nanmean(),
            "macro_f1": _macro_f1(self.confusion),
            "per_class_accuracy": per_class,
            "confusion_matrix": self.confusion,
            "loss": self.negative_log_likelihood / samples,
        }
        if self.num_classes > 5:
            results["top5"] = self.top5_hits / samples
        return results


class AttributeMetrics(Metric):
    """Accuracy and macro-F1 of each attribute, and the fraction of samples with all attributes correct.

    A sample without a label for an attribute is ignored for that attribute. ``compute`` returns, nan without samples:

    - ``<attribute>_accuracy``: fraction of samples whose class has the largest probability.
    - ``<attribute>_macro_f1``: mean of the per-class F1, 2 TP / (2 TP + FP + FN). A class without samples and
      predictions is ignored (scikit-learn's default, too). A class with predictions but without samples counts as 0.
    - ``mean_accuracy``, ``mean_macro_f1``: means over the attributes with labels.
    - ``all_correct``: fraction of samples whose labeled attributes are all correct, among those with any label.
    - ``loss``: sum over the attributes of their mean negative log-likelihood, without weights.
    - ``ingredients_micro_f1``: F1 over all (sample, ingredient) pairs, with a threshold of 0.5.
    - ``ingredients_map``: mean over the ingredients of their average precision sum_n (R_n - R_{n-1}) P_n over the
      thresholds 200/200, 199/200, ..., 0; ingredients without positives are ignored.

    Args:
        attributes: number of classes of each attribute.
        num_ingredients: number of ingredients, V; 0 omits their metrics.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    THRESHOLDS = 200

    cells: Tensor
    negative_log_likelihood: Tensor
    samples: Tensor
    scores: Tensor

    def __init__(self, attributes: dict[str, int], num_ingredients: int = 0) -> None:
        super().__init__()
        self.attributes, self.num_ingredients = dict(attributes), num_ingredients
        self.sizes = [count**2 for count in attributes.values()]
        # Flattened confusion matrices (rows are true classes), concatenated; the last cell counts missing labels.
        self.add_state("cells", torch.zeros(sum(self.sizes) + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("negative_log_likelihood", torch.zeros(len(attributes)), dist_reduce_fx="sum")
        # Samples with all labels correct, and samples with any label.
        self.add_state("samples", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        # Histograms of the probabilities of absent and present ingredients, rounded down to multiples of 1/200.
        shape = (2, num_ingredients, self.THRESHOLDS + 1)
        self.add_state("scores", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        probabilities: dict[str, Tensor],
        labels: dict[str, Tensor],
        ingredients: Tensor | None = None,
        present: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            probabilities: float32 (B, C) of each attribute.
            labels: int64 (B,) of each attribute, -100 if missing.
            ingredients: probabilities, float32 (B, V).
            present: ground truth, uint8 (B, V) of 0 and 1; a row of 255 is missing.
        """
        cells, losses, correct, labeled = [], [], [], []
        start = 0
        for (name, count), size in zip(self.attributes.items(), self.sizes, strict=True):
            p, label = probabilities[name], labels[name]
            known, predicted, safe = label >= 0, p.argmax(1), label.clamp(min=0)
            cells.append(torch.where(known, start + safe * count + predicted, sum(self.sizes)))
            losses.append(-(_log_likelihood(p, safe) * known).sum())
            correct.append(~known | (predicted == label))
            labeled.append(known)
            start += size
        # Not in place: the states may be inference tensors.
        self.cells = self.cells + _bincount_like(torch.cat(cells), self.cells)
        self.negative_log_likelihood = self.negative_log_likelihood + torch.stack(losses)
        any_label = torch.stack(labeled).any(0)
        self.samples = self.samples + torch.stack([(torch.stack(correct).all(0) & any_label).sum(), any_label.sum()])
        if ingredients is not None and present is not None:
            bins = (ingredients * self.THRESHOLDS).long().clamp(0, self.THRESHOLDS)
            number = torch.arange(self.num_ingredients, device=bins.device)
            cell = ((present == 1) * self.num_ingredients + number) * (self.THRESHOLDS + 1) + bins
            counted = (present != UNKNOWN).long().flatten()
            self.scores = self.scores + _bincount_like(cell.flatten(), self.scores, counted)

    def compute(self) -> dict[str, Tensor]:
        """Return the results listed above."""
        results: dict[str, Tensor] = {}
        accuracies, f1s, losses = [], [], []
        parts = self.cells[:-1].split(self.sizes)
        for (name, count), part, loss in zip(self.attributes.items(), parts, self.negative_log_likelihood, strict=True):
            confusion = part.view(count, count)
            accuracies.append(confusion.diagonal().sum() / confusion.sum())
            f1s.append(_macro_f1(confusion))
            losses.append(loss / confusion.sum())
            results |= {f"{name}_accuracy": accuracies[-1], f"{name}_macro_f1": f1s[-1]}
        results["mean_accuracy"] = torch.stack(accuracies).nanmean()
        results["mean_macro_f1"] = torch.stack(f1s).nanmean()
        results["all_correct"] = self.samples[0] / self.samples[1]
        joint = torch.stack(losses)
        results["loss"] = torch.where(joint.isnan().all(), torch.nan, joint.nansum())
        return results | (self._compute_ingredients() if self.num_ingredients else {})

    def _compute_ingredients(self) -> dict[str, Tensor]:
        # False and true positives at each threshold, from the highest one to 0.
        absent, present = self.scores.flip(2).cumsum(2)
        precision, positives = present / (absent + present), present[:, -1:]
        recall_gain = present.diff(dim=1, prepend=torch.zeros_like(positives)) / positives
        average_precision = torch.where(recall_gain > 0, recall_gain * precision, 0.0).sum(1)
        average_precision = torch.where(positives[:, 0] > 0, average_precision, torch.nan)
        half = self.THRESHOLDS // 2  # index of the threshold 0.5
        true, false = present[:, half].sum(), absent[:, half].sum()
        return {
            "ingredients_micro_f1": 2 * true / (true + false + positives.sum()),
            "ingredients_map": average_precision.nanmean(),
        }


def _macro_f1(confusion: Tensor) -> Tensor:
    """Return the mean F1 of the classes; 0/0, a class without samples and predictions, is ignored."""
    return (2 * confusion.diagonal() / (confusion.sum(0) + confusion.sum(1))).nanmean()


def _log_likelihood(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return log p_{y_i} (B,); probabilities that underflow to 0 are raised to the smallest float32."""
    return probabilities.gather(1, labels[:, None]).squeeze(1).clamp_min(torch.finfo(torch.float32).tiny).log()


def _bincount_like(cells: Tensor, like: Tensor, amounts: Tensor | None = None) -> Tensor:
    """Count flat indices of ``like``, int64 of its shape; bincount would synchronize with the device."""
    amounts = torch.ones_like(cells) if amounts is None else amounts
    return torch.zeros_like(like).view(-1).scatter_add_(0, cells, amounts).view_as(like)
