"""Patch classifier: dense inference equals separate patches; patches, sampled centers, and learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VGG
from torchvision.models.vgg import make_layers

from lightning_modules.components.vgg import VGG16
from lightning_modules.segmentation.fcn import FCN
from lightning_modules.segmentation.patch_classifier import (
    PatchClassifier,
    PatchNetwork,
    classify_densely,
    classify_each_patch,
    extract_patches,
    pad_to_grid,
    sample_centers,
)
from tests.lightning_modules.detection.test_sliding_window import with_random_statistics


def small(**options: Any) -> PatchClassifier:
    return PatchClassifier(**{"num_classes": 3, "width_multiplier": 0.25, "patch_size": 24, **options})


def plain_slice(image: Tensor, row: int, column: int, patch: int) -> Tensor:
    """Slice the patch (3, patch, patch) around a pixel of an image (3, H, W) that is padded with zeros."""
    wide = torch.zeros(3, image.shape[1] + 2 * patch, image.shape[2] + 2 * patch, dtype=image.dtype)
    wide[:, patch:-patch, patch:-patch] = image
    top, left = row + patch - patch // 2, column + patch - patch // 2
    return wide[:, top : top + patch, left : left + patch]


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"backbone": "small"}, 1_280_309),
        ({"backbone": "small", "num_classes": 11, "width_multiplier": 0.5, "patch_size": 48}, 157_083),
        ({"backbone": "vgg16"}, 134_346_581),
        ({"backbone": "vgg16", "num_classes": 1000}, 138_357_544),
    ],
)
def test_parameters(options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in PatchNetwork(**options).parameters()) == count


@pytest.mark.parametrize("size", [(32, 40), (37, 21), (5, 3)])
@pytest.mark.parametrize("stride", [8, 4, 1])
def test_one_pass_gives_what_the_patches_give(size: tuple[int, int], stride: int) -> None:
    """In float64 both ways of inference equal the network's result for sliced patches."""
    torch.manual_seed(0)
    network = with_random_statistics(PatchNetwork(3, patch_size=24, width_multiplier=0.25)).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        dense = classify_densely(network, images, stride)
        naive = classify_each_patch(network, images, stride)
        assert naive.shape == dense.shape == (2, 3, -(-size[0] // stride), -(-size[1] // stride))
        for row, column in [(0, 0), (-1, -1), (0, -1), (dense.shape[2] // 2, dense.shape[3] // 2)]:
            y, x = (i % n * stride + stride // 2 for i, n in zip((row, column), dense.shape[2:], strict=True))
            alone = torch.stack([network(plain_slice(image, y, x, 24)[None])[0] for image in images])
            torch.testing.assert_close(naive[:, :, row, column], alone, atol=1e-12, rtol=1e-12)
    assert naive.std(dim=(0, 2, 3)).min() > 1e-4  # the patches have different logits
    torch.testing.assert_close(dense, naive, atol=1e-12, rtol=1e-12)


def narrow_vgg(classes: int, patch: int = 224) -> VGG:
    """Build torchvision's VGG-16 with a twentieth of the channels."""
    vgg = VGG(make_layers([round(c * 0.05) if isinstance(c, int) else c for c in VGG16]))
    vgg.avgpool = nn.Identity() if patch != 224 else vgg.avgpool
    for i, (into, out) in enumerate(((26 * (patch // 32) ** 2, 205), (205, 205), (205, classes))):
        vgg.classifier[3 * i] = nn.Linear(into, out)
    return vgg.eval()


def test_a_classifier_becomes_convolutional(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For one patch of 224 pixels the convolutional VGG-16 equals torchvision's, with its weights."""
    torch.manual_seed(0)
    vgg = narrow_vgg(3)
    torch.save(vgg.state_dict(), tmp_path / "vgg16.pth")
    options: dict[str, Any] = {"backbone": "vgg16", "patch_size": None, "width_multiplier": 0.05}
    network = small(weights=str(tmp_path / "vgg16.pth"), **options).network.eval()
    assert "newly" not in capsys.readouterr().out
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        dense, expected = network.dense(pixels), vgg(pixels)
        assert network.dense(torch.randn(1, 3, 256, 320)).shape == (1, 3, 2, 4)
    assert dense.shape == (2, 3, 1, 1)
    assert (expected[0] - expected[1]).abs().max() > 1e-5
    torch.testing.assert_close(dense[:, :, 0, 0], expected, atol=2e-7, rtol=2e-6)

    # Another number of classes; a file of features alone, whose classifier is nan.
    module = small(num_classes=5, weights=str(tmp_path / "vgg16.pth"), **options)
    assert "newly initialized: classifier.6.weight (3, 205) -> (5, 205)" in capsys.readouterr().out
    assert torch.equal(module.network.classifier[0].weight, vgg.classifier[0].weight)
    features = {k: v if k.startswith("features.") else v * torch.nan for k, v in vgg.state_dict().items()}
    torch.save(features, tmp_path / "features.pth")
    module = small(weights=str(tmp_path / "features.pth"), **options)
    assert torch.equal(module.network.features[0].weight, vgg.features[0].weight)
    assert all(p.isfinite().all() for p in module.parameters())

    # FCN starts from the weights of a patch classifier.
    torch.save({"state_dict": module.state_dict()}, tmp_path / "patches.ckpt")
    fcn = FCN(num_classes=3, width_multiplier=0.05, weights=str(tmp_path / "patches.ckpt")).network
    assert torch.equal(fcn.fc6[0].weight, module.network.classifier[0].weight.unflatten(1, (-1, 7, 7)))


def test_zero_padding_keeps_one_pass_from_being_the_patches() -> None:
    """Inside a larger image VGG-16 does not see the zeros that surround a separate patch."""
    torch.manual_seed(0)
    network = PatchNetwork(3, "vgg16", 64, width_multiplier=0.1).double().eval()
    images = torch.randn(1, 3, 96, 160, dtype=torch.float64)
    with torch.inference_mode():
        dense, naive = classify_densely(network, images, 32), classify_each_patch(network, images, 32)
        # The patch in the second row and third column lies inside the image.
        alone = images[:, :, 16:80, 48:112]
        for patch in (naive[:, :, 1, 2], network.dense(alone)[:, :, 0, 0]):
            torch.testing.assert_close(patch, network(alone), atol=1e-12, rtol=1e-12)
    assert dense.shape == naive.shape == (1, 3, 3, 5)
    assert (dense - naive)[:, :, 1, 2].abs().max() > 0.05 * naive.std()


# --- patches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2, 7, 8])
def test_a_patch_is_centered_on_its_pixel(patch: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 5)
    patches = extract_patches(images, patch, 1)
    assert patches.shape == (2, 3, 6, 5, patch, patch)
    for i, row, column in np.ndindex(2, 6, 5):
        found = patches[i, :, row, column]
        assert torch.equal(found, plain_slice(images[i], row, column, patch))
        assert torch.equal(found[:, patch // 2, patch // 2], images[i, :, row, column])


def test_padding_is_the_mean_color() -> None:
    module = small(mean=(0.2, 0.4, 0.6))
    mean = torch.tensor([51, 102, 153], dtype=torch.uint8)[:, None, None].expand(1, 3, 5, 7)
    padded = pad_to_grid(module.preprocess(mean), 24, 8)
    assert padded.shape == (1, 3, 24, 24)
    assert padded.abs().max() < 1e-6


class Oracle(nn.Module):
    """Predict the class that is encoded as red in the pixel ``off`` the center of the patch."""

    def __init__(self, patch: int, off: int = 0) -> None:
        super().__init__()
        self.patch_size, self.index = patch, patch // 2 + off

    def forward(self, x: Tensor) -> Tensor:
        red = (x[:, 0, self.index, self.index] * 255).round().long()
        return 50.0 * nn.functional.one_hot(red.clamp(0, 4), 5)


@pytest.mark.parametrize("patch", [7, 8])
def test_the_label_is_that_of_the_center(patch: int) -> None:
    """Each pixel has the color of its random class, so only the center determines the label."""
    torch.manual_seed(0)
    module = small(num_classes=5, mean=(0.0,) * 3, std=(1.0,) * 3, patches_per_image=40)
    mask = torch.randint(0, 5, (3, 9, 12))
    void = torch.rand(mask.shape) < 0.5
    batch = {"image": mask.byte()[:, None].expand(-1, 3, -1, -1), "mask": mask.masked_fill(void, 255)}
    for off, right in ((0, True), (1, False), (-1, False)):
        module.network = Oracle(patch, off)  # type: ignore[assignment]
        for _ in range(5):
            loss = module.losses(batch)["cross_entropy"].item()
            assert (loss < 1e-6) if right else (loss > 10)


def test_void_is_not_sampled() -> None:
    torch.manual_seed(0)
    mask = torch.randint(0, 4, (3, 10, 12))
    mask[torch.rand(mask.shape) < 0.6] = 255
    mask[2] = 255
    mask[2, 4, 5:8] = 1  # fewer than requested
    image = torch.arange(3)[:, None]
    for balanced in (False, True):
        row, column, label = sample_centers(mask, 20, balanced)
        assert row.shape == column.shape == label.shape == (3, 20)
        assert torch.equal(label, mask[image, row, column])
        assert (label[:2] != 255).all()
        assert (label[2] != 255).sum() == 3
        assert all(len(set(pixels.tolist())) == 20 for pixels in row * 12 + column)
    assert sample_centers(mask, 500)[2].shape == (3, 120)
    torch.manual_seed(7)
    first = sample_centers(mask, 20)
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first, sample_centers(mask, 20), strict=True))
    assert not torch.equal(first[0], sample_centers(mask, 20)[0])


def test_classes_are_sampled_by_pixels_or_equally() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(200, 20, 20, dtype=torch.int64)
    mask[:, :2] = 1
    mask[:100, 10:] = 255
    for balanced, expected in ((False, (0.2, 0.1)), (True, (0.5, 0.5))):
        label = sample_centers(mask, 10, balanced)[2].float()
        found = label[:100].mean().item(), label[100:].mean().item()
        assert found == pytest.approx(expected, abs=0.05)
    # Pixels of a class are sampled equally often.
    row, column, label = sample_centers(mask[100:].repeat(20, 1, 1), 10, balance_classes=True)
    counts = torch.bincount((row * 20 + column)[label == 1], minlength=400)[:40].double()
    assert counts.sum() > 8000
    assert ((counts - counts.mean()) / counts.mean().sqrt()).abs().max() < 4.5


# --- module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [8, 2, 1])
def test_logits_are_aligned_with_the_patches(stride: int) -> None:
    """The classifier returns the center's color; on a ramp interpolation returns the ramp."""
    module = small(mean=(0.0,) * 3, std=(1 / 255,) * 3, inference="patches", stride=stride).eval()

    class Center(nn.Module):
        patch_size = 24

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1, 12, 12]

    module.network = Center()  # type: ignore[assignment]
    y, x = torch.meshgrid(torch.arange(45), torch.arange(61), indexing="ij")
    ramp = (y + 2 * x).byte().expand(1, 3, -1, -1)
    with torch.inference_mode():
        (found,) = module.logits(ramp)
    assert found.shape == (1, 45, 61)
    # An even number of pixels has no middle; the center is the pixel after it.
    expected = (y + 2 * x) + (1.5 if stride > 1 else 0)
    inner = slice(stride, -2 * stride)
    torch.testing.assert_close(found[0, inner, inner], expected.float()[inner, inner], atol=1e-3, rtol=0)


def test_both_ways_predict_the_same_at_the_original_size() -> None:
    torch.manual_seed(0)
    module, other = small(stride=4), small(stride=4, inference="patches")
    with_random_statistics(module)
    other.load_state_dict(module.state_dict())
    other.eval()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((40, 50), (33, 47))]
    batch = {"image": images, "original_mask": [torch.zeros(80, 100), torch.zeros(33, 47)]}
    with torch.inference_mode():
        for a, b, image in zip(module.logits(images), other.logits(images), images, strict=True):
            assert a.shape == (3, *image.shape[1:])
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        maps = module.predict_batch(batch)
        assert [tuple(m.shape) for m in maps] == [(80, 100), (33, 47)]
        assert [tuple(m.shape) for m in module.predict(torch.stack([images[0]] * 2))] == [(40, 50)] * 2
    metrics = module.build_metrics()
    module.update_metrics(metrics, maps, {"original_mask": [m.long() for m in batch["original_mask"]]})
    assert 0 <= metrics.compute()["miou"] <= 1


def test_an_all_void_batch() -> None:
    torch.manual_seed(0)
    for balanced in (False, True):
        module = small(patches_per_image=4, balance_classes=balanced)
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        loss = module.losses({"image": images, "mask": torch.full((2, 32, 32), 255)})["cross_entropy"]
        loss.backward()
        assert loss == 0
        assert all(p.grad.abs().sum() == 0 for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vgg19"}, "backbone: expected small or vgg16, found vgg19"),
        ({"patch_size": 16}, "patch_size: expected a multiple of 8 that is at least 24 for small, found 16"),
        ({"patch_size": 50}, "patch_size: expected a multiple of 8 that is at least 24 for small, found 50"),
        (
            {"backbone": "vgg16", "patch_size": 100},
            "patch_size: expected a multiple of 32 that is at least 32 for vgg16",
        ),
        ({"patches_per_image": 0}, "patches_per_image: expected 1 or more, found 0"),
        ({"inference": "dense"}, "inference: expected convolutional or patches, found dense"),
        ({"stride": 3}, "stride: expected a divisor of 8, the stride of small, found 3"),
        ({"stride": 0}, "stride: expected a divisor of 8, the stride of small, found 0"),
        ({"weights": "DEFAULT"}, "weights: expected a file or null for small"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_training_images_must_have_one_size() -> None:
    images = [torch.zeros(3, 32, side, dtype=torch.uint8) for side in (32, 40)]
    with pytest.raises(ValueError, match="set --data.crop_size"):
        small().losses({"image": images, "mask": []})


def test_it_learns_the_surroundings_of_a_pixel() -> None:
    """Bright is class 1, dark is class 2, and pixels within three pixels of their edge are class 0."""
    torch.manual_seed(0)
    module = small(patches_per_image=24, balance_classes=True, stride=1)
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        edge, x = torch.randint(12, 28, (n, 1, 1)), torch.arange(40)
        bright = (x < edge).expand(-1, 40, -1)
        image = torch.where(bright[:, None], 200, 40).expand(-1, 3, -1, -1) + torch.randint(0, 20, (n, 3, 40, 40))
        near = ((x - edge + 0.5).abs() < 3).expand(-1, 40, -1)
        return image.to(torch.uint8), torch.where(near, 0, torch.where(bright, 1, 2))

    for _ in range(60):
        images, mask = batch(4)
        optimizer.zero_grad()
        module.losses({"image": images, "mask": mask})["cross_entropy"].backward()
        optimizer.step()
    images, mask = batch(4)
    module.eval()
    with torch.inference_mode():
        found = torch.stack(module.predict(images))
    assert (found == mask).float().mean() > 0.9
    assert (found == mask)[mask == 0].float().mean() > 0.8
