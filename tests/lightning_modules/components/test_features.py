"""Features: activations against torchvision's, all kinds of weights, random features, rescaled filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from errors import UserError
from lightning_modules.base import IMAGENET_MEAN, IMAGENET_STD
from lightning_modules.classification.image_classifier import ImageClassifier
from lightning_modules.components.features import Features, layer_names

MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


def images(size: int = 64, count: int = 2) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of VGG-16 and AlexNet in torchvision's format."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("vgg16", "alexnet"):
        torch.manual_seed(1)
        torch.save(torchvision.models.get_model(name, weights=None).state_dict(), folder / f"{name}.pth")
    return folder


@pytest.mark.parametrize(
    ("layer", "index"),
    [("conv1_1", 0), ("relu1_1", 1), ("relu2_1", 6), ("relu3_1", 11), ("relu4_1", 20), ("relu4_2", 22),
     ("relu5_1", 29), ("pool5", 36)],
)  # fmt: skip
def test_names_stand_where_the_papers_have_them(layer: str, index: int) -> None:
    """Compare with the indices of torchvision's ``features``, which the authors' code uses, too."""
    names = [name for name in layer_names("vgg19") if not name.startswith(("fc", "prob", "logprob", "relu6", "relu7"))]
    assert names.index(layer) == index
    assert len(names) == 37


def test_other_networks_names() -> None:
    assert layer_names("alexnet") == [
        "conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "conv3", "relu3", "conv4", "relu4", "conv5", "relu5",
        "pool5", "fc6", "relu6", "fc7", "relu7", "fc8", "prob", "logprob",
    ]  # fmt: skip
    assert layer_names("vgg16_bn") == layer_names("vgg16")


@pytest.mark.parametrize("backbone", ["vgg16", "alexnet"])
def test_they_are_torchvisions_activations(backbone: Any, files: Path) -> None:
    weights = str(files / f"{backbone}.pth")
    theirs = torchvision.models.get_model(backbone, weights=None).eval()
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    pool = "pool5"
    found = Features(["conv1_1" if backbone == "vgg16" else "conv1", pool, "fc6", "logprob"], backbone, weights)(
        images(224)
    )
    with torch.no_grad():
        x = (images(224) - MEAN) / STD
        assert torch.equal(next(iter(found.values())), theirs.features[0](x)), (
            "expected activations before the ReLU, which works in place in torchvision"
        )
        assert (next(iter(found.values())) < 0).any()
        torch.testing.assert_close(found[pool], theirs.features(x))
        flat = theirs.avgpool(theirs.features(x)).flatten(1)
        linear = next(part for part in theirs.classifier if isinstance(part, nn.Linear))
        torch.testing.assert_close(found["fc6"], linear(flat))
        torch.testing.assert_close(found["logprob"], theirs(x).log_softmax(1))


def test_it_ends_where_it_may(files: Path) -> None:
    features = Features(["relu2_1"], "vgg16", str(files / "vgg16.pth"))
    assert list(features.layers)[-1] == "relu2_1"
    assert sum(p.numel() for p in features.parameters()) == 3 * 64 * 9 + 64 + 64 * 64 * 9 + 64 + 64 * 128 * 9 + 128
    x = images()
    before = x.clone()
    assert features(x)["relu2_1"].shape == (2, 128, 32, 32)
    assert torch.equal(x, before)
    assert not features.train().training
    assert not any(p.requires_grad for p in features.parameters())


def test_gradients_reach_the_image() -> None:
    features, x = Features(["relu1_2"], "vgg16", "random"), images().requires_grad_()
    features(x)["relu1_2"].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_pooling_and_padding() -> None:
    most, mean = (Features(["relu1_2", "pool1"], "vgg16", "random", pooling=pooling) for pooling in ("max", "average"))
    for pool, function in ((most, nn.functional.max_pool2d), (mean, nn.functional.avg_pool2d)):
        found = pool(images())
        assert torch.equal(found["pool1"], function(found["relu1_2"], 2))
    gray = torch.full((1, 3, 32, 32), 0.7)
    zeros, reflect = (Features(["conv1_1"], "vgg16", "random", padding=padding)(gray)["conv1_1"]
                      for padding in ("zeros", "reflect"))  # fmt: skip
    assert reflect.std((2, 3)).max() < 1e-5, "a uniform image must have no edge at its border"
    assert zeros.std((2, 3)).max() > 0.01


def test_our_own_classifier_gives_features_and_its_normalization(tmp_path: Path) -> None:
    """Load a classifier of 7 classes with batch normalization; without its last layer there is no fc8."""
    torch.manual_seed(2)
    classifier = ImageClassifier("vgg16_bn", num_classes=7, mean=[0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7])
    for part in classifier.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -1, 1)  # type: ignore[arg-type]
            nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]
    path = str(tmp_path / "best.ckpt")
    torch.save({"state_dict": classifier.state_dict(), "hyper_parameters": dict(classifier.hparams)}, path)
    found = Features(["relu2_2", "relu7"], "vgg16_bn", path)(images())
    classifier.eval()
    with torch.no_grad():
        x = classifier.preprocess((images() * 255).round().to(torch.uint8))
        expected = classifier.network.features[:13](x)  # type: ignore[index]
        torch.testing.assert_close(found["relu2_2"], expected, atol=0.1, rtol=0.1)
        rounded = Features(["relu2_2"], "vgg16_bn", path)((images() * 255).round() / 255)["relu2_2"]
        torch.testing.assert_close(rounded, expected, atol=1e-3, rtol=1e-3)
        scores = Features(["fc8", "logprob"], "vgg16_bn", path)((images() * 255).round() / 255)
        torch.testing.assert_close(scores["fc8"], classifier.network(x), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(scores["logprob"].exp().sum(1), torch.ones(len(x)))
    headless = {k: v for k, v in classifier.state_dict().items() if "classifier.6" not in k}
    torch.save(headless, path)
    with pytest.raises(UserError, match="expected layers before fc8, which .*best.ckpt does not have"):
        Features(["fc8"], "vgg16_bn", path)


def test_random_features_are_the_same_everywhere_and_of_one_scale() -> None:
    layers = ["conv1_1", "conv2_2", "conv3_4", "conv5_1"]
    torch.manual_seed(5)
    one = Features(layers, "vgg19", "random")
    torch.manual_seed(6)
    found, again = (features(images(96)) for features in (one, Features(layers, "vgg19", "random")))
    assert one.random
    for layer in layers:
        assert torch.equal(found[layer], again[layer])
    assert all(0.1 < float(values.std()) < 3 for values in found.values())


def test_rescaled_filters_have_a_mean_of_one_and_compute_the_same(files: Path) -> None:
    plain, scaled = (
        Features(["relu1_1", "relu3_3", "pool5", "fc6"], "vgg16", str(files / "vgg16.pth")) for _ in range(2)
    )
    scaled.rescale_filters(images(96))
    before, after = plain(images(96)), scaled(images(96))
    torch.testing.assert_close(after["fc6"], before["fc6"], atol=1e-4, rtol=1e-3)
    for layer in ("relu1_1", "relu3_3"):
        means, plain_means = after[layer].mean((0, 2, 3)), before[layer].mean((0, 2, 3))
        assert (means > 0.999).sum() > 32
        torch.testing.assert_close(means[means > 0.99], torch.ones_like(means[means > 0.99]), atol=1e-3, rtol=1e-3)
        # Filters that barely respond stay small.
        assert (plain_means[means <= 0.99] < plain_means[means > 0.99].min()).all()
    assert (before["relu3_3"].mean((0, 2, 3)) - 1).abs().max() > 0.1


def test_what_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"fetch https.*vgg19-.*put it at .*untrained features with --model.weights random"
    ):
        Features(["relu1_1"])
    with pytest.raises(UserError, match="layers: expected some of conv1_1, .* of vgg19, found relu9_1"):
        Features(["relu9_1"], weights="random")
    with pytest.raises(UserError, match="found none"):
        Features([], weights="random")
    with pytest.raises(UserError, match="backbone: expected vgg16, .* found resnet18"):
        Features(["relu1"], "resnet18", "random")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="found no file nowhere.pth"):
        Features(["relu1_1"], weights="nowhere.pth")


def test_a_file_of_convolutions_alone(tmp_path: Path) -> None:
    """Layers before fc6 work; fc6 itself is refused, whether the file lacks it or has nan for it."""
    torch.manual_seed(0)
    state = torchvision.models.vgg16().features.state_dict(prefix="features.")
    torch.save(state, tmp_path / "vgg16.pth")
    features = Features(["relu1_1"], "vgg16", str(tmp_path / "vgg16.pth"))
    assert torch.equal(features.layers["conv1_1"].weight, state["features.0.weight"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="layers: expected layers before fc6"):
        Features(["relu7"], "vgg16", str(tmp_path / "vgg16.pth"))
