"""What is measured of a classifier, over the whole set at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassificationMetrics(Metric):
    """Accuracies, confusion matrix and mean loss from one pass, exact on any number of ranks and any last batch.

    ``compute`` gives:

    - ``top1``, ``top5``: share of samples whose class is the first, or among the first five, of the prediction. They
      are "micro", as the field reports them: every sample counts the same. ``top5`` only beyond five classes.
    - ``mean_class_accuracy``: mean of the classes' own accuracies; classes without a sample are left out.
    - ``macro_f1``: mean of the classes' F1, 2 TP / (2 TP + FP + FN); classes that neither occur nor are predicted are
      left out.
    - ``per_class_accuracy``: float32 (C,), nan for a class without a sample.
    - ``confusion_matrix``: int64 (C,C), rows are the truth, columns the prediction.
    - ``loss``: mean negative log-likelihood of a sample, without label smoothing or class weights.

    All are nan while no sample was seen.

    Args:
        num_classes: C.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

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
        """Adds a batch: probabilities float32 (B,C), labels int64 (B,) in 0..C-1."""
        cells = labels * self.num_classes + probabilities.argmax(1)
        # Not in place: the state may be an inference tensor.
        self.confusion = self.confusion + _count(cells, self.confusion)
        if self.num_classes > 5:
            self.top5_hits = self.top5_hits + (probabilities.topk(5).indices == labels[:, None]).sum()
        # A probability may underflow to zero; its logarithm may not.
        likelihood = probabilities.gather(1, labels[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
        self.negative_log_likelihood = self.negative_log_likelihood - likelihood.log().sum()

    def compute(self) -> dict[str, Tensor]:
        """The results named above."""
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
    """Each attribute's accuracy and macro-F1, and how often all are right, exact on any number of ranks and batches.

    Samples without a label for an attribute do not count for that attribute. ``compute`` gives:

    - ``<attribute>_accuracy``: share of samples whose class is the most probable one.
    - ``<attribute>_macro_f1``: mean of the classes' F1, 2 TP / (2 TP + FP + FN). A class that neither occurs nor is
      predicted has none and is left out (scikit-learn's default too): a split need not hold every class. One that is
      predicted and never occurs counts as 0.
    - ``mean_accuracy``, ``mean_macro_f1``: means over the attributes, those without a labeled sample left out.
    - ``all_correct``: share of samples whose every labeled attribute is right, among those with at least one label.
    - ``loss``: sum over the attributes of their mean negative log-likelihood, without weights.
    - ``ingredients_micro_f1``: of all (sample, ingredient) pairs together, predicted from a probability of 0.5 on.
    - ``ingredients_map``: mean over the ingredients of their average precision, sum_n (R_n - R_{n-1}) P_n over falling
      thresholds 200/200, 199/200, ... 0; those that never occur are left out.

    What counted nothing is nan.

    Args:
        attributes: {name: number of classes}.
        num_ingredients: V; 0 leaves the ingredients' figures out.
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
        # All confusion matrices one behind the other, rows are the truth; the last cell takes what has no label.
        self.add_state("cells", torch.zeros(sum(self.sizes) + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("negative_log_likelihood", torch.zeros(len(attributes)), dist_reduce_fx="sum")
        # Those with all labels right, and those with any label.
        self.add_state("samples", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        # Of each ingredient, how often it was given each probability: [absent, present], rounded down to 1/200.
        shape = (2, num_ingredients, self.THRESHOLDS + 1)
        self.add_state("scores", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        probabilities: dict[str, Tensor],
        labels: dict[str, Tensor],
        ingredients: Tensor | None = None,
        present: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            probabilities: {attribute: float32 (B,C)}.
            labels: {attribute: int64 (B,)}, -100 where missing.
            ingredients: probabilities, float32 (B,V).
            present: uint8 (B,V) of 0 and 1, a row of 255 where missing.
        """
        cells, losses, right, known = [], [], [], []
        start = 0
        for (name, count), size in zip(self.attributes.items(), self.sizes, strict=True):
            p, label = probabilities[name], labels[name]
            has, predicted, safe = label >= 0, p.argmax(1), label.clamp(min=0)
            cells.append(torch.where(has, start + safe * count + predicted, sum(self.sizes)))
            likelihood = p.gather(1, safe[:, None]).squeeze(1).clamp_min(torch.finfo(torch.float32).tiny)
            losses.append(-(likelihood.log() * has).sum())
            right.append(~has | (predicted == label))
            known.append(has)
            start += size
        # States are not changed in place: they may be inference tensors.
        self.cells = self.cells + _count(torch.cat(cells), self.cells)
        self.negative_log_likelihood = self.negative_log_likelihood + torch.stack(losses)
        any_known = torch.stack(known).any(0)
        self.samples = self.samples + torch.stack([(torch.stack(right).all(0) & any_known).sum(), any_known.sum()])
        if ingredients is not None and present is not None:
            bins = (ingredients * self.THRESHOLDS).long().clamp(0, self.THRESHOLDS)
            number = torch.arange(self.num_ingredients, device=bins.device)
            place = ((present == 1) * self.num_ingredients + number) * (self.THRESHOLDS + 1) + bins
            counted = (present != 255).long().flatten()
            self.scores = self.scores + _count(place.flatten(), self.scores, counted)

    def compute(self) -> dict[str, Tensor]:
        """The results named above."""
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
        return results | (self._ingredients() if self.num_ingredients else {})

    def _ingredients(self) -> dict[str, Tensor]:
        # Cumulated from the most probable bin on: how many would be found, and how many of them rightly.
        absent, present = self.scores.flip(2).cumsum(2)
        precision, positives = present / (absent + present), present[:, -1:]
        gained = present.diff(dim=1, prepend=torch.zeros_like(positives)) / positives
        average_precision = torch.where(gained > 0, gained * precision, 0.0).sum(1)
        average_precision = torch.where(positives[:, 0] > 0, average_precision, torch.nan)
        half = self.THRESHOLDS // 2  # the bins from 0.5 on
        true, false = present[:, half].sum(), absent[:, half].sum()
        return {
            "ingredients_micro_f1": 2 * true / (true + false + positives.sum()),
            "ingredients_map": average_precision.nanmean(),
        }


def _macro_f1(confusion: Tensor) -> Tensor:
    """Mean of the classes' F1; 0/0, a class that neither occurs nor is predicted, is left out."""
    return (2 * confusion.diagonal() / (confusion.sum(0) + confusion.sum(1))).nanmean()


def _count(places: Tensor, like: Tensor, amounts: Tensor | None = None) -> Tensor:
    """How often each flat position of ``like`` occurs: int64, of its shape.

    Not bincount: it waits for the device to know its length.
    """
    amounts = torch.ones_like(places) if amounts is None else amounts
    return torch.zeros_like(like).view(-1).scatter_add_(0, places, amounts).view_as(like)
