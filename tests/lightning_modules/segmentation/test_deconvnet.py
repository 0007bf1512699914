"""DeconvNet: parameter counts, unpooling, combination of windows, ensemble, CRF, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

import lightning_modules.segmentation.deconvnet as deconvnet
from datamodules.segmentation.instance_crops import add_context
from lightning_modules.components.vgg import VGG16
from lightning_modules.segmentation.deconvnet import (
    CRF,
    DeconvNet,
    DeconvNetwork,
    combine_windows,
    select_windows,
)
from lightning_modules.segmentation.encoder_decoder import EncoderDecoder
from lightning_modules.segmentation.fcn import FCN


def small(**options: Any) -> DeconvNet:
    return DeconvNet(**{"num_classes": 3, "width_multiplier": 0.02, "inference": "image", **options})


def random_images(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]


# --- network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_norm", "count"), [(True, 251_805_653), (False, 251_772_245)])
def test_the_authors_network(batch_norm: bool, count: int) -> None:
    with torch.device("meta"):
        network = DeconvNetwork(batch_norm=batch_norm)
    assert sum(p.numel() for p in network.parameters()) == count
    learned = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == (len(learned) - 1 if batch_norm else 0)  # after all but the scores
    up = [layer.out_channels for layer in learned if isinstance(layer, nn.ConvTranspose2d)]
    assert up == [512, 512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 64]


def test_the_decoder_is_initialized_with_a_standard_deviation_of_0_01() -> None:
    torch.manual_seed(0)
    network = DeconvNetwork(3, 0.2)
    for layer in (network.fc6_deconv[0], *(m for m in network.decoder.modules() if isinstance(m, nn.ConvTranspose2d))):
        assert isinstance(layer, nn.ConvTranspose2d)
        assert layer.bias is not None
        assert 0.009 < layer.weight.std() < 0.011
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("size", [(224, 224), (193, 256), (225, 199)])
def test_one_logit_per_pixel_and_class(size: tuple[int, int]) -> None:
    network = DeconvNetwork(3, 0.02).eval()
    with torch.inference_mode():
        assert network(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_a_smaller_fc6_leaves_more_cells() -> None:
    network = DeconvNetwork(3, 0.02, fc6_kernel=3).eval()
    cells = []
    network.fc7.register_forward_hook(lambda *args: cells.append(tuple(args[2].shape[2:])))
    with torch.inference_mode():
        assert network(torch.randn(1, 3, 160, 65)).shape == (1, 3, 160, 65)
    assert cells == [(3, 1)]


def test_an_image_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="expected at least 193 pixels per side, found 192x300; increase"):
        DeconvNetwork(3, 0.02)(torch.zeros(1, 3, 300, 192))


def test_unpooling_uses_the_positions_of_the_maxima() -> None:
    """Each unpooled map is 0 except at the maxima of the feature map of its own encoder level."""
    torch.manual_seed(0)
    network = DeconvNetwork(3, 0.05).eval()
    pooled, unpooled = [], []
    for layer in network.features:
        if isinstance(layer, nn.MaxPool2d):
            index = list(network.features).index(layer)
            network.features[index - 1].register_forward_hook(lambda _m, _i, out: pooled.append(out.clone()))
    for block in network.decoder:
        assert isinstance(block, nn.Sequential)
        block[0].register_forward_pre_hook(lambda _m, inputs: unpooled.append(inputs[0].clone()))
    with torch.inference_mode():
        network(torch.randn(1, 3, 225, 224))
    assert len(pooled) == len(unpooled) == 5
    for before, after in zip(pooled, reversed(unpooled), strict=True):
        assert before.shape == after.shape
        top = F.interpolate(F.max_pool2d(before, 2, ceil_mode=True), scale_factor=2)
        is_top = before == top[:, :, : before.shape[2], : before.shape[3]]
        assert (after != 0).any()
        assert is_top[after != 0].all()
        assert not is_top.all()


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_vgg16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plan: list[int | str] = [max(1, round(c * 0.02)) if isinstance(c, int) else c for c in VGG16]
    features = make_layers(plan, batch_norm=True)
    layers = [nn.Linear(10 * 49, 82), nn.ReLU(), nn.Dropout(), nn.Linear(82, 82), nn.ReLU(), nn.Dropout()]
    classifier = nn.Sequential(*layers, nn.Linear(82, 10))
    vgg = nn.ModuleDict({"features": features, "classifier": classifier})
    torch.save(vgg.state_dict(), tmp_path / "vgg16_bn.pth")
    network = small(weights=str(tmp_path / "vgg16_bn.pth")).network.eval()
    # Batch normalization after fc6 and fc7 is new; initially it changes nothing, except for its epsilon.
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        vgg.eval()
        found = network.fc7(network.fc6(network.features(pixels)))
        expected = classifier[:5](features(pixels).flatten(1))
    torch.testing.assert_close(found.flatten(1), expected, atol=1e-4, rtol=1e-4)


def test_the_second_stage_starts_from_the_checkpoint_of_the_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = small()
    torch.save({"state_dict": first.state_dict()}, tmp_path / "stage1.ckpt")
    second = small(weights=str(tmp_path / "stage1.ckpt"))
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value)
    other = EncoderDecoder(num_classes=3, channels=(8, 8))
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="expected weights of vgg16_bn"):
        small(weights=str(tmp_path / "other.ckpt"))


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_windows_are_boxes_with_context() -> None:
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 300, (200, 4)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2] + 2
    found = select_windows(torch.from_numpy(boxes), 1000, 1)
    assert found == [list(add_context(box)) for box in boxes]  # the crops of training
    assert select_windows(torch.tensor([[10.0, 20.0, 110.0, 70.0]]), 50, 1) == [[0, 15, 120, 75]]
    large = [box for box in found if min(box[2] - box[0], box[3] - box[1]) >= 112]
    assert 50 < len(large) < 200
    assert select_windows(torch.from_numpy(boxes), 50, 112) == large[:50]
    assert select_windows(torch.zeros(0, 4), 50, 112) == []


def blend(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (C, h, w) to (C, height, width) bilinearly, pixel by pixel."""
    channels, height, width = values.shape
    out = np.zeros((channels, *size))
    for y in range(size[0]):
        for x in range(size[1]):
            v = min(max((y + 0.5) * height / size[0] - 0.5, 0), height - 1)
            u = min(max((x + 0.5) * width / size[1] - 0.5, 0), width - 1)
            top, left = int(v), int(u)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b = v - top, u - left
            upper = (1 - b) * values[:, top, left] + b * values[:, top, right]
            lower = (1 - b) * values[:, below, left] + b * values[:, below, right]
            out[:, y, x] = (1 - a) * upper + a * lower
    return out


