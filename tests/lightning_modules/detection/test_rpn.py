"""The region proposal network: anchors, labels, loss and proposals against the paper's rules in loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from lightning_modules.components.anchors import make_anchors
from lightning_modules.components.backbones import make_trunk
from lightning_modules.components.boxes import Sample, decode_boxes, sample_balanced
from lightning_modules.components.rpn import RegionProposalNetwork, RPNOutput, encode, propose, rpn_loss
from lightning_modules.detection.rpn import RPN, RPNNetwork

CPU = torch.device("cpu")
NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def small(**options: Any) -> RPN:
    return RPN(**{"width": 0.05, "batch_norm": True, "anchor_sizes": [16, 32], "least": 2.0, **options})


def some_boxes(rng: np.random.Generator, n: int, side: float) -> Tensor:
    corner, size = rng.uniform(0, side * 0.7, (n, 2)), rng.uniform(3, side * 0.4, (n, 2))
    return torch.from_numpy(np.concatenate([corner, np.minimum(corner + size, side)], 1)).float()


def a_case(seed: int) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    """Two images of 64 and 48 pixels with up to six objects, the same twice among them, and anchors."""
    rng = np.random.default_rng(seed)
    target = []
    for side in (64.0, 48.0):
        boxes = some_boxes(rng, int(rng.integers(0, 6)), side)
        boxes = torch.cat([boxes, boxes[:1]]) if seed % 3 == 0 else boxes
        target.append({"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)})
    anchors = make_anchors((10, 20), (0.5, 1, 2), 8, (8, 8), CPU)
    return target, anchors, torch.tensor([[64.0, 64.0], [48.0, 48.0]])


def output_of(seed: int, images: int, anchors: Tensor, counts: list[int] | None = None) -> RPNOutput:
    generator = torch.Generator().manual_seed(seed)
    objectness = torch.randn(images, len(anchors), generator=generator)
    offset = torch.randn(images, len(anchors), 4, generator=generator) * 0.3
    return RPNOutput(objectness, offset, anchors, counts or [len(anchors)], len(anchors) // 6)


# --- network ----------------------------------------------------------------------------------------------------------


def test_the_papers_network() -> None:
    with torch.device("meta"):
        network = RPN().network
    assert sum(p.numel() for p in network.rpn.parameters()) == 512 * 512 * 9 + 512 + 9 * 513 + 36 * 513
    assert sum(p.numel() for p in network.trunk.parameters()) == 14_714_688


def test_anchors_of_one_place_are_the_authors() -> None:
    """py-faster-rcnn's generate_anchors, of inclusive pixels; its sides are rounded."""
    anchors = make_anchors((128, 256, 512), (0.5, 1, 2), 16, (1, 1), CPU)
    theirs = [
        (-84, -40, 99, 55), (-176, -88, 191, 103), (-360, -184, 375, 199),
        (-56, -56, 71, 71), (-120, -120, 135, 135), (-248, -248, 263, 263),
        (-36, -80, 51, 95), (-80, -168, 95, 183), (-168, -344, 183, 359),
    ]  # fmt: skip
    expected = torch.tensor(theirs).float() + torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(anchors[3:6], expected[3:6])
    torch.testing.assert_close(anchors, expected, atol=12, rtol=0)
    assert ((anchors[:, :2] + anchors[:, 2:]) / 2 == 8).all()


def test_anchors_lie_on_the_cells_row_by_row() -> None:
    anchors = make_anchors((32,), (1,), 8, (2, 3), CPU)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centers.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]


