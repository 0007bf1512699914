"""R-CNN: crops, targets and objectives against the authors' rules in loops, optima, and a fit of all three stages.

The reference optima of the second and third stage come from other solvers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from scipy.optimize import minimize
from torchvision.ops import box_iou

import cli.parser
from datamodules.proposals import proposal_path, write_proposals
from datamodules.synthetic.voc import write_voc
from lightning_modules.components.boxes import sample_balanced
from lightning_modules.components.external_proposals import pad_proposals, training_proposals
from lightning_modules.components.selective_search import selective_search
from lightning_modules.detection import rcnn
from lightning_modules.detection.crop_network import CropNetwork, rename_crop_weights, warp_crops
from lightning_modules.detection.linear_models import DeltaWhitening, LinearModel, ridge_objective, svm_objective
from lightning_modules.detection.rcnn import RCNN, Candidates, decode, delta_moments, encode, softmax_loss, svm_targets
from tests.processes import finish, train_ranks
from tests.small_system import differences, kill_and_resume, outcome

NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
# Stub of a trainer: 5 batches per epoch, one rank.
TRAINER = SimpleNamespace(
    num_training_batches=5, world_size=1, strategy=SimpleNamespace(reduce=lambda values, reduce_op: values)
)


def small(**options: Any) -> RCNN:
    arguments: dict[str, Any] = {"num_classes": 3, "crop_size": 32, "context": 4, "width_multiplier": 0.1, **options}
    arguments = {"rois_per_image": 8, "svm_proposals_per_image": 20, "crop_batch_size": 16, **arguments}
    module = RCNN(**{"backbone": "small", **arguments})
    module.trainer = TRAINER  # type: ignore[assignment]
    return module


def random_boxes(rng: np.random.Generator, count: int, size: float = 60) -> torch.Tensor:
    corner = rng.random((count, 2)) * size * 0.6
    return torch.from_numpy(np.concatenate([corner, corner + 4 + rng.random((count, 2)) * size * 0.4], 1)).float()


def random_target(rng: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
    return {"boxes": random_boxes(rng, count), "labels": torch.from_numpy(rng.integers(0, 3, count))}


def random_candidates(rng: np.random.Generator, images: int = 2) -> tuple[Candidates, list[torch.Tensor], list[Any]]:
    """Return candidates, half of them near an object, with their proposals and targets."""
    targets = [random_target(rng, int(rng.integers(0, 5))) for _ in range(images)]
    proposals = []
    for target in targets:
        near = target["boxes"].repeat(4, 1)
        near = near + torch.from_numpy(rng.normal(0, 3, tuple(near.shape))).float()
        near = torch.cat([near[:, :2], torch.maximum(near[:, 2:], near[:, :2] + 2)], 1)
        proposals.append(torch.cat([near, random_boxes(rng, int(rng.integers(0, 9)))]))
    return encode(*pad_proposals(proposals), targets, 3), proposals, targets


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "network", "whole"),
    [("alexnet", 57_089_877, 57_909_177), ("vgg16", 134_346_581, 136_435_641), ("small", 689_429, 858_489)],
)
def test_parameters(backbone: Any, network: int, whole: int) -> None:
    with torch.device("meta"):
        module = RCNN(backbone, num_classes=20)
    assert sum(p.numel() for p in module.network.parameters()) == network
    assert sum(p.numel() for p in module.parameters()) == whole


@pytest.mark.parametrize("backbone", ["alexnet", "vgg16"])
def test_torchvisions_weights_are_renamed(backbone: Any) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(backbone, weights=None).state_dict()
        ours = CropNetwork(backbone, 20).state_dict()
    renamed = rename_crop_weights(theirs, backbone)
    assert ours.keys() - renamed.keys() == {"classifier.weight", "classifier.bias"}
    assert all(value.shape == ours[key].shape for key, value in renamed.items() if key in ours)
    assert renamed.keys() - ours.keys() == {"classifier.6.weight", "classifier.6.bias"}


def test_weights_of_a_checkpoint_except_the_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = small()
    torch.save({"state_dict": first.state_dict()}, tmp_path / "first.ckpt")
    second = small(num_classes=5, weights=str(tmp_path / "first.ckpt"))
    assert torch.equal(second.network.fc6.weight, first.network.fc6.weight)
    assert "classifier.weight" in capsys.readouterr().out
    scales = [group.get("lr_scale", 1.0) for group in second.parameter_groups()]
    assert scales == [1, 2, 1, 10, 20, 1, 1]
    groups = second.parameter_groups()
    assert sum(len(group["params"]) for group in groups) == len(list(second.parameters()))


def test_fc7_equals_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(weights=None).eval()
    ours = CropNetwork("alexnet", 2).eval()
    ours.load_state_dict(rename_crop_weights(theirs.state_dict(), "alexnet"), strict=False)
    x = torch.randn(2, 3, 227, 227)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x)[1], theirs.classifier[:6](theirs.avgpool(theirs.features(x)).flatten(1)))


# --- crops ------------------------------------------------------------------------------------------------------------


def test_crops_have_context_and_are_padded_with_the_mean() -> None:
    """In an image of coordinates each pixel of a crop contains the position that it was sampled from."""
    rng = np.random.default_rng(0)
    y, x = torch.meshgrid(torch.arange(80.0) + 0.5, torch.arange(100.0) + 0.5, indexing="ij")
    image = torch.stack([x, y, torch.ones_like(x)])[None]
    for _ in range(30):
        left, top = rng.uniform(20, 40, 2)
        width, height = rng.uniform(10, 25, 2)
        side, context = int(rng.integers(20, 60)), float(rng.uniform(0, 5))
        box = torch.tensor([[[left, top, left + width, top + height]]]).float()
        (crop,) = warp_crops(image, box, side, context)
        assert crop.shape == (3, side, side)
        for i in (0, side // 2, side - 1):
            # The box starts at pixel ``context`` of the crop.
            expected = left + (i + 0.5 - context) / (side - 2 * context) * width
            assert float(crop[0, 3, i]) == pytest.approx(expected, abs=1e-3)
            expected = top + (i + 0.5 - context) / (side - 2 * context) * height
            assert float(crop[1, i, 3]) == pytest.approx(expected, abs=1e-3)
    (outside,) = warp_crops(image, torch.tensor([[[-20.0, 20.0, 20.0, 60.0]]]), 40, 0)
    assert outside[2, :, :18].eq(0).all()
    assert outside[2, :, 21:].eq(1).all()


# --- target encoding --------------------------------------------------------------------------------------------------


def test_candidates() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        found, proposals, targets = random_candidates(rng)
        most = max(1, max(len(p) for p in proposals))
        for b, (boxes, target) in enumerate(zip(proposals, targets, strict=True)):
            assert int(found.valid[b].sum()) == len(boxes) + len(target["boxes"])
            assert int(found.is_object[b].sum()) == len(target["boxes"])
            everything = torch.cat([boxes, target["boxes"]])
            iou = box_iou(target["boxes"], everything)
            places = [*range(len(boxes)), *(most + i for i in range(len(target["boxes"])))]
            for n, place in enumerate(places):
                assert torch.equal(found.boxes[b, place], everything[n])
                for label in range(3):
                    same = [float(iou[m, n]) for m in range(len(iou)) if target["labels"][m] == label]
                    assert float(found.class_iou[b, place, label]) == pytest.approx(max(same, default=0), abs=1e-5)
                if len(iou) == 0:
                    assert found.max_iou[b, place] == 0
                    continue
                m = n - len(boxes) if n >= len(boxes) else int(iou[:, n].argmax())
                assert found.label[b, place] == target["labels"][m]
                x0, y0, x1, y1 = everything[n].double().tolist()
                u0, v0, u1, v1 = target["boxes"][m].double().tolist()
                offset = [
                    ((u0 + u1) - (x0 + x1)) / 2 / (x1 - x0),
                    ((v0 + v1) - (y0 + y1)) / 2 / (y1 - y0),
                    np.log((u1 - u0) / (x1 - x0)),
                    np.log((v1 - v0) / (y1 - y0)),
                ]
                np.testing.assert_allclose(found.deltas[b, place], offset, atol=1e-4)


def test_a_quarter_of_the_crops_are_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there are enough; the others are background, and padding is ignored."""
    seen: list[Any] = []

    def spy(*arguments: Any) -> torch.Tensor:
        seen.append(arguments)
        return softmax_loss(*arguments)

    monkeypatch.setattr(rcnn, "softmax_loss", spy)
    torch.manual_seed(0)
    objects = torch.tensor([[10.0, 10, 30, 30], [40, 40, 60, 60]])
    target = {"boxes": objects, "labels": torch.tensor([0, 2])}
    many = torch.cat([objects.repeat(5, 1) + 1, objects[:1].repeat(20, 1) + 15])
    batch = {
        "image": torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8),
        "target": [target, target, NOTHING],
        "proposals": [many, many[:1], many],
    }
    small(rois_per_image=16).losses(batch)
    ((_, label, taken),) = seen
    label, taken = label.view(3, 16), taken.view(3, 16)
    assert (label > 0).sum(1).tolist() == [4, 3, 0]
    assert taken.sum(1).tolist() == [16, 3, 16]
    assert set(label.flatten().tolist()) == {0, 1, 3}
    assert not (label[~taken] > 0).any()


