"""RoI heads: pooling, sampling, loss and decoding, compared to the paper's rules in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, roi_align, roi_pool

from lightning_modules.components.boxes import decode_boxes
from lightning_modules.components.roi_heads import (
    ROI_BOX_STD,
    RoIHeads,
    RoIPooling,
    SampledRoIs,
    decode_detections,
    fast_rcnn_loss,
    sample_rois,
)
from tests.lightning_modules.components.test_boxes import random_boxes


def random_case(seed: int) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Up to 40 proposals of each of two images, half of them near objects, and up to five objects."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 40))
    valid = torch.zeros(2, max(count, 1), dtype=torch.bool)
    boxes = torch.zeros(2, max(count, 1), 4)
    target = []
    for i in range(2):
        n = int(rng.integers(0, count + 1))
        valid[i, :n] = True
        boxes[i, :n] = random_boxes(rng, n, 64)
        objects = random_boxes(rng, int(rng.integers(0, 6)), 64)
        for j in range(0, n if len(objects) else 0, 2):
            boxes[i, j] = objects[j % len(objects)] + torch.from_numpy(rng.uniform(-3, 3, 4)).float()
        target.append({"boxes": objects, "labels": torch.from_numpy(rng.integers(0, 3, len(objects)))})
    return boxes, valid, target


# --- pooling ----------------------------------------------------------------------------------------------------------


def pool_in_loops(features: np.ndarray, left: int, top: int, bins: tuple[int, int]) -> np.ndarray:
    """Return the maximum of each of 7x7 bins of ``bins`` (width, height) cells."""
    result = np.empty((len(features), 7, 7), np.float32)
    for row in range(7):
        for column in range(7):
            y, x = top + row * bins[1], left + column * bins[0]
            result[:, row, column] = features[:, y : y + bins[1], x : x + bins[0]].max((1, 2))
    return result


def random_features(height: int, width: int) -> Tensor:
    """Return distinct values, float32 (1, 3, height, width)."""
    generator = torch.Generator().manual_seed(height)
    return torch.randperm(3 * height * width, generator=generator).float().view(1, 3, height, width)


@pytest.mark.parametrize(("width", "height", "bins"), [(21, 14, (3, 2)), (35, 42, (5, 6))], ids=["21x14", "35x42"])
def test_the_lectures_examples(width: int, height: int, bins: tuple[int, int]) -> None:
    """An RoI of 21x14 cells becomes 7x7 by bins of 3x2, one of 35x42 by bins of 5x6.

    The last column and row belong to the box: 21 cells from 0 are those from 0 to 20.
    """
    features = random_features(50, 60)
    for left, top in ((0, 0), (8, 5), (60 - width, 50 - height)):
        box = torch.tensor([[left, top, left + width - 1, top + height - 1]], dtype=torch.float32)
        pooled = roi_pool(features, [box], 7)[0]
        np.testing.assert_array_equal(pooled.numpy(), pool_in_loops(features[0].numpy(), left, top, bins))


def test_roi_pool_of_a_continuous_box_is_one_cell_too_large() -> None:
    features = random_features(50, 60)
    expected = pool_in_loops(features[0].numpy(), 0, 0, (3, 2))
    pooled = roi_pool(features, [torch.tensor([[0.0, 0, 21, 14]])], 7)[0].numpy()
    assert (pooled != expected).any()


def test_roi_pool_scales_pixels_to_cells() -> None:
    """With a stride of 16, pixels 0 to 335 are cells 0 to 21, rounded."""
    features = random_features(50, 60)
    pixels = roi_pool(features, [torch.tensor([[16.0 * 4, 16 * 3, 16 * 24, 16 * 16]])], 7, spatial_scale=1 / 16)
    cells = roi_pool(features, [torch.tensor([[4.0, 3, 24, 16]])], 7)
    torch.testing.assert_close(pixels, cells, rtol=0, atol=0)
    np.testing.assert_array_equal(cells[0].numpy(), pool_in_loops(features[0].numpy(), 4, 3, (3, 2)))


def test_only_the_maximum_of_each_bin_has_a_gradient() -> None:
    features = random_features(14, 21).requires_grad_()
    roi_pool(features, [torch.tensor([[0.0, 0, 20, 13]])], 7).sum().backward()
    blocks = features.grad[0].view(3, 7, 2, 7, 3).transpose(2, 3).reshape(3, 49, 6)  # type: ignore[index]
    values = features.detach()[0].view(3, 7, 2, 7, 3).transpose(2, 3).reshape(3, 49, 6)
    torch.testing.assert_close(blocks, torch.nn.functional.one_hot(values.argmax(2), 6).float())


def test_roi_align_does_not_round() -> None:
    """On a linear ramp each bin has the value at its center, for any box; the centers of cells are at 0.5."""
    x = torch.arange(60, dtype=torch.float32) + 0.5
    features = (x[None, :] + 100 * x[:50, None])[None, None]
    left, top, width, height = 3.3, 7.9, 16.1, 23.45
    box = torch.tensor([[left, top, left + width, top + height]])
    aligned = roi_align(features, [box], 7, sampling_ratio=2, aligned=True)[0, 0]
    center = (torch.arange(7) + 0.5) / 7
    torch.testing.assert_close(aligned, left + width * center[None, :] + 100 * (top + height * center[:, None]))


def test_the_last_pixel_of_a_box_is_pooled() -> None:
    """The last pixel of a box to 312 is 311, in cell 19; that of a box to 313 is 312, rounded to cell 20."""
    torch.manual_seed(0)

    def pool(pooling: RoIPooling) -> Tensor:
        return RoIHeads("vgg16", 26, (16,), 3, 0.05, False, pooling).pool([features], boxes)

    features = torch.randn(2, 26, 24, 24)
    boxes = torch.tensor([[[0.0, 0, 312, 313]], [[16.0, 32, 120, 152]]])
    expected = [
        roi_pool(features[:1], [torch.tensor([[0.0, 0, 19, 20]])], 7),
        roi_pool(features[1:], [torch.tensor([[1.0, 2, 7, 9]])], 7),
    ]
    torch.testing.assert_close(pool("pool"), torch.cat(expected))
    assert not torch.equal(pool("pool"), pool("align"))


# --- target encoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bg_iou_min", "fg_iou"), [(0.0, 0.5), (0.1, 0.5), (0.1, 0.6)])
def test_rois_are_sampled_by_the_papers_rules(bg_iou_min: float, fg_iou: float) -> None:
    torch.manual_seed(0)
    positives = 0
    for seed in range(150):
        boxes, valid, target = random_case(seed)
        rois = sample_rois(boxes, valid, target, 16, 0.25, fg_iou, bg_iou_min)
        for i, entry in enumerate(target):
            candidates = torch.cat([boxes[i][valid[i]], entry["boxes"]])
            iou = box_iou(candidates, entry["boxes"])
            best, matched = iou.max(1) if len(entry["boxes"]) else (torch.zeros(len(candidates)), None)
            lowest = bg_iou_min if len(entry["boxes"]) else 0.0
            counts = int((best >= fg_iou).sum()), int(((best < fg_iou) & (best >= lowest)).sum())
            sampled, labels = rois.valid[i], rois.labels[i]
            expected = min(4, counts[0])
            assert int((sampled & (labels > 0)).sum()) == expected, seed
            assert int((sampled & (labels == 0)).sum()) == min(16 - expected, counts[1]), seed
            for box, u, v in zip(*(x[i][sampled] for x in (rois.boxes, rois.labels, rois.deltas)), strict=True):
                row = (candidates == box).all(1).nonzero()[0, 0]
                if u == 0:
                    assert lowest <= best[row] < fg_iou
                    continue
                positives += 1
                assert best[row] >= fg_iou
                k = matched[row]  # type: ignore[index]
                assert u == entry["labels"][k] + 1
                decoded = decode_boxes(v, box, ROI_BOX_STD)
                torch.testing.assert_close(decoded, entry["boxes"][k], atol=1e-3, rtol=1e-4)
    assert positives > 300


def test_ground_truth_boxes_are_proposals() -> None:
    target = [{"boxes": torch.tensor([[3.0, 4, 20, 30]]), "labels": torch.tensor([1])}]
    rois = sample_rois(torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.bool), target, 16)
    assert rois.labels[rois.valid].tolist() == [2]
    assert rois.deltas[rois.valid].abs().max() < 1e-5


def test_positive_rois_come_first() -> None:
    """The mask and keypoint branches process no others."""
    torch.manual_seed(0)
    for _ in range(50):
        corner = torch.rand(2, 60, 2) * 40
        proposals = torch.cat([corner, corner + 10 + torch.rand(2, 60, 2) * 20], 2)
        target = [{"boxes": proposals[i, :5], "labels": torch.arange(5)} for i in range(2)]
        rois = sample_rois(proposals, torch.ones(2, 60, dtype=torch.bool), target, 24, 0.25)
        assert not rois.labels[:, 6:].any()
        positive = rois.labels > 0
        assert positive.sum() == 12
        assert torch.equal(rois.object_indices[positive], rois.labels[positive] - 1)


# --- loss -------------------------------------------------------------------------------------------------------------


def loss_in_loops(logits: np.ndarray, deltas: np.ndarray, rois: SampledRoIs, weight: float) -> tuple[float, float]:
    """Compute equations 1 to 3."""
    log_loss = smooth_l1 = 0.0
    count = int(rois.valid.sum())
    for b, i in rois.valid.nonzero().tolist():
        u = int(rois.labels[b, i])
        p = np.exp(logits[b, i]) / np.exp(logits[b, i]).sum()
        log_loss -= math.log(p[u])
        if u >= 1:
            for t, v in zip(deltas[b, i, u], rois.deltas[b, i].double().numpy(), strict=True):
                x = abs(t - v)
                smooth_l1 += 0.5 * x * x if x < 1 else x - 0.5
    return log_loss / max(count, 1), weight * smooth_l1 / max(count, 1)


def test_loss_is_the_papers() -> None:
    torch.manual_seed(0)
    for seed in range(200):
        rois = sample_rois(*random_case(seed), 16)
        n = rois.labels.shape[1]
        logits, deltas = torch.randn(2, n, 4), torch.randn(2, n, 4, 4)
        terms = fast_rcnn_loss(logits, deltas, rois, 2.0)
        expected = loss_in_loops(logits.double().numpy(), deltas.double().numpy(), rois, 2.0)
        assert terms["class"].item() == pytest.approx(expected[0], rel=1e-5)
        assert terms["box"].item() == pytest.approx(expected[1], rel=1e-5, abs=1e-8)


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detections_per_image", [100, 2])
def test_decode_inverts_encode(detections_per_image: int) -> None:
    """For objects that do not overlap."""
    boxes = torch.tensor([[[3.0, 5, 17, 17], [30, 2, 60, 20], [20, 40, 33, 62], [0, 30, 10, 40]]])
    gt_boxes = torch.tensor([[2.0, 5, 14, 18], [32, 2, 55, 20], [20, 38, 33, 62]])
    target = [{"boxes": gt_boxes, "labels": torch.tensor([2, 0, 1])}]
    rois = sample_rois(boxes, torch.ones(1, 4, dtype=torch.bool), target, 16, positive_fraction=1.0)
    logits = torch.nn.functional.one_hot(rois.labels, 4) * 20.0
    deltas = rois.deltas[:, :, None].expand(-1, -1, 4, -1)
    size = torch.tensor([[64.0, 64.0]])
    (detections,) = decode_detections(
        logits, deltas, rois.boxes, rois.valid, size, detections_per_image=detections_per_image
    )
    if detections_per_image == 2:
        assert len(detections["boxes"]) == 2
        return
    order = detections["labels"].argsort()
    assert detections["labels"][order].tolist() == [0, 1, 2]
    torch.testing.assert_close(detections["boxes"][order], gt_boxes[[1, 2, 0]], atol=1e-3, rtol=1e-4)


def test_padding_is_not_detected() -> None:
    valid = torch.tensor([[True, False]])
    logits = torch.tensor([0.0, 10, 0, 0]).expand(1, 2, 4)
    boxes = torch.tensor([[[3.0, 5, 17, 17], [30, 2, 60, 20]]])
    (detections,) = decode_detections(logits, torch.zeros(1, 2, 4, 4), boxes, valid, torch.tensor([[64.0, 64.0]]))
    assert detections["boxes"].tolist() == [[3, 5, 17, 17]]
    assert detections["labels"].tolist() == [0]
