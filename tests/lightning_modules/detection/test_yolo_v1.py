"""YOLO v1: parameter counts, the loss against equation 3 in loops and darknet's gradient, encoding and decoding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from errors import UserError
from lightning_modules.detection.yolo_v1 import (
    LAYERS,
    CellPredictions,
    YOLOv1,
    YOLOv1Network,
    decode,
    encode,
    yolo_loss,
)
from lightning_modules.schedules import Step
from tests.command import ROOT

S, B, C, SIDE = 4, 2, 3, 64


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_norm", "parameters"), [(False, 271_703_550), (True, 271_716_734)])
def test_the_papers_network(batch_norm: bool, parameters: int) -> None:
    with torch.device("meta"):
        network = YOLOv1Network(batch_norm=batch_norm)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len([layer for layer in LAYERS if layer != "M"]) == 24
    assert network(torch.zeros(1, 3, 448, 448, device="meta")).shape == (1, 7, 7, 30)


@pytest.mark.parametrize("backbone", ["darknet", "resnet18"])
def test_small_variants(backbone: Any) -> None:
    network = YOLOv1Network(backbone, 3, grid_size=2, width_multiplier=0.05, batch_norm=True, hidden_units=16)
    assert network(torch.zeros(2, 3, 128, 128)).shape == (2, 2, 2, 13)


def test_the_input_size_must_fit_the_grid() -> None:
    with pytest.raises(UserError, match="input_size: expected 448, 64 pixels per cell of grid_size 7, found 300"):
        YOLOv1(input_size=300)
    module = YOLOv1(num_classes=3, grid_size=2, input_size=128, width_multiplier=0.05, hidden_units=16)
    with pytest.raises(UserError, match="image: expected 128x128 pixels, found 96x96; set --data.image_size 128"):
        module.predict(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))


def test_the_papers_network_has_no_published_weights_by_name() -> None:
    with pytest.raises(UserError, match="expected null for backbone 'darknet' or a file .* use a ResNet backbone"):
        YOLOv1Network(weights="DEFAULT")


# --- loss -------------------------------------------------------------------------------------------------------------


def iou(a: Any, b: Any) -> float:
    """Compute the IoU of two boxes (x, y, w, h) with center (x, y)."""
    sides = [
        min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2) for i in (0, 1)
    ]
    if min(sides) <= 0:
        return 0.0
    intersection = sides[0] * sides[1]
    return intersection / (a[2] * a[3] + b[2] * b[3] - intersection)


def loss_in_loops(output: np.ndarray, target: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Compute half of equation 3 as a sum over cells and boxes, with 1_ij^obj and 1_ij^noobj."""
    terms = dict.fromkeys(("center", "size", "object", "no_object", "class"), 0.0)
    for n, t in enumerate(target):
        first: dict[tuple[int, int], tuple] = {}
        for box, label in zip(t["boxes"].double().numpy(), t["labels"].tolist(), strict=True):
            x, y = (box[0] + box[2]) / 2 / SIDE, (box[1] + box[3]) / 2 / SIDE
            w, h = (box[2] - box[0]) / SIDE, (box[3] - box[1]) / SIDE
            if w < 0.005 or h < 0.005:
                continue
            first.setdefault((int(y * S), int(x * S)), (x, y, w, h, label))
        for i in range(S):
            for j in range(S):
                cell = output[n, i, j]
                predicted = [cell[5 * b : 5 * b + 5] for b in range(B)]
                chosen, overlap = -1, 0.0
                if (i, j) in first:
                    x, y, w, h, label = first[i, j]
                    boxes = [((p[0] + j) / S, (p[1] + i) / S, p[2] ** 2, p[3] ** 2) for p in predicted]
                    overlaps = [iou(p, (x, y, w, h)) for p in boxes]
                    if max(overlaps) > 0:
                        chosen = int(np.argmax(overlaps))
                    else:
                        chosen = int(np.argmin([sum((p[k] - (x, y, w, h)[k]) ** 2 for k in range(4)) for p in boxes]))
                    overlap = overlaps[chosen]
                    for c in range(C):
                        terms["class"] += (cell[5 * B + c] - (c == label)) ** 2
                for b, p in enumerate(predicted):
                    if b == chosen:
                        terms["center"] += 5 * ((p[0] - (x * S - j)) ** 2 + (p[1] - (y * S - i)) ** 2)
                        terms["size"] += 5 * ((p[2] - math.sqrt(w)) ** 2 + (p[3] - math.sqrt(h)) ** 2)
                        terms["object"] += (p[4] - overlap) ** 2
                    else:
                        terms["no_object"] += 0.5 * p[4] ** 2
    return {key: value / (2 * len(target)) for key, value in terms.items()}


