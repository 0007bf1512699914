"""AttributeClassifier: scales, losses with missing labels, weights, learning."""

import math
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.classification.yummly import Yummly28K
from datamodules.synthetic.yummly import write_yummly
from lightning_modules.classification.attributes import (
    AttributeClassifier,
    AttributeNetwork,
    MultiScale,
    masked_binary_cross_entropy,
    masked_cross_entropy,
)
from lightning_modules.classification.image_classifier import ImageClassifier
from lightning_modules.schedules import Cosine

ATTRIBUTES = {"cuisine": ["Greek", "Thai", "Indian"], "taste": ["Sour", "Sweet"]}
INGREDIENTS = ["salt", "rice"]


def tiny(attributes=ATTRIBUTES, ingredients=INGREDIENTS, **options):
    return AttributeClassifier(
        "resnet20_cifar", attributes, ingredients, **{"base_channels": 2, "channels": 4, **options}
    )


def a_batch(size=6, side=32):
    g = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=g),
        "labels": {k: torch.randint(0, len(names), (size,), generator=g) for k, names in ATTRIBUTES.items()},
        "ingredients": torch.randint(0, 2, (size, 2), dtype=torch.uint8, generator=g),
        "id": [str(i) for i in range(size)],
    }


# --- network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "last", "without_head"), [("resnet18", 512, 11_176_512), ("resnet50", 2048, 23_508_032)]
)
def test_parameters(backbone, last, without_head):
    """The backbone has torchvision's count without the last layer; the rest is computed here."""
    outputs = {"cuisine": 16, "course": 13, "taste": 6, "ingredients": 100}
    network = AttributeNetwork(backbone, outputs)
    c, bn = 256, 2 * 256
    reduce = (last // 2 + last) * c + 2 * bn
    convolve = 2 * ((1 + 9 + 25) * c * c + 3 * bn)
    attention = c * c + c + c
    heads = (c + 1) * sum(outputs.values())
    assert sum(p.numel() for p in network.parameters()) == without_head + reduce + convolve + attention + heads


def test_the_scales_are_a_weighted_mean():
    torch.manual_seed(0)
    scales = MultiScale((3, 6), 5, (1, 3, 5)).eval()
    maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 6, 4, 4)]
    features, weights = scales(maps)
    assert (features.shape, weights.shape) == ((2, 5), (2, 6))
    assert torch.allclose(weights.sum(1), torch.ones(2))
    assert not torch.allclose(weights[0], weights[1]), "expected weights that depend on the image"
    expected = torch.zeros(2, 5)
    vectors = []
    for m in range(2):
        reduced = scales.reduce[m](maps[m])
        vectors += [scales.convolve[3 * m + k](reduced).mean((2, 3)) for k in range(3)]
    w, b, u = scales.attention[0].weight, scales.attention[0].bias, scales.attention[2].weight[0]
    for i in range(2):
        scores = [u @ torch.tanh(w @ v[i] + b) for v in vectors]
        total = sum(score.exp() for score in scores)
        expected[i] = sum(score.exp() / total * v[i] for score, v in zip(scores, vectors, strict=True))
    assert torch.allclose(features, expected, atol=1e-6)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet20_cifar"])
def test_any_image_size(backbone):
    module = AttributeClassifier(backbone, ATTRIBUTES, INGREDIENTS, channels=4).eval()
    for height, width in ((32, 32), (47, 33)):
        images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
        predictions = module.predict(images)
        assert {k: tuple(p.shape) for k, p in predictions["attributes"].items()} == {"cuisine": (2, 3), "taste": (2, 2)}
        assert all(torch.allclose(p.sum(1), torch.ones(2)) for p in predictions["attributes"].values())
        assert predictions["ingredients"].shape == (2, 2)
        assert torch.equal(module.predict(list(images))["ingredients"], predictions["ingredients"])
    assert "ingredients" not in tiny(ingredients=None).eval().predict(images)


def test_the_backbone_loads_an_image_classifiers_weights(tmp_path, capsys):
    classifier = ImageClassifier("resnet20_cifar", 7, base_channels=2)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "classifier.ckpt")
    module = tiny(weights=str(tmp_path / "classifier.ckpt"))
    assert "skipped: fc.weight, fc.bias" in capsys.readouterr().out
    for name, value in module.network.backbone.state_dict().items():
        assert torch.equal(value, classifier.network.state_dict()[name]), name
    with pytest.raises(ValueError, match="expected weights of resnet20_cifar"):
        tiny(base_channels=3, weights=str(tmp_path / "classifier.ckpt"))


# --- loss -----------------------------------------------------------------------------------------------------------