def test_combined_windows_equal_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with loops over windows and pixels; a side of 16 enlarges all crops, so that none is filtered."""
    monkeypatch.setattr(deconvnet, "WINDOW_BATCH_SIZE", 3)
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 3, padding=1)
    rng = np.random.default_rng(0)
    for count in (0, 1, 7):
        image = torch.randn(3, 20, 24)
        corners = rng.integers(-4, 14, (count, 2))
        boxes = np.concatenate([corners, corners + rng.integers(6, 16, (count, 2))], 1).tolist()
        expected = np.zeros((4, 20, 24))
        for left, top, right, bottom in boxes:
            crop = np.zeros((3, bottom - top, right - left))
            for y in range(max(0, top), min(20, bottom)):
                for x in range(max(0, left), min(24, right)):
                    crop[:, y - top, x - left] = image[:, y, x]
            with torch.inference_mode():
                scores = network(torch.from_numpy(blend(crop, (16, 16))).float()[None])[0].numpy()
            scores = blend(scores, (bottom - top, right - left))
            for y in range(max(0, top), min(20, bottom)):
                for x in range(max(0, left), min(24, right)):
                    expected[:, y, x] = np.maximum(expected[:, y, x], scores[:, y - top, x - left])
        with torch.inference_mode():
            found = combine_windows(network, image, boxes, 4, 16)
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
        assert (found >= 0).all()


def test_proposals_of_the_batch_or_selective_search(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = small(inference="proposals", num_proposals=2, min_window_size=20).eval()
    images = random_images((60, 80), (50, 50))
    boxes = [
        torch.tensor([[5.0, 5.0, 45.0, 40.0], [0.0, 0.0, 10.0, 10.0], [30.0, 10.0, 80.0, 60.0]]),
        torch.zeros(0, 4),
    ]
    with torch.inference_mode():
        scores = module.logits(images, None, boxes)
        maps = module.predict_batch({"image": images, "proposals": boxes})
        sizes = [torch.zeros(30, 40), torch.zeros(50, 50)]
        resized = module.predict_batch({"image": images, "proposals": boxes, "original_mask": sizes})
        # The 10x10 box is too small and does not count. Without windows all logits are 0: background.
        large = [box[[0, 2]] if len(box) else box for box in boxes]
        again = module.logits(images, None, large)
    torch.testing.assert_close(scores[0], again[0])
    assert (scores[0] != 0).any()
    assert (scores[1] == 0).all()
    assert (maps[1] == 0).all()
    assert [tuple(m.shape) for m in maps] == [(60, 80), (50, 50)]
    assert [tuple(m.shape) for m in resized] == [(30, 40), (50, 50)]
    asked = []

    def search(images: Any, proposals: Any, top: int = 2000) -> tuple[Tensor, Tensor]:
        asked.append(proposals)
        return torch.stack([boxes[0]] * 2), torch.ones(2, 3, dtype=torch.bool)

    monkeypatch.setattr(deconvnet, "inference_proposals", search)
    with torch.inference_mode():
        found = module.logits(images)
    assert asked == [None]
    torch.testing.assert_close(found[0], scores[0])


def test_whole_images_of_any_size() -> None:
    torch.manual_seed(0)
    module = small().eval()
    images = random_images((60, 80), (300, 250))
    with torch.inference_mode():
        scores = module.logits(images)
        one = module.network(deconvnet.resize_to_square(module.preprocess(images[0][None]), 224))
        maps = module.predict(images)
        same = module.predict(torch.stack([images[0]] * 2))
    assert [tuple(s.shape) for s in scores] == [(3, 60, 80), (3, 300, 250)]
    expected = F.interpolate(one, (60, 80), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(scores[0], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(maps[0], scores[0].argmax(0))
    assert len(same) == 2


# --- ensemble and CRF -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fcn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    module = FCN(num_classes=3, width_multiplier=0.02, batch_norm=True, conv1_padding=1)
    nn.init.normal_(module.network.score_fr.weight)
    path = tmp_path_factory.mktemp("fcn") / "fcn.ckpt"
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save({**checkpoint, "pytorch-lightning_version": "2.5.0"}, path)
    return path


def test_the_ensemble_is_the_product_of_class_probabilities(fcn: Path) -> None:
    torch.manual_seed(0)
    alone, together = small().eval(), small(ensemble=str(fcn)).eval()
    together.load_state_dict(alone.state_dict())  # the FCN is not part of the state
    assert len(together.parameter_groups()[0]["params"]) == len(alone.parameter_groups()[0]["params"])
    images = random_images((64, 64), (48, 80))
    with torch.inference_mode():
        ours = [s.softmax(0).numpy().astype(np.float64) for s in alone.logits(images)]
        other = FCN.load_from_checkpoint(fcn, weights_only=True).eval()
        theirs = [s.softmax(0).numpy().astype(np.float64) for s in other.logits(images)]
        found, maps = together.logits(images), together.predict(images)
    for a, b, scores, m in zip(ours, theirs, found, maps, strict=True):
        product = a * b
        np.testing.assert_allclose(scores.softmax(0).numpy(), product / product.sum(0), atol=1e-5)
        assert (m.numpy() == product.argmax(0)).mean() > 0.999
    # Two classes: the products are 0.12 and 0.32, the probabilities 0.27 and 0.73.
    scores = torch.tensor([0.6, 0.4]).log() + torch.tensor([0.2, 0.8]).log()
    torch.testing.assert_close(scores.softmax(0), torch.tensor([0.12 / 0.44, 0.32 / 0.44]))


def test_weights_of_an_fcn(fcn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, state = small(weights=str(fcn)), torch.load(fcn, weights_only=True)["state_dict"]
    for name in ("features.0.weight", "features.41.running_var", "fc6.0.weight", "fc7.1.weight"):
        assert torch.equal(module.network.state_dict()[name], state[f"network.{name}"])
    printed = capsys.readouterr().out
    assert "newly initialized: fc6_deconv.0.weight" in printed
    assert "skipped: score_fr.weight" in printed


def test_bad_ensemble(fcn: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ensemble: expected a checkpoint of an FCN, found no file"):
        small(ensemble=str(tmp_path / "none.ckpt"))
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"ensemble: expected a checkpoint of an FCN, found .*bad.ckpt"):
        small(ensemble=str(tmp_path / "bad.ckpt"))
    with pytest.raises(ValueError, match="expected an FCN with 4 classes, found 3"):
        small(num_classes=4, ensemble=str(fcn))


def test_the_crf_reads_the_image_and_the_probabilities() -> None:
    torch.manual_seed(0)
    plain, module = small().eval(), small(crf=True).eval()
    module.load_state_dict(plain.state_dict())
    images = random_images((40, 40))
    with torch.inference_mode():
        scores = [50 * s for s in plain.logits(images)]
        assert torch.equal(module.decode(scores, images)[0], CRF(scores[0].softmax(0), images[0]).argmax(0))
        with pytest.raises(ValueError, match="original size 20x20, found 40x40; set --data.eval_image_size null"):
            module.predict_batch({"image": images, "original_mask": [torch.zeros(20, 20)]})


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_authors_optimizer_and_arguments() -> None:
    groups = small().parameter_groups()
    assert [group.get("lr_scale", 1.0) for group in groups] == [1.0, 2.0, 1.0]
    assert [group.get("weight_decay") for group in groups] == [None, 0.0, 0.0]
    optimizer = small().optimizer_factory(groups)
    assert {key: optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay")} == {
        "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4,
    }  # fmt: skip
    with pytest.raises(ValueError, match="inference: expected image or proposals, found tiles"):
        small(inference="tiles")
    with pytest.raises(ValueError, match="num_proposals: expected 1 or more, found 0"):
        small(num_proposals=0)


def test_an_all_void_batch_and_images_of_several_sizes() -> None:
    torch.manual_seed(0)
    module = small()
    images = torch.stack(random_images((224, 224), (224, 224)))
    loss = module.losses({"image": images, "mask": torch.full((2, 224, 224), 255)})["cross_entropy"]
    loss.backward()
    assert loss == 0
    assert all(torch.isfinite(p.grad).all() for p in module.network.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="set --data.crop_size"):
        module.losses({"image": [images[0], images[1, :, :32]], "mask": []})


def test_it_learns_colors() -> None:
    """Images of two colors: bright is class 1, dark is class 2; the predicted edge matches."""
    torch.manual_seed(0)
    module = small(width_multiplier=0.06).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        edge = torch.randint(50, 174, (n, 1, 1))
        bright = (torch.arange(224) < edge).expand(-1, 224, -1)
        image = torch.where(bright[:, None], 200, 40).expand(-1, 3, -1, -1) + torch.randint(0, 20, (n, 3, 224, 224))
        return image.to(torch.uint8), torch.where(bright, 1, 2)

    for _ in range(20):
        images, mask = batch(4)
        optimizer.zero_grad()
        module.losses({"image": images, "mask": mask})["cross_entropy"].backward()
        optimizer.step()
    images, mask = batch(4)
    with torch.inference_mode():
        for _ in range(8):  # update the batch statistics
            module.network(module.preprocess(batch(4)[0]))
        found = torch.stack(module.eval().predict(images))
    assert (found == mask).float().mean() > 0.9
