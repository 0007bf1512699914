"""Networks: exact parameter counts, the papers' formulas, input sizes."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from errors import UserError
from lightning_modules.classification.image_classifier import ImageClassifier
from lightning_modules.components.alexnet import AlexNet2012, LocalResponseNorm
from lightning_modules.components.networks import build_network
from lightning_modules.components.resnet_cifar import ResNetCifar, shortcut_a


def count(backbone, classes=1000, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(backbone, classes, **options).parameters())


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [
        ("alexnet", 61_100_840),
        ("alexnet_2012", 60_965_224),
        ("vgg16", 138_357_544),
        ("vgg16_bn", 138_365_992),
        ("vgg19", 143_667_240),
        ("vgg19_bn", 143_678_248),
        ("googlenet", 6_624_904),
        ("inception_v3", 23_834_568),
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_parameters_at_1000_classes(backbone, parameters):
    assert count(backbone) == parameters


def test_parameters_with_auxiliary_heads():
    assert count("googlenet", aux_logits=True) == 13_004_888
    assert count("inception_v3", aux_logits=True) == 27_161_264


def test_parameters_of_vgg16_for_places365():
    assert count("vgg16", 365) == 135_755_949


def cifar_parameters(depth, classes=10, base_channels=16):
    n = (depth - 2) // 6
    c = base_channels
    total = 27 * c + 2 * c
    for into, out in ((c, c), (c, 2 * c), (2 * c, 4 * c)):
        total += 9 * into * out + (2 * n - 1) * 9 * out * out + 2 * n * 2 * out
    return total + 4 * c * classes + classes


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_parameters_of_cifar_resnets(depth, parameters):
    assert cifar_parameters(depth) == parameters
    assert count(f"resnet{depth}_cifar", 10) == parameters
    assert count(f"resnet{depth}_cifar", 100, base_channels=4) == cifar_parameters(depth, 100, 4)


def test_cifar_resnet_counts_its_layers():
    layers = [m for m in ResNetCifar(20, base_channels=2).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 20
    with pytest.raises(UserError, match=r"expected 6n\+2"):
        ResNetCifar(21)


def test_shortcut_a_subsamples_and_pads_with_zeros():
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    y = shortcut_a(x, 6, 2)
    assert y.shape == (2, 6, 4, 4)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert shortcut_a(x, 3, 1) is x


def test_cifar_resnet_is_initialized_after_he():
    torch.manual_seed(0)
    weight = ResNetCifar(20).stage3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_lrn_is_the_papers_formula():
    a = np.random.default_rng(0).normal(0, 100, (2, 7, 3, 3))
    expected = np.empty_like(a)
    for i in range(7):
        window = a[:, max(0, i - 2) : min(6, i + 2) + 1]
        expected[:, i] = a[:, i] / (2 + 1e-4 * (window**2).sum(1)) ** 0.75
    found = LocalResponseNorm()(torch.from_numpy(a).float())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    undivided = nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)(torch.from_numpy(a).float())
    assert np.abs(undivided.numpy() / expected - 1).max() > 0.1


def test_lrn_does_not_overflow_in_half_precision():
    x = torch.full((1, 5, 1, 1), 1000.0)
    half = LocalResponseNorm()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), LocalResponseNorm()(x), rtol=1e-3, atol=0)


def test_alexnet_2012_layers_and_initialization():
    torch.manual_seed(0)
    network = AlexNet2012(10).eval()
    assert [c.groups for c in network.children() if isinstance(c, nn.Conv2d)] == [1, 2, 1, 2, 2]
    ones = {name for name, p in network.named_parameters() if name.endswith("bias") and (p == 1).all()}
    zeros = {name for name, p in network.named_parameters() if name.endswith("bias") and (p == 0).all()}
    assert ones == {f"{name}.bias" for name in ("conv2", "conv4", "conv5", "fc6", "fc7")}
    assert zeros == {f"{name}.bias" for name in ("conv1", "conv3", "fc8")}
    assert network.conv2.weight.std().item() == pytest.approx(0.01, rel=0.01)
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 227, 227)).shape == (1, 10)
    with pytest.raises(UserError, match="expected 227x227 pixels, found 224x224"):
        network(torch.zeros(1, 3, 224, 224))


def test_alexnet_2012_sees_pixels_on_their_own_scale():
    with torch.device("meta"):
        network = build_network("alexnet_2012", 2)
    assert network.fc8.out_features == 2
    module = ImageClassifier("resnet20_cifar", 2, base_channels=2, mean=[0.5] * 3, std=[1 / 255] * 3)
    black = module.preprocess(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    torch.testing.assert_close(black, torch.full((1, 3, 2, 2), -127.5))


def test_googlenet_normalizes_once_as_torchvision_means_it():
    module = ImageClassifier("googlenet", 3, aux_loss_weight=0)
    module.eval()
    reference = torchvision.models.googlenet(num_classes=3, aux_logits=False, init_weights=False, transform_input=True)
    reference.load_state_dict(module.network.state_dict())
    reference.eval()
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        expected = reference((image / 255 - mean) / std).softmax(1)
        torch.testing.assert_close(module.predict(image)["probabilities"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        module.preprocess(image), reference._transform_input((image / 255 - mean) / std), rtol=0, atol=2e-6
    )


def test_options_of_other_networks_are_refused():
    with pytest.raises(UserError, match="expected null for resnet50"):
        build_network("resnet50", 10, dropout=0.5)
    with pytest.raises(UserError, match="base_channels: expected 16 for vgg16"):
        build_network("vgg16", 10, base_channels=8)
