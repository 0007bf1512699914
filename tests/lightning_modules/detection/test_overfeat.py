"""OverFeat: parameter counts, dense evaluation, both losses, and merging against the paper's steps in loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.detection.overfeat import (
    ARCHITECTURES,
    BoxRegressor,
    OverFeat,
    OverFeatNetwork,
    apply_at_every_offset,
    box_loss,
    match_score,
    merge_boxes,
    merge_detections,
)
from lightning_modules.detection.windows import IGNORE_LABEL, resize_to_window_grid, window_grid
from tests.lightning_modules.detection.test_sliding_window import learn, with_random_statistics

C = 3


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "window", "parameters", "kernel", "channels"),
    [
        ("fast", 231, 145_920_872, 6, 1024),
        ("accurate", 221, 144_656_488, 5, 1024),
        ("small", 63, 10_562_920, 3, 512),
    ],
)
def test_the_papers_networks(variant: Any, window: int, parameters: int, kernel: int, channels: int) -> None:
    with torch.device("meta"):
        network = OverFeatNetwork(variant, 1000)
    assert sum(p.numel() for p in network.parameters()) == parameters
    images = torch.zeros(2, 3, window, window, device="meta")
    assert network(images).shape == (2, 1000)
    assert network.pooled(images).shape == (2, channels, kernel, kernel)
    # The window is the smallest input: with one stride less, no window fits.
    with pytest.raises(RuntimeError):
        network(images[..., : -network.stride])


def test_the_regressor() -> None:
    with torch.device("meta"):
        regressor = BoxRegressor(1024, 5, 1000)
    expected = (1024 * 25 + 1) * 4096 + 4097 * 1024 + 1025 * 4000
    assert sum(p.numel() for p in regressor.parameters()) == expected
    untrained = BoxRegressor(8, 3, 2, width_multiplier=0.01)(torch.randn(5, 8, 3, 3)).flatten(1)
    assert torch.equal(untrained, torch.tensor([0.0, 0, 1, 1] * 2).expand(5, -1))


@pytest.mark.parametrize(("sides", "shape"), [((245, 245), (3, 3)), ((281, 317), (6, 9)), ((317, 389), (9, 15))])
def test_the_papers_map_sizes(sides: tuple[int, int], shape: tuple[int, int]) -> None:
    """Table 5: output maps of the first three scales, at 3x3 offsets of 1x1, 2x3 and 3x5 cells."""
    with torch.device("meta"):
        network = OverFeatNetwork("accurate", 10, width_multiplier=0.1)
        features = network.features(torch.zeros(1, 3, *sides, device="meta"))
        found = apply_at_every_offset(features, network.pool_size, network.kernel_size, network.classifier)
    assert found.shape == (1, 10, *shape)


# --- dense evaluation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(0, 0), (4, 0), (20, 28), (22, 13)])
def test_every_offset_gives_what_each_window_gives(extra: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = OverFeatNetwork("small", C + 1, width_multiplier=0.05, batch_norm=True, num_boxes=C)
    with_random_statistics(network)
    nn.init.normal_(network.classifier[-1].weight)
    nn.init.normal_(network.regressor[-1].weight)
    side, step = network.window_size, network.stride
    images = torch.randn(2, 3, side + extra[0], side + extra[1])
    with torch.inference_mode():
        features = network.features(images)
        logits, edges = (
            apply_at_every_offset(features, network.pool_size, network.kernel_size, head)
            for head in (network.classifier, network.regressor)
        )
        rows, columns = (e // step + 1 for e in extra)
        assert logits.shape == (2, C + 1, rows, columns)
        for row in range(rows):
            for column in range(columns):
                y, x = row * step, column * step
                window = images[:, :, y : y + side, x : x + side]
                torch.testing.assert_close(logits[:, :, row, column], network(window), atol=1e-5, rtol=1e-4)
                boxes = network.regressor(network.pooled(window)).flatten(1)
                torch.testing.assert_close(edges[:, :, row, column], boxes, atol=1e-5, rtol=1e-4)
        image, row, column = (
            torch.tensor([1, 0, 1]),
            torch.tensor([0, rows - 1, rows - 1]),
            torch.tensor([0, 0, columns - 1]),
        )
        some = network.regress_boxes(features, image, row, column)
        torch.testing.assert_close(some.flatten(1), edges[image, :, row, column], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("variant", "cells", "equal"), [("accurate", 15, 7), ("fast", 12, 6), ("small", 9, 9)])
def test_padding_changes_the_border_cells_of_a_window(variant: Any, cells: int, equal: int) -> None:
    """The padded layers see zeros around a window, but the image around the same window of a dense map.

    The docstring of the module has these numbers.
    """
    torch.manual_seed(0)
    network = OverFeatNetwork(variant, C + 1, width_multiplier=0.03).eval()
    side, offset = network.window_size, 5 * network.stride
    image = torch.randn(1, 3, side + 2 * offset, side + 2 * offset)
    with torch.inference_mode():
        window = network.features(image[:, :, offset : offset + side, offset : offset + side])
        dense = network.features(image)[:, :, 5 : 5 + cells, 5 : 5 + cells]
    assert window.shape[-1] == cells
    same = torch.isclose(window, dense, atol=1e-5).all(1)[0]
    border = (cells - equal) // 2
    inside = slice(border, cells - border)
    assert same[inside, inside].all()
    assert int(same.any(0).sum()) <= equal + 2  # a border cell may be 0 in both by chance
    assert int(same.sum()) <= equal**2 + 2


@pytest.mark.parametrize(
    ("variant", "scales", "shorter", "smallest", "largest"),
    [
        ("accurate", (245, 281, 317, 389, 425, 461), 375, 128, 375),
        ("fast", (245, 281, 317, 389, 425, 461), 375, 135, 375),
        ("small", (150, 190, 270, 330, 600, 720), 320, 20, 188),
    ],
)
def test_object_sizes_that_six_scales_reach(
    variant: Any, scales: tuple[int, ...], shorter: int, smallest: int, largest: int
) -> None:
    """Sides of square objects with which a window can have an IoU of 0.5; docs/detection.md has these numbers."""
    network = OverFeatNetwork(variant, C, width_multiplier=0.01)
    reached = set()
    for scale in scales:
        image = torch.zeros(1, 1, shorter, shorter)
        resized = resize_to_window_grid(image, scale, scale, network.window_size, network.stride)
        windows = window_grid(resized, shorter, shorter, network.window_size, network.stride)
        side = float(windows[0, 0, 2])
        # An object within the window, or around it, with the same center.
        reached |= {s for s in range(1, shorter + 1) if min(s / side, side / s) ** 2 >= 0.5}
    assert (min(reached), max(reached)) == (smallest, largest)


def test_offsets_are_a_dilated_convolution() -> None:
    """Pooling with stride 1 and a head dilated by the pooling size compute the same map."""
    torch.manual_seed(0)
    head, features = nn.Conv2d(4, 5, 2), torch.randn(2, 4, 13, 11)
    dilated = F.conv2d(F.max_pool2d(features, 3, 1), head.weight, head.bias, dilation=3)
    torch.testing.assert_close(apply_at_every_offset(features, 3, 2, head), dilated, atol=1e-5, rtol=1e-5)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_specific", [True, False])
def test_the_box_loss_is_the_formula(class_specific: bool) -> None:
    rng = np.random.default_rng(0)
    empty = 0
    for _ in range(200):
        count = int(rng.integers(1, 8))
        boxes = rng.normal(0.5, 1, (count, C if class_specific else 1, 4))
        label = rng.choice([0, 1, 2, C, IGNORE_LABEL], count)
        target = rng.normal(0.5, 1, (count, 4))
        terms = []
        for box, y, gt_box in zip(boxes, label, target, strict=True):
            if y not in (C, IGNORE_LABEL):
                terms.append(sum((box[y if class_specific else 0][k] - gt_box[k]) ** 2 for k in range(4)))
        empty += not terms
        found = box_loss(*(torch.from_numpy(x) for x in (boxes, label, target)), C)
        assert found.item() == pytest.approx(sum(terms) / max(1, len(terms)), rel=1e-4, abs=1e-7)
    assert empty > 10


# --- merging ----------------------------------------------------------------------------------------------------------


def score_of(a: Any, b: Any) -> float:
    """Compute `match_score` in scalars."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    diagonals = [math.hypot(x[2] - x[0], x[3] - x[1]) for x in (a, b)]
    centers = [((x[0] + x[2]) / 2, (x[1] + x[3]) / 2) for x in (a, b)]
    distance = math.dist(*centers) / (sum(diagonals) / 2)
    return distance + 1 - width * height / (sum(areas) - width * height)


