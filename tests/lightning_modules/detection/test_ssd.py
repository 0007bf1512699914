"""SSD: priors, the network against torchvision's, matching and loss against the authors' rules in loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert, box_iou

from lightning_modules.components.boxes import batched_box_iou, decode_boxes, encode_boxes
from lightning_modules.components.vgg import reduce_vgg16_weights
from lightning_modules.detection.ssd import (
    BOX_STD,
    SSD,
    VARIANTS,
    SSDNetwork,
    decode,
    encode,
    make_priors,
    match_objects,
    multibox_loss,
)
from lightning_modules.detection.ssd_matching import ROUNDS, match_objects_batched

NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def small(**options: Any) -> SSD:
    return SSD(**{"num_classes": 3, "width_multiplier": 0.03, "batch_norm": True, **options})


def torchvisions_ssd(module: SSD) -> Any:
    """Return torchvision's SSD300 with the weights of a module and the paper's priors."""
    peer: Any = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=module.num_classes + 1)
    variant = VARIANTS["ssd300"]
    ratios = [list(ratios) for ratios in variant.aspect_ratios]
    scales = [0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05]
    peer.anchor_generator = DefaultBoxGenerator(ratios, scales=scales, steps=list(variant.steps), clip=False)
    network = module.network
    peer.backbone.scale_weight.data.copy_(network.norm.scale)
    # The layers have the same order, but other names.
    for source, destination in (
        ([network.features, network.extras], [peer.backbone.features, peer.backbone.extra]),
        ([network.location], [peer.head.regression_head]),
        ([network.confidence], [peer.head.classification_head]),
    ):
        ours, theirs = ([p for part in parts for p in part.parameters()] for parts in (source, destination))
        for value, parameter in zip(ours, theirs, strict=True):
            parameter.data.copy_(value)
    return peer


@pytest.fixture(scope="module")
def full() -> SSD:
    torch.manual_seed(0)
    return SSD(num_classes=2).eval()


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "priors"), [("ssd300", 26_285_486, 8732), ("ssd512", 27_188_676, 24564)]
)
def test_the_papers_networks(name: str, parameters: int, priors: int) -> None:
    variant = VARIANTS[name]
    size = variant.image_size
    with torch.device("meta"):
        network = SSDNetwork(variant)
        location, confidence = network(torch.zeros(1, 3, size, size))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert location.shape == (1, priors, 4)
    assert confidence.shape == (1, priors, 21)
    assert make_priors(variant).shape == (priors, 4)


def test_feature_maps_have_one_cell_per_group_of_priors() -> None:
    found: list[int] = []
    for variant in VARIANTS.values():
        size = variant.image_size
        with torch.device("meta"):
            network = SSDNetwork(variant, width_multiplier=0.02)
            for predictor in network.location:
                predictor.register_forward_hook(lambda _, inputs, output: found.append(output.shape[-1]))
            network(torch.zeros(1, 3, size, size))
    assert found == [cells for variant in VARIANTS.values() for cells in variant.cells]


def test_the_network_and_the_boxes_are_torchvisions(full: SSD) -> None:
    """Torchvision's SSD300 with the same weights gives the same outputs and the same boxes before suppression."""
    module, theirs = full, torchvisions_ssd(full).eval()
    image = torch.randint(0, 256, (1, 3, 300, 300), dtype=torch.uint8)
    with torch.inference_mode():
        pixels = module.preprocess(image)
        location, confidence = module.network(pixels)
        features = list(theirs.backbone(pixels).values())
        expected = theirs.head(features)
        anchors = theirs.anchor_generator(ImageList(pixels, [(300, 300)]), features)[0]
    torch.testing.assert_close(location, expected["bbox_regression"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(confidence, expected["cls_logits"], atol=1e-4, rtol=1e-4)
    boxes = theirs.box_coder.decode_single(location[0], anchors)
    priors = box_convert(make_priors(VARIANTS["ssd300"]), "cxcywh", "xyxy")
    torch.testing.assert_close(decode_boxes(location[0], priors, BOX_STD), boxes, atol=1e-2, rtol=1e-4)


def test_biases_learn_at_twice_the_rate_and_only_weights_decay() -> None:
    module = small()
    module.trainer = None  # type: ignore[assignment]
    optimizer = SSD(num_classes=3, width_multiplier=0.03).configure_optimizers()
    weights, biases = optimizer.param_groups
    assert (weights["lr"], weights["weight_decay"]) == (1e-3, 5e-4)
    assert (biases["lr"], biases["weight_decay"]) == (2e-3, 0)
    assert all(p.ndim == 1 for p in biases["params"])
    groups = module.parameter_groups()
    assert [group.get("weight_decay") for group in groups] == [None, 0, 0]
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_weights_of_a_vgg16(full: SSD, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Load the authors' reduced network, torchvision's VGG-16, and its feature layers alone."""
    reduced = full.network.features.state_dict()
    torch.save(reduced, tmp_path / "reduced.pth")
    features = SSD(weights=str(tmp_path / "reduced.pth")).network.features.state_dict()
    assert all(torch.equal(features[key], value) for key, value in reduced.items())
    assert "newly initialized: norm.scale" in capsys.readouterr().out

    vgg16 = {f"features.{k}": v for k, v in reduced.items() if int(k.split(".")[0]) < 30}
    # Each value encodes its source index.
    unit = torch.arange(4096.0)
    taps = torch.arange(49.0).view(1, 1, 49).expand(4096, 512, 49) + unit[:, None, None] * 100
    vgg16["classifier.0.weight"] = taps.reshape(4096, 25088)
    vgg16["classifier.0.bias"] = vgg16["classifier.3.bias"] = unit
    vgg16["classifier.3.weight"] = unit[:, None] * 1000 + unit
    converted = reduce_vgg16_weights(vgg16, 31, 33)
    assert converted["features.31.weight"].shape == (1024, 512, 3, 3)
    assert converted["features.31.weight"][2, 5].tolist() == [[800, 803, 806], [821, 824, 827], [842, 845, 848]]
    assert converted["features.33.weight"][1, :3, 0, 0].tolist() == [4000, 4004, 4008]
    assert not any(key.startswith("classifier") for key in converted)
    vgg16["classifier.0.weight"] = torch.full((1, 1), torch.nan)
    assert set(reduce_vgg16_weights(vgg16, 31, 33)) == {key for key in vgg16 if key.startswith("features")}


def test_a_batch_of_one_trains_with_batch_normalization() -> None:
    """The last feature map has one cell and thus no batch statistics: its layer is not normalized."""
    for variant in VARIANTS.values():
        size = variant.image_size
        with torch.device("meta"):
            network = SSDNetwork(variant, width_multiplier=0.02, batch_norm=True).train()
            network(torch.zeros(1, 3, size, size))


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected weights of vgg16"):
        SSD(num_classes=3, width_multiplier=0.03, weights=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="expected DEFAULT or a file of weights"):
        SSD(num_classes=3, width_multiplier=0.03, weights="missing.pth")


def test_images_of_another_size_are_refused() -> None:
    message = "image: expected 300x300 pixels, found 96x64; set --data.image_size 300"
    with pytest.raises(ValueError, match=message):
        small().predict(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected images of one size, found 300x300, 64x300"):
        small().predict([torch.zeros(3, 300, side, dtype=torch.uint8) for side in (300, 64)])
    with pytest.raises(ValueError, match="variant: expected ssd300 or ssd512, found ssd400"):
        small(variant="ssd400")


def test_priors_are_options() -> None:
    """Change the smallest prior, and use only square priors on the first feature map."""
    sizes, ratios = [35, 60, 111, 162, 213, 264, 315], [[], [2, 3], [2, 3], [2, 3], [2], [2]]
    module = small(prior_sizes=sizes, aspect_ratios=ratios, top_k=7, keep_top_k=5)
    assert module.priors.value.shape == (8732 - 2 * 38 * 38, 4)
    assert module.priors.value[0].tolist() == [4, 4, 35, 35]
    (found,) = module.eval().predict(torch.zeros(1, 3, 300, 300, dtype=torch.uint8))
    assert len(found["boxes"]) <= 5
    with pytest.raises(ValueError, match="prior_sizes: expected 7 entries for ssd300, found 2"):
        small(prior_sizes=[30, 60])
    with pytest.raises(ValueError, match="aspect_ratios: expected 7 entries for ssd512, found 6"):
        small(variant="ssd512", aspect_ratios=ratios)


def test_top_k_is_per_class_and_keep_top_k_per_image() -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 300, 300), dtype=torch.uint8)
    for options, count in (({"top_k": 1}, 3), ({"top_k": 1, "keep_top_k": 2}, 2), ({"keep_top_k": 5}, 5)):
        (found,) = small(**options).eval().predict(image)
        assert len(found["boxes"]) == count


# --- priors -----------------------------------------------------------------------------------------------------------


def test_priors_computed_by_hand() -> None:
    priors = make_priors(VARIANTS["ssd300"])
    root = math.sqrt(2)
    first = [[4, 4, 30, 30], [4, 4, 30 * root, 30 * root], [4, 4, 30 * root, 30 / root], [4, 4, 30 / root, 30 * root]]
    torch.testing.assert_close(priors[:4], torch.tensor(first))
    assert priors[4].tolist() == [12, 4, 30, 30]  # along the row first
    assert priors[38 * 4].tolist() == [4, 12, 30, 30]
    assert priors[38 * 38 * 4].tolist() == [8, 8, 60, 60]
    torch.testing.assert_close(priors[-1], torch.tensor([150, 150, 264 / root, 264 * root]))
    large = make_priors(VARIANTS["ssd512"])
    torch.testing.assert_close(large[0], torch.tensor([4, 4, 35.84, 35.84]))
    torch.testing.assert_close(large[1], torch.tensor([4, 4, math.sqrt(35.84 * 76.8), math.sqrt(35.84 * 76.8)]))
    torch.testing.assert_close(large[-1], torch.tensor([256, 256, 460.8 / root, 460.8 * root]))


def test_priors_are_torchvisions_with_the_papers_scales() -> None:
    for name, scales in (
        ("ssd300", [0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05]),
        ("ssd512", [0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05]),
    ):
        variant = VARIANTS[name]
        size = variant.image_size
        ratios = [list(ratios) for ratios in variant.aspect_ratios]
        generator = DefaultBoxGenerator(ratios, scales=scales, steps=list(variant.steps), clip=False)
        images = ImageList(torch.zeros(1, 3, size, size), [(size, size)])
        expected = generator(images, [torch.zeros(1, 1, cells, cells) for cells in variant.cells])[0]
        found = box_convert(make_priors(variant), "cxcywh", "xyxy")
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


# --- matching and loss ------------------------------------------------------------------------------------------------


def the_authors_matching(overlap: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """MatchBBox for IoUs (M, P): the object of each prior, -1 for none."""
    objects, priors = overlap.shape
    match = np.full(priors, -1)
    pool = list(range(objects))
    while pool:
        best, pair = 1e-6, None
        for i in range(priors):
            for j in pool:
                if match[i] == -1 and overlap[j, i] > best:
                    best, pair = overlap[j, i], (i, j)
        if pair is None:
            break
        match[pair[0]] = pair[1]
        pool.remove(pair[1])
    for i in range(priors):
        if match[i] == -1 and objects and overlap[:, i].max() >= threshold:
            match[i] = int(overlap[:, i].argmax())
    return match


def the_formula(
    location: np.ndarray, confidence: np.ndarray, priors: np.ndarray, target: list[dict[str, Any]], match: np.ndarray
) -> tuple[float, float]:
    """Equations 1 to 3, image by image and prior by prior."""
    positives, location_loss, confidence_loss = 0, 0.0, 0.0
    for b, entry in enumerate(target):
        background_losses = []
        image_positives = 0
        for i in range(len(priors)):
            logits = confidence[b, i]
            log_softmax = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
            if match[b, i] == -1:
                background_losses.append(-log_softmax[0])
                continue
            image_positives += 1
            left, top, right, bottom = entry["boxes"][match[b, i]].double().numpy()
            cx, cy, w, h = priors[i]
            delta = [
                ((left + right) / 2 - cx) / w / 0.1,
                ((top + bottom) / 2 - cy) / h / 0.1,
                math.log((right - left) / w) / 0.2,
                math.log((bottom - top) / h) / 0.2,
            ]
            for found, expected in zip(location[b, i], delta, strict=True):
                d = abs(found - expected)
                location_loss += 0.5 * d * d if d < 1 else d - 0.5
            confidence_loss -= log_softmax[1 + int(entry["labels"][match[b, i]])]
        confidence_loss += sum(sorted(background_losses, reverse=True)[: 3 * image_positives])
        positives += image_positives
    if positives == 0:
        return 0.0, 0.0
    return location_loss / positives, confidence_loss / positives


def a_case(seed: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Return priors and objects: none, crowds, duplicate boxes, and objects that overlap no prior."""
    rng = np.random.default_rng(seed)
    # Priors of different sizes: an object within two priors of one size has the same IoU with both.
    priors = np.concatenate([rng.uniform(10, 90, (40, 2)), rng.uniform(8, 70, (40, 2))], 1)
    target = []
    for _ in range(int(rng.integers(1, 4))):
        count = int(rng.choice([0, 1, 3, ROUNDS]))
        spread = rng.choice([1.0, 60.0])
        low = rng.uniform(0, 40, 2) + rng.uniform(0, spread, (count, 2))
        boxes = np.concatenate([low, low + rng.choice([4.0, 20, 50]) * rng.uniform(0.7, 1.4, (count, 2))], 1)
        if count > 2 and rng.random() < 0.5:
            boxes[1] = boxes[0]
        if count > 2 and rng.random() < 0.2:
            boxes[2] = [500, 500, 510, 510]
        boxes = torch.from_numpy(boxes).float()
        target.append({"boxes": boxes, "labels": torch.from_numpy(rng.integers(0, 3, count))})
    return torch.from_numpy(priors).float(), target


def test_matching_and_loss_are_the_authors() -> None:
    contested = empty = twice = apart = 0
    for seed in range(300):
        priors, target = a_case(seed)
        rng = np.random.default_rng(seed)
        shape = (len(target), len(priors))
        location = torch.from_numpy(rng.normal(0, rng.choice([0.3, 5]), (*shape, 4))).float()
        confidence = torch.from_numpy(rng.normal(0, rng.choice([0.1, 3]), (*shape, 4))).float()
        targets = encode(target, priors)
        match = []
        for b, entry in enumerate(target):
            overlap = batched_box_iou(entry["boxes"][None], box_convert(priors, "cxcywh", "xyxy"))[0].numpy()
            match.append(the_authors_matching(overlap))
            label = np.where(match[b] >= 0, 1 + entry["labels"].numpy()[match[b]], 0) if len(entry["labels"]) else 0
            assert (targets.labels[b].numpy() == label).all(), seed
            assert (targets.positive[b].numpy() == (match[b] >= 0)).all(), seed
            if len(overlap):
                best = overlap.argmax(1)
                contested += len(set(best)) < len(best)
                apart += (overlap.max(1) == 0).any()
            twice += len(overlap) > 1 and (overlap[0] == overlap[1]).all()
        found = multibox_loss(location, confidence, targets)
        expected = the_formula(
            location.double().numpy(), confidence.double().numpy(), priors.double().numpy(), target, np.stack(match)
        )
        assert found["location"].item() == pytest.approx(expected[0], rel=1e-4, abs=1e-6), seed
        assert found["confidence"].item() == pytest.approx(expected[1], rel=1e-4, abs=1e-6), seed
        empty += not any((m >= 0).any() for m in match)
    assert min(contested, empty, twice, apart) > 10  # each special case occurred


def test_matching_on_the_real_priors() -> None:
    """Each of several close objects has its own prior."""
    rng = np.random.default_rng(0)
    priors = make_priors(VARIANTS["ssd300"])
    for _ in range(10):
        low = rng.uniform(0, 200, (6, 2))
        low[3:] = low[:3] + rng.uniform(-4, 4, (3, 2))
        boxes = torch.from_numpy(np.concatenate([low, low + rng.uniform(10, 80, (6, 2))], 1)).float()
        targets = encode([{"boxes": boxes, "labels": torch.arange(6)}], priors)
        iou = box_iou(boxes, box_convert(priors, "cxcywh", "xyxy"))
        torch.testing.assert_close(batched_box_iou(boxes[None], box_convert(priors, "cxcywh", "xyxy"))[0], iou)
        assert set(targets.labels[0].tolist()) == set(range(7))
        assert targets.positive[0][(iou >= 0.5).any(0)].all()
        has = targets.labels[0] - 1
        assert (iou[has[targets.positive[0]], targets.positive[0].nonzero()[:, 0]] > 0).all()


def test_two_objects_with_one_best_prior() -> None:
    """The object with the higher IoU gets the prior; the other gets its next best."""
    overlap = torch.tensor([[[0.4, 0.3, 0.0], [0.45, 0.35, 0.2]]])
    assert match_objects_batched(overlap).tolist() == [[1, 0, 2]]
    # A third object displaces the second, which displaces the first.
    overlap = torch.tensor([[[0.4, 0.3, 0.1], [0.45, 0.35, 0.2], [0.6, 0.0, 0.0]]])
    assert match_objects_batched(overlap).tolist() == [[2, 1, 0]]
    # Of equal objects, the first wins. An object that overlaps no prior has none.
    overlap = torch.tensor([[[0.4, 0.3, 0.0], [0.4, 0.3, 0.0], [0.0, 0.0, 0.0]]])
    assert match_objects_batched(overlap).tolist() == [[0, 1, 3]]


def test_the_batched_matching_equals_the_plain_one() -> None:
    """Random IoUs without ties, at most `ROUNDS` competing objects; some objects overlap no prior."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        iou = torch.rand(3, 1 + seed % ROUNDS, 50, generator=generator)
        iou = torch.where(torch.rand(iou.shape, generator=generator) < 0.7, 0, iou)
        assert torch.equal(match_objects(iou), match_objects_batched(iou)), seed


@pytest.mark.parametrize("objects", [1, 8, 12, 40])
def test_the_batched_matching_differs_from_the_plain_one_only_by_ties(objects: int) -> None:
    """On SSD300's priors, objects may take another prior of equal IoU; without ties the results are equal."""
    generator = torch.Generator().manual_seed(objects)
    corner = 200 * torch.rand(4, objects, 2, generator=generator)
    boxes = torch.cat([corner, corner + 20 + 80 * torch.rand(4, objects, 2, generator=generator)], 2)
    iou = batched_box_iou(boxes, box_convert(make_priors(VARIANTS["ssd300"]), "cxcywh", "xyxy")).double()
    jittered = iou * (1 + 1e-6 * torch.rand(iou.shape, generator=generator, dtype=torch.float64))
    assert torch.equal(match_objects(jittered), match_objects_batched(jittered))
    plain, batched = match_objects(iou), match_objects_batched(iou)
    assert [owner.bincount()[:-1].tolist() for owner in batched] == [[1] * objects] * 4
    for overlap, a, b in zip(iou, plain, batched, strict=True):
        assert [overlap[i, a == i].item() for i in range(objects)] == [
            overlap[i, b == i].item() for i in range(objects)
        ]


def test_crowds_beyond_the_rounds_disturb_no_other_object() -> None:
    """With more equal objects than rounds, the first ones have one prior each; other objects keep theirs."""
    torch.manual_seed(0)
    overlap = torch.rand(1, 1, 30).sort(descending=True).values.expand(1, ROUNDS + 5, 30).clone()
    overlap[0, -1] = 0
    overlap[0, -1, 29] = 0.9
    owner = match_objects_batched(overlap)[0]
    assert owner[:ROUNDS].tolist() == list(range(ROUNDS))
    assert owner[29] == ROUNDS + 4
    assert (owner[ROUNDS:29] == ROUNDS + 5).all()


def test_three_hard_negatives_for_a_positive_in_each_image() -> None:
    """Gradients reach three negatives per positive, those with the highest loss, and no others."""
    priors = make_priors(VARIANTS["ssd300"])
    exact = box_convert(priors[4000:4001], "cxcywh", "xyxy")
    target = [{"boxes": exact, "labels": torch.tensor([1])}, NOTHING]
    targets = encode(target, priors)
    torch.manual_seed(0)
    confidence = torch.randn(2, len(priors), 4, requires_grad=True)
    location = torch.zeros(2, len(priors), 4, requires_grad=True)
    terms = multibox_loss(location, confidence, targets)
    sum(terms.values()).backward()
    touched = confidence.grad.abs().sum(-1) > 0
    negatives = touched[0] & ~targets.positive[0]
    count = int(targets.positive[0].sum())
    assert int(negatives.sum()) == 3 * count
    assert not touched[1].any()
    background = -confidence.detach()[0].log_softmax(-1)[:, 0]
    left = background[~touched[0]]
    assert background[negatives].min() >= left.max()
    assert not location.grad[~targets.positive].any()
    # With `empty_negatives`, an image without objects trains its hardest priors as background.
    confidence.grad = None
    multibox_loss(location, confidence, targets, empty_negatives=7)["confidence"].backward()
    assert int((confidence.grad[1].abs().sum(-1) > 0).sum()) == 7


@pytest.mark.parametrize("empty_negatives", [0, 3])
def test_a_batch_without_objects_trains_as_background(empty_negatives: int) -> None:
    """Without negatives, as in the authors' code, the loss is 0; no gradient is nan."""
    module = small(empty_negatives=empty_negatives)
    batch = {"image": torch.zeros(2, 3, 300, 300, dtype=torch.uint8), "target": [NOTHING, NOTHING]}
    terms = module.losses(batch)
    assert terms["location"] == 0
    assert (terms["confidence"] > 0) == (empty_negatives > 0)
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_the_loss_is_of_single_precision_under_autocast() -> None:
    module = small()
    boxes = torch.tensor([[20.0, 30, 90, 80], [100, 100, 250, 280]])
    batch = {
        "image": torch.randint(0, 256, (1, 3, 300, 300), dtype=torch.uint8),
        "target": [{"boxes": boxes, "labels": torch.tensor([0, 2])}],
    }
    with torch.autocast("cpu", torch.bfloat16):
        terms = module.losses(batch)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert all(torch.isfinite(term) for term in terms.values())


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_decode_inverts_encode() -> None:
    rng = np.random.default_rng(0)
    priors = make_priors(VARIANTS["ssd300"])
    for _ in range(10):
        cells = rng.permutation(9)[:4]
        low = np.stack([cells % 3, cells // 3], 1) * 100 + rng.uniform(0, 20, (4, 2))
        boxes = torch.from_numpy(np.concatenate([low, low + rng.uniform(15, 80, (4, 2))], 1)).float()
        labels = torch.from_numpy(rng.integers(0, 3, 4))
        targets = encode([{"boxes": boxes, "labels": labels}], priors)
        confidence = torch.nn.functional.one_hot(targets.labels, 4) * 20.0
        (found,) = decode(targets.deltas, confidence, priors, 300)
        order = found["boxes"][:, :2].mul(torch.tensor([1.0, 1000])).sum(1).argsort()
        expected = boxes[:, :2].mul(torch.tensor([1.0, 1000])).sum(1).argsort()
        torch.testing.assert_close(found["boxes"][order], boxes[expected], atol=1e-3, rtol=1e-4)
        assert found["labels"][order].tolist() == labels[expected].tolist()
        assert multibox_loss(targets.deltas, confidence, targets)["location"] < 1e-8
    priors = box_convert(priors, "cxcywh", "xyxy")
    random = box_convert(torch.from_numpy(rng.uniform(4, 200, (len(priors), 4))).float(), "cxcywh", "xyxy")
    decoded = decode_boxes(encode_boxes(random, priors, BOX_STD), priors, BOX_STD)
    torch.testing.assert_close(decoded, random, atol=1e-2, rtol=1e-4)


def test_at_most_200_boxes_all_within_the_image() -> None:
    torch.manual_seed(0)
    priors = make_priors(VARIANTS["ssd300"])
    location = torch.randn(1, len(priors), 4) * 3
    location[0, 0] = 1e6
    (found,) = decode(location, torch.randn(1, len(priors), 21), priors, 300)
    assert len(found["boxes"]) == 200
    assert torch.isfinite(found["boxes"]).all()
    assert found["boxes"].min() >= 0
    assert found["boxes"].max() <= 300
    assert (found["scores"].diff() <= 0).all()
    assert found["scores"].min() > 0.01
    background = torch.zeros(1, len(priors), 21)
    background[..., 0] = 20
    assert len(decode(location, background, priors, 300)[0]["boxes"]) == 0


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_to_find_squares() -> None:
    """Detect bright squares of two colors on noise after 80 steps from scratch."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    def draw(images: int) -> dict[str, Any]:
        pixels = torch.from_numpy(rng.integers(0, 60, (images, 3, 300, 300), dtype=np.uint8))
        target = []
        for image in pixels:
            cells = rng.permutation(4)[: rng.integers(1, 4)]
            boxes, labels = [], []
            for cell in cells:
                x, y = (int(v) for v in np.array([cell % 2, cell // 2]) * 150 + rng.integers(0, 40, 2))
                side, label = int(rng.integers(50, 100)), int(rng.integers(0, 2))
                image[2 * label, y : y + side, x : x + side] = 250
                boxes.append([x, y, x + side, y + side])
                labels.append(label)
            target.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
        return {"image": pixels, "target": target}

    module = small(num_classes=2, width_multiplier=0.1, compute_coco_ap=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    for _ in range(80):
        optimizer.zero_grad()
        sum(module.losses(draw(8)).values()).backward()
        optimizer.step()
    module.eval()
    metrics = module.build_metrics()
    with torch.inference_mode():
        for _ in range(4):
            batch = draw(8)
            module.update_metrics(metrics, module.predict(batch["image"]), batch)
    assert metrics.compute()["map"] > 0.7
