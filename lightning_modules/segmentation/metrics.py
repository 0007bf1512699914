"""What is measured of a segmentation: overlaps of classes over a whole set, and average precision of objects' masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from errors import UserError
from lightning_modules.components.average_precision import APMethod, COCOMeanAP, VOCMeanAP

VOID = 255


def segmentation_metrics(num_classes: int) -> MetricCollection:
    """What every system that gives each pixel a class is measured by: `SegmentationMetrics`."""
    return MetricCollection({"segmentation": SegmentationMetrics(num_classes)})


def instance_metrics(num_classes: int, ap: APMethod = "11point", coco: bool = True) -> MetricCollection:
    """What every system that finds objects and their masks is measured by: AP^r at 0.5 and 0.7, and COCO's if asked for.

    ``apr_50``, ``apr_70``; the tables of a class (``ap``, ``precision``, ``objects``, ``detections``) are those at 0.5.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "apr_50": RegionAP(num_classes, ap, 0.5, tables=True),
        "apr_70": RegionAP(num_classes, ap, 0.7),
    }
    # No compute groups: torchmetrics would join the two for good where their first batch has equal results.
    return MetricCollection({**metrics, "coco": COCOMeanAP(masks=True)} if coco else metrics, compute_groups=False)


class SegmentationMetrics(Metric):
    """Intersections over union and accuracies from one confusion matrix of the set (VOCevalseg.m; Long et al. 2015).

    With n_ij pixels of class i predicted as class j, t_i of class i in all and C classes, ``compute`` gives, over all
    samples of all ranks:

    - ``miou``: the mean of n_ii / (t_i + sum_j n_ji - n_ii) over the classes, float32 scalar, as all that follow.
    - ``pixel_accuracy``: sum_i n_ii / sum_i t_i.
    - ``mean_accuracy``: the mean of n_ii / t_i over the classes with t_i > 0.
    - ``fwiou``: the classes' intersections over union, weighted by t_i.
    - ``iou``: float32 (C,), of each class.
    - ``confusion_matrix``: int64 (C,C), n_ij, rows are the truth.

    Pixels whose truth is 255 (void) do not count. A class that is neither there nor predicted has no intersection over
    union (nan) and is left out of the mean, as torchmetrics does it. The development kit divides zero by zero there and
    its mean is nan; on VOC's sets every class occurs. A class that is only predicted counts as 0.

    The truth has the images' own sizes, as the development kit demands. The mean of batches' or images' values, and
    values on a resized truth, are other numbers.

    Args:
        num_classes: C; ids are 0..C-1.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    matrix: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if not 1 <= num_classes <= VOID:
            raise UserError(f"num_classes: expected 1 to {VOID}, found {num_classes}")
        self.num_classes = num_classes
        self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Adds images.

        Args:
            preds: one map of ids an image, integers (h,w).
            target: the same of the truth, 255 where void.

        Raises:
            ValueError: the lists differ in length, two maps in size, or an id is not among the classes.
        """
        if len(preds) != len(target):
            raise UserError(f"expected as many predictions as targets, found {len(preds)} and {len(target)}")
        for i, (p, t) in enumerate(zip(preds, target, strict=True)):
            if p.shape != t.shape:
                raise UserError(
                    f"expected a prediction of the truth's size {tuple(t.shape)}, found {tuple(p.shape)} at {i}: "
                    "resize the scores to the truth, never the truth"
                )
        if not any(m.numel() for m in preds):
            return
        found, true = (torch.cat([m.flatten() for m in maps]).long() for maps in (preds, target))
        void = true == VOID
        for kind, ids in (("prediction", found), ("truth", true.masked_fill(void, 0))):
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.num_classes:
                wrong = low if low < 0 else high
                raise UserError(f"expected ids 0 to {self.num_classes - 1}, found {wrong} in a {kind}")
        # Void is one more row, which is left out.
        cells = true.masked_fill(void, self.num_classes) * self.num_classes + found
        counts = torch.bincount(cells, minlength=self.num_classes * (self.num_classes + 1))[: self.num_classes**2]
        self.matrix = self.matrix + counts.view(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """The results named above."""
        right, true = self.matrix.diagonal().double(), self.matrix.sum(1).double()
        iou = right / (true + self.matrix.sum(0) - right)
        results = {
            "miou": iou.nanmean(),
            "pixel_accuracy": right.sum() / true.sum(),
            "mean_accuracy": (right / true).nanmean(),
            "fwiou": (true * iou.nan_to_num(0)).sum() / true.sum(),
            "iou": iou,
        }
        return {**{name: value.float() for name, value in results.items()}, "confusion_matrix": self.matrix}


class RegionAP(VOCMeanAP):
    """AP^r: average precision of objects whose masks, not boxes, overlap enough (Hariharan et al. 2014).

    Detections are matched as `VOCMeanAP` matches them, by ``masks``, bool or uint8 (N,H,W), in predictions and targets;
    the papers know no difficult objects, and the data marks none.

    ``compute`` gives ``apr_<threshold in per cent>``, the mean over the classes.

    Args:
        num_classes: C; labels are 0..C-1.
        method: ``11point``, or ``area``; see `VOCMeanAP`.
        iou_threshold: the least overlap of the masks, 0.5 or 0.7 in the papers.
        tables: give ``ap``, ``precision``, ``objects`` and ``detections`` too, see `VOCMeanAP`.
    """

    def __init__(
        self, num_classes: int, method: APMethod = "11point", iou_threshold: float = 0.5, tables: bool = False
    ) -> None:
        super().__init__(num_classes, method, iou_threshold)
        self.tables = tables

    def pairwise_iou(self, pred: dict[str, Any], gt: dict[str, Any]) -> Tensor:
        return mask_iou(pred["masks"], gt["masks"])

    def compute(self) -> dict[str, Tensor]:
        """The results named above."""
        results = super().compute()
        mean = {f"apr_{round(100 * self.iou_threshold)}": results.pop("map")}
        return {**mean, **results} if self.tables else mean


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of each mask of one with each of the other: float64 (N,M); 0 where both are empty.

    Args:
        a, b: bool or uint8 (N,H,W) and (M,H,W) of 0 and 1.

    Raises:
        ValueError: they differ in size.
    """
    if a.shape[1:] != b.shape[1:]:
        raise UserError(f"masks: expected those of the objects' size {tuple(b.shape[1:])}, found {tuple(a.shape[1:])}")
    # Double precision counts exactly, and no autocast touches it.
    first, second = a.flatten(1).double(), b.flatten(1).double()
    shared = first @ second.T
    union = first.sum(1)[:, None] + second.sum(1) - shared
    return torch.where(union > 0, shared / union, 0.0)
