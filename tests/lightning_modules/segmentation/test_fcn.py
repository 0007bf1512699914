"""FCN: parameter counts, crops, bilinear upsampling, weights of a classifier and of the previous stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG, resnet18
from torchvision.models.vgg import make_layers

from lightning_modules.components.vgg import VGG16
from lightning_modules.segmentation.fcn import FCN, BilinearUpsampling, FCNNetwork

VARIANTS = ("32s", "16s", "8s", "8s-atonce")


def small(**options: Any) -> FCN:
    return FCN(**{"num_classes": 3, "width_multiplier": 0.05, "batch_norm": True, "conv1_padding": 1, **options})


@pytest.mark.parametrize(
    ("variant", "all_of_them", "learned"),
    [
        ("32s", 136_152_917, 134_346_581),
        ("16s", 134_815_994, 134_357_354),
        ("8s", 134_489_759, 134_362_751),
        ("8s-atonce", 134_489_759, 134_362_751),
    ],
)
def test_the_authors_networks(variant: Any, all_of_them: int, learned: int) -> None:
    with torch.device("meta"):
        parameters = list(FCNNetwork(variant).parameters())
    assert sum(p.numel() for p in parameters) == all_of_them
    assert sum(p.numel() for p in parameters if p.requires_grad) == learned


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [{"width_multiplier": 0.03}, {"width_multiplier": 0.03, "conv1_padding": 1}, {"backbone": "mobilenet_v3_large"}],
)
def test_a_score_for_every_pixel(variant: Any, options: dict[str, Any]) -> None:
    network = FCNNetwork(variant, 3, **options).eval()
    with torch.inference_mode():
        for size in ((64, 96), (97, 131), (33, 40)):
            assert network(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_the_authors_crops_put_cells_on_what_they_see() -> None:
    """Follow the center of each cell's receptive field: maps that are added, and the output, are aligned."""

    def after(layer: nn.Module, scale: float, start: float) -> tuple[float, float]:
        """Cell i of the input is centered on pixel scale * i + start; return scale and start of the output."""
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            sides: Any = (layer.kernel_size, layer.stride, layer.padding)
            kernel, stride, padding = (x[0] if isinstance(x, tuple) else x for x in sides)
            return scale * stride, start + scale * ((kernel - 1) / 2 - padding)
        return scale, start

    for variant, pixel in (("32s", 32), ("16s", 16), ("8s", 8)):
        network = FCNNetwork(variant, width_multiplier=0.02)  # type: ignore[arg-type]
        place, seen = (1.0, 0.0), {}
        assert isinstance(network.features, nn.Sequential)
        for i, layer in enumerate(network.features):
            place = after(layer, *place)
            if i in network.skip_layers:
                seen[network.skip_layers[i]] = place
        place = after(network.fc6[0], *place)
        for name in network.score:
            # The center of a bilinear kernel is between its two inner cells.
            scale, start = place[0] / 2, place[1] - place[0] * 1.5 / 2
            finer = seen[name][0], seen[name][1] + seen[name][0] * network.crops[name]
            assert finer == (scale, start)
            place = scale, start
        scale, start = place[0] / pixel, place[1] - place[0] * (pixel - 0.5) / pixel
        assert scale == 1
        assert start + network.crops["image"] == 0


@pytest.mark.parametrize("factor", [2, 8, 32])
def test_upsampling_is_bilinear(factor: int) -> None:
    scores = torch.randn(1, 3, 6, 7)
    expected = F.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)
    inner = slice(factor, -factor)  # the transposed convolution pads the border with zeros
    layer = BilinearUpsampling(3, factor)
    assert not layer.weight.requires_grad
    found = layer(scores)[:, :, factor // 2 : -(factor // 2), factor // 2 : -(factor // 2)]
    assert found.shape == expected.shape
    torch.testing.assert_close(found[:, :, inner, inner], expected[:, :, inner, inner])


@pytest.mark.parametrize(("factor", "peak"), [(2, 1.0), (2, 1.25), (8, 7.0), (32, 31.0), (32, 31.5)])
def test_upsampling_puts_cells_at_the_peak(factor: int, peak: float) -> None:
    """A linear ramp over the cells stays linear and has the value of cell i at factor * i + peak."""
    ramp = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 1, 6, 6)
    found = BilinearUpsampling(1, factor, peak)(ramp)[0, 0, 3 * factor]
    inner = torch.arange(2 * factor, 5 * factor)
    torch.testing.assert_close(found[inner], (inner - peak) / factor)


