"""Mean IoU against torchmetrics and known mistakes; AP of masks against AP of boxes and loops."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_modules.components.average_precision import COCOMeanAP, VOCMeanAP
from lightning_modules.segmentation.metrics import (
    RegionAP,
    SegmentationMetrics,
    instance_metrics,
    mask_iou,
    segmentation_metrics,
)
from tests.lightning_modules.components.test_average_precision import devkit

Maps = list[torch.Tensor]


def some_maps(seed: int, count: int = 6, classes: int = 5) -> tuple[Maps, Maps]:
    """Maps of random blocks of classes, of different sizes; some predicted pixels are wrong, some targets are void."""
    generator = torch.Generator().manual_seed(seed)
    preds, target = [], []
    for _ in range(count):
        height, width = (int(torch.randint(9, 40, (), generator=generator)) for _ in range(2))
        blocks = torch.randint(0, classes, (1, 1, 4, 4), generator=generator).float()
        ids = F.interpolate(blocks, (height, width)).long()[0, 0]
        noise = torch.rand(height, width, generator=generator)
        preds.append(torch.where(noise < 0.4, torch.randint(0, classes, ids.shape, generator=generator), ids))
        target.append(torch.where(noise > 0.9, 255, ids))
    return preds, target


def compute(preds: Maps, target: Maps, classes: int = 5) -> dict[str, torch.Tensor]:
    metric = SegmentationMetrics(classes)
    for p, t in zip(preds, target, strict=True):
        metric.update([p], [t])
    return metric.compute()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("classes", [2, 5, 21])
def test_it_equals_torchmetrics(seed: int, classes: int) -> None:
    preds, target = some_maps(seed, classes=classes)
    results = compute(preds, target, classes)
    flat = [torch.cat([m.flatten() for m in maps]) for maps in (preds, target)]
    for name, oracle in (
        ("miou", MulticlassJaccardIndex(classes, ignore_index=255)),
        ("fwiou", MulticlassJaccardIndex(classes, ignore_index=255, average="weighted")),
        ("pixel_accuracy", MulticlassAccuracy(classes, ignore_index=255, average="micro")),
    ):
        torch.testing.assert_close(results[name], oracle(*flat), msg=name)
    each = MulticlassJaccardIndex(classes, ignore_index=255, average=None)(*flat)
    torch.testing.assert_close(results["iou"].nan_to_num(0), each)


def test_a_worked_example() -> None:
    """3 of 4 pixels of class 0 and 1 of 2 of class 1 are correct; class 2 is only predicted; class 3 is absent."""
    target = torch.tensor([[0, 0, 0, 0], [1, 1, 255, 255]])
    preds = torch.tensor([[0, 0, 0, 1], [1, 2, 0, 3]])
    results = compute([preds], [target], 4)
    assert results["confusion_matrix"].tolist() == [[3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert results["confusion_matrix"].dtype == torch.int64
    assert results["iou"][:3].tolist() == pytest.approx([3 / 4, 1 / 3, 0])
    assert results["iou"][3].isnan()
    assert results["miou"] == pytest.approx((3 / 4 + 1 / 3 + 0) / 3)
    assert results["pixel_accuracy"] == pytest.approx(4 / 6)
    assert results["mean_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert results["fwiou"] == pytest.approx((4 * 3 / 4 + 2 * 1 / 3) / 6)


def test_the_mistakes_give_other_numbers() -> None:
    preds, target = some_maps(3, count=8)
    right = compute(preds, target)["miou"]
    batches = [compute(preds[i : i + 2], target[i : i + 2])["miou"] for i in range(0, 8, 2)]
    images = [compute([p], [t])["miou"] for p, t in zip(preds, target, strict=True)]

    def resized(m: torch.Tensor) -> torch.Tensor:
        return F.interpolate(m[None, None].float(), (16, 16), mode="nearest-exact").long()[0, 0]

    small = compute([resized(p) for p in preds], [resized(t) for t in target])["miou"]
    wrong_mask = compute(preds, [t.where(t != 255, 0) for t in target])["miou"]
    for other in (torch.stack(batches).mean(), torch.stack(images).mean(), small, wrong_mask):
        assert abs(float(other - right)) > 0.003
    assert compute(preds, target)["miou"] == right


def test_counts_beyond_what_single_precision_holds() -> None:
    metric = SegmentationMetrics(2)
    metric.matrix = torch.tensor([[2**40, 1], [0, 2**30]])
    results = metric.compute()
    assert results["confusion_matrix"].tolist() == [[2**40, 1], [0, 2**30]]
    assert results["miou"] == 1
    metric.update([torch.zeros(2, 2, dtype=torch.int64)], [torch.zeros(2, 2, dtype=torch.int64)])
    assert metric.compute()["confusion_matrix"][0, 0] == 2**40 + 4


def test_void_alone_and_nothing() -> None:
    void = torch.full((4, 4), 255)
    results = compute([torch.zeros(4, 4, dtype=torch.int64)], [void])
    assert results["miou"].isnan()
    assert results["confusion_matrix"].sum() == 0
    assert compute([], [])["pixel_accuracy"].isnan()


def test_wrong_input_is_named() -> None:
    metric = SegmentationMetrics(3)
    good = torch.zeros(4, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="as many predictions as targets, found 1 and 2"):
        metric.update([good], [good, good])
    message = r"preds\[1\]: expected the ground truth's size \(4, 6\), found \(2, 3\); resize the logits"
    with pytest.raises(ValueError, match=message):
        metric.update([good, good[:2, :3]], [good, good])
    with pytest.raises(ValueError, match="preds: expected ids 0 to 2, found 3"):
        metric.update([good + 3], [good])
    for wrong in (3, 7, -1):
        with pytest.raises(ValueError, match=f"target: expected ids 0 to 2, found {wrong}"):
            metric.update([good], [good + wrong])
    assert metric.matrix.sum() == 0
    with pytest.raises(ValueError, match="preds: expected ids 0 to 2, found 255"):
        metric.update([good + 255], [good])
    with pytest.raises(ValueError, match="num_classes: expected 1 to 255, found 0"):
        SegmentationMetrics(0)


def test_the_collection_gives_scalars_and_tables() -> None:
    metrics = segmentation_metrics(5)
    metrics.update(*some_maps(0))
    results = metrics.compute()
    assert {name for name, value in results.items() if value.ndim == 0} == {
        "miou", "pixel_accuracy", "mean_accuracy", "fwiou",
    }  # fmt: skip
    assert results["iou"].shape == (5,)
    assert results["confusion_matrix"].shape == (5, 5)
    metrics.reset()
    metrics.update(*some_maps(1))
    assert torch.equal(metrics.compute()["iou"], compute(*some_maps(1))["iou"])


# --- instances --------------------------------------------------------------------------------------------------------

Images = list[dict[str, torch.Tensor]]


def box_masks(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    y, x = torch.arange(height)[:, None], torch.arange(width)
    x1, y1, x2, y2 = boxes.T[..., None, None]
    return ((x >= x1) & (x < x2) & (y >= y1) & (y < y2)).to(torch.uint8)


def some_objects(seed: int, count: int = 10, classes: int = 3) -> tuple[Images, Images]:
    """Rectangles on the pixel grid, whose masks and boxes have the same IoU; images of different sizes."""
    rng = np.random.default_rng(seed)
    preds, target = [], []
    for _ in range(count):
        height, width = (int(side) for side in rng.integers(30, 50, 2))
        n = int(rng.integers(0, 5))
        corner = rng.integers(0, 20, (n, 2))
        boxes = np.concatenate([corner, corner + rng.integers(3, 10, (n, 2))], 1)
        labels = rng.integers(0, classes, n)
        near = np.repeat(np.arange(n), rng.integers(0, 3, n))
        moved = boxes[near] + rng.integers(-2, 3, (len(near), 4)).clip(-1, 1)
        moved = np.maximum(moved, 0)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        for boxes_, labels_, images in ((moved, labels[near], preds), (boxes, labels, target)):
            tensor = torch.from_numpy(boxes_.reshape(-1, 4)).float()
            images.append(
                {
                    "boxes": tensor,
                    "labels": torch.from_numpy(labels_),
                    "masks": box_masks(tensor, height, width),
                    "difficult": torch.zeros(len(tensor), dtype=torch.bool),
                }
            )
        preds[-1]["scores"] = torch.from_numpy(rng.permutation(len(near)) / 17 + rng.random()).float()
    return preds, target


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_rectangular_masks_give_what_boxes_give(seed: int, threshold: float) -> None:
    preds, target = some_objects(seed, count=20)
    by_mask, by_box = RegionAP(3, "11point", threshold, tables=True), VOCMeanAP(3, "11point", threshold)
    for i in range(0, 20, 4):
        by_mask.update(preds[i : i + 4], target[i : i + 4])
        by_box.update(preds[i : i + 4], target[i : i + 4])
    results, expected = by_mask.compute(), by_box.compute()
    assert results[f"apr_{round(100 * threshold)}"] == expected["map"]
    for name in ("ap", "precision", "objects", "detections"):
        assert torch.equal(results[name].nan_to_num(-1), expected[name].nan_to_num(-1))
    if threshold == 0.5:
        for label in range(3):
            assert float(results["ap"][label]) == pytest.approx(devkit(preds, target, label, "11point"), nan_ok=True)


def test_masks_are_matched_and_not_their_boxes() -> None:
    """Two triangles in one square have the same box and no common pixel."""
    upper = torch.ones(8, 8).triu(1)[None].to(torch.uint8)
    both = {"boxes": torch.tensor([[0.0, 0, 8, 8]]), "labels": torch.tensor([0])}
    target = [{**both, "masks": upper}]
    wrong = [{**both, "scores": torch.tensor([0.9]), "masks": 1 - upper}]
    metrics = instance_metrics(1)
    metrics.update(wrong, target)
    results = metrics.compute()
    assert results["apr_50"] == results["apr_70"] == results["coco/mask_map"] == 0
    assert results["coco/map"] == pytest.approx(1)
    metrics.reset()
    metrics.update([{**wrong[0], "masks": upper.bool()}], target)
    results = metrics.compute()
    assert results["apr_50"] == results["apr_70"] == 1
    assert results["coco/mask_map"] == pytest.approx(1)
    assert {"ap", "precision", "objects", "detections", "coco/mask_map_50", "coco/map_75"} <= results.keys()


def test_thresholds_differ_after_a_first_batch_in_which_they_agree() -> None:
    """Torchmetrics merges metrics of equal states for good, unless compute groups are off."""
    full = torch.ones(1, 10, 10, dtype=torch.uint8)
    part = full.clone()
    part[:, 6:] = 0
    entry = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([0])}
    target = [{**entry, "masks": full}]
    metrics = instance_metrics(1, compute_coco_ap=False)
    metrics.update([{**entry, "masks": full, "scores": torch.tensor([0.9])}], target)
    metrics.update([{**entry, "masks": part, "scores": torch.tensor([0.8])}], target)
    results = metrics.compute()
    assert results["apr_50"] == 1
    assert results["apr_70"] == pytest.approx(6 / 11)


def test_mask_iou_counts_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, 9, 13, generator=generator) < 0.4 for n in (5, 3))
    a[0] = b[0] = False
    result = mask_iou(a, b.to(torch.uint8))
    for i in range(5):
        for j in range(3):
            union = int((a[i] | b[j]).sum())
            assert float(result[i, j]) == (int((a[i] & b[j]).sum()) / union if union else 0)
    assert mask_iou(a[:0], b).shape == (0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mask_iou(a, b), result)
    with pytest.raises(ValueError, match=r"ground truth's size \(9, 13\), found \(4, 13\)"):
        mask_iou(a[:, :4], b)


def test_coco_of_rectangular_masks_is_that_of_boxes() -> None:
    preds, target = some_objects(2, count=20)
    masks, boxes = COCOMeanAP(masks=True), COCOMeanAP()
    masks.update(preds, target)
    boxes.update(preds, target)
    results, expected = masks.compute(), boxes.compute()
    for name in ("map", "map_50", "map_75"):
        assert results[f"coco/mask_{name}"] == pytest.approx(float(expected[f"coco/{name}"]))
        assert results[f"coco/{name}"] == pytest.approx(float(expected[f"coco/{name}"]))
    assert set(expected) < set(results)


# --- ranks ------------------------------------------------------------------------------------------------------------


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    preds, target = some_maps(5, count=7)
    pixels, objects = segmentation_metrics(5), instance_metrics(3)
    detections, gt = some_objects(5, count=7)
    for i in range(rank, 7, world):
        pixels.update([preds[i]], [target[i]])
        objects.update([detections[i]], [gt[i]])
    results = {**pixels.compute(), **objects.compute()}
    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))
    torch.distributed.destroy_process_group()


def test_ranks_with_uneven_shards_give_what_one_process_gives(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    pixels, objects = segmentation_metrics(5), instance_metrics(3)
    pixels.update(*some_maps(5, count=7))
    objects.update(*some_objects(5, count=7))
    expected = {**pixels.compute(), **objects.compute()}
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name].nan_to_num(-1), value.nan_to_num(-1)), name
