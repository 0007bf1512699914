"""Average precision of VOC and COCO."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision

from errors import UserError
from lightning_modules.components.boxes import image_of, paired_iou

APMethod = Literal["area", "11point"]


# The overlaps of detections and objects, both int64 (N,) indices among all those of some images: float (N,).
FALSE, TRUE, IGNORED = 0, 1, 2
OverlapOf = Callable[[Tensor, Tensor], Tensor]


class VOCMeanAP(Metric):
    """Mean average precision by the rules of the VOC development kit (Everingham et al. 2010, 4.2; VOCevaldet.m).

    Of a class, detections are taken by falling score. Each is matched to the ground truth of its class and image that
    it overlaps most, whether or not that one is taken already: with an IoU below the threshold it is false; matched to
    a difficult object it does not count; the first one of an object is true, all later ones are false. Objects marked
    difficult are not to be found. A class without an object that is to be found has no average precision (nan) and is
    left out of the mean.

    The development kit counts pixels inclusively, 1-based. Boxes stored as (xmin - 1, ymin - 1, xmax, ymax) have the
    same IoU as continuous rectangles.

    ``compute`` gives, over all samples of all ranks:

    - ``map``: mean of the classes' average precisions, float32 scalar.
    - ``ap``: float32 (C,).
    - ``precision``: float32 (C,101), the precision-recall curves: the highest precision at a recall of at least 0, 0.01,
      ... 1; 0 where that recall is not reached.
    - ``objects``: int64 (C,), those that are to be found.
    - ``detections``: int64 (C,), those that count.

    Equal scores are taken in the order of the images in the dataset, on any number of ranks, and of the detections in
    their image.

    Args:
        num_classes: C; labels are 0..C-1.
        method: ``area`` under the curve made monotonic (VOC2010 and later), or ``11point``: the mean of the precisions
            at recalls 0, 0.1, ... 1 (VOC2007, which the papers report on its test set).
        iou_threshold: the least overlap, 0.5 in the challenge.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    scores: list[Tensor]
    labels: list[Tensor]
    outcomes: list[Tensor]
    places: list[Tensor]
    objects: Tensor
    images: Tensor

    def __init__(self, num_classes: int, method: APMethod = "area", iou_threshold: float = 0.5) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"num_classes: expected 1 or more, found {num_classes}")
        if method not in ("area", "11point"):
            raise UserError(f"method: expected area or 11point, found {method}")
        if not 0 < iou_threshold <= 1:
            raise UserError(f"iou_threshold: expected a number above 0 and at most 1, found {iou_threshold}")
        self.num_classes, self.method, self.iou_threshold = num_classes, method, iou_threshold
        for name in ("scores", "labels", "outcomes", "places"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("objects", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        # Not reduced: it numbers this rank's images, and what it gave is in `places`.
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
        """Adds images.

        Args:
            preds: one dict an image: ``boxes`` float (N,4) xyxy, ``scores`` float (N,), ``labels`` int64 (N,).
            target: one dict an image: ``boxes`` float (M,4) xyxy, ``labels`` int64 (M,) and, if any object is
                difficult, ``difficult`` bool (M,).

        Raises:
            ValueError: the lists differ in length, or an image's tensors do.
        """
        if len(preds) != len(target):
            raise UserError(f"expected as many predictions as targets, found {len(preds)} and {len(target)}")
        for kind, dicts, keys in (("preds", preds, ("scores", "labels")), ("target", target, ("labels", "difficult"))):
            for i, entry in enumerate(dicts):
                sizes = {key: len(entry[key]) for key in ("boxes", *keys) if key in entry}
                if len(set(sizes.values())) > 1:
                    raise UserError(f"{kind}[{i}]: expected one entry a box, found {sizes}")
        if not preds:
            return
        boxes, scores, labels = (torch.cat([p[key] for p in preds]) for key in ("boxes", "scores", "labels"))
        true_boxes, true_labels = (torch.cat([t[key] for t in target]) for key in ("boxes", "labels"))
        marks = [t.get("difficult", torch.zeros_like(t["labels"])).bool() for t in target]
        difficult = torch.cat(marks)
        image = image_of(preds, boxes.device)
        outcome = match(
            boxes,
            scores,
            labels,
            image,
            true_boxes,
            true_labels,
            difficult,
            image_of(target, boxes.device),
            self.iou_threshold,
            self.overlap_of(preds, target),
        )
        to_find = true_labels[~difficult]
        self.objects = self.objects.scatter_add(0, to_find, torch.ones_like(to_find))
        rank, world = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.scores.append(scores.float())
        self.labels.append(labels)
        self.outcomes.append(outcome)
        # A rank holds every world-th image of the dataset.
        self.places.append((self.images + image) * world + rank)
        self.images = self.images + len(preds)

    def overlap_of(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> OverlapOf | None:
        """How detections and objects overlap; None: as boxes."""
        return None

    def compute(self) -> dict[str, Tensor]:
        """The results named above."""
        scores, labels, outcomes, places = (self._whole(name) for name in ("scores", "labels", "outcomes", "places"))
        order = torch.argsort(places, stable=True)
        order = order[torch.argsort(scores[order], descending=True, stable=True)]
        order = order[torch.argsort(labels[order], stable=True)]
        order = order[outcomes[order] != IGNORED]
        labels, true = labels[order], outcomes[order] == TRUE
        counts = torch.zeros_like(self.objects).scatter_add(0, labels, torch.ones_like(labels))
        curves = zip(true.split(counts.tolist()), self.objects, strict=True)
        results = [average_precision(hits, int(objects), self.method) for hits, objects in curves]
        ap = torch.stack([result[0] for result in results])
        return {
            "map": ap.nanmean(),
            "ap": ap,
            "precision": torch.stack([result[1] for result in results]),
            "objects": self.objects,
            "detections": counts,
        }

    def _whole(self, name: str) -> Tensor:
        # A list before the ranks are joined, a tensor after.
        values = getattr(self, name)
        if isinstance(values, Tensor):
            return values
        dtype = torch.float32 if name == "scores" else torch.int64
        return torch.cat(values) if values else torch.zeros(0, dtype=dtype, device=self.device)


class COCOMeanAP(MeanAveragePrecision):
    """COCO's average precision (Lin et al. 2014), by torchmetrics and faster-coco-eval, which agrees with pycocotools.

    ``compute`` gives float32 scalars: ``coco/map`` (mean over IoUs of 0.5, 0.55 to 0.95 and the classes), ``coco/map_50``,
    ``coco/map_75``, ``coco/map_small``, ``coco/map_medium``, ``coco/map_large`` (areas up to 32^2, up to 96^2 and more
    pixels); nan where there are no such objects. It takes 100 detections an image at most. VOC's difficult objects
    become COCO's crowds, of which neither a detection nor a miss counts.

    Args:
        masks: measure masks too, ``masks`` bool or uint8 (N,H,W) in predictions and targets: ``coco/mask_map`` and so
            on beside those of the boxes; areas are then those of the masks.
    """

    def __init__(self, masks: bool = False) -> None:
        super().__init__(iou_type=("bbox", "segm") if masks else "bbox", backend="faster_coco_eval")
        self.masks = masks
        # That only the best 100 take part is the protocol.
        self.warn_on_many_detections = False

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:  # type: ignore[override]
        """As `VOCMeanAP.update`."""
        if self.masks:
            preds, target = ([{**d, "masks": d["masks"].to(torch.uint8)} for d in dicts] for dicts in (preds, target))
        keys = ("boxes", "labels", *(("masks",) if self.masks else ()))
        crowds = [{"iscrowd": t["difficult"].long()} if "difficult" in t else {} for t in target]
        truth = [{**{key: t[key] for key in keys}, **crowd} for t, crowd in zip(target, crowds, strict=True)]
        super().update([{key: p[key] for key in (*keys, "scores")} for p in preds], truth)

    def compute(self) -> dict[str, Tensor]:
        """The results named above."""
        results = super().compute()
        names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
        kinds = {"": "bbox_", "mask_": "segm_"} if self.masks else {"": ""}
        values = {f"coco/{kind}{name}": results[theirs + name] for kind, theirs in kinds.items() for name in names}
        return {name: value.where(value >= 0, torch.nan) for name, value in values.items()}

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Joins the ranks' images, in the order of the dataset.

        Torchmetrics gathers one image after another, which asks for as many on every rank.
        """
        names = [name for name, default in self._defaults.items() if isinstance(default, list)]
        # Masks are run lengths, which are no tensors.
        mine = {name: [v.cpu() if isinstance(v, Tensor) else v for v in getattr(self, name)] for name in names}
        ranks: list[Any] = [None] * torch.distributed.get_world_size(process_group)
        torch.distributed.all_gather_object(ranks, mine, group=process_group)
        for name in names:
            # A rank holds every world-th image, so the longer ones come first.
            rows = itertools.zip_longest(*(rank[name] for rank in ranks))
            values = [value for row in rows for value in row if value is not None]
            setattr(self, name, [v.to(self.device) if isinstance(v, Tensor) else v for v in values])


def match(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image: Tensor,
    true_boxes: Tensor,
    true_labels: Tensor,
    difficult: Tensor,
    true_image: Tensor,
    iou_threshold: float = 0.5,
    overlap_of: OverlapOf | None = None,
) -> Tensor:
    """What becomes of each detection of some images: int64 (N,) of FALSE, TRUE, IGNORED.

    No detection waits for another: each is matched to the object that it overlaps most, and of an object's matches the
    one with the highest score is true.

    Args:
        boxes: float (N,4) xyxy, all images' detections.
        scores: float (N,).
        labels: int64 (N,).
        image: int64 (N,), which image each belongs to.
        true_boxes, true_labels, difficult, true_image: (M,...), the same of the objects; difficult is bool.
        iou_threshold: the least overlap.
        overlap_of: the overlaps of detections and objects of one image; None: those of the boxes.
    """
    outcome = torch.full_like(labels, FALSE)
    if not len(boxes) or not len(true_boxes):
        return outcome
    # All pairs of a detection and an object of its image and class, by one sorted key of both.
    classes = torch.maximum(labels.amax(), true_labels.amax()) + 1
    key, true_key = image * classes + labels, true_image * classes + true_labels
    by_key = torch.argsort(true_key, stable=True)
    start, end = (torch.searchsorted(true_key[by_key], key, right=right) for right in (False, True))
    count = end - start
    of = torch.repeat_interleave(torch.arange(len(boxes), device=boxes.device), count)
    pair = torch.arange(len(of), device=boxes.device) - (count.cumsum(0) - count)[of]
    objects = by_key[start[of] + pair]
    overlap = paired_iou(boxes[of], true_boxes[objects]) if overlap_of is None else overlap_of(of, objects)
    best = overlap.new_full((len(boxes),), -1.0).scatter_reduce(0, of, overlap, "amax")
    first = torch.where(overlap == best[of], objects, len(true_boxes))  # of equal overlaps, the first object
    matched = torch.full_like(labels, len(true_boxes)).scatter_reduce(0, of, first, "amin")
    found = best >= iou_threshold
    # By object and then by falling score, the first of each object is true.
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[found[order]]
    order = order[torch.argsort(matched[order], stable=True)]
    objects = matched[order]
    leads = torch.ones_like(objects, dtype=torch.bool)
    leads[1:] = objects[1:] != objects[:-1]
    outcome[order] = torch.where(difficult[objects], IGNORED, torch.where(leads, TRUE, FALSE))
    return outcome


def average_precision(hits: Tensor, objects: int, method: APMethod) -> tuple[Tensor, Tensor]:
    """Average precision of one class, float32 scalar, and its precision-recall curve, float32 (101,).

    Args:
        hits: bool (N,), whether each detection that counts is true, by falling score.
        objects: how many there are to be found; 0 gives nan.
        method: see `VOCMeanAP`.
    """
    nan = torch.full((), torch.nan, device=hits.device)
    if objects == 0:
        return nan, nan.expand(101)
    true = hits.cumsum(0)
    precision = true.double() / torch.arange(1, len(hits) + 1, device=hits.device)
    # From each detection on, the highest precision that is still to come.
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
    # The recall is at least k/n where n * true >= k * objects: whole numbers, since 3/10 is not 3 * 0.1 in floats.
    envelope = torch.cat([envelope, envelope.new_zeros(1)])

    def at_recalls(n: int) -> Tensor:
        return envelope[torch.searchsorted(n * true, torch.arange(n + 1, device=hits.device) * objects)]

    ap = at_recalls(10).mean() if method == "11point" else envelope[:-1][hits].sum() / objects
    return ap.float(), at_recalls(100).float()
