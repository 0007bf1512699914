"""Faster R-CNN: networks, the feature pyramid compared to torchvision's, weights, options and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList

from lightning_modules.components.image_batches import pad_images
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.detection.rpn import RPN
from tests.lightning_modules.components.test_boxes import NO_OBJECTS

PYRAMID = {"backbone": "resnet50_fpn", "anchor_sizes": (32, 64, 128, 256, 512)}
# Few proposals and RoIs, and anchors for images of about 64 px.
SMALL = {
    "width_multiplier": 0.05,
    "batch_norm": True,
    "anchor_sizes": (16, 32),
    "rpn_min_size": 2.0,
    "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 50,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_test": 20,
}


def small(**options: Any) -> FasterRCNN:
    batch_norm = options.get("backbone", "vgg16") == "vgg16"  # a ResNet always has it
    return FasterRCNN(**{**SMALL, "num_classes": 3, "rois_per_image": 8, "batch_norm": batch_norm, **options})


def small_batch() -> dict[str, Any]:
    """Two images of different sizes, the second without objects."""
    image = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 96), (80, 50))]
    objects = {"boxes": torch.tensor([[10.0, 10, 40, 30], [50, 20, 80, 60]]), "labels": torch.tensor([0, 2])}
    return {"image": image, "target": [objects, NO_OBJECTS]}


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 137_073_622),
        # A ResNet without its classifier, and heads on 1,024 and 2,048 channels.
        ({"backbone": "resnet50"}, 23_508_032 + 1024 * 1024 * 9 + 1024 + 1025 * 9 * 5 + 2049 * 21 * 5),
        ({"backbone": "resnet101"}, 42_500_160 + 1024 * 1024 * 9 + 1024 + 1025 * 9 * 5 + 2049 * 21 * 5),
    ],
)
def test_the_papers_networks(options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        network = FasterRCNN(**options).network
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_the_pyramid_is_torchvisions() -> None:
    """With the same weights, torchvision's Faster R-CNN computes the same for its anchors and RoIs."""
    torch.manual_seed(0)
    network = FasterRCNN(**PYRAMID, num_classes=3).network.eval()  # type: ignore[arg-type]
    reference = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4).eval()
    prefixes = {
        "backbone.": "trunk.", "rpn.": "rpn.", "roi_heads.box_head.": "roi.head.",
        "roi_heads.box_predictor.cls_score.": "roi.classifier.", "roi_heads.box_predictor.bbox_pred.": "roi.regressor.",
    }  # fmt: skip
    state = {}
    for key, value in reference.state_dict().items():
        old = next(prefix for prefix in prefixes if key.startswith(prefix))
        state[prefixes[old] + key[len(old) :]] = value
    # With torchvision's small initial weights all outputs would be almost equal.
    state = {k: v * 30 if k.startswith(("rpn", "roi.regressor", "roi.class")) else v for k, v in state.items()}
    network.load_state_dict(state)
    predictor = reference.roi_heads.box_predictor
    for name, module in (
        ("rpn.head.", reference.rpn.head),
        ("roi.classifier.", predictor.cls_score),
        ("roi.regressor.", predictor.bbox_pred),
    ):
        module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
    pixels = torch.randn(2, 3, 128, 192)
    boxes = torch.rand(2, 9, 4) * 40 + torch.tensor([0, 0, 60, 60])
    with torch.inference_mode():
        maps = network.feature_maps(pixels)
        output = network.rpn(maps)
        logits, deltas = network.roi(maps, boxes)
        features = reference.backbone(pixels)
        expected_objectness, expected_deltas = reference.rpn.head(list(features.values()))
        pooled = reference.roi_heads.box_roi_pool(features, list(boxes), [(128, 192)] * 2)
        expected = predictor(reference.roi_heads.box_head(pooled))
        anchors = reference.rpn.anchor_generator(ImageList(pixels, [(128, 192)] * 2), list(features.values()))[0]
    assert output.objectness.std() > 1e-3
    first = 3 * 32 * 48
    torch.testing.assert_close(output.objectness[0, :first].view(32, 48, 3), expected_objectness[0][0].movedim(0, 2))
    torch.testing.assert_close(output.deltas[1, :first].view(32, 48, 12), expected_deltas[0][1].movedim(0, 2))
    torch.testing.assert_close(logits.flatten(0, 1), expected[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(deltas.flatten(0, 1).flatten(1), expected[1], atol=1e-4, rtol=1e-3)
    # Torchvision centers anchors on the corners of cells and rounds their sides.
    assert anchors.shape == output.anchors.shape
    counts = zip(output.anchors_per_map, (4, 8, 16, 32, 64), strict=True)
    half_strides = torch.cat([torch.full((count, 4), stride / 2) for count, stride in counts])
    torch.testing.assert_close(output.anchors - anchors, half_strides, atol=0.5, rtol=0)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_a_resnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With ImageNet weights, trunk and conv5 together compute what the classifier does."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet50(width_per_group=3).eval()
    for module in resnet.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    path = str(tmp_path / "resnet.pth")
    torch.save(resnet.state_dict(), path)
    pixels = torch.randn(1, 3, 64, 64)
    resnet.fc = torch.nn.Identity()  # type: ignore[assignment]
    for freeze_backbone in (False, True):
        network = small(backbone="resnet50", freeze_backbone=freeze_backbone, weights=path).network.eval()
        with torch.inference_mode():
            torch.testing.assert_close(network.roi.head(network.trunk(pixels)), resnet(pixels), atol=1e-4, rtol=1e-4)
        assert "newly initialized: rpn.head" in capsys.readouterr().out
    state = small(**PYRAMID, weights=path).network.state_dict()
    for key, value in resnet.state_dict().items():
        assert torch.equal(state[f"trunk.body.{key}"], value)


def test_weights_of_a_vgg16_and_of_a_proposal_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = small()
    names = {"trunk": "features", "roi.head.fc6": "classifier.0", "roi.head.fc7": "classifier.3"}
    state = {}
    for key, value in first.network.state_dict().items():
        prefix = next((p for p in names if key.startswith(f"{p}.")), None)
        if prefix:
            state[names[prefix] + key[len(prefix) :]] = value
    torch.save(state, tmp_path / "vgg16.pth")
    second = small(weights=str(tmp_path / "vgg16.pth")).network.state_dict()
    for key, value in first.network.state_dict().items():
        assert torch.equal(second[key], value) or not key.startswith(("trunk", "roi.head"))
    # Torchvision's file of features alone has nan in fc6 and fc7, which keep their initial weights.
    state = {k: v * torch.nan if k.startswith("classifier") else v for k, v in state.items()}
    torch.save(state, tmp_path / "features.pth")
    assert all(p.isfinite().all() for p in small(weights=str(tmp_path / "features.pth")).parameters())
    assert "newly initialized: rpn.head" in capsys.readouterr().out
    proposer = RPN(width_multiplier=0.05, batch_norm=True, anchor_sizes=[16, 32])
    torch.save({"state_dict": proposer.state_dict()}, tmp_path / "rpn.ckpt")
    third = small(weights=str(tmp_path / "rpn.ckpt")).network.state_dict()
    assert all(torch.equal(third[key], value) for key, value in proposer.network.state_dict().items())
    capsys.readouterr()
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected weights of vgg16_bn"):
        small(weights=str(tmp_path / "other.pth"))


# --- module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 8, "roi_pooling": "align"}, {"backbone": "resnet50", "freeze_backbone": True}, PYRAMID],
)
def test_it_trains_with_and_without_objects(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = small(**options)
    for batch in (small_batch(), {**small_batch(), "target": [NO_OBJECTS, NO_OBJECTS]}):
        module.zero_grad()
        terms = module.losses(batch)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        assert set(terms) == {"rpn_class", "rpn_box", "class", "box"}
        trained = [p for p in module.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert (terms["box"] > 0) == bool(len(batch["target"][0]["boxes"]))
    with torch.inference_mode():
        detections = module.eval().predict(batch["image"])
    for entry, (height, width) in zip(detections, ((64, 96), (80, 50)), strict=True):
        assert entry["boxes"].shape == (len(entry["scores"]), 4)
        assert (entry["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert ((entry["labels"] >= 0) & (entry["labels"] < 3)).all()


def test_the_loss_is_in_single_precision_under_autocast() -> None:
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        terms = small().losses(small_batch())
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_images_of_two_sizes_are_padded_with_the_mean_color() -> None:
    """The padding is 0, like that of convolutions, and nothing is detected there."""
    torch.manual_seed(0)
    module = small(score_threshold=0.0).eval()
    one, other = (torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((60, 64), (96, 128)))
    pixels, sizes = pad_images([one, other], module.preprocess)
    assert pixels.shape == (2, 3, 96, 128)
    assert sizes.tolist() == [[64, 60], [128, 96]]
    assert (pixels[0, :, 60:] == 0).all()
    assert (pixels[0, :, :, 64:] == 0).all()
    torch.testing.assert_close(pixels[0, :, :60, :64], module.preprocess(one[None])[0])
    assert pad_images(one[None], module.preprocess)[0].shape == (1, 3, 64, 64)
    with torch.inference_mode():
        detections = module.predict([one, other])
    assert (detections[0]["boxes"] <= torch.tensor([64, 60, 64, 60])).all()
    assert (detections[1]["boxes"] > 64).any()


@pytest.mark.parametrize("training", [False, True])
def test_proposals_have_no_gradient_and_the_given_number(training: bool) -> None:
    torch.manual_seed(0)
    module, batch = small(rois_per_image=1000), small_batch()
    output, losses = module(batch["image"], batch["target"] if training else None)
    assert output.logits.requires_grad
    assert not output.boxes.requires_grad
    assert not output.valid.requires_grad
    # In training the two ground-truth boxes are added to the 50 proposals.
    assert output.boxes.shape[1] == (52 if training else 20)
    assert set(losses) == ({"rpn_class", "rpn_box"} if training else set())


def test_sampled_rois_follow_the_options() -> None:
    torch.manual_seed(0)
    module, batch = small(rois_per_image=12, roi_positive_fraction=0.1, roi_fg_iou_threshold=0.3), small_batch()
    output, _ = module(batch["image"], batch["target"])
    assert output.boxes.shape == (2, 12, 4)
    assert output.sample is not None
    assert int((output.sample.labels > 0).sum()) == 1
    # A fraction of 0 leaves background only, which has no box loss.
    assert small(roi_positive_fraction=0.0).losses(batch)["box"] == 0


def test_detections_per_image_are_limited() -> None:
    torch.manual_seed(0)
    module = small(score_threshold=0.0, detections_per_image=3).eval()
    with torch.inference_mode():
        assert [len(entry["boxes"]) for entry in module.predict(small_batch()["image"])] == [3, 3]


def test_a_checkpoint_restores_the_options(tmp_path: Path) -> None:
    """Options of all base classes are saved, and none that a subclass fixes."""
    module = small(rpn_nms_threshold=0.6, detections_per_image=7, score_threshold=0.2)
    path = tmp_path / "model.ckpt"
    hparams = dict(module.hparams)
    assert {**SMALL, "rpn_nms_threshold": 0.6, "detections_per_image": 7}.items() <= hparams.items()
    state = {"state_dict": module.state_dict(), "hyper_parameters": hparams, "pytorch-lightning_version": "2.6.6"}
    torch.save(state, path)
    restored = FasterRCNN.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert (restored.rpn_nms_threshold, restored.detections_per_image, restored.score_threshold) == (0.6, 7, 0.2)
    assert dict(restored.hparams) == hparams
