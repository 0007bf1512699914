"""What is measured of a detector: average precision as PASCAL VOC's development kit computes it, and as COCO does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from errors import UserError
from lightning_modules.components.average_precision import APMethod, COCOMeanAP, VOCMeanAP
from lightning_modules.components.boxes import overlaps


def detection_metrics(num_classes: int, ap: APMethod, coco: bool) -> MetricCollection:
    """What every detector is measured by: `VOCMeanAP`, and `COCOMeanAP` if asked for."""
    metrics: dict[str, Metric | MetricCollection] = {"voc": VOCMeanAP(num_classes, ap)}
    return MetricCollection({**metrics, "coco": COCOMeanAP()} if coco else metrics)


class ProposalRecall(Metric):
    """Of the objects that are not difficult, the part that some of an image's first N proposals overlap enough.

    ``compute`` gives, over all samples of all ranks, nan without objects:

    - ``recall_50``, ``recall_300``, ``recall_1000``: with an IoU of 0.5, as in Ren et al. 2015, section 3.4.
    - ``average_recall_50`` and so on: the mean over IoUs of 0.5, 0.55 to 0.95 (Hosang et al. 2015).
    - ``recall``: float32 (3,10), by N and IoU, of which those are.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    counts = (50, 300, 1000)

    found: Tensor
    objects: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("found", torch.zeros(len(self.counts), 10, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("objects", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
        """Adds images.

        Args:
            preds: one dict an image: ``boxes`` float (N,4) xyxy, the best first.
            target: one dict an image: ``boxes`` float (M,4) xyxy and, if any object is difficult, ``difficult`` bool.

        Raises:
            ValueError: the lists differ in length.
        """
        if len(preds) != len(target):
            raise UserError(f"expected as many predictions as targets, found {len(preds)} and {len(target)}")
        least = torch.arange(10, device=self.found.device) * 0.05 + 0.5
        for proposed, entry in zip(preds, target, strict=True):
            marks = entry.get("difficult", torch.zeros(len(entry["boxes"]), device=self.found.device))
            boxes = entry["boxes"][~marks.bool()]
            # One more that overlaps nothing, so that an image without proposals is nothing special.
            others = F.pad(proposed["boxes"].float(), (0, 0, 0, 1))
            best = overlaps(boxes.float()[None], others)[0].cummax(1).values
            at = torch.tensor([min(count, len(others)) - 1 for count in self.counts], device=best.device)
            self.found += (best[:, at, None] >= least).sum(0)
            self.objects += len(boxes)

    def compute(self) -> dict[str, Tensor]:
        """The results named above."""
        recall = self.found.float() / self.objects.where(self.objects > 0, torch.nan)
        named = {f"recall_{n}": recall[i, 0] for i, n in enumerate(self.counts)}
        return {
            **named,
            **{f"average_{name}": row.mean() for name, row in zip(named, recall, strict=True)},
            "recall": recall,
        }