# --- loss -------------------------------------------------------------------------------------------------------------


def test_softmax_loss() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        logits, label = rng.normal(0, 3, (12, 4)), rng.integers(0, 4, 12)
        taken = rng.random(12) < rng.random()
        terms = [np.log(np.exp(z).sum()) - z[u] for z, u, t in zip(logits, label, taken, strict=True) if t]
        found = softmax_loss(torch.from_numpy(logits), torch.from_numpy(label), torch.from_numpy(taken))
        assert float(found) == pytest.approx(np.mean(terms) if terms else 0.0, rel=1e-5)


def test_the_svm_objective() -> None:
    """Objects of the class are positives, IoUs below 0.3 negatives; all other candidates are ignored."""
    rng, ignored = np.random.default_rng(3), 0
    for _ in range(100):
        found, proposals, targets = random_candidates(rng)
        torch.manual_seed(int(rng.integers(1000)))
        count = torch.tensor([len(p) for p in proposals])
        objects = max(1, max(len(t["boxes"]) for t in targets))
        drawn = sample_balanced(found.is_object, found.valid & ~found.is_object, 6 + objects, 1.0)
        taken = found.select(drawn.indices)
        side, weight = svm_targets(taken, drawn, count)
        scores = torch.from_numpy(rng.normal(0, 1, tuple(side.shape)))
        w, b = torch.from_numpy(rng.normal(0, 1, (3, 5))), torch.from_numpy(rng.normal(0, 1, 3))
        objective = svm_objective(scores.flatten(0, 1), side.flatten(0, 1), weight.flatten(0, 1), (w, b), 0.01)
        for c in range(3):
            total = 0.5 * float((w[c] ** 2).sum()) + 0.5 * float(b[c] / 10) ** 2
            for image in range(2):
                there = [i for i in range(drawn.indices.shape[1]) if drawn.valid[image, i]]
                others = [i for i in there if not taken.is_object[image, i]]
                assert len(there) - len(others) == len(targets[image]["boxes"])
                for i in there:
                    z = float(scores[image, i, c])
                    if taken.is_object[image, i] and taken.label[image, i] == c:
                        total += 0.01 * 2 * max(0, 1 - z)
                    elif taken.class_iou[image, i, c] < 0.3:
                        each = 1 if taken.is_object[image, i] else int(count[image]) / len(others)
                        total += 0.01 * each * max(0, 1 + z)
                    else:
                        ignored += 1
            assert float(objective[c]) == pytest.approx(total, rel=1e-5)
    assert ignored > 500


