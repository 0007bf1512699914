"""Classification metrics against NumPy and hand-computed values."""

import numpy as np
import pytest
import torch
import torchmetrics

from lightning_modules.classification.metrics import AttributeMetrics, ClassificationMetrics

CLASSES = 7


def batches(sizes=(16, 16, 5)):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(sum(sizes), CLASSES))
    labels = rng.choice([0, 0, 0, 0, 0, 0, 1, 2, 3, 5, 6], sum(sizes))  # unbalanced, without class 4
    logits[labels == 0, 0] += 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cuts = np.cumsum(sizes)[:-1]
    return list(zip(np.split(probabilities, cuts), np.split(labels, cuts), strict=True))


def measure(parts):
    metric = ClassificationMetrics(CLASSES)
    for probabilities, labels in parts:
        metric.update(torch.from_numpy(probabilities).float(), torch.from_numpy(labels))
    return {name: value.numpy() for name, value in metric.compute().items()}


def test_against_numpy():
    parts = batches()
    p, y = (np.concatenate(x) for x in zip(*parts, strict=True))
    found = measure(parts)
    rank = (p > p[np.arange(len(y)), y][:, None]).sum(1)
    confusion = np.zeros((CLASSES, CLASSES), int)
    np.add.at(confusion, (y, p.argmax(1)), 1)
    assert (found["confusion_matrix"] == confusion).all()
    assert found["confusion_matrix"].dtype == np.int64
    assert found["top1"] == pytest.approx((rank == 0).mean())
    assert found["top5"] == pytest.approx((rank < 5).mean())
    assert found["loss"] == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), rel=1e-6)
    present = [c for c in range(CLASSES) if (y == c).any()]
    per_class = [(p.argmax(1)[y == c] == c).mean() for c in present]
    assert 4 not in present
    assert np.isnan(found["per_class_accuracy"][4])
    np.testing.assert_allclose(found["per_class_accuracy"][present], per_class, rtol=1e-6)
    assert found["mean_class_accuracy"] == pytest.approx(np.mean(per_class))
    assert abs(found["mean_class_accuracy"] - found["top1"]) > 0.01, "micro and macro differ on this set"
    guess, scores = p.argmax(1), []
    for c in range(CLASSES):
        right, predicted, true = ((guess == c) & (y == c)).sum(), (guess == c).sum(), (y == c).sum()
        if predicted + true:
            precision, recall = (right / n if n else 0.0 for n in (predicted, true))
            scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert found["macro_f1"] == pytest.approx(np.mean(scores))


def test_macro_f1_by_hand():
    """Class 0: 2 of 3 correct; class 1: 1 of 2, one false positive; class 2: absent; class 3: one false positive."""
    guesses, labels = [0, 0, 1, 1, 3], [0, 0, 0, 1, 1]
    metric = ClassificationMetrics(4)
    metric.update(torch.eye(4)[guesses], torch.tensor(labels))
    # 2 * 2 / (4 + 1), 2 * 1 / (2 + 2), left out, 0
    assert metric.compute()["macro_f1"] == pytest.approx((0.8 + 0.5 + 0) / 3)


def test_the_average_of_batches_is_another_number():
    parts = batches()
    averaged = np.mean([measure([part])["top1"] for part in parts])
    assert abs(averaged - measure(parts)["top1"]) > 1e-3


def test_merging_ranks_gives_the_whole():
    parts = batches()
    ranks = [ClassificationMetrics(CLASSES) for _ in range(2)]
    for i, (probabilities, labels) in enumerate(parts):
        ranks[i % 2].update(torch.from_numpy(probabilities).float(), torch.from_numpy(labels))
    ranks[0].merge_state(ranks[1])
    whole = measure(parts)
    for name, value in ranks[0].compute().items():
        np.testing.assert_allclose(value.numpy(), whole[name], rtol=1e-6)


def test_certain_and_wrong_is_a_finite_loss():
    metric = ClassificationMetrics(2)
    metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    results = metric.compute()
    assert results["loss"].isfinite()
    assert "top5" not in results


def test_after_a_reset_in_inference_mode():
    metric = ClassificationMetrics(2)
    with torch.inference_mode():
        metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
        metric.reset()
    metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert metric.compute()["top1"] == 1


# --- attributes -----------------------------------------------------------------------------------------------------

ATTRIBUTES = {"cuisine": 5, "course": 3, "taste": 4}
INGREDIENTS = 6


def attribute_batches(sizes=(9, 14, 1, 3), seed=0):
    """Return probabilities, labels, ingredients and their targets; some labels are missing, one class never occurs."""
    rng = np.random.default_rng(seed)
    parts = []
    for size in sizes:
        probabilities, labels = {}, {}
        for name, count in ATTRIBUTES.items():
            logits = rng.normal(size=(size, count))
            label = rng.integers(0, count, size)
            logits[np.arange(size), label] += 1
            if name == "cuisine":
                logits[:, 4], label = -9, label % 4
            if name == "course":
                logits[:, 2] += 2
                label = label % 2
            labels[name] = np.where(rng.random(size) < 0.3, -100, label)
            p = np.exp(logits)
            probabilities[name] = (p / p.sum(1, keepdims=True)).astype(np.float32)
        present = (rng.random((size, INGREDIENTS)) < 0.3).astype(np.uint8)
        present[:, 5] = 0
        scores = np.clip(rng.random((size, INGREDIENTS)) * 0.7 + 0.3 * present, 0, 1).astype(np.float32)
        present[rng.random(size) < 0.2] = 255
        parts.append((probabilities, labels, scores, present))
    return parts