def merged_in_loops(boxes: list, scores: list, threshold: float) -> list[tuple[tuple[float, ...], float]]:
    """Steps (d) to (g) of section 4.3."""
    b = [(tuple(box), score) for box, score in zip(boxes, scores, strict=True)]
    while True:
        pairs = [(score_of(b[i][0], b[j][0]), i, j) for i in range(len(b)) for j in range(i + 1, len(b))]
        if not pairs or min(pairs)[0] > threshold:
            return b
        _, i, j = min(pairs)
        mean = tuple((p + q) / 2 for p, q in zip(b[i][0], b[j][0], strict=True))
        b[i] = (mean, b[i][1] + b[j][1])
        del b[j]


def test_merging_is_the_papers_loop() -> None:
    rng = np.random.default_rng(0)
    merges = kept = 0
    for _ in range(60):
        groups, max_boxes = int(rng.integers(1, 4)), int(rng.integers(1, 9))
        low = rng.uniform(0, 30, (groups, max_boxes, 2))
        boxes = np.concatenate([low, low + rng.uniform(10, 40, (groups, max_boxes, 2))], 2)
        scores = rng.uniform(0.1, 1, (groups, max_boxes)) * (
            np.arange(max_boxes) < rng.integers(0, max_boxes + 1, (groups, 1))
        )
        for g in range(groups):
            valid = scores[g] > 0
            expected = merged_in_loops(boxes[g][valid].tolist(), scores[g][valid].tolist(), 0.7)
            found_boxes, found = merge_boxes(torch.from_numpy(boxes[g][valid]), torch.from_numpy(scores[g][valid]), 0.7)
            assert len(found) == len(expected)
            for box, score, (e_box, e_score) in zip(found_boxes, found, expected, strict=True):
                assert box.tolist() == pytest.approx(e_box)
                assert score.item() == pytest.approx(e_score)
            merges += int(valid.sum()) - len(expected)
            kept += len(expected)
    assert min(merges, kept) > 20


