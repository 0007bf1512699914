"""DeepLab v1 and v2: parameter counts, alignment of cells, the loss against loops, pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VGG, resnet101
from torchvision.models.vgg import make_layers

from lightning_modules.components.image_batches import pad_to_multiple
from lightning_modules.components.vgg import VGG16
from lightning_modules.segmentation.base import upsample_aligned
from lightning_modules.segmentation.deeplab import DeepLab, DeepLabNetwork, deeplab_loss, subsample_mask

VARIANTS = ("largefov", "aspp", "resnet101")


def small(**options: Any) -> DeepLab:
    return DeepLab(**{"variant": "largefov", "num_classes": 3, "width_multiplier": 0.03, **options})


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
    """Every layer is centered, so cell i of stride s lies on pixel s i."""
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


class Ramps(DeepLabNetwork):
    """The logits of classes 0 and 1 are the red and green of every eighth pixel."""

    def cell_logits(self, x: Tensor) -> Tensor:
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
    torch.testing.assert_close(network.pixel_logits(image), image[:, :2])
    # The padding is cropped again; it affects only the pixels after the last complete cell.
    part = network.pixel_logits(image[:, :, :50, :60])
    assert part.shape == (1, 2, 50, 60)
    network.scales = (1,)
    torch.testing.assert_close(network.pixel_logits(image[:, :, :50, :60])[:, :, :49, :57], image[:, :2, :49, :57])


def test_the_maximum_of_the_scales() -> None:
    class Sizes(DeepLabNetwork):
        """The logits are the negative distance of the image's width from 73 pixels: 0 at scale 0.75."""

        def cell_logits(self, x: Tensor) -> Tensor:
            return -(x.new_tensor(x.shape[3]) - 73).abs().expand(1, 2, (x.shape[2] + 7) // 8, (x.shape[3] + 7) // 8)

    with torch.device("meta"):
        network = Sizes("largefov", 2, 0.02, scales=(1, 0.75, 0.5))
    outputs = network(torch.zeros(1, 3, 97, 97))
    assert [float(output.amax()) for output in outputs] == [-24, 0, -24, 0]
    assert (outputs[-1] == 0).all()


def test_sizes_are_padded_to_the_authors() -> None:
    for side, full in ((1, 1), (2, 33), (33, 33), (321, 321), (322, 353), (500, 513)):
        assert pad_to_multiple(torch.ones(1, 3, side, 33), 32, offset=1).shape == (1, 3, full, 33)
    mask = pad_to_multiple(torch.zeros(1, 30, 33, dtype=torch.int64), 32, offset=1, value=255)
    assert (mask[:, 30:] == 255).all()
    assert (mask[:, :30] == 0).all()
    assert upsample_aligned(torch.zeros(1, 2, 5, 5), (30, 20)).shape == (1, 2, 30, 20)


def test_labels_of_cells() -> None:
    mask = torch.randint(0, 21, (2, 321, 321), generator=torch.Generator().manual_seed(0))
    assert torch.equal(subsample_mask(mask, (41, 41)), mask[:, ::8, ::8])
    assert torch.equal(subsample_mask(mask, (21, 21)), mask[:, ::16, ::16])
    assert torch.equal(subsample_mask(mask, (321, 321)), mask)


def test_loss_is_the_papers_sum() -> None:
    """PAMI 2018, section 4.1.2: mean cross entropies, over cells that are not void, of the scales and their maximum."""
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


# --- module ---------------------------------------------------------------------------------------------------------


def test_learning_rates_of_the_head_and_of_biases() -> None:
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
        module = small(batch_norm=True, freeze_batch_norm=frozen)
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
    module = small(variant="aspp", width_multiplier=1 / 16, weights=str(tmp_path / "vgg16.pth"))
    for branch in module.network.branches:
        fc6, fc7 = branch.fc6[0], branch.fc7[0]
        kernel = vgg.classifier[0].weight.view(256, 32, 7, 7)
        for unit, channel, row, column in ((0, 0, 0, 0), (5, 3, 1, 2), (63, 31, 2, 2)):
            assert fc6.weight[unit, channel, row, column] == kernel[4 * unit, channel, 3 * row, 3 * column]
        assert fc7.weight[9, 60, 0, 0] == vgg.classifier[3].weight[36, 240]
        assert torch.equal(fc6.bias, vgg.classifier[0].bias[::4])
    assert torch.equal(module.network.features[28].weight, vgg.features[28].weight)
    # Torchvision's file of features alone: fc6 and fc7 are newly initialized.
    state = {k: v if k.startswith("features.") else torch.full_like(v, torch.nan) for k, v in vgg.state_dict().items()}
    torch.save(state, tmp_path / "features.pth")
    module = small(width_multiplier=1 / 16, weights=str(tmp_path / "features.pth"))
    assert all(p.isfinite().all() for p in module.parameters())
    torch.save({"state_dict": module.state_dict()}, tmp_path / "ours.ckpt")
    again = small(width_multiplier=1 / 16, weights=str(tmp_path / "ours.ckpt"))
    for key, value in module.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[key], value)


