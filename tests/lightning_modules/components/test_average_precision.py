"""VOCMeanAP against the loops of the development kit, its known traps, and COCOMeanAP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from lightning_modules.components.average_precision import COCOMeanAP, VOCMeanAP
from lightning_modules.detection.metrics import detection_metrics

Images = list[dict[str, torch.Tensor]]


def devkit(preds: Images, target: Images, label: int, method: str) -> float:
    """VOCevaldet.m for one class, with boxes stored as (xmin - 1, ymin - 1, xmax, ymax)."""
    objects = []
    for t in target:
        of_class = t["labels"] == label
        objects.append(
            (
                t["boxes"][of_class].double().numpy(),
                t["difficult"][of_class].numpy(),
                np.zeros(int(of_class.sum()), bool),
            )
        )
    positives = sum(int((~difficult).sum()) for _, difficult, _ in objects)
    if positives == 0:
        return float("nan")
    detections = [
        (-float(s), i, k)
        for i, p in enumerate(preds)
        for k, (s, c) in enumerate(zip(p["scores"], p["labels"], strict=True))
        if c == label
    ]
    tp, fp = [], []
    for _, i, k in sorted(detections, key=lambda d: d[0]):
        box = preds[i]["boxes"][k].double().numpy()
        boxes, difficult, matched = objects[i]
        best, at = -np.inf, -1
        for j, other in enumerate(boxes):
            # Inclusive pixels: from xmin = box[0] + 1 to xmax = box[2].
            low, high = np.maximum(box[:2] + 1, other[:2] + 1), np.minimum(box[2:], other[2:])
            width, height = high - low + 1
            if width > 0 and height > 0:
                areas = np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2])
                overlap = width * height / (areas - width * height)
                if overlap > best:
                    best, at = overlap, j
        if best >= 0.5:
            if difficult[at]:
                tp.append(0)
                fp.append(0)
            elif not matched[at]:
                matched[at] = True
                tp.append(1)
                fp.append(0)
            else:
                tp.append(0)
                fp.append(1)
        else:
            tp.append(0)
            fp.append(1)
    true, false = np.cumsum(tp), np.cumsum(fp)
    recall, precision = true / positives, true / np.maximum(true + false, 1)
    if method == "11point":
        ap = 0.0
        for t in range(11):
            reached = precision[true * 10 >= t * positives]
            ap += (reached.max() if len(reached) else 0.0) / 11
        return ap
    r, p = np.concatenate([[0], recall, [1]]), np.concatenate([[0], precision, [0]])
    for i in range(len(p) - 2, -1, -1):
        p[i] = max(p[i], p[i + 1])
    return float(sum((r[i] - r[i - 1]) * p[i] for i in range(1, len(r))))


def some_images(seed: int, count: int = 12, classes: int = 4, ties: bool = False) -> tuple[Images, Images]:
    """Draw integer boxes, many of them near an object; with duplicates, difficult objects and empty images."""
    rng = np.random.default_rng(seed)
    preds, target = [], []
    for _ in range(count):
        m = int(rng.integers(0, 6))
        corner = rng.integers(0, 40, (m, 2))
        boxes = np.concatenate([corner, corner + rng.integers(4, 30, (m, 2))], 1)
        labels = rng.integers(0, classes - 1, m)  # the last class has no object
        n = int(rng.integers(0, 14))
        guess, guess_labels = rng.integers(0, 40, (n, 4)), rng.integers(0, classes, n)
        guess[:, 2:] = guess[:, :2] + rng.integers(1, 30, (n, 2))
        for k in range(n):
            if m and rng.random() < 0.7:
                j = rng.integers(m)
                guess[k], guess_labels[k] = boxes[j] + rng.integers(-2, 3, 4), labels[j]
        scores = rng.integers(0, 5, n) / 5 if ties else rng.permutation(n) / 50 + rng.random() / 1000
        preds.append(
            {
                "boxes": torch.from_numpy(guess).float(),
                "scores": torch.from_numpy(scores).float(),
                "labels": torch.from_numpy(guess_labels).long(),
            }
        )
        target.append(
            {
                "boxes": torch.from_numpy(boxes).float().reshape(-1, 4),
                "labels": torch.from_numpy(labels).long(),
                "difficult": torch.from_numpy(rng.random(m) < 0.25),
            }
        )
    return preds, target


def measured(preds: Images, target: Images, batch: int = 5, **options: Any) -> dict[str, torch.Tensor]:
    metric = VOCMeanAP(4, **options)
    for i in range(0, len(preds), batch):
        metric.update(preds[i : i + batch], target[i : i + batch])
    return metric.compute()


@pytest.mark.parametrize("method", ["area", "11point"])
@pytest.mark.parametrize("ties", [False, True])
def test_against_the_development_kit(method: str, ties: bool) -> None:
    total = 0.0
    for seed in range(25):
        preds, target = some_images(seed, ties=ties)
        result = measured(preds, target, batch=1 + seed % 6, method=method)
        expected = [devkit(preds, target, label, method) for label in range(4)]
        np.testing.assert_allclose(result["ap"].numpy(), expected, atol=1e-6, err_msg=f"seed {seed}")
        assert result["map"].item() == pytest.approx(np.nanmean(expected), abs=1e-6)
        assert np.isnan(expected[3])
        total += float(result["map"])
    assert 2 < total < 23


def one(boxes: list, scores: list | None = None, difficult: list | None = None, labels: list | None = None) -> dict:
    image = {"boxes": torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)}
    image["labels"] = torch.tensor(labels or [0] * len(boxes), dtype=torch.int64)
    if scores is not None:
        image["scores"] = torch.tensor(scores)
    if difficult is not None:
        image["difficult"] = torch.tensor(difficult)
    return image


def ap(preds: list, target: list, **options: Any) -> float:
    metric = VOCMeanAP(1, **options)
    metric.update(preds, target)
    return float(metric.compute()["map"])


BOX, NEAR = [0.0, 0, 10, 10], [0.0, 0, 10, 9]


def test_a_second_detection_of_an_object_is_false() -> None:
    # Precisions 1, 1/2, 2/3 at recalls 1/2, 1/2, 1: area 0.5 * 1 + 0.5 * 2/3.
    preds = [one([BOX, NEAR, [20, 20, 30, 30]], [0.9, 0.8, 0.7])]
    assert ap(preds, [one([BOX, [20, 20, 30, 30]])]) == pytest.approx(0.5 + 1 / 3)


def test_a_duplicate_does_not_go_to_the_second_best_object() -> None:
    # Both have the highest IoU with the first object; the second one, with an IoU above 0.5 too, is missed.
    target = [one([BOX, [0, 0, 10, 14]])]
    assert ap([one([BOX, BOX], [0.9, 0.8])], target) == pytest.approx(0.5)


def test_difficult_objects_count_neither_way() -> None:
    target = [one([BOX, [20, 20, 30, 30]], difficult=[True, False])]
    assert ap([one([BOX, NEAR, [20, 20, 30, 30]], [0.9, 0.8, 0.7])], target) == 1
    assert ap([one([[20, 20, 30, 30]], [0.7])], target) == 1
    assert np.isnan(ap([one([BOX], [0.9])], [one([BOX], difficult=[True])]))


def test_an_overlap_of_exactly_the_threshold_is_enough() -> None:
    assert ap([one([[0, 0, 10, 5]], [0.9])], [one([BOX])]) == 1
    assert ap([one([[0, 0, 10, 5]], [0.9])], [one([BOX])], iou_threshold=0.51) == 0


def test_eleven_points_at_a_recall_of_three_tenths() -> None:
    """A recall of 3/10 reaches the point 0.3, although 3 * 0.1 > 0.3 in floats: four points of eleven."""
    target = [one([BOX])] * 10
    preds = [one([BOX], [0.9])] * 3 + [one([], [])] * 7
    assert ap(preds, target, method="11point") == pytest.approx(4 / 11)
    assert ap(preds, target) == pytest.approx(0.3)


def test_the_curve_is_the_interpolated_precision() -> None:
    metric = VOCMeanAP(1)
    metric.update([one([[50, 50, 60, 60], BOX], [0.9, 0.8]), one([], [])], [one([BOX]), one([BOX])])
    curve = metric.compute()["precision"][0]
    assert curve.shape == (101,)
    torch.testing.assert_close(curve, torch.where(torch.arange(101) <= 50, 0.5, 0.0))


def test_nothing_detected_nothing_seen() -> None:
    metric = VOCMeanAP(2)
    assert torch.isnan(metric.compute()["map"])
    metric.update([one([], [])], [one([BOX])])
    result = metric.compute()
    assert result["ap"][0] == 0
    assert torch.isnan(result["ap"][1])
    assert result["objects"].tolist() == [1, 0]


def test_boxes_without_area() -> None:
    flat = [5.0, 5, 5, 5]
    assert ap([one([flat], [0.9])], [one([flat, BOX])]) == 0


def test_wrong_input_is_named() -> None:
    metric = VOCMeanAP(1)
    with pytest.raises(ValueError, match="as many predictions as targets, found 1 and 2"):
        metric.update([one([BOX], [0.9])], [one([BOX])] * 2)
    with pytest.raises(ValueError, match=r"preds\[0\]: expected one entry per box, found \{'boxes': 1, 'scores': 2"):
        metric.update([one([BOX], [0.9, 0.1])], [one([BOX])])
    with pytest.raises(ValueError, match="method"):
        VOCMeanAP(1, method="coco")  # type: ignore[arg-type]


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for case, (count, ties) in enumerate([(11, False), (11, True), (2, False)]):
        preds, target = some_images(5, count=count, ties=ties)
        metric = detection_metrics(4, "area", compute_coco_ap=True)
        for i in range(rank, count, world):
            metric.update([preds[i]], [target[i]])
        result = metric.compute()
        if rank == 0:
            torch.save(result, os.path.join(folder, f"{case}.pt"))
    torch.distributed.destroy_process_group()


def test_ranks_with_uneven_shards_give_what_one_process_gives(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    for case, (count, ties) in enumerate([(11, False), (11, True), (2, False)]):
        single = detection_metrics(4, "area", compute_coco_ap=True)
        single.update(*some_images(5, count=count, ties=ties))
        expected = single.compute()
        result = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        for key, value in expected.items():
            assert torch.equal(torch.nan_to_num(result[key], -1), torch.nan_to_num(value, -1)), key
        assert {"map", "coco/map"} <= expected.keys()


def test_coco_counts_the_thresholds_that_a_box_reaches() -> None:
    """An IoU of 0.83 reaches seven of the ten thresholds; a difficult object counts neither way."""
    target = [
        {
            "boxes": torch.tensor([[0.0, 0, 100, 100], [200, 200, 300, 300]]),
            "labels": torch.tensor([0, 0]),
            "difficult": torch.tensor([False, True]),
        }
    ]
    boxes = torch.tensor([[200.0, 200, 300, 300], [0, 0, 100, 83]])
    preds = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 0])}]
    metric = COCOMeanAP()
    metric.update(preds, target)
    results = metric.compute()
    assert results["coco/map"] == pytest.approx(0.7)
    assert results["coco/map_50"] == pytest.approx(1.0)
    assert results["coco/map_large"] == pytest.approx(0.7)
    assert results["coco/map_small"].isnan()
    both = detection_metrics(1, "area", compute_coco_ap=True)
    both.update(preds, target)
    names = both.compute()
    assert names["map"] == 1
    assert names["coco/map"] == pytest.approx(0.7)
    assert "coco/map" not in detection_metrics(1, "area", compute_coco_ap=False).compute()


AREA_RANGES = {"map": (0, 1e10), "map_small": (0, 32**2), "map_medium": (32**2, 96**2), "map_large": (96**2, 1e10)}


def coco_in_loops(preds: Images, target: Images, classes: int, masks: bool = False) -> dict[str, float]:
    """pycocotools' COCOeval (computeIoU, evaluateImg, accumulate) in loops; ``difficult`` is its ignore flag."""

    def shapes(entry: dict[str, torch.Tensor], label: int) -> np.ndarray:
        key = "masks" if masks else "boxes"
        return entry[key][entry["labels"] == label].double().numpy()

    def area(shape: np.ndarray) -> float:
        return float(shape.sum() if masks else np.prod(shape[2:] - shape[:2]))

    def intersection(a: np.ndarray, b: np.ndarray) -> float:
        if masks:
            return float((a * b).sum())
        return float(np.prod((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0)))

    curves: dict[str, list[np.ndarray]] = {name: [] for name in AREA_RANGES}
    for label in range(classes):
        for name, (low, high) in AREA_RANGES.items():
            for threshold in np.linspace(0.5, 0.95, 10):
                scored, positives = [], 0
                for p, t in zip(preds, target, strict=True):
                    objects = shapes(t, label)
                    flags = [
                        t.get(key, torch.zeros(len(t["labels"])))[t["labels"] == label].bool().tolist()
                        for key in ("difficult", "iscrowd")
                    ]
                    # COCO's area of an object is that of its mask, also for boxes.
                    sizes = [area(o) for o in objects]
                    if "masks" in t:
                        sizes = t["masks"][t["labels"] == label].double().sum((1, 2)).tolist()
                    ignored = [
                        d or c or not low <= a <= high for d, c, a in zip(flags[0], flags[1], sizes, strict=True)
                    ]
                    crowd = flags[1]
                    positives += ignored.count(False)
                    order = sorted(range(len(objects)), key=lambda j: ignored[j])
                    scores = p["scores"][p["labels"] == label].tolist()
                    detections = shapes(p, label)
                    used = [False] * len(objects)
                    for k in sorted(range(len(scores)), key=lambda k: -scores[k])[:100]:
                        best, match = threshold, -1
                        for j in order:
                            if used[j] and not crowd[j]:
                                continue
                            if match >= 0 and not ignored[match] and ignored[j]:
                                break
                            common = intersection(detections[k], objects[j])
                            union = area(detections[k]) + (0 if crowd[j] else area(objects[j]) - common)
                            overlap = common / union if union else 0.0
                            if overlap >= best:
                                best, match = overlap, j
                        if match >= 0:
                            used[match] = True
                        skipped = ignored[match] if match >= 0 else not low <= area(detections[k]) <= high
                        if not skipped:
                            scored.append((scores[k], match >= 0))
                if positives == 0:
                    continue
                true = np.cumsum([hit for _, hit in sorted(scored, key=lambda d: -d[0])])
                precision = true / np.arange(1, len(true) + 1)
                for i in range(len(precision) - 2, -1, -1):
                    precision[i] = max(precision[i], precision[i + 1])
                at = np.searchsorted(true / positives, np.linspace(0, 1, 101))
                curves[name].append(np.append(precision, 0.0)[np.minimum(at, len(precision))])
    return {name: float(np.mean(values)) if values else float("nan") for name, values in curves.items()}