def test_whitening() -> None:
    """Per class, over candidates with an IoU of 0.6: mean 0 and no correlation, except for the authors' 0.001."""
    rng = np.random.default_rng(4)
    moments = torch.zeros(3, 22, dtype=torch.float64)
    examples: list[list[np.ndarray]] = [[], [], []]
    for _ in range(40):
        found, _, _ = random_candidates(rng)
        moments += delta_moments(found)
        for b, n in (found.valid & (found.max_iou >= 0.6)).nonzero().tolist():
            examples[int(found.label[b, n])].append(found.deltas[b, n].numpy().astype(np.float64))
    assert moments[:, 21].tolist() == [40] * 3
    whitening = DeltaWhitening.from_moments(moments)
    for c in range(3):
        y = np.array(examples[c])
        assert moments[c, 0] == len(y) > 50
        np.testing.assert_allclose(whitening.mean[c], y.mean(0), atol=1e-6)
        s = np.cov(y.T, bias=True)
        values, vectors = np.linalg.eigh(s)
        np.testing.assert_allclose(
            whitening.whiten[c], vectors @ np.diag((values + 0.001) ** -0.5) @ vectors.T, rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(whitening.whiten[c] @ whitening.unwhiten[c], np.eye(4), atol=1e-4)
    nothing = DeltaWhitening.from_moments(torch.zeros(3, 22))
    assert all(torch.isfinite(part).all() for part in nothing)


def measured(features: torch.Tensor, outputs: int) -> LinearModel:
    model = LinearModel(features.shape[1], outputs)
    model.measure(features, torch.ones(len(features), dtype=torch.bool), lambda values: values)
    return model


def test_features_have_a_mean_norm_of_20() -> None:
    torch.manual_seed(0)
    features = torch.rand(50, 6) * 7 + 1
    counted = torch.arange(50) < 30
    model = LinearModel(6, 2)
    model.measure(features, counted, lambda values: values)
    model.measure(features * 9, counted, lambda values: values)  # the first call counts
    scaled = features * 20 / features[:30].norm(dim=1).mean()
    assert float(scaled[:30].norm(dim=1).mean()) == pytest.approx(20)
    with torch.no_grad():
        model.weight.normal_()
        model.bias.normal_()
    w, b = model.uncentered()
    torch.testing.assert_close(model(features), scaled @ w.T + b, rtol=1e-4, atol=1e-4)


def test_objectives_are_in_single_precision_under_autocast() -> None:
    torch.manual_seed(0)
    features, label = torch.rand(50, 6), torch.randint(0, 3, (50,))
    model = measured(features, 12)
    torch.nn.init.normal_(model.weight)

    def both() -> list[torch.Tensor]:
        found, plain = model(features), model.uncentered()
        machines = svm_objective(found, torch.ones(50, 12), torch.ones(50, 12), plain, 0.1)
        boxes = found.unflatten(1, (3, 4))
        return [*plain, machines, ridge_objective(boxes, boxes + 1.01, label, torch.rand(50), plain, 7.0, 3)]

    torch.manual_seed(1)
    expected = both()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert differences(expected, both()) == []


def descend(model: LinearModel, objective: Callable[[], torch.Tensor], steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.003 * (1 - step / steps)
        optimizer.zero_grad()
        objective().sum().backward()
        optimizer.step()
    return float(objective().sum().detach())


def test_descent_reaches_the_optimum_of_the_dual_problem() -> None:
    rng = np.random.default_rng(5)
    y = np.where(rng.random(300) < 0.2, 1.0, -1.0)
    x = rng.normal(0, 1, (300, 8)) + 3 + 0.7 * (y > 0)[:, None]
    features = torch.from_numpy(x).float()
    model = measured(features, 1)
    cost, weight = 0.02, np.where(y > 0, 2.0, 1.0)
    scaled = np.concatenate([x * 20 / float(model.norm.value), np.full((300, 1), 10.0)], 1) * y[:, None]
    gram = scaled @ scaled.T
    dual = minimize(
        lambda a: (a @ gram @ a / 2 - a.sum(), gram @ a - 1), np.zeros(300), jac=True, method="L-BFGS-B",
        bounds=[(0, cost * each) for each in weight], options={"maxiter": 2000},
    )  # fmt: skip
    sides, weights = (torch.from_numpy(v).float()[:, None] for v in (y, weight))
    found = descend(model, lambda: svm_objective(model(features), sides, weights, model.uncentered(), cost), 1500)
    # Strong duality: both optima are equal.
    assert -dual.fun <= found * 1.001
    assert found == pytest.approx(-dual.fun, rel=0.02)


def test_the_regressions_gradient_vanishes_at_the_closed_form() -> None:
    """The reference solves (X'X + lambda) beta = X'y; the bias is the weight of a constant feature of 1."""
    rng = np.random.default_rng(6)
    features, label = torch.from_numpy(rng.random((200, 5)) * 3).float(), torch.from_numpy(rng.integers(0, 3, 200))
    wanted = torch.from_numpy(rng.normal(0.3, 1, (200, 3, 4))).float()
    weight = torch.from_numpy(rng.integers(0, 3, 200)).float()
    model = measured(features, 12)
    x = np.concatenate([features.numpy() * 20 / float(model.norm.value), np.ones((200, 1))], 1).astype(np.float64)
    total = 0.0
    with torch.no_grad():
        for c in range(3):
            mine = (label == c).numpy()
            xc, yc, each = x[mine], wanted[torch.from_numpy(mine), c].double().numpy(), 3 * weight.numpy()[mine, None]
            beta = np.linalg.solve(xc.T @ (each * xc) + 1000 * np.eye(6), xc.T @ (each * yc))
            total += float((each * (yc - xc @ beta) ** 2).sum() + 1000 * (beta**2).sum())
            model.weight[4 * c : 4 * c + 4] = torch.from_numpy(beta[:5].T)
            shift = torch.from_numpy(beta[:5].T).float() @ (model.mean.value * 20 / model.norm.value)
            model.bias[4 * c : 4 * c + 4] = (torch.from_numpy(beta[5]).float() + shift) / 20
    plain = model.uncentered()
    objective = ridge_objective(model(features).unflatten(1, (3, 4)), wanted, label, weight, plain, 1000, 3)
    assert float(objective.sum().detach()) == pytest.approx(total, rel=1e-4)
    gradients = torch.autograd.grad(objective.sum(), list(model.parameters()))
    # Away from the optimum it is in the thousands.
    assert max(float(g.abs().max()) for g in gradients) < 0.05
    with torch.no_grad():
        model.weight += 0.01
    moved = ridge_objective(model(features).unflatten(1, (3, 4)), wanted, label, weight, model.uncentered(), 1000, 3)
    assert max(float(g.abs().max()) for g in torch.autograd.grad(moved.sum(), list(model.parameters()))) > 100


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("proposals", [0, 12])
@pytest.mark.parametrize("objects", [0, 3])
def test_nothing_to_learn_from(stage: int, proposals: int, objects: int) -> None:
    """Losses and gradients are finite without objects or proposals, in a batch or in one of its images."""
    torch.manual_seed(0)
    rng = np.random.default_rng(7)
    module = small()
    module.stage = stage
    module.train()
    parts = module.stage_modules()
    for images in ([0, 0], [1, 0]):
        batch = {
            "image": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
            "target": [random_target(rng, objects * one) for one in images],
            "proposals": [random_boxes(rng, proposals * one) for one in images],
        }
        module.zero_grad()
        (loss,) = module.losses(batch).values()
        loss.backward()
        assert torch.isfinite(loss)
        for i, part in enumerate(parts):
            gradients = [p.grad for p in part.parameters()]
            assert all(torch.isfinite(g).all() if i == stage else g is None for g in gradients), (i, stage)  # type: ignore[arg-type]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"expected a batch with proposals.*--data\.proposals"):
        training_proposals({"image": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(ValueError, match="stage_fractions: expected three positive fractions"):
        RCNN("small", width_multiplier=0.1, crop_size=32, context=4, stage_fractions=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="context: expected 0 or more and less than half of a crop of 32"):
        RCNN("small", width_multiplier=0.1, crop_size=32)


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_the_best_box_of_each_class_is_kept() -> None:
    boxes = torch.tensor([[[10.0, 10, 50, 50], [12, 10, 52, 50], [70, 70, 120, 90], [0, 0, 0, 0]]])
    scores = torch.tensor([[[0.5, -0.9], [0.7, -2.0], [-0.5, -1.0], [9.0, 9.0]]])
    there = torch.tensor([[True, True, True, False]])
    moved = boxes[:, :, None].expand(-1, -1, 2, -1)
    (found,) = decode(scores, moved, there, torch.tensor([[100.0, 80.0]]), score_threshold=-1.0)
    # Negative scores above the threshold of -1 are kept, and boxes are clipped to the image.
    assert found["scores"].tolist() == pytest.approx([0.7, -0.5, -0.9])
    assert found["labels"].tolist() == [0, 0, 1]
    assert found["boxes"].tolist() == [[12, 10, 52, 50], [70, 70, 100, 80], [10, 10, 50, 50]]


def test_whitening_is_computed_once_for_the_same_moments() -> None:
    module = small()
    first = module.whitening()
    assert module.whitening() is first
    module.load_stage_state({"moments": torch.ones(3, 22, dtype=torch.float64), "scaling": {}})
    second = module.whitening()
    assert second is not first
    assert torch.equal(second.mean, DeltaWhitening.from_moments(torch.ones(3, 22, dtype=torch.float64)).mean)


def test_whitened_deltas_lead_to_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prediction after the third stage inverts the encoding of its targets."""
    rng = np.random.default_rng(8)
    module = small().eval()
    found = random_candidates(rng, images=1)[0]
    while not found.is_object.any():
        found = random_candidates(rng, images=1)[0]
    for _ in range(30):
        module.moments.value += delta_moments(random_candidates(rng)[0])
    mean, whiten, _ = module.whitening()
    target = ((found.deltas[:, :, None] - mean)[..., None, :] @ whiten)[..., 0, :]
    monkeypatch.setattr(module.box_regressor, "forward", lambda pool5: target.flatten(2))
    module.finished_stages = 3
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        _, moved = module.score_boxes(pixels, found.boxes)
    near = found.valid & (found.max_iou > 0.3)
    expected = rcnn.decode_boxes(found.deltas, found.boxes, (1.0, 1.0, 1.0, 1.0))
    for c in range(3):
        torch.testing.assert_close(moved[:, :, c][near], expected[near], atol=1e-2, rtol=1e-3)


def test_images_without_proposals_are_searched() -> None:
    torch.manual_seed(0)
    module = small(score_threshold=0.0).eval()
    images = torch.zeros(2, 3, 32, 250, dtype=torch.uint8)
    images[0, :, 10:25, 10:150] = 200
    images[1, 0, 5:30, 30:60] = 150
    boxes = [torch.from_numpy(selective_search(i.permute(1, 2, 0).numpy(), 2000)) for i in images]
    assert min(len(b) for b in boxes) > 0
    with torch.inference_mode():
        alone, given = module.predict(images), module.predict(list(images), boxes)
        none = module.predict(images, [torch.zeros(0, 4)] * 2)
        batch = module.predict_batch({"image": images, "proposals": boxes})
    assert differences(alone, given) == []
    assert differences(alone, batch) == []
    assert sum(len(found["boxes"]) for found in alone) > 0
    assert [len(found["boxes"]) for found in none] == [0, 0]


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write ten training images and four for validation, with proposals."""
    folder = tmp_path_factory.mktemp("VOC")
    write_voc(str(folder), classes=2, train=5, val=2, size=48)
    rng = np.random.default_rng(0)
    for path in sorted((folder / "VOCdevkit/VOC2007/JPEGImages").iterdir()):
        corner = rng.random((40, 2)) * 24
        boxes = np.concatenate([corner, corner + 8 + rng.random((40, 2)) * 16], 1).astype(np.float32)
        write_proposals(proposal_path(str(folder / "proposals"), f"VOC2007/JPEGImages/{path.name}"), boxes, 2000)
    return ["--data.root", str(folder / "VOCdevkit"), "--data.proposals", str(folder / "proposals")]


OPTIONS = [
    "fit", "--data", "VOCDetection", "--data.train", "[VOC2007/train]", "--data.val", "[VOC2007/val]",
    "--data.image_size", "64", "--data.num_workers", "0", "--model", "RCNN", "--model.backbone", "small",
    "--model.width_multiplier", "0.1", "--model.crop_size", "32", "--model.context", "4",
    "--model.rois_per_image", "8", "--model.svm_proposals_per_image", "20",
    "--model.stage_fractions", "[0.34, 0.33, 0.33]", "--model.compute_coco_ap", "false",
    "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.weight_decay", "0.1",
    "--model.schedule", "lightning_modules.schedules.Cosine", "--trainer.log_every_n_steps", "1",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "3",
    "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled", "--last.every_n_steps", "1",
    "--last.keep", "99", "--experiment", "run",
]  # fmt: skip


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / f"checkpoints/step={step:08d}.ckpt", weights_only=True)


def test_a_fit_and_its_resumes(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three stages of five steps; the run is killed within and between them."""
    monkeypatch.chdir(tmp_path)
    cli.parser.run([*OPTIONS, *data, "--data.batch_size", "2", "--data.photometric", "ssd", "--data.hflip", ".5"])
    printed = capsys.readouterr().out
    for number, line in enumerate(("fine-tuning", "support vector machines", "box regression")):
        assert printed.count(f"RCNN: stage {number + 1} of 3, {line}, starts at step {5 * number}\n") == 1
    (run,) = Path("runs/run").iterdir()
    expected = outcome(run)
    assert expected["file"] == "step=00000015.ckpt"
    states = {step: checkpoint(run, step)["state_dict"] for step in (4, 5, 9, 10, 14, 15)}
    for part, moves in (("network", 5), ("svm", 10), ("box_regressor", 15)):
        for step in (5, 10, 15):
            # AdamW's weight decay and momentum, and batch statistics, do not change frozen parts.
            same = [torch.equal(states[step - 1][k], v) for k, v in states[step].items() if k.startswith(part)]
            assert all(same) if step != moves else not all(same), (part, step)
    assert [checkpoint(run, step)["stages"]["finished"] for step in (4, 5, 9, 10, 14, 15)] == [0, 1, 1, 2, 2, 3]
    assert [row["train/stage"] for row in expected["metrics"] if "train/stage" in row] == [1] * 5 + [2] * 5 + [3] * 5
    last = checkpoint(run, 15)["stages"]
    assert last["moments"][:, 21].tolist() == [5] * 20
    for step in (3, 5, 7, 10, 12):
        killed = kill_and_resume(run, step)
        assert differences(expected, outcome(killed)) == [], step
        assert differences(last, checkpoint(killed, 15)["stages"]) == [], step


@pytest.mark.xdist_group("processes")
def test_two_ranks(data: list[str], tmp_path: Path) -> None:
    """Frozen parts do not change or block DDP, and sums are over all ranks."""
    ranks = [*OPTIONS, *data, "--data.batch_size", "1", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert finish(*train_ranks(ranks, tmp_path)) == [0, 0], (tmp_path / "log.txt").read_text()
    (run,) = (tmp_path / "runs/run").iterdir()
    states = {step: checkpoint(run, step)["state_dict"] for step in (4, 5, 9, 10, 14, 15)}
    for part, moves in (("network", 5), ("svm", 10), ("box_regressor", 15)):
        for step in (5, 10, 15):
            same = [torch.equal(states[step - 1][k], v) for k, v in states[step].items() if k.startswith(part)]
            assert all(same) if step != moves else not all(same), (part, step)
    (tmp_path / "one").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "one")
        cli.parser.run([*OPTIONS, *data, "--data.batch_size", "2"])
    (alone,) = (tmp_path / "one/runs/run").iterdir()
    # One rank and two read the same images in an epoch, and the moments do not depend on sampling.
    mine, theirs = (checkpoint(r, 15)["stages"]["moments"] for r in (alone, run))
    torch.testing.assert_close(mine[:, :21], theirs[:, :21])
    assert (mine[:, 0] > 0).any()
    assert theirs[:, 21].tolist() == [10] * 20
    log = (tmp_path / "log.txt").read_text()
    assert log.count("RCNN: stage 2 of 3, support vector machines, starts at step 5") == 1