# Independent of `cell_centers`: the middle of the pixels that an inner cell depends on.
@pytest.mark.parametrize(
    ("backbone", "starts"),
    [
        ("resnet18", (0, 0, 0)),
        ("mobilenet_v2", (0, 0, 0)),
        ("densenet121", (2, 6, 14)),
        ("convnext_tiny", (3.5, 7.5, 15.5)),
    ],
)
def test_cells_of_other_backbones_are_drawn_where_they_see(backbone: str, starts: tuple[float, ...]) -> None:
    """Logits that are the column of each cell's center become the column of each pixel."""
    network = FCNNetwork("8s", 1, backbone).eval()
    assert list(network.centers.values()) == list(zip((8, 16, 32), starts, strict=True))
    with torch.inference_mode():
        shapes = {name: m.shape for name, m in network.feature_maps(torch.zeros(1, 3, 257, 257)).items()}
    for variant, drawn in (("32s", ["top"]), ("8s", ["top", "pool4", "pool3"])):
        network = FCNNetwork(variant, 1, backbone).eval()  # type: ignore[arg-type]
        ramps = {
            name: (torch.arange(shape[3]) * stride + start).expand(1, 1, *shape[2:])
            for (name, shape), (stride, start) in zip(shapes.items(), network.centers.values(), strict=True)
        }
        # Each score layer returns its map's ramp, so that their sum is the number of maps times the column.
        network.feature_maps = lambda x, ramps=ramps: ramps  # type: ignore[method-assign, assignment, misc]
        network.score_fr = nn.Identity()  # type: ignore[assignment]
        network.score = nn.ModuleDict({name: nn.Identity() for name in network.score})
        with torch.inference_mode():
            found = network(torch.zeros(1, 3, 257, 257))[0, 0, 128]
        columns = torch.arange(64, 160)
        torch.testing.assert_close(found[columns] / len(drawn), columns.float())


@pytest.mark.parametrize(("backbone", "part", "cell"), [("resnet18", "pool3", 20), ("resnet18", "pool4", 20)])
def test_centers_are_the_middle_of_what_a_cell_sees(backbone: str, part: str, cell: int) -> None:
    network = FCNNetwork("8s", 1, backbone).double().eval()
    for layer in network.modules():  # positive weights, so that no path cancels another
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 0.01)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.MaxPool2d):  # an average depends on all pixels of its window
            network.set_submodule(name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding))
    pixels = torch.rand(1, 3, 64, 641, dtype=torch.float64, requires_grad=True)
    network.feature_maps(pixels)[part][0, 0, 1, cell].backward()
    assert pixels.grad is not None
    seen = pixels.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    stride, start = network.centers[part]
    assert float(seen.min() + seen.max()) / 2 == stride * cell + start


@pytest.mark.parametrize("options", [{"width_multiplier": 0.5}, {"batch_norm": True}, {"conv1_padding": 1}])
def test_options_of_vgg16_are_refused_for_other_backbones(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}: expected .* for backbone resnet18, found"):
        FCN(num_classes=3, backbone="resnet18", **options)


def test_a_classifier_becomes_convolutional(tmp_path: Path) -> None:
    """On an image of 224 pixels the center cell of the converted VGG-16 equals the classifier."""
    torch.manual_seed(0)
    plan: list[int | str] = [round(c * 0.05) if isinstance(c, int) else c for c in VGG16]
    vgg = VGG(make_layers(plan))
    vgg.classifier[0] = nn.Linear(26 * 49, 205)
    vgg.classifier[3] = nn.Linear(205, 205)
    vgg.classifier[6] = nn.Linear(205, 10)
    vgg.eval()
    state = vgg.state_dict()
    state["classifier.0.weight"] = state["classifier.0.weight"].clone()
    torch.save(state, tmp_path / "vgg16.pth")
    network = FCN(
        num_classes=3, width_multiplier=0.05, conv1_padding=1, weights=str(tmp_path / "vgg16.pth")
    ).network.eval()
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        top = network.feature_maps(pixels)["top"]
        expected = vgg.classifier[:5](vgg.features(pixels).flatten(1))
    assert top.shape == (1, 205, 7, 7)
    torch.testing.assert_close(top[:, :, 3, 3], expected, atol=1e-5, rtol=1e-4)