def update(metric, part):
    probabilities, labels, scores, present = part
    tensors = [{name: torch.from_numpy(value) for name, value in d.items()} for d in (probabilities, labels)]
    metric.update(*tensors, torch.from_numpy(scores), torch.from_numpy(present))


def slow_average_precision(scores, present):
    """By definition: every distinct score, rounded down to 1/200, is a threshold."""
    scores = np.floor(scores * np.float32(200))
    found, area, recall = present.sum(), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        right = present[chosen].sum()
        area += (right / found - recall) * right / chosen.sum()
        recall = right / found
    return area


def slowly(parts):
    """Compute the same metrics with loops over the samples."""
    rows = []
    for probabilities, labels, scores, present in parts:
        for i in range(len(scores)):
            rows.append(
                (
                    {k: v[i] for k, v in probabilities.items()},
                    {k: v[i] for k, v in labels.items()},
                    scores[i],
                    present[i],
                )
            )
    results = {}
    losses = []
    for name, count in ATTRIBUTES.items():
        pairs = [(r[1][name], int(r[0][name].argmax())) for r in rows if r[1][name] != -100]
        results[f"{name}_accuracy"] = np.mean([a == b for a, b in pairs])
        f1s = []
        for c in range(count):
            tp = sum(a == b == c for a, b in pairs)
            fp, fn = sum(b == c != a for a, b in pairs), sum(a == c != b for a, b in pairs)
            if tp + fp + fn:
                f1s.append(2 * tp / (2 * tp + fp + fn))
        results[f"{name}_macro_f1"] = np.mean(f1s)
        losses.append(np.mean([-np.log(r[0][name][r[1][name]]) for r in rows if r[1][name] != -100]))
    for kind in ("accuracy", "macro_f1"):
        results[f"mean_{kind}"] = np.mean([results[f"{name}_{kind}"] for name in ATTRIBUTES])
    every = []
    for p, label, _, _ in rows:
        known = [name for name in ATTRIBUTES if label[name] != -100]
        if known:
            every.append(all(p[name].argmax() == label[name] for name in known))
    results["all_correct"] = np.mean(every)
    results["loss"] = sum(losses)
    listed = [(s, t) for _, _, s, t in rows if t[0] != 255]
    s, t = (np.array(x) for x in zip(*listed, strict=True))
    tp, fp, fn = ((s >= 0.5) & (t == 1)).sum(), ((s >= 0.5) & (t == 0)).sum(), ((s < 0.5) & (t == 1)).sum()
    results["ingredients_micro_f1"] = 2 * tp / (2 * tp + fp + fn)
    precisions = [slow_average_precision(s[:, v], t[:, v]) for v in range(INGREDIENTS) if t[:, v].any()]
    assert len(precisions) < INGREDIENTS
    results["ingredients_map"] = np.mean(precisions)
    return results


@pytest.mark.parametrize("seed", range(5))
def test_attributes_against_loops_and_over_uneven_ranks(seed):
    parts = attribute_batches(seed=seed)
    ranks = [AttributeMetrics(ATTRIBUTES, INGREDIENTS) for _ in range(2)]
    for metric, mine in zip(ranks, (parts[:3], parts[3:]), strict=True):
        for part in mine:
            update(metric, part)
    # What torchmetrics does at compute: every state is the sum of the ranks'.
    merged, whole = AttributeMetrics(ATTRIBUTES, INGREDIENTS), AttributeMetrics(ATTRIBUTES, INGREDIENTS)
    assert set(merged._reductions.values()) == {torchmetrics.utilities.data.dim_zero_sum}
    for name in merged._defaults:
        setattr(merged, name, sum(getattr(metric, name) for metric in ranks))
    merged._update_count = 1
    for part in parts:
        update(whole, part)
    found, expected = merged.compute(), slowly(parts)
    assert found.keys() == expected.keys() == whole.compute().keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5), name
        assert found[name].item() == pytest.approx(whole.compute()[name].item(), rel=1e-6), name


def test_attributes_by_hand():
    """Three samples: both labels, one of them wrong; one label, correct; no label."""
    metric = AttributeMetrics({"a": 3, "b": 2})
    p = {"a": torch.eye(3)[[0, 1, 2]] * 0.7 + 0.1, "b": torch.eye(2)[[0, 0, 1]] * 0.6 + 0.2}
    metric.update(p, {"a": torch.tensor([0, 1, -100]), "b": torch.tensor([1, -100, -100])})
    found = {name: value.item() for name, value in metric.compute().items()}
    assert (found["a_accuracy"], found["b_accuracy"], found["all_correct"]) == (1.0, 0.0, 0.5)
    assert (found["a_macro_f1"], found["b_macro_f1"], found["mean_macro_f1"]) == (1.0, 0.0, 0.5)
    assert found["loss"] == pytest.approx(-np.log(0.8) - np.log(0.2), rel=1e-5)
    assert not any("ingredients" in name for name in found)


def test_an_attribute_without_labels_is_nan_and_left_out_of_the_means():
    metric = AttributeMetrics({"a": 2, "b": 2}, 2)
    assert all(value.isnan() for value in metric.compute().values())
    p = {name: torch.tensor([[0.9, 0.1]]) for name in "ab"}
    missing = torch.full((1, 2), 255, dtype=torch.uint8)
    metric.update(p, {"a": torch.tensor([0]), "b": torch.tensor([-100])}, torch.rand(1, 2), missing)
    found = metric.compute()
    assert found["b_macro_f1"].isnan()
    assert found["ingredients_map"].isnan()
    assert (found["mean_macro_f1"].item(), found["mean_accuracy"].item(), found["all_correct"].item()) == (1, 1, 1)
