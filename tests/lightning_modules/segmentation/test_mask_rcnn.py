"""Mask R-CNN: torchvision's network and weights, cropping and pasting of masks, and the loss in loops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList

from lightning_modules.components.boxes import decode_boxes
from lightning_modules.components.torchvision_rcnn import from_torchvision
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.segmentation import mask_rcnn
from lightning_modules.segmentation.mask_rcnn import (
    MASK_SIZE,
    MaskRCNN,
    crop_masks,
    mask_loss,
    paste_masks,
    select_class,
)
from tests.lightning_modules.detection.test_faster_rcnn import SMALL

PYRAMID = {"backbone": "resnet50_fpn", "batch_norm": False, "anchor_sizes": (32, 64, 128, 256, 512)}


def small(**options: Any) -> MaskRCNN:
    return MaskRCNN(**{**SMALL, "backbone": "vgg16", "num_classes": 3, "rois_per_image": 16, **options})


def no_objects(height: int, width: int) -> dict[str, Tensor]:
    masks = torch.zeros(0, height, width, dtype=torch.uint8)
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": masks}


def small_batch() -> dict[str, Any]:
    """Two images of different sizes, the second without objects."""
    image = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 96), (80, 50))]
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[0, 10:30, 10:40] = masks[1, 20:60, 50:60] = masks[1, 20:30, 50:80] = 1
    objects = {"boxes": torch.tensor([[10.0, 10, 40, 30], [50, 20, 80, 60]]), "labels": torch.tensor([0, 2])}
    return {"image": image, "target": [{**objects, "masks": masks}, no_objects(80, 50)]}


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("freeze_backbone", "parameters"), [(True, 44_401_393), (False, 44_454_513)])
def test_the_network_is_torchvisions(freeze_backbone: bool, parameters: int) -> None:
    with torch.device("meta"):
        network = MaskRCNN(num_classes=90, freeze_backbone=freeze_backbone).network
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("options", [{"stride": 8}, PYRAMID])
def test_it_trains_with_and_without_objects(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = small(**options)
    empty = [no_objects(64, 96), no_objects(80, 50)]
    for batch in (small_batch(), {**small_batch(), "target": empty}):
        module.zero_grad()
        terms = module.losses(batch)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        assert set(terms) == {"rpn_class", "rpn_box", "class", "box", "mask"}
        trained = [p for p in module.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert (terms["mask"] > 0) == bool(len(batch["target"][0]["boxes"]))
    images = small_batch()["image"]
    with torch.inference_mode():
        detections = module.eval().predict(images)
    for entry, image in zip(detections, images, strict=True):
        assert entry["masks"].shape == (len(entry["scores"]), *image.shape[1:])
        assert entry["masks"].dtype == torch.bool
        assert ((entry["labels"] >= 0) & (entry["labels"] < 3)).all()
    assert sum(int(entry["masks"].sum()) for entry in detections) > 0


def test_objects_without_area_are_ignored() -> None:
    """A box without area, and a mask without a pixel."""
    vanished = {"boxes": torch.zeros(1, 4), "labels": torch.tensor([1]), "masks": torch.zeros(1, 64, 96).byte()}
    torch.manual_seed(0)
    terms = small().losses({**small_batch(), "target": [vanished, no_objects(80, 50)]})
    assert all(term.isfinite() for term in terms.values())
    assert terms["mask"] == terms["box"] == terms["rpn_box"] == 0


def test_the_loss_is_in_single_precision_under_autocast() -> None:
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        terms = small().losses(small_batch())
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_targets_without_masks_are_refused() -> None:
    batch = small_batch()
    for entry in batch["target"]:
        del entry["masks"]
    with pytest.raises(ValueError, match="expected objects with masks, found boxes only; use --data VOCInstance"):
        small().losses(batch)


# --- torchvision's weights --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> TorchvisionMaskRCNN:
    """Torchvision's network for three classes and background, with random weights."""
    torch.manual_seed(0)
    network = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4).eval()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # as in that of COCO_V1
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.running_var[0] = 1e-7
            module.weight.data[0] = 1e-4
        if name.startswith(("rpn.", "roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits")):
            for parameter in module.parameters(recurse=False):
                parameter.data.normal_(std=0.0005 if name == "rpn.head.bbox_pred" else 0.03)
    return network


