"""Recall of proposals against a loop over images, objects, proposals and counts; COCO's areas in original pixels."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from lightning_modules.detection.base import Detector
from lightning_modules.detection.metrics import ProposalRecall, scale_to_original


def test_recall_of_proposals() -> None:
    """Four images, two of them without proposals or objects; difficult objects do not count."""
    torch.manual_seed(0)
    recall, preds, target = ProposalRecall(), [], []
    for n, m in ((400, 7), (0, 2), (1200, 5), (20, 0)):
        corner = torch.rand(n + m, 2) * 60
        boxes = torch.cat([corner, corner + 8 + torch.rand(n + m, 2) * 20], 1)
        preds.append({"boxes": boxes[:n]})
        target.append({"boxes": boxes[n:], "difficult": torch.arange(m) == 1})
    recall.update(preds[:1], target[:1])
    recall.update(preds[1:], target[1:])
    results = recall.compute()
    for row, count in enumerate((50, 300, 1000)):
        for column in range(10):
            threshold = 0.5 + 0.05 * column
            found = objects = 0
            for p, t in zip(preds, target, strict=True):
                for box, difficult in zip(t["boxes"], t["difficult"], strict=True):
                    if difficult:
                        continue
                    objects += 1
                    found += any(box_iou(box[None], other[None]) >= threshold for other in p["boxes"][:count])
            assert objects == 11
            assert results["recall"][row, column] == pytest.approx(found / objects)
        assert results[f"recall_{count}"] == results["recall"][row, 0]
        assert results[f"average_recall_{count}"] == pytest.approx(results["recall"][row].mean().item())
    assert 0 < results["recall_50"] < results["recall_1000"] < 1
    recall.reset()
    recall.update(preds[3:], target[3:])
    assert recall.compute()["recall_300"].isnan()
    with pytest.raises(ValueError, match="expected as many predictions as targets, found 1 and 0"):
        recall.update(preds[:1], [])


SIZES = [(300, 400), (480, 640), (375, 500)]  # (height, width) on disk


def coco_at(size: int, as_list: bool = False) -> dict[str, float]:
    """COCO's AP of the same detections if the images are resized to a square of this size."""
    detector = Detector(num_classes=2)
    metrics = detector.build_metrics()
    generator = torch.Generator().manual_seed(0)
    preds, target = [], []
    for height, width in SIZES:
        scale = torch.tensor([size / width, size / height] * 2)
        # Sides of 20, 60 and 150 pixels on disk: two small, two medium and two large objects.
        side = torch.tensor([20.0, 20, 60, 60, 150, 150])[:, None]
        corner = torch.rand(6, 2, generator=generator) * 100
        boxes = torch.cat([corner, corner + side], dim=1)
        labels = torch.arange(6) % 2
        guess = boxes + (torch.rand(6, 4, generator=generator) - 0.5) * 0.3 * side
        target.append({"boxes": boxes * scale, "labels": labels, "difficult": torch.arange(6) == 3})
        preds.append({"boxes": guess * scale, "scores": torch.rand(6, generator=generator), "labels": labels})
    images = torch.zeros(3, 3, size, size, dtype=torch.uint8)
    batch = {"image": list(images) if as_list else images, "target": target, "original_size": torch.tensor(SIZES)}
    detector.update_metrics(metrics, preds, batch)
    return {name: float(value) for name, value in metrics.compute().items() if value.ndim == 0}


def test_object_sizes_are_those_on_disk_at_any_size_of_the_network() -> None:
    at_160, at_640 = coco_at(160), coco_at(640)
    assert at_160 == pytest.approx(at_640, abs=1e-6)
    assert at_160 == pytest.approx(coco_at(160, as_list=True), abs=1e-6)
    values = {at_160[f"coco/map_{name}"] for name in ("small", "medium", "large")}
    assert len(values) == 3
    assert all(0 < value < 1 for value in values)  # no range is empty


def test_boxes_are_scaled_to_the_size_on_disk() -> None:
    entry = {"boxes": torch.tensor([[2.0, 1, 6, 3]]), "labels": torch.tensor([0]), "masks": torch.ones(1, 12, 16)}
    image = torch.zeros(1, 3, 4, 8, dtype=torch.uint8)
    batch = {"image": image, "target": [entry], "original_size": torch.tensor([[12, 16]])}
    for (found,) in scale_to_original([entry], batch):
        assert found["boxes"].tolist() == [[4, 3, 12, 9]]
        assert found["masks"] is entry["masks"]
    original = [{"boxes": torch.tensor([[5.0, 3, 12, 9]])}]
    assert scale_to_original([entry], {**batch, "original_target": original})[1] == original
    assert scale_to_original([entry], {"image": image, "target": [entry]}) == ([entry], [entry])