def test_two_that_agree_become_one_and_a_third_stays() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [40, 40, 50, 50]])
    merged, scores = merge_boxes(boxes, torch.tensor([0.5, 0.25, 0.125]), 0.5)
    assert scores.tolist() == [0.75, 0.125]
    assert merged.tolist() == [[0.5, 0, 10.5, 10], [40, 40, 50, 50]]


def test_the_match_score() -> None:
    box = torch.tensor([0.0, 0, 30, 40])
    assert match_score(box, box).item() == 0
    beside = torch.tensor([30.0, 0, 60, 40])
    assert match_score(box, beside).item() == pytest.approx(30 / 50 + 1)
    assert match_score(10 * box, 10 * beside).item() == pytest.approx(30 / 50 + 1)


def test_nothing_to_merge() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    found = merge_detections(torch.zeros(0, 4), torch.zeros(0), none, none, 2, 0.5, top_k=10)
    assert [len(entry["boxes"]) for entry in found] == [0, 0]


def test_classes_and_images_merge_apart() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1)
    scores, labels = torch.tensor([0.5, 0.25, 0.3, 0.9, 0.1]), torch.tensor([0, 0, 1, 0, 0])
    image = torch.tensor([0, 0, 0, 2, 2])
    first, second, third = merge_detections(boxes, scores, labels, image, 3, 0.5, top_k=10)
    assert first["scores"].tolist() == pytest.approx([0.75, 0.3])
    assert first["labels"].tolist() == [0, 1]
    assert len(second["boxes"]) == 0
    assert third["scores"].tolist() == [1.0]
    assert merge_detections(boxes, scores, labels, image, 3, 0.5, top_k=1)[2]["scores"].tolist() == pytest.approx([0.9])


# --- module -----------------------------------------------------------------------------------------------------------


def small(**options: Any) -> OverFeat:
    settings: dict[str, Any] = {
        "variant": "small",
        "num_classes": C,
        "width_multiplier": 0.05,
        "batch_norm": True,
        "scales": [64],
    }
    return OverFeat(**{**settings, **options})