def slow_cross_entropy(logits, labels, weights):
    total = counted = 0.0
    for row, label in zip(logits, labels, strict=True):
        if label == -100:
            continue
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        w = 1.0 if weights is None else weights[label]
        total += -w * math.log(p[label])
        counted += w
    return total / counted if counted else 0.0


def slow_binary_cross_entropy(logits, targets):
    terms = []
    for row, target in zip(logits, targets, strict=True):
        if target[0] == 255:
            continue
        for x, t in zip(row, target, strict=True):
            s = 1 / (1 + math.exp(-x))
            terms.append(-math.log(s) if t else -math.log(1 - s))
    return sum(terms) / len(terms) if terms else 0.0


def test_losses_against_loops():
    rng = np.random.default_rng(0)
    empty = 0
    for case in range(300):
        n, classes = rng.integers(1, 7), rng.integers(2, 6)
        logits = rng.normal(size=(n, classes)) * 4
        missing = rng.random(n) < rng.choice([0, 0.3, 0.8, 1])
        labels = np.where(missing, -100, rng.integers(0, classes, n))
        weights = None if case % 2 else rng.uniform(0.1, 3, classes)
        found = masked_cross_entropy(
            torch.from_numpy(logits),
            torch.from_numpy(labels),
            None if weights is None else torch.tensor(weights).float(),
        )
        assert found.item() == pytest.approx(slow_cross_entropy(logits, labels, weights), rel=1e-5, abs=1e-6)
        targets = rng.integers(0, 2, (n, classes)).astype(np.uint8)
        targets[missing] = 255
        found = masked_binary_cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))
        assert found.item() == pytest.approx(slow_binary_cross_entropy(logits, targets), rel=1e-5, abs=1e-6)
        empty += missing.all()
    assert empty > 20


def test_an_attribute_without_a_label_contributes_exactly_zero():
    torch.manual_seed(0)
    module, batch = tiny(class_weights={"taste": [1.0, 2.0]}), a_batch()
    batch["labels"]["taste"][:] = -100
    batch["ingredients"][:] = 255
    terms = module.losses(batch)
    assert (terms["taste"].item(), terms["ingredients"].item()) == (0.0, 0.0)
    sum(terms.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    for name in ("taste", "ingredients"):
        assert not module.network.heads[name].weight.grad.any()
    assert module.network.heads["cuisine"].weight.grad.any()
    gradient = [p.grad.clone() for p in module.network.backbone.parameters()]
    module.zero_grad()
    module.losses(batch)["cuisine"].backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(gradient, module.network.backbone.parameters(), strict=True))


def test_attribute_weights_multiply_the_terms():
    torch.manual_seed(0)
    module, batch = tiny(), a_batch()
    plain = module.losses(batch)
    module.attribute_weights = {"cuisine": 2.0, "ingredients": 0.5}
    weighted = module.losses(batch)
    assert list(plain) == ["cuisine", "taste", "ingredients"]
    for name, factor in (("cuisine", 2.0), ("taste", 1.0), ("ingredients", 0.5)):
        assert weighted[name].item() == pytest.approx(factor * plain[name].item(), rel=1e-6)


def test_class_weights_are_no_buffers():
    module = tiny(class_weights={"cuisine": [1.0, 2.0, 3.0]})
    assert not any("weights" in name for name, _ in module.named_buffers())
    assert not any("class_weights" in name for name in module.state_dict())


# --- module ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"attributes": None},
            "attributes: expected one or more, each with classes, found {}; check that the data has attributes",
        ),
        ({"attributes": {"cuisine": []}}, "found {'cuisine': 0}"),
        ({"attributes": {"ingredients": ["a"]}}, "expected no attribute named ingredients"),
        ({"attribute_weights": {"flavour": 1.0}}, "attribute_weights: expected names among .*taste, found flavour"),
        ({"attribute_weights": {"taste": -1.0}}, "expected 0 or more"),
        ({"ingredients": None, "attribute_weights": {"ingredients": 1.0}}, "found ingredients"),
        ({"class_weights": {"flavour": "balanced"}}, "class_weights: expected names among"),
        ({"class_weights": {"taste": [1.0]}}, "class_weights: taste: expected 2, one per class, found 1"),
        ({"kernel_sizes": [1, 4]}, r"kernel_sizes: expected odd numbers, found \[1, 4\]"),
    ],
)
def test_bad_arguments(options, expected):
    with pytest.raises(ValueError, match=expected):
        tiny(**options)


