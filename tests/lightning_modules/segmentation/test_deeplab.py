"""DeepLab v1 and v2: counts, where cells lie, the loss against loops, scales and reflections, the CRF, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VGG, resnet50
from torchvision.models.vgg import make_layers

from lightning_modules.components.image_batches import pad_to_multiple
from lightning_modules.components.vgg import VGG16
from lightning_modules.segmentation.deeplab import (
    Decoder,
    DeepLab,
    DeepLabNetwork,
    at_cells,
    deeplab_loss,
    to_pixels,
)
from lightning_modules.segmentation.dilated_resnet import DilatedResNet, Pointwise

VARIANTS = ("largefov", "aspp", "resnet101")


def small(**options: Any) -> DeepLab:
    return DeepLab(**{"variant": "largefov", "num_classes": 3, "width": 0.03, **options})


@pytest.mark.parametrize(
    ("variant", "parameters"), [("largefov", 20_505_429), ("aspp", 37_877_652), ("resnet101", 44_048_532)]
)
def test_the_authors_networks(variant: Any, parameters: int) -> None:
    with torch.device("meta"):
        network = DeepLabNetwork(variant, scales=(1, 0.75, 0.5))
        outputs = network(torch.zeros(1, 3, 321, 321))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert [tuple(output.shape) for output in outputs] == [(1, 21, side, side) for side in (41, 31, 21, 41)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cells_lie_on_every_eighth_pixel(variant: Any) -> None:
    """Every layer is centerd: a cell of stride s is on pixel s i, whatever lies between."""
    with torch.device("meta"):
        network = DeepLabNetwork(variant)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            sides: list[Any] = [layer.kernel_size, layer.padding, getattr(layer, "dilation", 1)]
            kernel, padding, dilation = (side if isinstance(side, int) else side[0] for side in sides)
            assert padding == dilation * (kernel - 1) // 2


def test_dilations() -> None:
    with torch.device("meta"):
        vgg, aspp, resnet = (DeepLabNetwork(variant) for variant in VARIANTS)  # type: ignore[arg-type]

    def dilations(module: nn.Module) -> list[int]:
        return [m.dilation[0] for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]

    assert dilations(vgg.features) == [1] * 10 + [2] * 3
    assert dilations(vgg.branches) == [12]
    assert dilations(aspp.branches) == dilations(resnet.score) == [6, 12, 18, 24]
    for stage, blocks, rate in (("layer1", 3, 1), ("layer2", 4, 1), ("layer3", 23, 2), ("layer4", 3, 4)):
        assert dilations(resnet.features.get_submodule(stage)) == [rate] * blocks


def test_dilation_gives_what_strides_leave_out() -> None:
    """The authors' ResNet with strides says of every 32nd pixel what the dilated one says there."""
    torch.manual_seed(0)
    strided = resnet50().eval()
    for stage in (strided.layer2, strided.layer3, strided.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    dilated = DilatedResNet("resnet50", stride=8, early=True).eval()
    state = {key: value for key, value in strided.state_dict().items() if not key.startswith("fc.")}
    dilated.load_state_dict(state)
    pixels = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        x = strided.maxpool(strided.relu(strided.bn1(strided.conv1(pixels))))
        expected = strided.layer4(strided.layer3(strided.layer2(strided.layer1(x))))
        found = dilated(pixels)
    assert found.shape[2:] == (9, 13)
    torch.testing.assert_close(found[:, :, ::4, ::4], expected, rtol=1e-4, atol=1e-4)


def test_pointwise_is_a_convolution_with_a_stride() -> None:
    torch.manual_seed(0)
    layer = Pointwise(8, 5, 2)
    x = torch.randn(2, 8, 7, 6)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, layer.weight, stride=2))


class Ramps(DeepLabNetwork):
    """Says of each eighth pixel what that pixel is: class 0 has the image's red, class 1 its green."""

    def scores(self, x: Tensor) -> Tensor:
        return x[:, :2, ::8, ::8]


