"""Metrics of detection and of region proposals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_modules.components.average_precision import APMethod, COCOMeanAP, VOCMeanAP, require_equal_length
from lightning_modules.components.boxes import batched_box_iou, constant_like


def detection_metrics(num_classes: int, ap_method: APMethod, compute_coco_ap: bool) -> MetricCollection:
    """Return the metrics of a detector: `VOCMeanAP` and, if asked for, `COCOMeanAP`."""
    metrics: dict[str, Metric | MetricCollection] = {"voc": VOCMeanAP(num_classes, ap_method)}
    return MetricCollection({**metrics, "coco": COCOMeanAP()} if compute_coco_ap else metrics)


def scale_to_original(
    predictions: Sequence[dict[str, Any]], batch: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scale the boxes of detections and ground truth to the images on disk, to whose pixels COCO's areas refer.

    Args:
        predictions: one dict per image with ``boxes`` (N, 4), xyxy in pixels of the image. Other entries are copied:
            masks have the size of the image on disk already.
        batch: see detection in the batch contract. Nothing is scaled without ``original_size``; ``original_target``
            takes the place of scaled ground truth.

    Returns:
        Copies of the predictions and of the targets; scaled ``boxes`` are float64.
    """
    target = batch.get("original_target", batch["target"])
    if "original_size" not in batch:
        return list(predictions), list(target)
    sizes = batch["original_size"].tolist()
    factors = [(w / image.shape[-1], h / image.shape[-2]) for (h, w), image in zip(sizes, batch["image"], strict=True)]
    detections = _scale_boxes(predictions, factors)
    return detections, list(target) if "original_target" in batch else _scale_boxes(target, factors)


def _scale_boxes(entries: Sequence[dict[str, Any]], factors: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """Multiply the boxes of each image by its (x, y) factors."""
    scaled = []
    for entry, factor in zip(entries, factors, strict=True):
        boxes = entry["boxes"].double()
        scaled.append({**entry, "boxes": boxes * constant_like([*factor, *factor], boxes)})
    return scaled


class ProposalRecall(Metric):
    """Recall of the first N proposals of each image, over the objects that are not difficult.

    ``compute`` returns, over all samples of all ranks, nan without objects:

    - ``recall_50``, ``recall_300``, ``recall_1000``: at an IoU of 0.5, as in Ren et al. 2015, section 3.4.
    - ``average_recall_50`` and so on: mean over the IoUs 0.5, 0.55, ... 0.95 (Hosang et al. 2015).
    - ``recall``: the recall by N and IoU, float32 (3, 10).
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    counts = (50, 300, 1000)

    recalled: Tensor
    objects: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("recalled", torch.zeros(len(self.counts), 10, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("objects", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
        """Add images.

        Args:
            preds: one dict per image: ``boxes`` float (N, 4), xyxy, best first.
            target: one dict per image: ``boxes`` float (M, 4), xyxy, and, if any object is difficult, ``difficult``
                bool (M,).

        Raises:
            UserError: the lists differ in length.
        """
        require_equal_length(preds, target)
        iou_thresholds = torch.arange(10, device=self.recalled.device) * 0.05 + 0.5
        for pred, gt in zip(preds, target, strict=True):
            difficult = gt.get("difficult", torch.zeros(len(gt["boxes"]), device=self.recalled.device)).bool()
            gt_boxes = gt["boxes"][~difficult].float()
            # An empty box overlaps nothing and avoids a special case for images without proposals.
            proposals = F.pad(pred["boxes"].float(), (0, 0, 0, 1))
            # (M, N): the highest IoU of each object with the first 1, 2, ... N proposals.
            best_iou = batched_box_iou(gt_boxes[None], proposals)[0].cummax(1).values
            last = torch.tensor([min(count, len(proposals)) - 1 for count in self.counts], device=best_iou.device)
            self.recalled += (best_iou[:, last, None] >= iou_thresholds).sum(0)
            self.objects += len(gt_boxes)

    def compute(self) -> dict[str, Tensor]:
        """The results named in the class docstring."""
        recall = self.recalled.float() / self.objects.where(self.objects > 0, torch.nan)
        named = {f"recall_{n}": recall[i, 0] for i, n in enumerate(self.counts)}
        averages = {f"average_{name}": row.mean() for name, row in zip(named, recall, strict=True)}
        return {**named, **averages, "recall": recall}