def test_each_stage_begins_where_the_last_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    first = small(variant="32s")
    nn.init.normal_(first.network.score_fr.weight)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "32s.ckpt")
    second = small(variant="16s", weights=str(tmp_path / "32s.ckpt"))
    assert "newly initialized: score.pool4.weight" in capsys.readouterr().out
    for key, value in first.network.state_dict().items():
        assert key.startswith("upscore") or torch.equal(second.network.state_dict()[key], value)
    # The new scores are zero, so the second network equals the first, up to two-step interpolation.
    pixels = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        a, b = first.network.eval()(pixels), second.network.eval()(pixels)
    assert (a - b).abs().mean() < 0.1 * a.std()


def test_weights_of_another_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    resnet = resnet18()
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    module = FCN(num_classes=3, backbone="resnet18", weights=str(tmp_path / "resnet18.pth"))
    assert torch.equal(module.network.features.state_dict()["layer4.1.conv2.weight"], resnet.layer4[1].conv2.weight)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "fcn.ckpt")
    FCN(num_classes=3, variant="8s-atonce", backbone="resnet18", weights=str(tmp_path / "fcn.ckpt"))
    torch.save({"some.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected weights of resnet18"):
        FCN(num_classes=3, backbone="resnet18", weights=str(tmp_path / "other.pth"))


def test_biases_learn_at_twice_the_rate_and_interpolation_does_not() -> None:
    module = small(batch_norm=False)
    groups = module.parameter_groups()
    assert [group.get("lr_scale", 1.0) for group in groups] == [1.0, 2.0]
    assert [group.get("weight_decay") for group in groups] == [None, 0.0]
    frozen = {id(layer.weight) for layer in module.modules() if isinstance(layer, BilinearUpsampling)}
    assert len(frozen) == 3
    assert not any(id(p) in frozen for group in groups for p in group["params"])


def test_an_all_void_batch_and_images_of_several_sizes() -> None:
    torch.manual_seed(0)
    module = small()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    loss = module.losses({"image": images, "mask": torch.full((2, 64, 64), 255)})["cross_entropy"]
    loss.backward()
    assert loss == 0
    with pytest.raises(ValueError, match="set --data.crop_size"):
        module.losses({"image": [images[0], images[1, :, :32]], "mask": []})
    module.eval()
    with torch.inference_mode():
        maps = module.predict_batch(
            {"image": [images[0], images[1, :, :40]], "original_mask": [torch.zeros(70, 60), torch.zeros(40, 64)]}
        )
    assert [tuple(m.shape) for m in maps] == [(70, 60), (40, 64)]
    with pytest.raises(ValueError, match="variant: expected 32s"):
        small(variant="4s")


def test_it_learns_colors() -> None:
    """Images have two colors: bright is class 1, dark is class 2."""
    torch.manual_seed(0)
    module = small(width_multiplier=0.05)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        edge = torch.randint(16, 48, (n, 1, 1))
        bright = (torch.arange(64) < edge).expand(-1, 64, -1)
        image = torch.where(bright[:, None], 200, 40).expand(-1, 3, -1, -1) + torch.randint(0, 20, (n, 3, 64, 64))
        return image.to(torch.uint8), torch.where(bright, 1, 2)

    for _ in range(40):
        images, mask = batch(4)
        optimizer.zero_grad()
        module.losses({"image": images, "mask": mask})["cross_entropy"].backward()
        optimizer.step()
    images, mask = batch(8)
    module.eval()
    with torch.inference_mode():
        found = torch.stack(module.predict(images))
    assert (found == mask).float().mean() > 0.9
