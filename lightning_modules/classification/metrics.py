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
        # Not bincount: it waits for the device to know its length. Not in place: the state may be an inference tensor.
        counts = torch.zeros_like(self.confusion).view(-1).scatter_add_(0, cells, torch.ones_like(cells))
        self.confusion = self.confusion + counts.view_as(self.confusion)
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
            "per_class_accuracy": per_class,
            "confusion_matrix": self.confusion,
            "loss": self.negative_log_likelihood / samples,
        }
        if self.num_classes > 5:
            results["top5"] = self.top5_hits / samples
        return results
