"""Average precision as PASCAL VOC and COCO define it.

- VOC: Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2; VOCevaldet.m.
- COCO: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision

from errors import UserError
from lightning_modules.components.boxes import paired_iou

APMethod = Literal["area", "11point"]

# What a detection is; an ignored one counts neither as a true nor as a false positive.
FALSE_POSITIVE, TRUE_POSITIVE, IGNORED = 0, 1, 2

# An area beyond COCO's largest range, 0 to 1e10: pycocotools ignores objects whose area is outside of a range.
IGNORED_AREA = 1e12


class VOCMeanAP(Metric):
    """Mean average precision by the rules of the VOC development kit.

    The detections of a class are ranked by score. Each is matched to the object of its class and image with the highest
    IoU, even if that object is already matched. It is a false positive if this IoU is below the threshold, ignored if
    the object is marked difficult, a true positive if it is the first match of the object, and a false positive
    otherwise. Difficult objects do not count for the recall. A class without other objects has no average precision
    (nan) and does not enter the mean.

    The development kit counts pixels inclusively, 1-based. Boxes stored as (xmin - 1, ymin - 1, xmax, ymax) have the
    same IoU as continuous rectangles.

    ``compute`` returns, over all samples of all ranks:

    - ``map``: mean of the average precisions of the classes, float32 scalar.
    - ``ap``: average precision of each class, float32 (C,).
    - ``precision``: interpolated precision at the recalls 0, 0.01, ... 1, float32 (C, 101); 0 at recalls that are not
      reached, nan for a class without objects that are not difficult.
    - ``objects``: number of objects that are not difficult, int64 (C,).
    - ``detections``: number of detections that are not ignored, int64 (C,).

    Detections of equal score are ranked by the order of the images in the dataset, on any number of ranks, then by
    their order in the image.

    Args:
        num_classes: number of classes, C; labels are 0..C-1.
        method: ``area`` under the interpolated precision-recall curve (VOC2010 and later), or ``11point``, the mean
            precision at the recalls 0, 0.1, ... 1 (VOC2007, which the papers report on its test set).
        iou_threshold: smallest IoU of a match; 0.5 in the challenge.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    array_results: ClassVar = {"ap": 1, "precision": 2, "objects": 1, "detections": 1}

    scores: list[Tensor]
    labels: list[Tensor]
    outcomes: list[Tensor]
    image_index: list[Tensor]
    objects: Tensor
    num_images: Tensor

    def __init__(self, num_classes: int, method: APMethod = "area", iou_threshold: float = 0.5) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"num_classes: expected 1 or more, found {num_classes}")
        if method not in ("area", "11point"):
            raise UserError(f"method: expected area or 11point, found {method}")
        if not 0 < iou_threshold <= 1:
            raise UserError(f"iou_threshold: expected a number above 0 and at most 1, found {iou_threshold}")
        self.method, self.iou_threshold = method, iou_threshold
        for name in ("scores", "labels", "outcomes", "image_index"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("objects", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        # Images of this rank so far; only `update` reads it.
        self.add_state("num_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
        """Add images.

        Args:
            preds: one dict per image: ``boxes`` float (N, 4), xyxy, ``scores`` float (N,), ``labels`` int64 (N,).
            target: one dict per image: ``boxes`` float (M, 4), xyxy, ``labels`` int64 (M,) and, if any object is
                difficult, ``difficult`` bool (M,).

        Raises:
            UserError: the lists, or the tensors of an image, differ in length.
        """
        require_equal_length(preds, target)
        for kind, dicts, keys in (("preds", preds, ("scores", "labels")), ("target", target, ("labels", "difficult"))):
            for i, entry in enumerate(dicts):
                sizes = {key: len(entry[key]) for key in ("boxes", *keys) if key in entry}
                if len(set(sizes.values())) > 1:
                    raise UserError(f"{kind}[{i}]: expected one entry per box, found {sizes}")
        rank, world_size = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for pred, gt in zip(preds, target, strict=True):
            difficult = gt.get("difficult", torch.zeros_like(gt["labels"])).bool()
            self.outcomes.append(
                match_detections(
                    self.pairwise_iou(pred, gt),
                    pred["scores"],
                    pred["labels"],
                    gt["labels"],
                    difficult,
                    self.iou_threshold,
                )
            )
            self.scores.append(pred["scores"].float())
            self.labels.append(pred["labels"])
            # Each rank holds every world_size-th image of the dataset.
            self.image_index.append((self.num_images * world_size + rank).expand(len(pred["labels"])))
            self.objects = self.objects.scatter_add(0, gt["labels"], (~difficult).long())
            self.num_images = self.num_images + 1

    def pairwise_iou(self, pred: dict[str, Any], gt: dict[str, Any]) -> Tensor:
        """IoU of each detection with each object of one image, float64 (N, M)."""
        return paired_iou(pred["boxes"][:, None], gt["boxes"])

    def compute(self) -> dict[str, Tensor]:
        """The results named in the class docstring."""
        scores, labels, outcomes, image_index = (
            self._concatenated(name) for name in ("scores", "labels", "outcomes", "image_index")
        )
        order = torch.argsort(image_index, stable=True)
        order = order[torch.argsort(scores[order], descending=True, stable=True)]
        order = order[torch.argsort(labels[order], stable=True)]
        order = order[outcomes[order] != IGNORED]
        labels, is_true_positive = labels[order], outcomes[order] == TRUE_POSITIVE
        detections = torch.zeros_like(self.objects).scatter_add(0, labels, torch.ones_like(labels))
        classes = zip(is_true_positive.split(detections.tolist()), self.objects.tolist(), strict=True)
        ap, precision = zip(*(average_precision(*entry, self.method) for entry in classes), strict=True)
        return {
            "map": torch.stack(ap).nanmean(),
            "ap": torch.stack(ap),
            "precision": torch.stack(precision),
            "objects": self.objects,
            "detections": detections,
        }

    def _concatenated(self, name: str) -> Tensor:
        # A list of tensors; one tensor once the ranks are synchronized.
        values = getattr(self, name)
        if isinstance(values, Tensor):
            return values
        dtype = torch.float32 if name == "scores" else torch.int64
        return torch.cat(values) if values else torch.zeros(0, dtype=dtype, device=self.device)


class COCOMeanAP(MeanAveragePrecision):
    """COCO's average precision, computed by torchmetrics with faster-coco-eval, which agrees with pycocotools.

    ``compute`` returns float32 scalars, nan where there are no such objects: ``coco/map`` (mean over the IoU thresholds
    0.5, 0.55, ... 0.95 and the classes), ``coco/map_50``, ``coco/map_75``, ``coco/map_small``, ``coco/map_medium`` and
    ``coco/map_large`` (areas up to 32^2, up to 96^2 and larger, in pixels; COCO's are those of the image on disk). At
    most 100 detections per image count.

    VOC's difficult objects are COCO's ignored objects, not its crowds: one detection that matches by IoU is ignored,
    unless it matches another object; further detections are false positives; a miss does not count. Targets may mark
    crowds by ``iscrowd``, bool or int (M,). A crowd is matched by intersection over the detection's area, and any
    number of its detections is ignored.

    Args:
        masks: also evaluate ``masks``, bool or uint8 (N, H, W), of predictions and targets: ``coco/mask_map`` and so
            on, beside the results of the boxes. Areas are then those of the masks.
    """

    def __init__(self, masks: bool = False) -> None:
        super().__init__(
            iou_type=("bbox", "segm") if masks else "bbox",
            # As in pycocotools. Torchmetrics' own are float32, so that an IoU of exactly 0.6 is no match.
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            backend="faster_coco_eval",
        )
        self.masks = masks
        # The protocol limits the detections to 100.
        self.warn_on_many_detections = False

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:  # type: ignore[override]
        """Add images, see `VOCMeanAP.update`; targets may also have ``iscrowd``."""
        if self.masks:
            preds, target = ([{**d, "masks": d["masks"].to(torch.uint8)} for d in dicts] for dicts in (preds, target))
        keys = ("labels", *(("masks",) if self.masks else ()))
        detections = [{key: p[key] for key in (*keys, "scores")} | {"boxes": p["boxes"].double()} for p in preds]
        objects = [{key: t[key] for key in keys} | {"boxes": t["boxes"].double()} for t in target]
        for entry, t in zip(objects, target, strict=True):
            difficult = t.get("difficult", torch.zeros_like(t["labels"])).bool()
            # Torchmetrics computes the areas that are 0.
            entry["area"] = torch.where(difficult, IGNORED_AREA, 0.0)
            if "iscrowd" in t:
                entry["iscrowd"] = t["iscrowd"].long()
        super().update(detections, objects)

    def compute(self) -> dict[str, Tensor]:
        """The results named in the class docstring."""
        results = super().compute()
        names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
        prefixes = {"": "bbox_", "mask_": "segm_"} if self.masks else {"": ""}
        values = {f"coco/{ours}{name}": results[theirs + name] for ours, theirs in prefixes.items() for name in names}
        return {name: value.where(value >= 0, torch.nan) for name, value in values.items()}

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Gather the images of all ranks in the order of the dataset.

        Torchmetrics gathers image by image and requires the same number of images on every rank.
        """
        names = [name for name, default in self._defaults.items() if isinstance(default, list)]
        # Masks are run-length encodings, not tensors.
        local = {name: [v.cpu() if isinstance(v, Tensor) else v for v in getattr(self, name)] for name in names}
        ranks: list[Any] = [None] * torch.distributed.get_world_size(process_group)
        torch.distributed.all_gather_object(ranks, local, group=process_group)
        for name in names:
            # Each rank holds every world_size-th image, so the longer lists come first.
            rows = itertools.zip_longest(*(rank[name] for rank in ranks))
            values = [value for row in rows for value in row if value is not None]
            setattr(self, name, [v.to(self.device) if isinstance(v, Tensor) else v for v in values])


def require_equal_length(preds: Sequence[Any], target: Sequence[Any]) -> None:
    """Raise UserError unless there is one prediction per target."""
    if len(preds) != len(target):
        raise UserError(f"preds: expected as many predictions as targets, found {len(preds)} and {len(target)}")


def match_detections(
    iou: Tensor, scores: Tensor, labels: Tensor, gt_labels: Tensor, difficult: Tensor, iou_threshold: float = 0.5
) -> Tensor:
    """Classify the detections of one image, see `VOCMeanAP`.

    Args:
        iou: IoU of each detection with each object, float (N, M).
        scores: scores of the detections, float (N,).
        labels: classes of the detections, int64 (N,).
        gt_labels: classes of the objects, int64 (M,).
        difficult: difficult objects, bool (M,).
        iou_threshold: smallest IoU of a match.

    Returns:
        FALSE_POSITIVE, TRUE_POSITIVE or IGNORED, int64 (N,).
    """
    outcome = torch.full_like(labels, FALSE_POSITIVE)
    if iou.numel() == 0:
        return outcome
    best_iou, matched = iou.masked_fill(labels[:, None] != gt_labels, -1).max(1)
    order = torch.argsort(scores, descending=True, stable=True)
    # By falling score; row i is one-hot in the object that detection i matches, or 0.
    matches = (matched[order, None] == torch.arange(len(gt_labels), device=iou.device)) & (
        best_iou[order, None] >= iou_threshold
    )
    first = matches & (matches.cumsum(0) == 1)
    outcome[order] = torch.where(first.any(1), TRUE_POSITIVE, FALSE_POSITIVE)
    return outcome.masked_fill((best_iou >= iou_threshold) & difficult[matched], IGNORED)


def average_precision(is_true_positive: Tensor, num_objects: int, method: APMethod) -> tuple[Tensor, Tensor]:
    """Compute the average precision of one class and its precision-recall curve.

    Args:
        is_true_positive: whether each detection is a true positive, by falling score, without ignored ones, bool (N,).
        num_objects: number of objects that are not difficult; 0 gives nan.
        method: see `VOCMeanAP`.

    Returns:
        Average precision, float32 scalar, and the precision at the recalls 0, 0.01, ... 1, float32 (101,).
    """
    device = is_true_positive.device
    if num_objects == 0:
        nan = torch.full((), torch.nan, device=device)
        return nan, nan.expand(101)
    true_positives = is_true_positive.cumsum(0)
    precision = true_positives.double() / torch.arange(1, len(is_true_positive) + 1, device=device)
    # Interpolate: at each rank, the highest precision at this or any higher recall; 0 beyond the last detection.
    if len(precision):
        precision = precision.flip(0).cummax(0).values.flip(0)
    precision = torch.cat([precision, precision.new_zeros(1)])

    def at_recalls(n: int) -> Tensor:
        # The recall is at least k / n where n * true_positives >= k * num_objects. Use integers: 3 * 0.1 > 3 / 10.
        rank = torch.searchsorted(n * true_positives, torch.arange(n + 1, device=device) * num_objects)
        return precision[rank]

    ap = at_recalls(10).mean() if method == "11point" else precision[:-1][is_true_positive].sum() / num_objects
    return ap.float(), at_recalls(100).float()