def random_case(seed: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Draw outputs and objects: images without objects, crowded cells, tiny objects, distant and close predictions."""
    rng = np.random.default_rng(seed)
    target = []
    images = int(rng.integers(1, 4))
    for _ in range(images):
        count = int(rng.choice([0, 1, 2, 8]))
        size = rng.choice([0.2, 1.0, 15.0, 60.0], (count, 2)) * rng.uniform(0.5, 1, (count, 2))
        center = rng.uniform(0, SIDE, (count, 2))
        low, high = (center - size / 2).clip(0), (center + size / 2).clip(None, SIDE)
        boxes = torch.from_numpy(np.concatenate([low, high], 1)).float()
        target.append({"boxes": boxes, "labels": torch.from_numpy(rng.integers(0, C, count))})
    output = torch.from_numpy(rng.normal(0, rng.choice([0.05, 0.5, 2.0]), (images, S, S, 5 * B + C))).float()
    return output, target


def test_the_loss_is_the_formula() -> None:
    unmatched = crowded = empty = 0
    for seed in range(300):
        output, target = random_case(seed)
        targets = encode(target, S, (SIDE, SIDE))
        terms = yolo_loss(output, targets, B)
        expected = loss_in_loops(output.double().numpy(), target)
        for key, value in expected.items():
            assert terms[key].item() == pytest.approx(value, rel=2e-4, abs=1e-5), (seed, key)
        empty += sum(len(t["boxes"]) for t in target) == 0
        crowded += int((~targets.assigned).sum()) > 0
        predicted = CellPredictions.split(output, B).boxes().flatten(0, 2)[targets.cell]
        disjoint = torch.minimum(predicted[..., 2:], targets.boxes[:, None, 2:]) <= torch.maximum(
            predicted[..., :2], targets.boxes[:, None, :2]
        )
        unmatched += bool((disjoint.any(-1).all(-1) & targets.assigned).any())
    assert min(unmatched, crowded, empty) > 15  # the special cases occurred


def darknet_delta(output: np.ndarray, target: dict[str, torch.Tensor]) -> np.ndarray:
    """Return ``l.delta`` of one image by darknet's src/detection_layer.c (rescore=1, sqrt=1), (S, S, 5 B + C).

    Darknet stores all classes, all confidences, then all boxes; this function restores the order of the cells.
    """
    cells = S * S
    classes = output[..., 5 * B :].reshape(cells, C)
    predicted = output[..., : 5 * B].reshape(cells, B, 5)
    flat = np.concatenate([classes.ravel(), predicted[..., 4].ravel(), predicted[..., :4].ravel()])
    truth = np.zeros((cells, 1 + C + 4))
    for box, label in zip(target["boxes"].double().numpy(), target["labels"].tolist(), strict=True):
        x, y, w, h = (box[0] + box[2]) / 2 / SIDE, (box[1] + box[3]) / 2 / SIDE, *((box[2:] - box[:2]) / SIDE)
        if w < 0.005 or h < 0.005:
            continue
        column, row = int(x * S), int(y * S)
        if truth[row * S + column, 0]:
            continue
        truth[row * S + column, [0, 1 + label]] = 1
        truth[row * S + column, 1 + C :] = x * S - column, y * S - row, w, h
    delta = np.zeros_like(flat)
    for i in range(cells):
        for j in range(B):
            index = cells * C + i * B + j
            delta[index] = 0.5 * (0 - flat[index])
        if not truth[i, 0]:
            continue
        for j in range(C):
            delta[i * C + j] = 1 * (truth[i, 1 + j] - flat[i * C + j])
        # Darknet compares the boxes relative to their common cell.
        true = truth[i, 1 + C :] / [S, S, 1, 1]
        best_index, best_iou, best_rmse = -1, 0.0, 20.0
        for j in range(B):
            start = cells * (C + B) + (i * B + j) * 4
            out = flat[start : start + 4] / [S, S, 1, 1]
            out[2:] = out[2:] * out[2:]
            overlap, rmse = iou(out, true), math.sqrt(((out - true) ** 2).sum())
            if best_iou > 0 or overlap > 0:
                if overlap > best_iou:
                    best_iou, best_index = overlap, j
            elif rmse < best_rmse:
                best_rmse, best_index = rmse, j
        start, index = cells * (C + B) + (i * B + best_index) * 4, cells * C + i * B + best_index
        delta[index] = 1 * (best_iou - flat[index])
        for k in range(2):
            delta[start + k] = 5 * (truth[i, 1 + C + k] - flat[start + k])
            delta[start + 2 + k] = 5 * (math.sqrt(truth[i, 3 + C + k]) - flat[start + 2 + k])
    confidence, boxes = np.split(delta[cells * C :], [cells * B])
    parts = np.concatenate([boxes.reshape(cells, B, 4), confidence.reshape(cells, B, 1)], 2).reshape(S, S, 5 * B)
    return np.concatenate([parts, delta[: cells * C].reshape(S, S, C)], 2)


def test_the_gradient_is_darknets() -> None:
    """Darknet adds ``delta`` over the images, and divides by their number in the update (learning_rate / batch)."""
    for seed in range(100):
        output, target = random_case(seed)
        output.requires_grad_()
        sum(yolo_loss(output, encode(target, S, (SIDE, SIDE)), B).values()).backward()
        expected = np.stack(
            [darknet_delta(o, t) for o, t in zip(output.detach().double().numpy(), target, strict=True)]
        )
        np.testing.assert_allclose(
            -output.grad.numpy() * len(target), expected, atol=2e-5, rtol=1e-5, err_msg=str(seed)
        )


def test_decay_is_for_weights() -> None:
    for batch_norm in (False, True):
        module = YOLOv1(num_classes=3, grid_size=2, input_size=128, width_multiplier=0.05, batch_norm=batch_norm)
        names = {id(p): name for name, p in module.named_parameters()}
        weights, others = module.parameter_groups()
        assert others["weight_decay"] == 0
        assert len(weights["params"]) == 26
        assert all(names[id(p)].endswith("weight") and p.ndim in (2, 4) for p in weights["params"])
        assert all(p.ndim == 1 for p in others["params"])
        assert len(weights["params"]) + len(others["params"]) == len(names)


def test_the_confidence_is_drawn_to_the_iou_not_to_one() -> None:
    """An object in the middle of cell (1, 1), and a box of half its width: the IoU is 0.5."""
    target = [{"boxes": torch.tensor([[16.0, 16, 32, 32]]), "labels": torch.tensor([1])}]
    output = torch.zeros(1, S, S, 5 * B + C)
    output[0, 1, 1, :5] = torch.tensor([0.5, 0.5, math.sqrt(1 / 8), math.sqrt(1 / 4), 0.5])
    output[0, 1, 1, 5 * B + 1] = 1
    terms = yolo_loss(output, encode(target, S, (SIDE, SIDE)), B)
    assert terms["object"].item() == pytest.approx(0, abs=1e-10)
    assert terms["class"].item() == 0
    assert terms["size"].item() == pytest.approx(5 / 2 * (math.sqrt(1 / 4) - math.sqrt(1 / 8)) ** 2)


def test_no_gradient_flows_through_the_iou() -> None:
    output, target = random_case(7)
    output.requires_grad_()
    yolo_loss(output, encode(target, S, (SIDE, SIDE)), B)["object"].backward()
    gradient = output.grad[..., : 5 * B].unflatten(-1, (B, 5))
    assert gradient[..., 4].abs().sum() > 0
    assert gradient[..., :4].abs().sum() == 0


def test_a_batch_without_objects_still_has_a_gradient() -> None:
    output = torch.ones(2, S, S, 5 * B + C, requires_grad=True)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    terms = yolo_loss(output, encode([empty, empty], S, (SIDE, SIDE)), B)
    assert sum(terms.values()).item() == pytest.approx(0.5 / 2 * S * S * B)
    sum(terms.values()).backward()
    assert torch.isfinite(output.grad).all()


def test_the_shipped_recipe_stays_finite_on_crowded_images() -> None:
    """From scratch, at an eighth of the width, the loss was not finite at step 11 without clipped gradients."""
    config = yaml.safe_load((ROOT / "configs/detection/yolo_v1_voc.yaml").read_text())
    sgd, schedule = (config["model"]["init_args"][key]["init_args"] for key in ("optimizer", "schedule"))
    assert sgd["lr"] * schedule["warmup_start"] == pytest.approx(1e-3)  # the paper's first learning rate
    steps, side = 80, 128
    torch.manual_seed(0)
    module = YOLOv1(num_classes=3, grid_size=2, input_size=side, width_multiplier=0.125, hidden_units=1024)
    optimizer = torch.optim.SGD(module.parameter_groups(), **sgd)
    rate = Step(optimizer, 100 * steps, **{**schedule, "warmup_steps": steps // 2})
    losses = []
    for _ in range(steps):
        corner = torch.rand(4, 20, 2) * 0.7 * side
        boxes = torch.cat([corner, corner + side * (0.05 + 0.25 * torch.rand(4, 20, 2))], 2)
        target = [{"boxes": b, "labels": torch.randint(3, (20,))} for b in boxes]
        images = torch.randint(256, (4, 3, side, side), dtype=torch.uint8)
        loss = torch.stack(list(module.losses({"image": images, "target": target}).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config["trainer"]["gradient_clip_val"])
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    assert optimizer.param_groups[0]["lr"] == sgd["lr"]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-20:]) < losses[0]


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_what_was_encoded_is_decoded() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        cells = rng.permutation(S * S)[:3]
        center = (np.stack([cells % S, cells // S], 1) + rng.uniform(0.1, 0.9, (3, 2))) * SIDE / S
        size = np.minimum(rng.uniform(4, 30, (3, 2)), 2 * np.minimum(center, SIDE - center))
        boxes = torch.from_numpy(np.concatenate([center - size / 2, center + size / 2], 1)).float()
        labels = torch.from_numpy(rng.integers(0, C, 3))
        t = encode([{"boxes": boxes, "labels": labels}], S, (SIDE, SIDE))
        output = torch.zeros(1, S, S, 5 * B + C).flatten(0, 2)
        output[t.cell, :4] = torch.cat([t.xy, t.sqrt_wh], 1)
        output[t.cell, 4] = torch.tensor([0.9, 0.8, 0.7])
        output[t.cell, 5 * B + labels] = 1
        (found,) = decode(output.view(1, S, S, -1), B, (SIDE, SIDE))
        torch.testing.assert_close(found["boxes"], boxes, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.8, 0.7]))
        assert found["labels"].tolist() == labels.tolist()
        assert all(yolo_loss(output.view(1, S, S, -1), t, B)[key] < 1e-6 for key in ("center", "size", "class"))


def test_duplicates_go_and_other_classes_and_images_stay() -> None:
    output = torch.zeros(2, S, S, 5 * B + C)
    same = torch.tensor([0.5, 0.5, 0.5, 0.5])
    output[:, 1, 1, :4], output[:, 1, 1, 5:9] = same, same
    output[:, 1, 1, 4], output[:, 1, 1, 9] = 0.9, 0.6
    output[:, 1, 1, 10], output[:, 1, 1, 11] = 1.0, 0.5
    for found in decode(output, B, (SIDE, SIDE)):
        assert found["labels"].tolist() == [0, 1]
        torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.45]))


def test_two_negative_factors_are_no_detection() -> None:
    output = torch.full((1, S, S, 5 * B + C), -1.0)
    assert len(decode(output, B, (SIDE, SIDE))[0]["boxes"]) == 0
