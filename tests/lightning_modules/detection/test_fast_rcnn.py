"""Fast R-CNN: the network, what is drawn to learn from, loss and decoding against the paper's rules in loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, roi_pool

from lightning_modules.components.boxes import decode_boxes
from lightning_modules.components.roi_heads import DEVIATIONS, decode, draw_regions, fast_rcnn_loss
from lightning_modules.detection.fast_rcnn import FastRCNN
from tests.lightning_modules.detection.test_rpn import NOTHING, some_boxes


def small(**options: Any) -> FastRCNN:
    return FastRCNN(**{"num_classes": 3, "width": 0.05, "batch_norm": True, **options})


def a_case(seed: int, near: bool = True) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Proposals of two images, where there are any, some of them near objects, and up to five objects."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 40))
    there = torch.zeros(2, max(count, 1), dtype=torch.bool)
    boxes = torch.zeros(2, max(count, 1), 4)
    target = []
    for i in range(2):
        n = int(rng.integers(0, count + 1))
        there[i, :n] = True
        boxes[i, :n] = some_boxes(rng, n, 64)
        objects = some_boxes(rng, int(rng.integers(0, 6)), 64)
        for j in range(0, n if near and len(objects) else 0, 2):
            boxes[i, j] = objects[j % len(objects)] + torch.from_numpy(rng.uniform(-3, 3, 4)).float()
        target.append({"boxes": objects, "labels": torch.from_numpy(rng.integers(0, 3, len(objects)))})
    return boxes, there, target


# --- network ----------------------------------------------------------------------------------------------------------


def test_the_papers_network() -> None:
    with torch.device("meta"):
        module = FastRCNN()
    assert sum(p.numel() for p in module.network.parameters()) == 134_690_729


def test_pretrained_layers_may_be_frozen() -> None:
    """conv1 and conv2 of VGG16, as in the paper; of a ResNet conv1, the first block and all batch normalization."""
    with torch.device("meta"):
        vgg, resnet = FastRCNN(frozen=True).network, FastRCNN("resnet50", frozen=True).network
    trained = [name for name, p in vgg.named_parameters() if p.requires_grad]
    assert trained[0] == "trunk.10.weight"
    assert len(trained) == len(list(vgg.parameters())) - 8
    trained = [name for name, p in resnet.named_parameters() if p.requires_grad]
    assert trained[0] == "trunk.layer2.0.conv1.weight"
    assert not any("bn" in name for name in trained)


def test_regions_are_pooled_as_in_the_paper() -> None:
    """A region ends with its last pixel: of 312, pixel 311, which is in cell 19; of 313, 312, rounded to cell 20."""
    torch.manual_seed(0)
    module = small()
    channels = module.network.roi.head.fc6.in_features // 49  # type: ignore[operator, union-attr]
    features = torch.randn(2, int(channels), 24, 24)
    boxes = torch.tensor([[[0.0, 0, 312, 313]], [[16.0, 32, 120, 152]]])
    pooled = module.network.roi.pool([features], boxes)
    expected = [
        roi_pool(features[:1], [torch.tensor([[0.0, 0, 19, 20]])], 7),
        roi_pool(features[1:], [torch.tensor([[1.0, 2, 7, 9]])], 7),
    ]
    torch.testing.assert_close(pooled, torch.cat(expected))
    assert not torch.equal(pooled, small(pooling="align").network.roi.pool([features], boxes))


def test_many_regions_are_looked_at_in_parts() -> None:
    torch.manual_seed(0)
    module = small().eval()
    pixels, boxes = torch.randn(2, 3, 64, 64), torch.rand(2, 30, 4) * 20 + torch.tensor([0, 0, 30, 30])
    with torch.inference_mode():
        whole = module.network(pixels, boxes)
        module.network.roi.at_once = 7
        parts = module.network(pixels, boxes)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


# --- target encoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [0.0, 0.1])
def test_regions_are_drawn_by_the_papers_rules(background: float) -> None:
    torch.manual_seed(0)
    positives = 0
    for seed in range(150):
        boxes, there, target = a_case(seed)
        regions = draw_regions(boxes, there, target, 16, 0.25, background)
        for i, entry in enumerate(target):
            candidates = torch.cat([boxes[i][there[i]], entry["boxes"]])
            iou = box_iou(candidates, entry["boxes"])
            best, chosen = iou.max(1) if len(entry["boxes"]) else (torch.zeros(len(candidates)), None)
            least = background if len(entry["boxes"]) else 0.0
            counts = int((best >= 0.5).sum()), int(((best < 0.5) & (best >= least)).sum())
            taken, label = regions.taken[i], regions.label[i]
            expected = min(4, counts[0])
            assert int((taken & (label > 0)).sum()) == expected, seed
            assert int((taken & (label == 0)).sum()) == min(16 - expected, counts[1]), seed
            for box, u, v in zip(*(x[i][taken] for x in (regions.boxes, regions.label, regions.offset)), strict=True):
                row = (candidates == box).all(1).nonzero()[0, 0]
                if u == 0:
                    assert least <= best[row] < 0.5
                    continue
                positives += 1
                assert best[row] >= 0.5
                truth = chosen[row]  # type: ignore[index]
                assert u == entry["labels"][truth] + 1
                back = decode_boxes(v, box, DEVIATIONS)
                torch.testing.assert_close(back, entry["boxes"][truth], atol=1e-3, rtol=1e-4)
    assert positives > 300


def test_objects_are_proposals_themselves() -> None:
    target = [{"boxes": torch.tensor([[3.0, 4, 20, 30]]), "labels": torch.tensor([1])}]
    regions = draw_regions(torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.bool), target, 16)
    assert regions.label[regions.taken].tolist() == [2]
    assert regions.offset[regions.taken].abs().max() < 1e-5


# --- loss -------------------------------------------------------------------------------------------------------------


def loss_in_loops(logits: np.ndarray, offset: np.ndarray, regions: Any, weight: float) -> tuple[float, float]:
    """Equations 1 to 3."""
    log_loss = smooth = 0.0
    count = int(regions.taken.sum())
    for b, i in regions.taken.nonzero().tolist():
        u = int(regions.label[b, i])
        p = np.exp(logits[b, i]) / np.exp(logits[b, i]).sum()
        log_loss -= math.log(p[u])
        if u >= 1:
            for t, v in zip(offset[b, i, u], regions.offset[b, i].double().numpy(), strict=True):
                x = abs(t - v)
                smooth += 0.5 * x * x if x < 1 else x - 0.5
    return log_loss / max(count, 1), weight * smooth / max(count, 1)


def test_loss_is_the_papers() -> None:
    torch.manual_seed(0)
    for seed in range(200):
        regions = draw_regions(*a_case(seed), 16)
        n = regions.label.shape[1]
        logits, offset = torch.randn(2, n, 4), torch.randn(2, n, 4, 4)
        terms = fast_rcnn_loss(logits, offset, regions, 2.0)
        expected = loss_in_loops(logits.double().numpy(), offset.double().numpy(), regions, 2.0)
        assert terms["class"].item() == pytest.approx(expected[0], rel=1e-5)
        assert terms["box"].item() == pytest.approx(expected[1], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("proposed", [0, 5])
def test_nothing_there_has_a_finite_loss(proposed: int) -> None:
    torch.manual_seed(0)
    module = small()
    boxes = torch.tensor([[10.0, 10, 40, 40]]).repeat(proposed, 1)
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    batch = {"image": image, "target": [NOTHING, NOTHING], "proposals": [boxes, boxes[:0]]}
    terms = module.losses(batch)
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert terms["box"] == 0
    assert (terms["class"] > 0.5) == (proposed > 0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_a_batch_without_proposals_is_refused() -> None:
    with pytest.raises(ValueError, match="python -m tools.proposals"):
        small().losses({"image": torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "target": [NOTHING]})


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_what_was_encoded_is_found() -> None:
    """decode(encode(x)) = x, of objects that stand apart."""
    boxes = torch.tensor([[[3.0, 5, 17, 17], [30, 2, 60, 20], [20, 40, 33, 62], [0, 30, 10, 40]]])
    truth = torch.tensor([[2.0, 5, 14, 18], [32, 2, 55, 20], [20, 38, 33, 62]])
    target = [{"boxes": truth, "labels": torch.tensor([2, 0, 1])}]
    regions = draw_regions(boxes, torch.ones(1, 4, dtype=torch.bool), target, 16, share=1.0)
    logits = torch.nn.functional.one_hot(regions.label, 4) * 20.0
    offset = regions.offset[:, :, None].expand(-1, -1, 4, -1)
    (found,) = decode(logits, offset, regions.boxes, regions.taken, torch.tensor([[64.0, 64.0]]))
    order = found["labels"].argsort()
    assert found["labels"][order].tolist() == [0, 1, 2]
    torch.testing.assert_close(found["boxes"][order], truth[[1, 2, 0]], atol=1e-3, rtol=1e-4)


def test_nothing_is_found_where_no_proposal_is() -> None:
    there = torch.tensor([[True, False]])
    logits = torch.tensor([0.0, 10, 0, 0]).expand(1, 2, 4)
    boxes = torch.tensor([[[3.0, 5, 17, 17], [30, 2, 60, 20]]])
    (found,) = decode(logits, torch.zeros(1, 2, 4, 4), boxes, there, torch.tensor([[64.0, 64.0]]))
    assert found["boxes"].tolist() == [[3, 5, 17, 17]]
    assert found["labels"].tolist() == [0]


def test_pictures_alone_are_searched() -> None:
    """Prediction of a folder has no proposals: Selective Search's are taken."""
    torch.manual_seed(0)
    module = small(score_threshold=0.0).eval()
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 20:45, 25:60] = 200
    with torch.inference_mode():
        (searched,) = module.predict([image])
        (given,) = module.predict_batch({"image": [image], "proposals": [torch.tensor([[25.0, 20, 60, 45]])]})
    assert len(searched["boxes"]) > 3
    assert len(given["boxes"]) == 3