def test_bad_labels_are_named_on_the_cpu():
    module = tiny()
    for name, value in (("cuisine", 3), ("taste", -1)):
        batch = a_batch()
        batch["labels"][name][2] = value
        with pytest.raises(ValueError, match=f"labels: {name}: expected 0.."):
            module.on_before_batch_transfer(batch, 0)
    with pytest.raises(ValueError, match="labels: expected cuisine, taste, found cuisine"):
        module.on_before_batch_transfer({"labels": {"cuisine": torch.tensor([0])}}, 0)
    with pytest.raises(ValueError, match="ingredients: expected 2 per sample, found 3"):
        module.on_before_batch_transfer(a_batch() | {"ingredients": torch.zeros(6, 3)}, 0)
    assert module.on_before_batch_transfer(a_batch(), 0)


def test_the_head_learns_at_its_own_rate():
    groups = tiny(head_lr_scale=10.0).parameter_groups()
    assert [group.get("lr_scale") for group in groups] == [None, 10.0]
    module = tiny()
    (single,) = module.parameter_groups()
    assert sum(len(group["params"]) for group in groups) == len(single["params"]) == len(list(module.parameters()))


def trainer(**options):
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pl.Trainer(accelerator="cpu", **dict.fromkeys(off, False), **options)


class Shuffled(Dataset):
    """Pair each image with the labels of random other images, anew in every epoch."""

    def __init__(self, dataset):
        self.dataset, self.transform = dataset, dataset.transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        others = np.random.randint(len(self), size=4)
        labels = {name: int(y[j]) for (name, y), j in zip(self.dataset.attributes.items(), others[:3], strict=True)}
        ingredients = torch.from_numpy(self.dataset.ingredients[others[3]].copy())
        return self.dataset[i] | {"labels": labels, "ingredients": ingredients}


class ShuffledYummly(Yummly28K):
    def dataset(self, split):
        return Shuffled(super().dataset(split)) if split == "train" else super().dataset(split)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yummly")
    write_yummly(str(folder), classes=3, train=200, val=50, size=40)
    return str(folder)


def after_training(kind, root):
    pl.seed_everything(0)
    data = kind(
        root, vocabulary_size=12, image_size=24, resize=24, crop_scale=(0.7, 1.0), num_workers=0, batch_size=24,
        eval_batch_size=64, val_fraction=0.2, test_fraction=0.0,
    )  # fmt: skip
    module = AttributeClassifier(
        "resnet20_cifar", data.attributes, data.ingredient_names, base_channels=8, channels=32,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.006),
        schedule=lambda optimizer, total: Cosine(optimizer, total, warmup_steps=10),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(max_epochs=6, limit_val_batches=0).fit(module, data)
        return trainer().validate(module, data, verbose=False)[0]


def test_every_attribute_is_learned(drawn):
    found = after_training(Yummly28K, drawn)
    for name, chance in {"cuisine": 1 / 3, "course": 1 / 4, "taste": 1 / 4}.items():
        assert found[f"val/{name}_accuracy"] > chance + 0.25, name
    assert found["val/all_correct"] > 0.2, "by chance 1/48"
    assert found["val/loss"] < 2.5


def test_nothing_is_learned_of_shuffled_labels(drawn):
    """The loss shows it; the accuracy of nearly equal probabilities is arbitrary."""
    found = after_training(ShuffledYummly, drawn)
    chance = math.log(3) + math.log(4) + math.log(4)
    assert found["val/loss"] == pytest.approx(chance, abs=0.2)
    assert found["val/all_correct"] < 0.2


def test_balanced_class_weights_come_from_the_datamodule(drawn):
    data = Yummly28K(drawn, vocabulary_size=0, image_size=16, num_workers=0, val_fraction=0.1)
    module = tiny(data.attributes, None, class_weights="balanced")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(max_steps=1, limit_val_batches=0).fit(module, data)
    for name, labels in data.attribute_labels("train").items():
        counts = np.bincount(labels[labels >= 0], minlength=len(data.attributes[name]))
        present = counts > 0
        expected = counts.sum() / (present.sum() * counts[present])
        assert module.class_weights[name].value.numpy()[present] == pytest.approx(expected), name
    with pytest.raises(ValueError, match="balanced needs a datamodule with attribute_labels"):
        trainer(max_steps=1).fit(tiny(class_weights={"taste": "balanced"}), DataLoader([a_batch()], batch_size=None))


def test_a_checkpoint_reads_without_pickled_code(tmp_path):
    module = tiny(class_weights={"taste": "balanced"}, attribute_weights={"taste": 2.0})
    t = trainer(max_steps=0)
    t.strategy.connect(module)
    t.save_checkpoint(tmp_path / "a.ckpt")
    again = AttributeClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.class_names == {**ATTRIBUTES, "ingredients": INGREDIENTS}
    images = a_batch()["image"]
    assert torch.equal(again.eval().predict(images)["ingredients"], module.eval().predict(images)["ingredients"])
