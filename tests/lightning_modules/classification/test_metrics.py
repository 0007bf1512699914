"""The metrics against NumPy, and the traps that they avoid."""

import numpy as np
import pytest
import torch

from lightning_modules.classification.metrics import ClassificationMetrics

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