def a_batch() -> dict[str, Any]:
    boxes, labels = torch.tensor([[10.0, 10, 40, 45]]), torch.tensor([1])
    no_objects = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    return {"image": images, "target": [{"boxes": boxes, "labels": labels}, no_objects]}


@pytest.mark.parametrize(
    ("stage", "terms", "learns"),
    [
        ("classifier", {"cross_entropy"}, {"features", "classifier"}),
        ("regressor", {"box"}, {"regressor"}),
        ("both", {"cross_entropy", "box"}, {"features", "classifier", "regressor"}),
    ],
)
def test_stages(stage: Any, terms: set[str], learns: set[str]) -> None:
    torch.manual_seed(0)
    module = small(train=stage, scales=[64, 130])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):  # the first step changes only the last layer of the regressor, whose weights start at 0
        losses = module.losses(a_batch())
        assert set(losses) == terms
        sum(losses.values()).backward()
        optimizer.step()
    changed = {key.split(".")[1] for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == learns


def test_the_second_stage_begins_with_the_first(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    first = small(train="classifier")
    path = str(tmp_path / "first.ckpt")
    torch.save({"state_dict": first.state_dict()}, path)
    second = small(train="regressor", weights=path)
    for key, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[key])
    with pytest.raises(ValueError, match="expected weights of OverFeat small"):
        small(width_multiplier=0.1, weights=path)


def test_boxes_are_the_windows_until_the_regressor_has_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small(scales=[75], score_threshold=0.9)  # 32 pixels become 75: 4x4 windows
    logits = torch.zeros(1, C + 1, 4, 4)
    logits[:, C], logits[0, 2, 1, 3] = 20, 40
    monkeypatch.setattr("lightning_modules.detection.overfeat.apply_at_every_offset", lambda *_: logits)
    module.eval()
    (found,) = module.predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    expected = torch.tensor([[12.0, 4, 75, 67]]) * 32 / 75
    torch.testing.assert_close(found["boxes"], expected)
    assert found["labels"].tolist() == [2]
    with torch.no_grad():
        module.network.regressor[-1].bias[8:] = torch.tensor([0.25, 0.0, 0.5, 1.0])
    (moved,) = module.predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    width = expected[0, 2] - expected[0, 0]
    assert moved["boxes"][0, 0].item() == pytest.approx((expected[0, 0] + width / 4).item(), rel=1e-5)
    assert moved["boxes"][0, 2].item() == pytest.approx((expected[0, 0] + width / 2).item(), rel=1e-5)


def test_a_batch_without_objects_trains_as_background() -> None:
    batch = a_batch()
    batch["target"] = [batch["target"][1]] * 2
    losses = small().losses(batch)
    assert losses["box"].item() == 0
    sum(losses.values()).backward()
    assert torch.isfinite(losses["cross_entropy"])


def test_scales_below_the_window_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"scales: expected at least 221 pixels, the window's side, found \[200, 245\]"
    ):
        OverFeat("accurate", 0.02, scales=[200, 245])


def test_it_learns(tmp_path: Any) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "width_multiplier": 0.1,
        "scales": [120, 200],
        "compute_coco_ap": False,
        "windows_per_image": 12,
    }
    before, after = learn(small(num_classes=2, **settings), str(tmp_path), steps=20, size=80)
    assert before < 0.1
    assert after > 0.3


def test_nothing_is_padded_in_the_small_network() -> None:
    assert all(isinstance(layer, int) or layer[3] == 0 for layer in ARCHITECTURES["small"].features)


def test_suppression_is_not_an_option() -> None:
    with pytest.raises(TypeError, match="nms_threshold"):
        small(nms_threshold=0.5)


def test_frozen_features_keep_their_batch_statistics() -> None:
    module = small(train="regressor", batch_norm=True)
    module.eval()
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    images = torch.randint(0, 256, (2, 3, 100, 120), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[10.0, 10, 80, 80]]), "labels": torch.tensor([0])}
    sum(module.losses({"image": images, "target": [target, target]}).values()).backward()  # type: ignore[union-attr]
    assert not [n for n, v in module.state_dict().items() if not torch.equal(v, before[n]) and "regressor" not in n]