def test_every_scale_is_put_where_it_belongs() -> None:
    with torch.device("meta"):
        network = Ramps("largefov", 2, 0.02, scales=(1, 0.75, 0.5))
    row, column = torch.meshgrid(torch.arange(65.0), torch.arange(97.0), indexing="ij")
    image = torch.stack([column, row, row])[None]
    outputs = network(image)
    for output, step in zip(outputs, (8, 32 / 3, 16, 8), strict=True):
        y, x = (torch.arange(side) * float(step) for side in output.shape[2:])
        torch.testing.assert_close(output[0, 0], x.expand(len(y), -1))
        torch.testing.assert_close(output[0, 1], y[:, None].expand(-1, len(x)))
    torch.testing.assert_close(network.of_pixels(image), image[:, :2])
    # What is filled up is cut off again; beyond the last whole cell it has a part in what is read.
    part = network.of_pixels(image[:, :, :50, :60])
    assert part.shape == (1, 2, 50, 60)
    network.scales = (1,)
    torch.testing.assert_close(network.of_pixels(image[:, :, :50, :60])[:, :, :49, :57], image[:, :2, :49, :57])


def test_the_maximum_of_the_scales() -> None:
    class Sizes(DeepLabNetwork):
        """Says how far apart an image's width and 73 pixels are, which suits the scale of 0.75."""

        def scores(self, x: Tensor) -> Tensor:
            return -(x.new_tensor(x.shape[3]) - 73).abs().expand(1, 2, (x.shape[2] + 7) // 8, (x.shape[3] + 7) // 8)

    with torch.device("meta"):
        network = Sizes("largefov", 2, 0.02, scales=(1, 0.75, 0.5))
    outputs = network(torch.zeros(1, 3, 97, 97))
    assert [float(output.amax()) for output in outputs] == [-24, 0, -24, 0]
    assert (outputs[-1] == 0).all()


def test_sizes_are_filled_up_to_the_authors() -> None:
    for side, full in ((1, 1), (2, 33), (33, 33), (321, 321), (322, 353), (500, 513)):
        assert pad_to_multiple(torch.ones(1, 3, side, 33), 32, offset=1).shape == (1, 3, full, 33)
    mask = pad_to_multiple(torch.zeros(1, 30, 33, dtype=torch.int64), 32, offset=1, value=255)
    assert (mask[:, 30:] == 255).all()
    assert (mask[:, :30] == 0).all()
    assert to_pixels(torch.zeros(1, 2, 5, 5), (30, 20)).shape == (1, 2, 30, 20)


def test_labels_of_cells() -> None:
    mask = torch.randint(0, 21, (2, 321, 321), generator=torch.Generator().manual_seed(0))
    assert torch.equal(at_cells(mask, (41, 41)), mask[:, ::8, ::8])
    assert torch.equal(at_cells(mask, (21, 21)), mask[:, ::16, ::16])
    assert torch.equal(at_cells(mask, (321, 321)), mask)


def test_loss_is_the_papers_sum() -> None:
    """Section 4.1.2 of 2018: cross entropies of the scales and of their maximum, each the mean of cells not void."""
    scales = (1, 0.75, 0.5)
    for seed in range(200):
        random = np.random.default_rng(seed)
        height, width = random.integers(2, 34, 2)
        mask = random.integers(0, 4, (2, height, width))
        mask[mask == 3] = 255
        full = np.full((2, 33, 33), 255)
        full[:, :height, :width] = mask
        outputs = [random.normal(0, 3, (2, 3, n, n)) for n in (5, 4, 3, 5)]
        found = deeplab_loss([torch.from_numpy(o).float() for o in outputs], torch.from_numpy(mask), scales)
        assert list(found) == ["scale_1", "scale_0.75", "scale_0.5", "maximum"]
        for output, value in zip(outputs, found.values(), strict=True):
            n, total, known = output.shape[2], 0.0, 0
            for b, i, j in np.ndindex(2, n, n):
                label = full[b, int(i * 32 / (n - 1) + 0.5), int(j * 32 / (n - 1) + 0.5)]
                if label != 255:
                    total += np.log(np.exp(output[b, :, i, j]).sum()) - output[b, label, i, j]
                    known += 1
            assert float(value) == pytest.approx(total / max(1, known), rel=1e-4, abs=1e-6)


# --- decoding -------------------------------------------------------------------------------------------------------


def as_floats(images: Tensor) -> Tensor:
    return images.float()


def test_probabilities_are_averaged_over_scales_and_reflections() -> None:
    torch.manual_seed(0)
    seen: list[tuple[int, ...]] = []

    def network(x: Tensor) -> Tensor:
        """Red, and more of it on the left, against green."""
        seen.append(tuple(x.shape[2:]))
        return torch.stack([x[:, 0] - torch.arange(x.shape[3]), x[:, 1]], 1)

    pixels = torch.randint(0, 20, (2, 3, 6, 8)).float()
    sizes = [(6, 8), (9, 12)]
    plain = Decoder().probabilities(network, pixels, sizes)
    torch.testing.assert_close(plain[0], network(pixels)[0].softmax(0))
    assert plain[1].shape == (2, 9, 12)
    flipped = Decoder(flip=True).probabilities(network, pixels, sizes)
    other = network(pixels.flip(3)).flip(3).softmax(1)
    torch.testing.assert_close(flipped[0], (plain[0] + other[0]) / 2)
    seen.clear()
    several = Decoder((0.5, 1, 1.5), flip=True).probabilities(network, pixels, sizes)
    assert seen == [(3, 4)] * 2 + [(6, 8)] * 2 + [(9, 12)] * 2
    torch.testing.assert_close(several[1].sum(0), torch.ones(9, 12))
    each = [Decoder((scale,), flip=True).probabilities(network, pixels, sizes)[1] for scale in (0.5, 1, 1.5)]
    torch.testing.assert_close(several[1], sum(each) / 3)  # type: ignore[arg-type]


def test_maps_have_the_sizes_asked_for() -> None:
    def network(x: Tensor) -> Tensor:
        return torch.stack([255 - x[:, 0], x[:, 0]], 1)

    images = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    images[1, :, :, 3:] = 255
    maps = Decoder()(network, as_floats, images)
    assert maps[0].tolist() == [[0] * 6] * 4
    assert maps[1].tolist() == [[0, 0, 0, 1, 1, 1]] * 4
    assert maps[0].dtype == torch.int64
    maps = Decoder()(network, as_floats, [images[0], images[1, :, :2]], [(4, 6), (4, 12)])
    assert maps[1].tolist() == [[0] * 6 + [1] * 6] * 4
    for scales in ([], [0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="eval_scales: expected one or more factors above 0"):
            Decoder(scales)


@pytest.mark.parametrize("crf", ["largefov", "vgg16", "resnet101"])
def test_a_crf_follows_the_edges_of_the_picture(crf: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = (torch.arange(32) < 13).expand(24, -1).long()
    image = torch.where(truth.bool(), 200, 60).expand(3, -1, -1).to(torch.uint8)
    noisy = torch.stack([1.0 - truth, truth.float()]) + torch.randn(2, 24, 32, generator=generator)

    def network(x: Tensor) -> Tensor:
        return noisy[None]

    (before,) = Decoder()(network, as_floats, image[None])
    (after,) = Decoder(crf=crf)(network, as_floats, image[None])
    assert (before == truth).float().mean() < 0.85
    assert (after == truth).float().mean() > 0.95
    with pytest.raises(ValueError, match="found 32x24 of 64x48: set --data.eval_image_size null"):
        Decoder(crf=crf)(network, as_floats, image[None], [(48, 64)])


def test_settings_are_named() -> None:
    with pytest.raises(ValueError, match="crf: expected one of largefov, vgg16, resnet101, found vgg"):
        small(crf="vgg")


# --- module ---------------------------------------------------------------------------------------------------------


def test_rates_of_the_head_and_of_biases() -> None:
    module = small(variant="aspp")
    groups = module.parameter_groups()
    assert [group.get("lr_scale", 1.0) for group in groups] == [1, 2, 10, 20]
    assert [group.get("weight_decay") for group in groups] == [None, 0, None, 0]
    assert [id(p) for p in groups[3]["params"]] == [id(score.bias) for score in module.network.score]
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in module.parameters())


def test_frozen_batch_normalization() -> None:
    torch.manual_seed(0)
    batch = {"image": torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8), "mask": torch.zeros(2, 33, 33).long()}
    moved = {}
    for frozen in (False, True):
        module = small(batch_norm=True, frozen_bn=frozen)
        module.eval()
        module.train()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        sum(module.losses(batch).values()).backward()  # type: ignore[union-attr]
        moved[frozen] = {k for k, v in module.state_dict().items() if not torch.equal(before[k], v)}
        learned = {id(p) for group in module.parameter_groups() for p in group["params"]}
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all((id(m.weight) in learned) != frozen for m in norms)
    assert any("running_mean" in key for key in moved[False])
    assert not moved[True]


def test_a_classifier_becomes_branches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plan: list[int | str] = [c // 16 if isinstance(c, int) else c for c in VGG16]
    vgg = VGG(make_layers(plan))
    vgg.classifier[0], vgg.classifier[3] = nn.Linear(32 * 49, 256), nn.Linear(256, 256)
    torch.save(vgg.state_dict(), tmp_path / "vgg16.pth")
    module = small(variant="aspp", width=1 / 16, weights=str(tmp_path / "vgg16.pth"))
    for branch in module.network.branches:
        fc6, fc7 = branch.fc6[0], branch.fc7[0]
        places = vgg.classifier[0].weight.view(256, 32, 7, 7)
        for unit, channel, row, column in ((0, 0, 0, 0), (5, 3, 1, 2), (63, 31, 2, 2)):
            assert fc6.weight[unit, channel, row, column] == places[4 * unit, channel, 3 * row, 3 * column]
        assert fc7.weight[9, 60, 0, 0] == vgg.classifier[3].weight[36, 240]
        assert torch.equal(fc6.bias, vgg.classifier[0].bias[::4])
    assert torch.equal(module.network.features[28].weight, vgg.features[28].weight)
    # Features alone, as torchvision has them for detectors: fc6 and fc7 begin anew.
    state = {k: v if k.startswith("features.") else torch.full_like(v, torch.nan) for k, v in vgg.state_dict().items()}
    torch.save(state, tmp_path / "features.pth")
    module = small(width=1 / 16, weights=str(tmp_path / "features.pth"))
    assert all(p.isfinite().all() for p in module.parameters())
    torch.save({"state_dict": module.state_dict()}, tmp_path / "ours.ckpt")
    again = small(width=1 / 16, weights=str(tmp_path / "ours.ckpt"))
    for key, value in module.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[key], value)


def test_an_all_void_batch_and_bad_input() -> None:
    torch.manual_seed(0)
    module = small(scales=(1, 0.5))
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    losses = module.losses({"image": images, "mask": torch.full((2, 40, 40), 255)})
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert [float(loss) for loss in losses.values()] == [0, 0, 0]
    with pytest.raises(ValueError, match="set --data.crop_size"):
        module.losses({"image": [images[0], images[1, :, :32]], "mask": []})
    with pytest.raises(ValueError, match="variant: expected largefov, aspp or resnet101, found vgg16"):
        small(variant="vgg16")
    for scales in ((0.5, 1), (1, 0.5, 0.5), (1, -1), ()):
        with pytest.raises(ValueError, match="scales: expected 1 and then other factors"):
            small(scales=scales)


def test_it_learns_colors_and_pictures_of_several_sizes() -> None:
    """Images of two colors: bright is class 1, dark is class 2."""
    torch.manual_seed(0)
    module = small(batch_norm=True, scales=(1, 0.5))
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    for _ in range(30):
        images, mask = two_colors(4)
        optimizer.zero_grad()
        sum(module.losses({"image": images, "mask": mask}).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    module.eval()
    images, mask = two_colors(4)
    with torch.inference_mode():
        found = torch.stack(module.predict(images))
        assert (found == mask).float().mean() > 0.9
        batch = {"image": [images[0], images[1, :, :50]], "original_mask": [torch.zeros(70, 60), torch.zeros(50, 65)]}
        maps = module.predict_batch(batch)
    assert [tuple(m.shape) for m in maps] == [(70, 60), (50, 65)]


def two_colors(n: int) -> tuple[Tensor, Tensor]:
    """Images uint8 (n,3,65,65) and their masks int64 (n,65,65)."""
    edge = torch.randint(16, 48, (n, 1, 1))
    bright = (torch.arange(65) < edge).expand(-1, 65, -1)
    images = torch.where(bright[:, None], 200, 40).expand(-1, 3, -1, -1) + torch.randint(0, 20, (n, 3, 65, 65))
    return images.to(torch.uint8), torch.where(bright, 1, 2)