def coco_images(seed: int, difficult: float, crowd: float = 0.0, masks: bool = False) -> tuple[Images, Images]:
    """`some_images` at COCO's object sizes, some of them with boxes inside another object; boxes become masks."""
    rng = np.random.default_rng(seed)
    preds, target = some_images(seed, count=10)
    scale = 0.5 if masks else float(rng.choice([1.5, 5.0]))
    for p, t in zip(preds, target, strict=True):
        t["difficult"] = torch.from_numpy(rng.random(len(t["labels"])) < difficult)
        if crowd:
            t["iscrowd"] = torch.from_numpy(rng.random(len(t["labels"])) < crowd).long()
        if len(t["boxes"]) and len(p["boxes"]) > 3:
            # Detections that fill a part of the first object.
            corner, side = t["boxes"][0, :2], t["boxes"][0, 2:] - t["boxes"][0, :2]
            p["boxes"][:3] = torch.cat([corner, corner + side * 0.6]).round()
            p["labels"][:3] = t["labels"][0]
        for entry in (p, t):
            entry["boxes"] = entry["boxes"] * scale
            if masks:
                pixel = torch.arange(0.5, 40)
                inside = [
                    (pixel > entry["boxes"][:, i, None]) & (pixel < entry["boxes"][:, i + 2, None]) for i in (0, 1)
                ]
                entry["masks"] = inside[1][:, :, None] & inside[0][:, None, :]
    return preds, target


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("difficult", "crowd"), [(0.0, 0.0), (0.4, 0.0), (0.4, 0.3), (1.0, 0.0)])
def test_coco_against_its_own_loops(difficult: float, crowd: float, masks: bool) -> None:
    sizes = set()
    for seed in range(2 if masks else 4):
        preds, target = coco_images(seed, difficult, crowd, masks)
        metric = COCOMeanAP(masks)
        for i in range(0, len(preds), 4):
            metric.update(preds[i : i + 4], target[i : i + 4])
        results = metric.compute()
        for prefix in ("", "mask_") if masks else ("",):
            expected = coco_in_loops(preds, target, 4, masks=prefix == "mask_")
            for name, value in expected.items():
                np.testing.assert_allclose(float(results[f"coco/{prefix}{name}"]), value, atol=1e-6, err_msg=name)
                sizes |= {name} if 0 < value < 1 else set()
    assert sizes >= ({"map"} if difficult < 1 else set())