def test_what_is_said_moves_with_the_picture() -> None:
    """Section 3.1.1: an image shifted by a stride has the same objectness and offsets one cell further."""
    torch.manual_seed(0)
    network = RPNNetwork(make_trunk("vgg16", width=0.05), (32, 64), (0.5, 1, 2)).eval()
    picture = torch.randn(1, 3, 512, 512)
    with torch.inference_mode():
        here, there = network(picture), network(picture.roll((16, 32), (2, 3)))
    for name in ("objectness", "offset"):
        a, b = (getattr(output, name).view(1, 32, 32, -1) for output in (here, there))
        inner = slice(10, 20)  # a place sees 114 pixels each way: not the edges
        assert a[:, inner, inner].std() > 1e-6
        torch.testing.assert_close(b[:, 11:21, 12:22], a[:, inner, inner], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(
        here.anchors.view(32, 32, 6, 4)[1, 2], here.anchors.view(32, 32, 6, 4)[0, 0] + torch.tensor([32.0, 16, 32, 16])
    )


def test_wrong_anchors_are_refused() -> None:
    with torch.device("meta"):
        with pytest.raises(ValueError, match="anchor_sizes: expected 5 numbers above 0, one a map, found"):
            RPN(backbone="resnet50_fpn")
        with pytest.raises(ValueError, match="anchor_sizes: expected numbers above 0, found"):
            RPN(anchor_sizes=[0, 3])
        with pytest.raises(ValueError, match="stride: expected 16 for resnet50, found 8"):
            RPN(backbone="resnet50", stride=8)


# --- target encoding --------------------------------------------------------------------------------------------------


def labels_in_loops(entry: dict[str, Tensor], anchors: Tensor, size: Tensor, crossing: bool) -> list[int]:
    """1, 0 and -1 for neither, by section 3.1.2."""
    iou = box_iou(entry["boxes"], anchors).numpy()
    labels = []
    inside = [crossing or (min(a[:2]) >= 0 and a[2] <= size[0] and a[3] <= size[1]) for a in anchors.tolist()]
    most_of = [max(value for value, used in zip(row, inside, strict=True) if used) for row in iou]
    for i in range(len(anchors)):
        if not inside[i]:
            labels.append(-1)
            continue
        label = -1
        if not len(iou) or max(iou[:, i]) < 0.3:
            label = 0
        for row, most in zip(iou, most_of, strict=True):
            # Equal but for rounding: the implementation's IoU is another one's last digit.
            if row[i] >= 0.7 or (most > 0 and row[i] >= most - 1e-6):
                label = 1
        labels.append(label)
    return labels


@pytest.mark.parametrize("crossing", [False, True])
def test_labels_are_the_papers(crossing: bool) -> None:
    positives = ignored = 0
    for seed in range(100):
        target, anchors, size = a_case(seed)
        targets = encode(target, anchors, size, crossing)
        assert not (targets.positive & targets.negative).any()
        for i, entry in enumerate(target):
            expected = torch.tensor(labels_in_loops(entry, anchors, size[i], crossing))
            found = torch.where(targets.positive[i], 1, torch.where(targets.negative[i], 0, -1))
            assert found.tolist() == expected.tolist(), seed
            positives += int((expected == 1).sum())
            ignored += int((expected == -1).sum())
            # What is learned of a positive leads to an object.
            boxes = decode_boxes(targets.offset[i], anchors, (1, 1, 1, 1))[targets.positive[i]]
            if len(boxes):
                assert (box_iou(boxes, entry["boxes"]).amax(1) > 0.999).all()
    assert positives > 500
    assert ignored > 500


def test_ties_are_all_positive() -> None:
    """An object exactly between two anchors, which it overlaps by less than 0.7."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [30, 30, 40, 40]])
    target = [{"boxes": torch.tensor([[5.0, 0, 15, 10]]), "labels": torch.tensor([0])}]
    targets = encode(target, anchors, torch.tensor([[64.0, 64.0]]))
    assert targets.positive.tolist() == [[True, True, False]]
    assert targets.negative.tolist() == [[False, False, True]]


def test_sampling_ratios() -> None:
    """256 anchors, half of them positive at most; negatives make it full; ignored ones are never drawn."""
    torch.manual_seed(0)
    for positives, negatives, expected in (
        (500, 1000, (128, 128)),
        (20, 1000, (20, 236)),
        (20, 30, (20, 30)),
        (0, 0, (0, 0)),
    ):
        order = torch.randperm(2000)
        positive, negative = (torch.zeros(1, 2000, dtype=torch.bool) for _ in range(2))
        positive[0, order[:positives]] = True
        negative[0, order[positives : positives + negatives]] = True
        drawn = sample_balanced(positive, negative, 256, 0.5)
        assert (int(drawn.positive.sum()), int((drawn.valid & ~drawn.positive).sum())) == expected
        assert positive.gather(1, drawn.indices)[drawn.positive].all()
        assert negative.gather(1, drawn.indices)[drawn.valid & ~drawn.positive].all()
        assert len(drawn.indices.unique()) == drawn.indices.numel()
    first, second = (sample_balanced(positive | True, negative, 256, 0.5).which for _ in range(2))
    assert not torch.equal(first, second)


# --- loss -------------------------------------------------------------------------------------------------------------


def loss_in_loops(
    output: RPNOutput, targets: Any, drawn: Sample, normalizer: str, weight: float
) -> tuple[float, float]:
    logits, offset, truth = (x.double().numpy() for x in (output.objectness, output.offset, targets.offset))
    log_loss = smooth = known = 0.0
    for b in range(len(logits)):
        for place, i in enumerate(drawn.indices[b].tolist()):
            if not drawn.valid[b, place]:
                continue
            known += 1
            p = 1 / (1 + math.exp(-logits[b, i]))
            log_loss -= math.log(p if targets.positive[b, i] else 1 - p)
            if targets.positive[b, i]:
                for t, v in zip(offset[b, i], truth[b, i], strict=True):
                    d = abs(t - v)
                    if normalizer == "paper":
                        smooth += 0.5 * d * d if d < 1 else d - 0.5
                    else:
                        smooth += 0.5 * (3 * d) ** 2 if d < 1 / 9 else d - 0.5 / 9
    if normalizer == "paper":
        images = len(logits)
        return log_loss / 256 / images, weight * smooth / output.places / images
    return log_loss / max(known, 1), smooth / max(known, 1)


@pytest.mark.parametrize("normalizer", ["paper", "authors"])
def test_loss_is_the_papers(normalizer: Any) -> None:
    torch.manual_seed(0)
    anchors = make_anchors((10, 20), (0.5, 1, 2), 8, (8, 8), CPU)
    for seed in range(100):
        target, anchors, size = a_case(seed)
        output = output_of(seed, 2, anchors)
        targets = encode(target, anchors, size, crossing=seed % 2 == 0)
        drawn = sample_balanced(targets.positive, targets.negative, 256, 0.5)
        terms = rpn_loss(output, targets, drawn, normalizer, 10.0)
        expected = loss_in_loops(output, targets, drawn, normalizer, 10.0)
        assert terms["rpn_class"].item() == pytest.approx(expected[0], rel=1e-4)
        assert terms["rpn_box"].item() == pytest.approx(expected[1], rel=1e-4, abs=1e-7)


def test_pictures_without_objects_train_as_background() -> None:
    torch.manual_seed(0)
    module = small()
    image = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    terms = module.losses({"image": image, "target": [NOTHING, NOTHING]})
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert terms["rpn_box"] == 0
    assert terms["rpn_class"] > 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    # No anchor lies within an image that is smaller than all of them.
    terms = small(anchor_sizes=[128]).losses({"image": image, "target": [NOTHING, NOTHING]})
    assert terms["rpn_class"] == 0


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_proposals_are_those_of_a_loop() -> None:
    """Two maps of anchors, two images: the best of each map, clipped, without small ones, suppressed map by map."""
    fine = make_anchors((12, 20), (0.5, 1, 2), 8, (8, 8), CPU)
    coarse = make_anchors((30, 40), (0.5, 1, 2), 16, (4, 4), CPU)
    anchors, size = torch.cat([fine, coarse]), torch.tensor([[64.0, 64.0], [48.0, 60.0]])
    for seed in range(20):
        output = output_of(seed, 2, anchors, [len(fine), len(coarse)])
        found = propose(output, size, before=100, after=40, least=12)
        for i in range(2):
            boxes_of, scores_of = [], []
            for start, count in ((0, len(fine)), (len(fine), len(coarse))):
                scores = output.objectness[i, start : start + count].sigmoid()
                best = scores.argsort(descending=True)[:100]
                boxes = decode_boxes(output.offset[i, start + best], anchors[start + best], (1, 1, 1, 1))
                boxes = torch.minimum(boxes.clamp_min(0), size[i].repeat(2))
                large = ((boxes[:, 2:] - boxes[:, :2]) >= 12).all(1)
                boxes, scores = boxes[large], scores[best][large]
                kept = nms(boxes, scores, 0.7)
                boxes_of.append(boxes[kept])
                scores_of.append(scores[kept])
            boxes, scores = torch.cat(boxes_of), torch.cat(scores_of)
            order = scores.argsort(descending=True)[:40]
            there = found.there[i]
            torch.testing.assert_close(found.scores[i][there], scores[order])
            torch.testing.assert_close(found.boxes[i][there], boxes[order], atol=1e-4, rtol=1e-5)
            assert (found.boxes[i][~there] == 0).all()


def test_what_was_encoded_is_proposed() -> None:
    """decode(encode(x)) = x, for objects that stand apart."""
    boxes = torch.tensor([[3.0, 5, 14, 17], [30, 2, 55, 20], [20, 40, 33, 62]])
    anchors = make_anchors((10, 20), (0.5, 1, 2), 8, (8, 8), CPU)
    size = torch.tensor([[64.0, 64.0]])
    targets = encode([{"boxes": boxes, "labels": torch.zeros(3, dtype=torch.int64)}], anchors, size, crossing=True)
    logits = torch.where(targets.positive, 5.0, -5.0)
    found = propose(RPNOutput(logits, targets.offset, anchors, [len(anchors)], 64), size, 1000, 1000, least=1)
    proposed = found.boxes[0][found.scores[0] > 0.9]
    assert len(proposed) == 3
    torch.testing.assert_close(proposed[proposed[:, 3].argsort()], boxes, atol=1e-3, rtol=1e-4)


def test_a_run_that_diverged_proposes_nothing() -> None:
    """No numbers would go on into the pooling of regions, which reads memory that is not there."""
    _, anchors, size = a_case(0)
    output = output_of(0, 2, anchors)
    for objectness, offset in ((torch.nan, 0.0), (0.0, torch.nan), (torch.nan, torch.nan)):
        lost = output._replace(objectness=output.objectness + objectness, offset=output.offset + offset)
        found = propose(lost, size, 100, 50, least=1)
        assert not found.there.any()
        assert (found.boxes == 0).all()


def test_predictions_of_pictures_of_two_sizes() -> None:
    torch.manual_seed(0)
    module = small(after=30).eval()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 96), (80, 50))]
    with torch.inference_mode():
        found = module.predict(images)
    for entry, (height, width) in zip(found, ((64, 96), (80, 50)), strict=True):
        assert 0 < len(entry["boxes"]) <= 30
        assert entry["boxes"].amax(0)[2:].le(torch.tensor([width, height])).all()
        assert (entry["scores"].diff() <= 0).all()
        assert entry["labels"].dtype == torch.int64


def test_it_learns_where_objects_are() -> None:
    """Bright squares on dark: after a short training the first proposals are theirs."""
    torch.manual_seed(0)
    module = small(stride=8, anchor_sizes=[16], width=0.1, crossing=True)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    generator = np.random.default_rng(0)

    def batch(n: int) -> dict[str, Any]:
        image = torch.zeros(n, 3, 64, 64, dtype=torch.uint8)
        target = []
        for i in range(n):
            x, y = generator.integers(0, 46, 2).tolist()
            image[i, :, y : y + 18, x : x + 18] = 255
            target.append({"boxes": torch.tensor([[x, y, x + 18.0, y + 18.0]]), "labels": torch.tensor([0])})
        return {"image": image, "target": target}

    for _ in range(60):
        optimizer.zero_grad()
        sum(module.losses(batch(8)).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    test = batch(32)
    with torch.inference_mode():
        found = module.predict(test["image"])
    first = torch.stack([entry["boxes"][0] for entry in found])
    truth = torch.cat([entry["boxes"] for entry in test["target"]])
    assert box_iou(first, truth).diag().median() > 0.6


def test_the_pyramid_has_one_size_of_anchor_a_map() -> None:
    torch.manual_seed(0)
    network = RegionProposalNetwork(make_trunk("resnet50_fpn", width=0.05), (8, 16, 32, 64, 128), (1,))
    channels = network.head.cls_logits.in_channels
    output = network([torch.randn(1, channels, 2**i, 2**i) for i in (4, 3, 2, 1, 0)])
    sides = output.anchors[:, 2] - output.anchors[:, 0]
    assert output.counts == [256, 64, 16, 4, 1]
    assert sides.unique().tolist() == [8, 16, 32, 64, 128]
    assert output.places == 341
