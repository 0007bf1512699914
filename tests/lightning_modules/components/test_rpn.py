"""Region proposal network: network, labels, loss and proposals, compared to the paper's rules in loops."""

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
from lightning_modules.components.rpn import (
    RegionProposalNetwork,
    RPNOutput,
    decode_proposals,
    encode_rpn_targets,
    rpn_loss,
)
from tests.lightning_modules.components.test_boxes import random_boxes

CPU = torch.device("cpu")


def random_case(seed: int) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    """Two images of 64 and 48 px with up to six objects, sometimes a duplicate, and anchors."""
    rng = np.random.default_rng(seed)
    target = []
    for side in (64.0, 48.0):
        boxes = random_boxes(rng, int(rng.integers(0, 6)), side)
        boxes = torch.cat([boxes, boxes[:1]]) if seed % 3 == 0 else boxes
        target.append({"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)})
    anchors = make_anchors((10, 20), (0.5, 1, 2), 8, (8, 8), CPU)
    return target, anchors, torch.tensor([[64.0, 64.0], [48.0, 48.0]])


def random_output(seed: int, images: int, anchors: Tensor, anchors_per_map: list[int] | None = None) -> RPNOutput:
    generator = torch.Generator().manual_seed(seed)
    objectness = torch.randn(images, len(anchors), generator=generator)
    deltas = torch.randn(images, len(anchors), 4, generator=generator) * 0.3
    return RPNOutput(objectness, deltas, anchors, anchors_per_map or [len(anchors)], len(anchors) // 6)


# --- network ----------------------------------------------------------------------------------------------------------


def test_a_pyramid_has_one_anchor_size_per_map() -> None:
    torch.manual_seed(0)
    trunk = make_trunk("resnet50_fpn", width_multiplier=0.05)
    network = RegionProposalNetwork(trunk.channels, trunk.strides, (8, 16, 32, 64, 128), (1,))
    output = network([torch.randn(1, trunk.channels, 2**i, 2**i) for i in (4, 3, 2, 1, 0)])
    sides = output.anchors[:, 2] - output.anchors[:, 0]
    assert output.anchors_per_map == [256, 64, 16, 4, 1]
    assert sides.unique().tolist() == [8, 16, 32, 64, 128]
    assert output.num_cells == 341


# --- target encoding --------------------------------------------------------------------------------------------------


def labels_in_loops(
    entry: dict[str, Tensor], anchors: Tensor, size: Tensor, allow_border: bool, fg: float, bg: float
) -> list[int]:
    """1 for positive, 0 for negative, -1 for ignored anchors (section 3.1.2)."""
    iou = box_iou(entry["boxes"], anchors).numpy()
    labels = []
    used = [allow_border or (min(a[:2]) >= 0 and a[2] <= size[0] and a[3] <= size[1]) for a in anchors.tolist()]
    highest = [max(value for value, inside in zip(row, used, strict=True) if inside) for row in iou]
    for i in range(len(anchors)):
        if not used[i]:
            labels.append(-1)
            continue
        label = -1
        if not len(iou) or max(iou[:, i]) < bg:
            label = 0
        for row, best in zip(iou, highest, strict=True):
            # The two implementations of IoU differ in the last digit.
            if row[i] >= fg or (best > 0 and row[i] >= best - 1e-6):
                label = 1
        labels.append(label)
    return labels


@pytest.mark.parametrize(("allow_border", "fg", "bg"), [(False, 0.7, 0.3), (True, 0.7, 0.3), (True, 0.5, 0.2)])
def test_labels_are_the_papers(allow_border: bool, fg: float, bg: float) -> None:
    positives = ignored = 0
    for seed in range(100):
        target, anchors, size = random_case(seed)
        targets = encode_rpn_targets(target, anchors, size, fg, bg, allow_border)
        assert not (targets.positive & targets.negative).any()
        for i, entry in enumerate(target):
            expected = torch.tensor(labels_in_loops(entry, anchors, size[i], allow_border, fg, bg))
            labels = torch.where(targets.positive[i], 1, torch.where(targets.negative[i], 0, -1))
            assert labels.tolist() == expected.tolist(), seed
            positives += int((expected == 1).sum())
            ignored += int((expected == -1).sum())
            # The deltas of positive anchors lead to an object.
            boxes = decode_boxes(targets.deltas[i], anchors, (1, 1, 1, 1))[targets.positive[i]]
            if len(boxes):
                assert (box_iou(boxes, entry["boxes"]).amax(1) > 0.999).all()
    assert positives > 500
    assert ignored > 500


def test_all_ties_are_positive() -> None:
    """An object between two anchors, with an IoU below 0.7."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [30, 30, 40, 40]])
    target = [{"boxes": torch.tensor([[5.0, 0, 15, 10]]), "labels": torch.tensor([0])}]
    targets = encode_rpn_targets(target, anchors, torch.tensor([[64.0, 64.0]]))
    assert targets.positive.tolist() == [[True, True, False]]
    assert targets.negative.tolist() == [[False, False, True]]


# --- loss -------------------------------------------------------------------------------------------------------------


def loss_in_loops(
    output: RPNOutput, targets: Any, sample: Sample, normalization: str, weight: float
) -> tuple[float, float]:
    logits, deltas, gt_deltas = (x.double().numpy() for x in (output.objectness, output.deltas, targets.deltas))
    log_loss = smooth_l1 = valid = 0.0
    for b in range(len(logits)):
        for position, i in enumerate(sample.indices[b].tolist()):
            if not sample.valid[b, position]:
                continue
            valid += 1
            p = 1 / (1 + math.exp(-logits[b, i]))
            log_loss -= math.log(p if targets.positive[b, i] else 1 - p)
            if targets.positive[b, i]:
                for t, v in zip(deltas[b, i], gt_deltas[b, i], strict=True):
                    d = abs(t - v)
                    if normalization == "paper":
                        smooth_l1 += 0.5 * d * d if d < 1 else d - 0.5
                    else:
                        smooth_l1 += 0.5 * (3 * d) ** 2 if d < 1 / 9 else d - 0.5 / 9
    if normalization == "paper":
        images = len(logits)
        return log_loss / 256 / images, weight * smooth_l1 / output.num_cells / images
    return log_loss / max(valid, 1), smooth_l1 / max(valid, 1)


@pytest.mark.parametrize("normalization", ["paper", "authors"])
def test_loss_is_the_papers(normalization: Any) -> None:
    torch.manual_seed(0)
    for seed in range(100):
        target, anchors, size = random_case(seed)
        output = random_output(seed, 2, anchors)
        targets = encode_rpn_targets(target, anchors, size, allow_border_anchors=seed % 2 == 0)
        sample = sample_balanced(targets.positive, targets.negative, 256, 0.5)
        terms = rpn_loss(output, targets, sample, normalization, 10.0)
        expected = loss_in_loops(output, targets, sample, normalization, 10.0)
        assert terms["rpn_class"].item() == pytest.approx(expected[0], rel=1e-4)
        assert terms["rpn_box"].item() == pytest.approx(expected[1], rel=1e-4, abs=1e-7)


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_proposals_equal_those_of_a_loop() -> None:
    """Two feature maps, two images: the best large anchors of each map, clipped and suppressed by map.

    The least size is one number, or one per image.
    """
    fine = make_anchors((12, 20), (0.5, 1, 2), 8, (8, 8), CPU)
    coarse = make_anchors((30, 40), (0.5, 1, 2), 16, (4, 4), CPU)
    anchors, size = torch.cat([fine, coarse]), torch.tensor([[64.0, 64.0], [48.0, 60.0]])
    for seed in range(20):
        output = random_output(seed, 2, anchors, [len(fine), len(coarse)])
        least = (12.0, 12.0) if seed % 2 else (10.0, 14.0)
        min_size = 12.0 if seed % 2 else torch.tensor(least)[:, None]
        proposals = decode_proposals(output, size, pre_nms_top_n=100, post_nms_top_n=40, min_size=min_size)
        for i in range(2):
            boxes_of, scores_of = [], []
            for start, count in ((0, len(fine)), (len(fine), len(coarse))):
                scores = output.objectness[i, start : start + count].sigmoid()
                part = slice(start, start + count)
                boxes = decode_boxes(output.deltas[i, part], anchors[part], (1, 1, 1, 1))
                boxes = torch.minimum(boxes.clamp_min(0), size[i].repeat(2))
                large = ((boxes[:, 2:] - boxes[:, :2]) >= least[i]).all(1)
                boxes, scores = boxes[large], scores[large]
                best = scores.argsort(descending=True)[:100]
                boxes, scores = boxes[best], scores[best]
                kept = nms(boxes, scores, 0.7)
                boxes_of.append(boxes[kept])
                scores_of.append(scores[kept])
            boxes, scores = torch.cat(boxes_of), torch.cat(scores_of)
            order = scores.argsort(descending=True)[:40]
            valid = proposals.valid[i]
            torch.testing.assert_close(proposals.scores[i][valid], scores[order])
            torch.testing.assert_close(proposals.boxes[i][valid], boxes[order], atol=1e-4, rtol=1e-5)
            assert (proposals.boxes[i][~valid] == 0).all()


def test_small_boxes_do_not_displace_large_ones() -> None:
    """Three small boxes have the highest scores; the best two of the others enter the suppression."""
    anchors = torch.tensor(
        [[0.0, 0, 8, 8], [20, 0, 28, 8], [40, 0, 48, 8], [0, 20, 20, 40], [30, 20, 50, 40], [0, 44, 20, 64]]
    )
    logits = torch.tensor([[5.0, 4, 3, 0, 2, 1]])
    output = RPNOutput(logits, torch.zeros(1, 6, 4), anchors, [6], 6)
    proposals = decode_proposals(output, torch.tensor([[64.0, 64.0]]), 2, 3, min_size=16)
    assert proposals.boxes[0].tolist() == [[30, 20, 50, 40], [0, 44, 20, 64], [0, 0, 0, 0]]
    assert proposals.valid.tolist() == [[True, True, False]]


def test_decode_inverts_encode() -> None:
    """For objects that do not overlap."""
    boxes = torch.tensor([[3.0, 5, 14, 17], [30, 2, 55, 20], [20, 40, 33, 62]])
    anchors = make_anchors((10, 20), (0.5, 1, 2), 8, (8, 8), CPU)
    size = torch.tensor([[64.0, 64.0]])
    target = [{"boxes": boxes, "labels": torch.zeros(3, dtype=torch.int64)}]
    targets = encode_rpn_targets(target, anchors, size, allow_border_anchors=True)
    logits = torch.where(targets.positive, 5.0, -5.0)
    output = RPNOutput(logits, targets.deltas, anchors, [len(anchors)], 64)
    proposals = decode_proposals(output, size, 1000, 1000, min_size=1)
    best = proposals.boxes[0][proposals.scores[0] > 0.9]
    assert len(best) == 3
    torch.testing.assert_close(best[best[:, 3].argsort()], boxes, atol=1e-3, rtol=1e-4)


def test_a_diverged_run_proposes_nothing() -> None:
    """RoI pooling of nan would read memory out of bounds."""
    _, anchors, size = random_case(0)
    output = random_output(0, 2, anchors)
    for objectness, deltas in ((torch.nan, 0.0), (0.0, torch.nan), (torch.nan, torch.nan)):
        diverged = output._replace(objectness=output.objectness + objectness, deltas=output.deltas + deltas)
        proposals = decode_proposals(diverged, size, 100, 50, min_size=1)
        assert not proposals.valid.any()
        assert (proposals.boxes == 0).all()