def test_a_difficult_object_does_not_hide_false_positives() -> None:
    """20 boxes inside a difficult object rank before the one true positive: a precision of 1 / 21 by both rules."""
    corner = torch.arange(20.0)[:, None].expand(20, 2) * 8
    boxes = torch.cat([corner, corner + 30], dim=1)
    target = [one([[0, 0, 200, 200], [300, 300, 340, 340]], difficult=[True, False])]
    pred = {
        "boxes": torch.cat([boxes, target[0]["boxes"][1:]]),
        "scores": torch.linspace(0.9, 0.1, 21),
        "labels": torch.zeros(21, dtype=torch.int64),
    }
    metrics = detection_metrics(1, "area", compute_coco_ap=True)
    metrics.update([pred], target)
    results = metrics.compute()
    assert float(results["map"]) == pytest.approx(1 / 21)
    assert float(results["coco/map_50"]) == pytest.approx(1 / 21)


def test_a_second_detection_of_a_difficult_object_is_false_by_coco() -> None:
    """The development kit ignores both."""
    target = [one([BOX, [20, 20, 30, 30]], difficult=[True, False])]
    metric = COCOMeanAP()
    metric.update([one([BOX, BOX, [20, 20, 30, 30]], [0.9, 0.8, 0.7])], target)
    assert float(metric.compute()["coco/map"]) == pytest.approx(0.5)
    assert ap([one([BOX, BOX, [20, 20, 30, 30]], [0.9, 0.8, 0.7])], target) == 1


def test_a_crowd_takes_any_number_of_detections() -> None:
    target = one([[0, 0, 100, 100], [200, 200, 230, 230]])
    target["iscrowd"] = torch.tensor([1, 0])
    inside = [[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]]
    metric = COCOMeanAP()
    metric.update([one([*inside, [200, 200, 230, 230]], [0.9, 0.8, 0.7, 0.6])], [target])
    assert float(metric.compute()["coco/map"]) == pytest.approx(1)