@pytest.fixture(scope="module")
def published(theirs: TorchvisionMaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights in the folder of torchvision's downloads, with the names of the older release."""
    renamed = {}
    for key, value in theirs.state_dict().items():
        name = re.sub(r"(fpn\.\w+\.\d)\.0\.", r"\1.", key)
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        name = re.sub(r"mask_head\.(\d)\.0", lambda found: f"mask_head.mask_fcn{int(found[1]) + 1}", name)
        if not key.endswith("num_batches_tracked"):
            renamed[name] = value
    assert "backbone.fpn.layer_blocks.3.weight" in renamed
    assert "roi_heads.mask_head.mask_fcn4.bias" in renamed
    path = tmp_path_factory.mktemp("hub") / "hub" / "checkpoints" / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    path.parent.mkdir(parents=True)
    torch.save(renamed, path)
    return path


@pytest.fixture(scope="module")
def ours(published: Path) -> MaskRCNN:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(published.parents[2]))
        return MaskRCNN(num_classes=3, freeze_backbone=True, weights="COCO_V1").eval()


def test_torchvisions_weights_compute_the_same(theirs: TorchvisionMaskRCNN, ours: MaskRCNN) -> None:
    pixels = torch.randn(1, 3, 128, 192)
    boxes = torch.rand(1, 9, 4) * 40 + torch.tensor([0, 0, 60, 60])
    with torch.inference_mode():
        maps = ours.network.feature_maps(pixels)
        output = ours.network.rpn(maps)
        logits, deltas = ours.network.roi(maps, boxes)
        masks = ours.branch_logits(maps, boxes)
        features = theirs.backbone(pixels)
        heads = theirs.roi_heads
        pooled = heads.box_roi_pool(features, list(boxes), [(128, 192)])
        expected_logits, expected_deltas = heads.box_predictor(heads.box_head(pooled))
        pooled = heads.mask_roi_pool(features, list(boxes), [(128, 192)])
        expected_masks = heads.mask_predictor(heads.mask_head(pooled))
        objectness, rpn_deltas = theirs.rpn.head(list(features.values()))
        anchors = theirs.rpn.anchor_generator(ImageList(pixels, [(128, 192)]), list(features.values()))
        rpn_deltas = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, 4) for level in rpn_deltas])
        expected_boxes = theirs.rpn.box_coder.decode(rpn_deltas, anchors)[:, 0]
        objectness = torch.cat([level.permute(0, 2, 3, 1).flatten() for level in objectness])
    assert masks.std() > 0.01
    results = (masks[0], logits[0], deltas[0].flatten(1), output.objectness[0])
    expected = (expected_masks, expected_logits, expected_deltas, objectness)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    # Torchvision rounds the sides of anchors to pixels.
    proposed = decode_boxes(output.deltas[0], output.anchors, (1, 1, 1, 1))
    side = (expected_boxes[:, 2:] - expected_boxes[:, :2]).amin(1)
    assert 0.05 < rpn_deltas.std() < 0.5
    assert ((proposed - expected_boxes).abs().amax(1) / side).max() < 0.05
    assert ((output.anchors - anchors[0]).abs().amax(1) / side).max() > 0.1


def test_names_of_the_current_torchvision(theirs: TorchvisionMaskRCNN, ours: MaskRCNN) -> None:
    state = ours.network.state_dict()
    renamed = from_torchvision(theirs.state_dict())
    assert set(renamed) == set(state)
    assert all(torch.equal(renamed[key], value) for key, value in state.items())


