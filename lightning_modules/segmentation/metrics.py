"""Metrics of segmentation.

- Mean IoU and accuracies: Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR
  2015, section 5; VOCevalseg.m of the VOC development kit.
- AP^r: Hariharan, Arbelaez, Girshick and Malik, "Simultaneous Detection and Segmentation", ECCV 2014.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from errors import UserError
from lightning_modules.components.average_precision import APMethod, COCOMeanAP, VOCMeanAP

#: Id of pixels without a class; losses and metrics ignore them.
VOID = 255


def segmentation_metrics(num_classes: int) -> MetricCollection:
    """Return the metrics of semantic segmentation: `SegmentationMetrics`."""
    return MetricCollection({"segmentation": SegmentationMetrics(num_classes)})


def instance_metrics(
    num_classes: int, ap_method: APMethod = "11point", compute_coco_ap: bool = True
) -> MetricCollection:
    """Return the metrics of instance segmentation: AP^r at IoU 0.5 and 0.7.

    Their names are ``apr_50`` and ``apr_70``. The per-class tables (``ap``, ``precision``, ``objects``, ``detections``)
    are those at 0.5.

    Args:
        num_classes: number of classes, without the background.
        ap_method: see `VOCMeanAP`.
        compute_coco_ap: also compute COCO's average precision of boxes and masks.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "apr_50": RegionAP(num_classes, ap_method, 0.5, tables=True),
        "apr_70": RegionAP(num_classes, ap_method, 0.7),
    }
    if compute_coco_ap:
        metrics["coco"] = COCOMeanAP(masks=True)
    # No compute groups: torchmetrics would merge the two thresholds for good if their first batch has equal results.
    return MetricCollection(metrics, compute_groups=False)


class SegmentationMetrics(Metric):
    """Mean IoU and accuracies, from one confusion matrix over the whole set (VOCevalseg.m; Long et al. 2015).

    Let n_ij be the number of pixels of class i predicted as class j, t_i the number of pixels of class i, and C the
    number of classes. ``compute`` returns, over all samples of all ranks:

    - ``miou``: mean over the classes of n_ii / (t_i + sum_j n_ji - n_ii), float32 scalar.
    - ``pixel_accuracy``: sum_i n_ii / sum_i t_i, float32 scalar.
    - ``mean_accuracy``: mean of n_ii / t_i over the classes with t_i > 0, float32 scalar.
    - ``fwiou``: IoU averaged over the classes with weights t_i, float32 scalar.
    - ``iou``: IoU of each class, float32 (C,).
    - ``confusion_matrix``: n_ij, int64 (C, C); rows are the ground truth.

    Void pixels are ignored. The IoU of a class that occurs in neither ground truth nor prediction is nan and does not
    enter the mean, as in torchmetrics. The development kit divides 0 by 0 there and its mean is nan; on VOC's sets
    every class occurs. The IoU of a class that is only predicted is 0.

    The ground truth has the original size of the images, as in the development kit. Averages of per-batch or per-image
    values, and values on resized ground truth, differ.

    Args:
        num_classes: number of classes, C; ids are 0..C-1.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    array_results: ClassVar = {"iou": 1, "confusion_matrix": 2}

    matrix: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if not 1 <= num_classes <= VOID:
            raise UserError(f"num_classes: expected 1 to {VOID}, found {num_classes}")
        self.num_classes = num_classes
        self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Add images.

        Args:
            preds: one map of class ids per image, integer (H, W).
            target: one map of class ids per image, integer (H, W); 255 is void.

        Raises:
            UserError: the lists differ in length, two maps differ in size, or an id is not a class.
        """
        if len(preds) != len(target):
            raise UserError(f"preds: expected as many predictions as targets, found {len(preds)} and {len(target)}")
        for i, (p, t) in enumerate(zip(preds, target, strict=True)):
            if p.shape != t.shape:
                raise UserError(
                    f"preds[{i}]: expected the ground truth's size {tuple(t.shape)}, found {tuple(p.shape)}; "
                    "resize the logits, never the ground truth"
                )
        if not any(m.numel() for m in preds):
            return
        predicted, true = (torch.cat([m.flatten() for m in maps]).long() for maps in (preds, target))
        void = true == VOID
        for name, ids in (("preds", predicted), ("target", true.masked_fill(void, 0))):
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.num_classes:
                wrong = low if low < 0 else high
                raise UserError(f"{name}: expected ids 0 to {self.num_classes - 1}, found {wrong}")
        # Count void as one more row, and drop that row.
        cells = true.masked_fill(void, self.num_classes) * self.num_classes + predicted
        counts = torch.bincount(cells, minlength=self.num_classes * (self.num_classes + 1))[: self.num_classes**2]
        self.matrix = self.matrix + counts.view(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """The results named in the class docstring."""
        correct, true = self.matrix.diagonal().double(), self.matrix.sum(1).double()
        iou = correct / (true + self.matrix.sum(0) - correct)
        results = {
            "miou": iou.nanmean(),
            "pixel_accuracy": correct.sum() / true.sum(),
            "mean_accuracy": (correct / true).nanmean(),
            "fwiou": (true * iou.nan_to_num(0)).sum() / true.sum(),
            "iou": iou,
        }
        return {**{name: value.float() for name, value in results.items()}, "confusion_matrix": self.matrix}


class RegionAP(VOCMeanAP):
    """AP^r: average precision of objects that are matched by the IoU of their masks, not boxes (Hariharan et al. 2014).

    Detections are matched as in `VOCMeanAP`, by ``masks``, bool or uint8 (N, H, W), in predictions and targets.
    The papers define no difficult objects, and the data contains none.

    ``compute`` returns ``apr_<threshold in percent>``, the mean over the classes.

    Args:
        num_classes: number of classes, C; labels are 0..C-1.
        method: ``11point`` or ``area``; see `VOCMeanAP`.
        iou_threshold: smallest mask IoU of a match; 0.5 or 0.7 in the papers.
        tables: also return ``ap``, ``precision``, ``objects`` and ``detections``; see `VOCMeanAP`.
    """

    def __init__(
        self, num_classes: int, method: APMethod = "11point", iou_threshold: float = 0.5, tables: bool = False
    ) -> None:
        super().__init__(num_classes, method, iou_threshold)
        self.tables = tables

    def pairwise_iou(self, pred: dict[str, Any], gt: dict[str, Any]) -> Tensor:
        return mask_iou(pred["masks"], gt["masks"])

    def compute(self) -> dict[str, Tensor]:
        """The results named in the class docstring."""
        results = super().compute()
        mean = {f"apr_{round(100 * self.iou_threshold)}": results.pop("map")}
        return {**mean, **results} if self.tables else mean


def mask_iou(masks: Tensor, gt_masks: Tensor) -> Tensor:
    """Compute the IoU of all pairs of masks; it is 0 if both are empty.

    Args:
        masks: bool or uint8 (N, H, W) of 0 and 1.
        gt_masks: bool or uint8 (M, H, W) of 0 and 1.

    Returns:
        IoU, float64 (N, M).

    Raises:
        UserError: the masks differ in size.
    """
    if masks.shape[1:] != gt_masks.shape[1:]:
        raise UserError(
            f"masks: expected the ground truth's size {tuple(gt_masks.shape[1:])}, found {tuple(masks.shape[1:])}"
        )
    # Float64 counts exactly and is not affected by autocast.
    first, second = masks.flatten(1).double(), gt_masks.flatten(1).double()
    intersection = first @ second.T
    union = first.sum(1)[:, None] + second.sum(1) - intersection
    return torch.where(union > 0, intersection / union, 0.0)
