"""Recall of proposals against a loop over images, objects, proposals and counts."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from lightning_modules.detection.metrics import ProposalRecall


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