def test_torchvisions_weights_for_other_classes(
    ours: MaskRCNN, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers that depend on the number of classes keep their initial weights, and a line reports them."""
    other = MaskRCNN(num_classes=5, weights=str(published)).network.state_dict()
    printed = capsys.readouterr().out
    state = ours.network.state_dict()
    new = [key for key, value in state.items() if other[key].shape != value.shape]
    heads = {"roi.classifier", "roi.regressor", "mask.predictor.mask_fcn_logits"}
    assert {key.rpartition(".")[0] for key in new} == heads
    assert all(key in printed.split("newly initialized")[1] for key in new)
    assert all(torch.equal(other[key], value) for key, value in state.items() if key not in new)


def test_missing_weights_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"fetch https://\S+maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth and put it at"):
        small(**PYRAMID, weights="COCO_V1")
    with pytest.raises(ValueError, match="maskrcnn_vgg16 .torchvision has none."):
        small(weights="COCO_V1")


def test_weights_of_a_faster_rcnn_and_of_imagenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a mask branch, or with a trunk only; the other modules keep their initial weights."""
    first = FasterRCNN(num_classes=3, width_multiplier=0.05, batch_norm=True, anchor_sizes=(16, 32))
    torch.save({"state_dict": first.state_dict()}, tmp_path / "faster.ckpt")
    state = first.network.state_dict()
    loaded = small(weights=str(tmp_path / "faster.ckpt")).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert "newly initialized: mask.head.0.0.weight absent" in capsys.readouterr().out
    features = {key.replace("trunk", "features"): value for key, value in state.items() if key.startswith("trunk")}
    torch.save(features, tmp_path / "vgg16_bn.pth")
    loaded = small(weights=str(tmp_path / "vgg16_bn.pth")).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items() if key.startswith("trunk"))


# --- target encoding and decoding -------------------------------------------------------------------------------------


def test_cropped_masks_are_means_of_pixels() -> None:
    """For boxes whose cells are whole pixels: a cell is foreground if half of its pixels are."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        sizes = [tuple(rng.integers(90, 140, 2)) for _ in range(3)]
        masks = [rng.integers(0, 2, (int(n), *size), dtype=np.uint8) for n, size in zip((2, 0, 3), sizes, strict=True)]
        masks[0][0] = np.kron(rng.integers(0, 2, (70, 70), dtype=np.uint8), np.ones((2, 2), np.uint8))[
            : sizes[0][0], : sizes[0][1]
        ]
        boxes, chosen = np.zeros((3, 4, 4), np.float32), np.zeros((3, 4), np.int64)
        expected = np.zeros((3, 4, MASK_SIZE, MASK_SIZE), bool)
        for i in (0, 2):
            for j in range(4):
                k = int(rng.integers(1, 4))
                y, x = (int(rng.integers(0, side - MASK_SIZE * k + 1)) for side in sizes[i])
                boxes[i, j], chosen[i, j] = (x, y, x + MASK_SIZE * k, y + MASK_SIZE * k), rng.integers(len(masks[i]))
                part = masks[i][chosen[i, j], y : y + MASK_SIZE * k, x : x + MASK_SIZE * k]
                expected[i, j] = part.reshape(MASK_SIZE, k, MASK_SIZE, k).mean((1, 3)) >= 0.5
        target = [{"masks": torch.from_numpy(m)} for m in masks]
        crops = crop_masks(target, torch.from_numpy(boxes), torch.from_numpy(chosen))
        assert np.array_equal(crops[0].numpy(), expected[0])
        assert np.array_equal(crops[2].numpy(), expected[2])


def test_pasting_inverts_cropping() -> None:
    """Exactly if a cell is one or two pixels wide; else except at the edges."""
    rng = np.random.default_rng(0)
    for k in (1, 2):
        mask = torch.zeros(90, 100, dtype=torch.uint8)
        pattern = np.kron(rng.integers(0, 2, (MASK_SIZE, MASK_SIZE), dtype=np.uint8), np.ones((k, k), np.uint8))
        mask[7 : 7 + MASK_SIZE * k, 20 : 20 + MASK_SIZE * k] = torch.from_numpy(pattern)
        box = torch.tensor([[20.0, 7, 20 + MASK_SIZE * k, 7 + MASK_SIZE * k]])
        crop = crop_masks([{"masks": mask[None]}], box[None], torch.zeros(1, 1, dtype=torch.int64))
        assert torch.equal(paste_masks(crop[0].float(), box, 90, 100)[0], mask.bool())
    y, x = torch.meshgrid(torch.arange(120) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    for _ in range(30):
        cx, cy, a, b = (float(v) for v in rng.uniform((60, 50, 10, 10), (100, 70, 50, 40)))
        disc = ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 <= 1
        box = torch.tensor([[cx - a, cy - b, cx + a, cy + b]])
        crop = crop_masks([{"masks": disc[None].byte()}], box[None], torch.zeros(1, 1, dtype=torch.int64))
        back = paste_masks(crop[0].float(), box, 120, 160)[0]
        assert (back & disc).sum() / (back | disc).sum() > 0.93
    full = paste_masks(torch.ones(1, MASK_SIZE, MASK_SIZE), torch.tensor([[3.0, 5, 60, 21]]), 40, 50)[0]
    assert full[5:21, 3:].all()
    assert full.sum() == 16 * 47


def paste_in_loops(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Interpolate the probability at each pixel center between the centers of the four nearest cells."""
    pasted = np.zeros((height, width))
    left, top, right, bottom = (float(side) for side in box)
    for row in range(height):
        for column in range(width):
            y, x = row + 0.5, column + 0.5
            if not (left <= x <= right and top <= y <= bottom):
                continue
            v = min(max((y - top) / (bottom - top) * MASK_SIZE - 0.5, 0), MASK_SIZE - 1)
            u = min(max((x - left) / (right - left) * MASK_SIZE - 0.5, 0), MASK_SIZE - 1)
            i, j = min(int(v), MASK_SIZE - 2), min(int(u), MASK_SIZE - 2)
            above = mask[i, j] * (1 - (u - j)) + mask[i, j + 1] * (u - j)
            below = mask[i + 1, j] * (1 - (u - j)) + mask[i + 1, j + 1] * (u - j)
            pasted[row, column] = above * (1 - (v - i)) + below * (v - i)
    return pasted