def test_it_learns_what_its_proposals_show() -> None:
    """Squares and bars among proposals that lie anywhere."""
    torch.manual_seed(0)
    module = small(num_classes=2, stride=8, width=0.1, pooling="align", regions=16)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    rng = np.random.default_rng(0)

    def batch(n: int) -> dict[str, Any]:
        image = torch.zeros(n, 3, 64, 64, dtype=torch.uint8)
        target, proposals = [], []
        for i in range(n):
            kind = int(rng.integers(2))
            width, height = ((24, 24), (12, 36))[kind]
            x, y = int(rng.integers(0, 64 - width)), int(rng.integers(0, 64 - height))
            image[i, :, y : y + height, x : x + width] = 255
            box = torch.tensor([[float(x), y, x + width, y + height]])
            target.append({"boxes": box, "labels": torch.tensor([kind])})
            near = (box + torch.from_numpy(rng.uniform(-4, 4, (4, 4))).float()).clamp(0, 64)
            proposals.append(torch.cat([near, some_boxes(rng, 12, 64)]))
        return {"image": image, "target": target, "proposals": proposals}

    for _ in range(60):
        optimizer.zero_grad()
        sum(module.losses(batch(8)).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    test = batch(32)
    with torch.inference_mode():
        found = module.predict_batch(test)
    right = [f["labels"][0] == t["labels"][0] for f, t in zip(found, test["target"], strict=True)]
    overlap = [box_iou(f["boxes"][:1], t["boxes"])[0, 0] for f, t in zip(found, test["target"], strict=True)]
    assert torch.stack(right).float().mean() > 0.8
    assert torch.stack(overlap).median() > 0.6
