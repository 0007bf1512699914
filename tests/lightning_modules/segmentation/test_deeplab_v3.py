"""DeepLabv3: parameter count, backbone and ASPP against torchvision, both output strides, a batch of one image."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.segmentation import deeplabv3

from lightning_modules.segmentation.deeplab_v3 import ASPP, DeepLabV3, DeepLabV3Network
from lightning_modules.segmentation.dilated_resnet import DilatedResNet
from tests.lightning_modules.segmentation.test_deeplab import two_colors


def small(**options: Any) -> DeepLabV3:
    defaults = {"backbone": "resnet18", "num_classes": 3, "width_multiplier": 0.125, "multi_grid": (1, 2)}
    return DeepLabV3(**{**defaults, "atrous_rates": (1, 2), **options})


def test_the_papers_network() -> None:
    with torch.device("meta"):
        network = DeepLabV3Network()
        assert sum(p.numel() for p in network.parameters()) == 58_040_661
        assert network.features(torch.zeros(1, 3, 513, 513)).shape == (1, 2048, 33, 33)
        assert network.eval()(torch.zeros(1, 3, 500, 375)).shape == (1, 21, 500, 375)


@pytest.mark.parametrize(("stride", "rates"), [(16, [6, 12, 18]), (8, [12, 24, 36])])
def test_rates_are_doubled_at_8(stride: Any, rates: list[int]) -> None:
    with torch.device("meta"):
        network = DeepLabV3Network(output_stride=stride)
        assert network.features(torch.zeros(1, 3, 513, 513)).shape[2:] == (512 // stride + 1,) * 2
    assert [branch[0].dilation[0] for branch in network.aspp.branches] == [1, *rates]


@pytest.mark.parametrize("stride", [16, 8])
def test_the_backbone_is_torchvisions_with_the_papers_dilations(stride: Any) -> None:
    """Set torchvision's dilations: its first dilated block has half of them, and it has no multi-grid."""
    torch.manual_seed(0)
    reference = resnet50(replace_stride_with_dilation=[False, stride == 8, True]).eval()
    for stage, rates in (
        ("layer3", [2] * 6 if stride == 8 else [1] * 6),
        ("layer4", [32 // stride * g for g in (1, 2, 4)]),
    ):
        for block, rate in zip(reference.get_submodule(stage), rates, strict=True):  # type: ignore[arg-type]
            block.conv2.dilation = block.conv2.padding = (rate, rate)
    backbone = DilatedResNet("resnet50", output_stride=stride, multi_grid=(1, 2, 4)).eval()
    backbone.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")})
    pixels = torch.randn(1, 3, 65, 49)
    with torch.inference_mode():
        x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(pixels))))
        expected = reference.layer4(reference.layer3(reference.layer2(reference.layer1(x))))
        torch.testing.assert_close(backbone(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_the_pyramid_is_torchvisions(training: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = ASPP(24, 12, (2, 4, 6)), deeplabv3.ASPP(24, (2, 4, 6), 12)
    parts = {f"branches.{i}": f"convs.{i}" for i in range(4)} | {"pooling": "convs.4", "project": "project"}
    state = theirs.state_dict()
    for prefix, other in parts.items():
        layers = dict(ours.get_submodule(prefix).named_parameters())
        # In torchvision pooling is a separate layer before the convolution.
        shift = 1 if prefix == "pooling" else 0
        for name, parameter in layers.items():
            number, kind = name.split(".")
            nn.init.normal_(parameter)
            state[f"{other}.{int(number) + shift}.{kind}"] = parameter.detach()
    theirs.load_state_dict(state)
    for network in (ours, theirs):
        network.train(training)
        for layer in network.modules():
            if isinstance(layer, nn.Dropout):
                layer.eval()
    x = torch.randn(3, 24, 9, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_training_on_one_image() -> None:
    torch.manual_seed(0)
    batch = {"image": torch.randint(0, 256, (1, 3, 33, 33), dtype=torch.uint8), "mask": torch.zeros(1, 33, 33).long()}
    module = small()
    with pytest.raises(ValueError, match="expected 2 or more training images, found 1"):
        module.losses(batch)
    assert small(freeze_batch_norm=True).losses(batch)["cross_entropy"].isfinite()
    module.eval()
    with torch.inference_mode():
        assert module.predict(batch["image"])[0].shape == (33, 33)


def test_weights_of_imagenet_and_of_the_stage_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    resnet = resnet18()
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    first = small(width_multiplier=1.0, weights=str(tmp_path / "resnet18.pth"))
    assert torch.equal(first.network.features.state_dict()["layer4.1.conv2.weight"], resnet.layer4[1].conv2.weight)
    first.eval()
    torch.save({"state_dict": first.state_dict()}, tmp_path / "first.ckpt")
    second = small(width_multiplier=1.0, output_stride=8, freeze_batch_norm=True, weights=str(tmp_path / "first.ckpt"))
    for key, value in first.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[key], value)
    torch.save({"some.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected weights of resnet18"):
        small(weights=str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multi_grid": (1, 2, 4)}, "multi_grid: expected a factor of 1 or more for each of the last 2 blocks"),
        ({"multi_grid": (1, 0)}, "multi_grid: expected a factor of 1 or more"),
        ({"output_stride": 32}, "output_stride: expected 8 or 16, found 32"),
        ({"backbone": "vgg16"}, "backbone: expected one of resnet18"),
        ({"batch_norm_momentum": 0.0}, "batch_norm_momentum: expected more than 0, at most 1, found 0.0"),
        ({"atrous_rates": ()}, "atrous_rates: expected one or more dilations"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_batch_normalization_and_weight_decay_are_the_papers() -> None:
    """A decay of 0.9997: after one batch the running mean is 0.0003 of the batch's mean."""
    module = small().train()
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {layer.momentum for layer in norms} == {3e-4}
    seen: list[torch.Tensor] = []
    module.network.features.bn1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    images = torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8)
    module.losses({"image": images, "mask": torch.zeros(2, 33, 33).long()})
    torch.testing.assert_close(module.network.features.bn1.running_mean, 3e-4 * seen[0])
    assert {n.momentum for n in small(batch_norm_momentum=0.1).modules() if isinstance(n, nn.BatchNorm2d)} == {0.1}

    optimizer = module.optimizer_factory(module.parameter_groups())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(module.parameters()))
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            expected = 1e-4 if isinstance(layer, nn.Conv2d) and name == "weight" else 0.0
            assert decay[id(parameter)] == expected
    everything = small(decay_norms=True)
    groups = everything.optimizer_factory(everything.parameter_groups()).param_groups
    assert {group["weight_decay"] for group in groups} == {1e-4}


def test_an_all_void_batch() -> None:
    module = small()
    images = torch.zeros(2, 3, 40, 30, dtype=torch.uint8)
    loss = module.losses({"image": images, "mask": torch.full((2, 40, 30), 255)})["cross_entropy"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in module.parameters())


@pytest.mark.parametrize("stride", [16, 8])
def test_it_learns_colors(stride: Any) -> None:
    """Images have two colors: bright is class 1, dark is class 2. Memory is NHWC, as in training."""
    torch.manual_seed(0)
    module = small(output_stride=stride, batch_norm_momentum=0.1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    for _ in range(30):
        images, mask = two_colors(4)
        optimizer.zero_grad()
        module.losses({"image": images, "mask": mask})["cross_entropy"].backward()
        optimizer.step()
    module.eval()
    images, mask = two_colors(8)
    with torch.inference_mode():
        found = torch.stack(module.predict(images))
    assert (found == mask).float().mean() > 0.9


def test_a_run_that_is_too_short_for_the_batch_norm_momentum_is_reported() -> None:
    """(1 - 3e-4)^1000 = 74%, (1 - 3e-4)^10000 = 5.0%."""
    line = r"after the 1000 steps .* 74% .* initial values; set --model.batch_norm_momentum 0.003 or more"
    cases: list[tuple[dict[str, Any], int, bool]] = [
        ({}, 1000, True),
        ({}, 10_000, False),
        ({"batch_norm_momentum": 0.003}, 1000, False),
        ({"freeze_batch_norm": True}, 1000, False),
    ]
    for options, steps, warns in cases:
        module = small(**options)
        module._trainer = SimpleNamespace(estimated_stepping_batches=steps)  # type: ignore[assignment]
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            module._report_slow_statistics()
        assert len(found) == warns
        assert not warns or re.search(line, str(found[0].message))