def test_pasted_masks_equal_those_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    masks = rng.uniform(0, 1, (40, MASK_SIZE, MASK_SIZE)).astype(np.float32)
    corner = rng.uniform(-10, 25, (40, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.5, 30, (40, 2))], 1).astype(np.float32)
    given = torch.from_numpy(masks), torch.from_numpy(boxes), 24, 33
    pasted = paste_masks(*given)
    compared = 0
    for i in range(40):
        expected = paste_in_loops(masks[i], boxes[i], 24, 33)
        sure = np.abs(expected - 0.5) > 1e-4
        compared += int((expected[sure] > 0).sum())
        assert np.array_equal(pasted[i].numpy()[sure], (expected >= 0.5)[sure]), i
    assert compared > 3000
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(paste_masks(*given), pasted)
    # In chunks, as in large images.
    monkeypatch.setattr(mask_rcnn, "PIXELS_PER_CHUNK", 24 * 33 * 7)
    assert torch.equal(paste_masks(*given), pasted)
    assert paste_masks(torch.zeros(0, MASK_SIZE, MASK_SIZE), torch.zeros(0, 4), 24, 33).shape == (0, 24, 33)


def test_masks_of_an_evaluation_have_the_size_on_disk() -> None:
    """The image is twice as large as on disk: each mask covers the same part of it."""
    torch.manual_seed(0)
    module = small(score_threshold=0.0).eval()
    image = torch.randint(0, 256, (1, 3, 128, 192), dtype=torch.uint8)
    target, original = no_objects(128, 192), no_objects(64, 96)
    with torch.inference_mode():
        (plain,) = module.predict(image)
        (scaled,) = module.predict_batch({"image": image, "target": [target], "original_target": [original]})
    assert plain["masks"].shape[1:] == (128, 192)
    assert scaled["masks"].shape[1:] == (64, 96)
    assert all(torch.equal(plain[key], scaled[key]) for key in ("boxes", "scores", "labels"))
    enlarged = scaled["masks"].repeat_interleave(2, 1).repeat_interleave(2, 2)
    large = plain["masks"].flatten(1).sum(1) > 400
    assert large.sum() > 5
    iou = (plain["masks"] & enlarged)[large].flatten(1).sum(1) / (plain["masks"] | enlarged)[large].flatten(1).sum(1)
    assert iou.min() > 0.85


