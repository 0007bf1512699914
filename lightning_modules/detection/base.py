"""Base class of the detectors."""

from __future__ import annotations

from typing import Any

from torchmetrics import MetricCollection

from lightning_modules.base import VisionModule
from lightning_modules.components.average_precision import APMethod
from lightning_modules.detection.metrics import detection_metrics, scale_to_original


class Detector(VisionModule):
    """Base class of the detectors: classes, thresholds of the post-processing, and metrics.

    Batch: see detection in the batch contract (``datamodules/base.py``). ``predict`` returns one dict per image, best
    detection first: ``boxes`` float32 (K, 4), xyxy in pixels, ``scores`` float32 (K,), ``labels`` int64 (K,). Metrics:
    those of `VOCMeanAP` and, with ``compute_coco_ap``, of `COCOMeanAP`.

    Args:
        num_classes: number of classes, without the background; ``train.py`` takes it from the data.
        class_names: one name per class; ``train.py`` takes them from the data.
        score_threshold: detections with a lower score are dropped.
        nms_threshold: IoU above which non-maximum suppression drops the weaker of two boxes of one class.
        ap_method: how VOC's average precision is computed: ``area`` (VOC2010 and later) or ``11point`` (VOC2007).
        compute_coco_ap: also compute COCO's average precision.
        **kwargs: see `VisionModule`.
    """

    monitor = ("val/map", "max")

    def __init__(
        self,
        num_classes: int = 20,
        class_names: list[str] | None = None,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        ap_method: APMethod = "area",
        compute_coco_ap: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.class_names = num_classes, class_names
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.ap_method, self.compute_coco_ap = ap_method, compute_coco_ap

    def name_classes(self, class_names: list[str] | None) -> None:
        """Take the names of the classes from a file of weights, unless they are known; checkpoints keep them."""
        if self.class_names is None and class_names is not None:
            self.class_names = self.hparams["class_names"] = class_names

    def build_metrics(self) -> MetricCollection:
        return detection_metrics(self.num_classes, self.ap_method, self.compute_coco_ap)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(*scale_to_original(predictions, batch))