def strides(module: DeepLab) -> tuple[int, int]:
    """Return the strides of the 1x1 and the 3x3 convolution of the first bottleneck with a stride."""
    block = module.network.features.layer2[0]
    return block.conv1.subsampling, block.conv2.stride[0]


def test_the_stride_is_where_the_weights_were_trained_with_it(tmp_path: Path, capsys: Any) -> None:
    options: dict[str, Any] = {"variant": "resnet101", "width_multiplier": 0.03}
    torch.save(resnet101(width_per_group=64).state_dict(), tmp_path / "resnet101.pth")
    assert strides(small(**options)) == (2, 1)  # the paper's
    assert strides(small(**options, stride_in_1x1=False)) == (1, 2)
    torchvisions = small(variant="resnet101", width_multiplier=1.0, weights=str(tmp_path / "resnet101.pth"))
    assert strides(torchvisions) == (1, 2)
    assert "stride_in_1x1: 3x3 convolution" in capsys.readouterr().out
    caffe = small(
        variant="resnet101", width_multiplier=1.0, stride_in_1x1=True, weights=str(tmp_path / "resnet101.pth")
    )
    assert strides(caffe) == (2, 1)

    # Checkpoints record the position: for the next stage, for loading, and for a run that resumes without weights.
    for trained, expected in ((small(**options), (2, 1)), (small(**options, stride_in_1x1=False), (1, 2))):
        checkpoint = {
            "state_dict": trained.state_dict(),
            "hyper_parameters": {**trained.hparams, "weights": None},
            "pytorch-lightning_version": "2.6.6",
        }
        torch.save(checkpoint, tmp_path / "run.ckpt")
        assert strides(small(**options, weights=str(tmp_path / "run.ckpt"))) == expected
        assert strides(DeepLab.load_from_checkpoint(tmp_path / "run.ckpt")) == expected
        resumed = small(**options)
        resumed.on_load_checkpoint(checkpoint)
        assert strides(resumed) == expected
    # Checkpoints without a record are older: they were trained with the stride in the 1x1 convolution.
    del checkpoint["hyper_parameters"]["stride_in_1x1"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert strides(small(**options, weights=str(tmp_path / "old.ckpt"))) == (2, 1)


def test_with_torchvisions_weights_and_stride_the_backbone_is_torchvisions(tmp_path: Path) -> None:
    """The oracle is torchvision's network with dilation in place of strides, and its own stride position."""
    torch.manual_seed(0)
    reference = resnet101(replace_stride_with_dilation=[False, True, True]).eval()
    for stage, rate in ((reference.layer3, 2), (reference.layer4, 4)):
        stage[0].conv2.dilation = stage[0].conv2.padding = (rate, rate)  # type: ignore[union-attr, assignment]
    torch.save(reference.state_dict(), tmp_path / "resnet101.pth")
    module = small(variant="resnet101", width_multiplier=1.0, weights=str(tmp_path / "resnet101.pth")).eval()
    reference, features = reference.double(), module.network.features.double()
    pixels = torch.randn(1, 3, 49, 41, dtype=torch.float64)
    with torch.inference_mode():
        x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(pixels))))
        expected = reference.layer4(reference.layer3(reference.layer2(reference.layer1(x))))
        torch.testing.assert_close(features(pixels), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "resnet101", "batch_norm": True}, "batch_norm: expected false for variant resnet101"),
        ({"freeze_batch_norm": True}, "freeze_batch_norm: expected false for variant largefov without batch_norm"),
        ({"variant": "aspp", "stride_in_1x1": False}, "stride_in_1x1: expected null for variant aspp"),
    ],
)
def test_options_without_an_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


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
        with pytest.raises(ValueError, match="scales: expected 1, then other factors"):
            small(scales=scales)


def test_it_learns_colors_and_images_of_several_sizes() -> None:
    """Images have two colors: bright is class 1, dark is class 2."""
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
    """Draw images uint8 (n, 3, 65, 65) and masks int64 (n, 65, 65)."""
    edge = torch.randint(16, 48, (n, 1, 1))
    bright = (torch.arange(65) < edge).expand(-1, 65, -1)
    images = torch.where(bright[:, None], 200, 40).expand(-1, 3, -1, -1) + torch.randint(0, 20, (n, 3, 65, 65))
    return images.to(torch.uint8), torch.where(bright, 1, 2)