def test_metrics_are_in_pixels_of_the_images_on_disk() -> None:
    """Perfect detections in an image of 1.5 times the size on disk; 20x20 px on disk are small, 40x40 px medium."""
    masks = torch.zeros(2, 100, 100, dtype=torch.uint8)
    masks[0, 10:30, 10:30] = masks[1, 50:90, 50:90] = 1
    boxes, labels = torch.tensor([[10.0, 10, 30, 30], [50, 50, 90, 90]]), torch.tensor([0, 2])
    original = {"boxes": boxes, "labels": labels, "masks": masks, "difficult": torch.zeros(2, dtype=torch.bool)}
    batch = {
        "image": torch.zeros(1, 3, 150, 150, dtype=torch.uint8),
        "target": [{**original, "boxes": boxes * 1.5, "masks": torch.zeros(2, 150, 150, dtype=torch.uint8)}],
        "original_target": [original],
        "original_size": torch.tensor([[100, 100]]),
    }
    prediction = {"boxes": boxes * 1.5, "labels": labels, "masks": masks.bool(), "scores": torch.tensor([0.9, 0.8])}
    module = small()
    metrics = module.build_metrics()
    module.update_metrics(metrics, [prediction], batch)
    results = metrics.compute()
    assert results["apr_50"] == results["apr_70"] == 1
    for name in ("coco/map", "coco/mask_map", "coco/map_small", "coco/map_medium"):
        assert results[name] == pytest.approx(1), name
    assert results["coco/map_large"].isnan()


def test_evaluation_without_masks_is_refused() -> None:
    batch = small_batch()
    for entry in batch["target"]:
        del entry["masks"]
    with pytest.raises(ValueError, match="expected objects with masks, found boxes only; use --data VOCInstance"):
        small().eval().predict_batch(batch)


# --- loss -------------------------------------------------------------------------------------------------------------


def test_the_mask_loss_is_the_papers() -> None:
    rng = np.random.default_rng(0)
    for seed in range(200):
        images, count, classes = (int(n) for n in rng.integers(1, 4, 3))
        logits = rng.normal(0, 3, (images, count, 1 + classes, 4, 4))
        crops = rng.integers(0, 2, (images, count, 4, 4)).astype(bool)
        label = rng.integers(0, 1 + classes, (images, count))
        entropies = []
        for b in range(images):
            for i in range(count):
                if label[b, i] > 0:
                    p = 1 / (1 + np.exp(-logits[b, i, label[b, i]]))
                    entropies.append(-np.where(crops[b, i], np.log(p), np.log(1 - p)).mean())
        expected = np.mean(entropies) if entropies else 0.0
        loss = mask_loss(torch.from_numpy(logits), torch.from_numpy(crops), torch.from_numpy(label))
        assert loss.item() == pytest.approx(expected, rel=1e-5), seed


def test_only_the_mask_of_the_true_class_has_a_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, MASK_SIZE, MASK_SIZE, requires_grad=True)
    label = torch.tensor([[2, 0, 4], [1, 0, 0]])
    mask_loss(logits, torch.rand(2, 3, MASK_SIZE, MASK_SIZE) > 0.5, label).backward()
    assert logits.grad is not None
    learned = logits.grad.abs().amin((3, 4)) > 0
    untouched = (logits.grad == 0).all(4).all(3)
    for b in range(2):
        for i in range(3):
            for k in range(5):
                is_target = label[b, i] == k and k > 0
                assert learned[b, i, k] == is_target
                assert untouched[b, i, k] != is_target


def test_only_the_last_layers_of_the_true_classes_have_a_gradient() -> None:
    """With objects of classes 0 and 2 of 3, background and class 1 have no gradient in the last layer."""
    torch.manual_seed(0)
    module = small()
    module.losses(small_batch())["mask"].backward()
    last = module.network.get_submodule("mask.predictor.mask_fcn_logits")
    for parameter in last.parameters():
        assert parameter.grad is not None
        assert parameter.grad.view(4, -1).any(1).tolist() == [False, True, False, True]


def test_masks_are_those_of_the_predicted_classes() -> None:
    logits = torch.arange(2 * 3 * 4.0).view(2, 3, 4, 1, 1).expand(-1, -1, -1, 5, 6)
    label = torch.tensor([[0, 3, 1], [2, 2, 0]])
    assert select_class(logits, label)[:, :, 4, 5].tolist() == [[0, 7, 9], [14, 18, 20]]


# --- module -----------------------------------------------------------------------------------------------------------


def test_perfect_predictions_have_an_average_precision_of_1() -> None:
    metrics = small().build_metrics()
    batch = small_batch()
    predictions = [
        {**entry, "masks": entry["masks"].bool(), "scores": torch.linspace(1, 0.9, len(entry["boxes"]))}
        for entry in batch["target"]
    ]
    small().update_metrics(metrics, predictions, batch)
    results = metrics.compute()
    assert results["apr_50"] == results["apr_70"] == 1
    assert results["coco/mask_map"] == pytest.approx(1)
