"""Fast R-CNN: network, training with and without objects, proposals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from lightning_modules.detection.fast_rcnn import FastRCNN
from tests.lightning_modules.components.test_boxes import NO_OBJECTS, random_boxes


def small(**options: Any) -> FastRCNN:
    return FastRCNN(**{"num_classes": 3, "width_multiplier": 0.05, "batch_norm": True, **options})


def test_the_papers_network() -> None:
    with torch.device("meta"):
        module = FastRCNN()
    assert sum(p.numel() for p in module.network.parameters()) == 134_690_729


def test_pretrained_layers_may_be_frozen() -> None:
    """conv1 and conv2 of VGG-16, as in the paper; conv1, the first block and batch normalization of a ResNet."""
    with torch.device("meta"):
        vgg = FastRCNN(freeze_backbone=True).network
        resnet = FastRCNN(backbone="resnet50", freeze_backbone=True).network
    trained = [name for name, p in vgg.named_parameters() if p.requires_grad]
    assert trained[0] == "trunk.10.weight"
    assert len(trained) == len(list(vgg.parameters())) - 8
    trained = [name for name, p in resnet.named_parameters() if p.requires_grad]
    assert trained[0] == "trunk.layer2.0.conv1.weight"
    assert not any("bn" in name for name in trained)


def test_many_rois_are_processed_in_chunks() -> None:
    torch.manual_seed(0)
    roi = small().eval().network.roi
    maps, boxes = [torch.randn(2, 26, 4, 4)], torch.rand(2, 30, 4) * 20 + torch.tensor([0, 0, 30, 30])
    with torch.inference_mode():
        expected = roi(maps, boxes)
        roi.rois_per_chunk = 7
        chunked = roi(maps, boxes)
    for a, b in zip(expected, chunked, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_proposals", [0, 5])
def test_the_loss_without_objects_is_finite(num_proposals: int) -> None:
    torch.manual_seed(0)
    module = small()
    boxes = torch.tensor([[10.0, 10, 40, 40]]).repeat(num_proposals, 1)
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    batch = {"image": image, "target": [NO_OBJECTS, NO_OBJECTS], "proposals": [boxes, boxes[:0]]}
    terms = module.losses(batch)
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert terms["box"] == 0
    assert (terms["class"] > 0.5) == (num_proposals > 0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_a_batch_without_proposals_is_refused() -> None:
    with pytest.raises(ValueError, match="python -m tools.proposals"):
        small().losses({"image": torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "target": [NO_OBJECTS]})


def test_selective_search_replaces_missing_proposals() -> None:
    """A folder of images to predict has no proposals."""
    torch.manual_seed(0)
    module = small(score_threshold=0.0).eval()
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 20:45, 25:60] = 200
    with torch.inference_mode():
        (searched,) = module.predict([image])
        (given,) = module.predict_batch({"image": [image], "proposals": [torch.tensor([[25.0, 20, 60, 45]])]})
    assert len(searched["boxes"]) > 3
    assert len(given["boxes"]) == 3


def test_it_learns_to_classify_proposals() -> None:
    """Squares and bars, among random proposals."""
    torch.manual_seed(0)
    module = small(num_classes=2, stride=8, width_multiplier=0.1, roi_pooling="align", rois_per_image=16)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    rng = np.random.default_rng(0)

    def batch(n: int) -> dict[str, Any]:
        image = torch.zeros(n, 3, 64, 64, dtype=torch.uint8)
        target, proposals = [], []
        for i in range(n):
            label = int(rng.integers(2))
            width, height = ((24, 24), (12, 36))[label]
            x, y = int(rng.integers(0, 64 - width)), int(rng.integers(0, 64 - height))
            image[i, :, y : y + height, x : x + width] = 255
            box = torch.tensor([[float(x), y, x + width, y + height]])
            target.append({"boxes": box, "labels": torch.tensor([label])})
            near = (box + torch.from_numpy(rng.uniform(-4, 4, (4, 4))).float()).clamp(0, 64)
            proposals.append(torch.cat([near, random_boxes(rng, 12, 64)]))
        return {"image": image, "target": target, "proposals": proposals}

    for _ in range(60):
        optimizer.zero_grad()
        sum(module.losses(batch(8)).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    test = batch(32)
    with torch.inference_mode():
        detections = module.predict_batch(test)
    pairs = list(zip(detections, test["target"], strict=True))
    correct = torch.stack([found["labels"][0] == gt["labels"][0] for found, gt in pairs])
    iou = torch.stack([box_iou(found["boxes"][:1], gt["boxes"])[0, 0] for found, gt in pairs])
    assert correct.float().mean() > 0.8
    assert iou.median() > 0.6
