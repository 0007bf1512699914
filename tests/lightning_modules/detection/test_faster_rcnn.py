"""Faster R-CNN: the networks, the pyramid against torchvision's, weights, and the parts together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList

from lightning_modules.components.backbones import maps_of
from lightning_modules.components.image_batches import pad_images
from lightning_modules.components.rpn import propose
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.detection.rpn import RPN
from tests.lightning_modules.detection.test_rpn import NOTHING

PYRAMID = {"backbone": "resnet50_fpn", "anchor_sizes": (32, 64, 128, 256, 512)}


def small(**options: Any) -> FasterRCNN:
    given = {"num_classes": 3, "width": 0.05, "batch_norm": True, "anchor_sizes": [16, 32], "least": 2.0, "regions": 8}
    given |= {"train_proposals": (200, 50), "test_proposals": (200, 20)}
    return FasterRCNN(**{**given, **options})


def a_batch() -> dict[str, Any]:
    """Two images of different sizes, the second without objects."""
    image = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 96), (80, 50))]
    objects = {"boxes": torch.tensor([[10.0, 10, 40, 30], [50, 20, 80, 60]]), "labels": torch.tensor([0, 2])}
    return {"image": image, "target": [objects, NOTHING]}


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
    """The same weights in torchvision's Faster R-CNN say the same of its anchors and of its regions."""
    torch.manual_seed(0)
    module = FasterRCNN(**PYRAMID, num_classes=3).eval()  # type: ignore[arg-type]
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4).eval()
    places = {
        "backbone.": "trunk.", "rpn.": "rpn.", "roi_heads.box_head.": "roi.head.",
        "roi_heads.box_predictor.cls_score.": "roi.classifier.", "roi_heads.box_predictor.bbox_pred.": "roi.regressor.",
    }  # fmt: skip
    state = {}
    for key, value in theirs.state_dict().items():
        old = next(place for place in places if key.startswith(place))
        state[places[old] + key[len(old) :]] = value
    # The deviations of theirs are so small that everything would be about equal.
    state = {k: v * 30 if k.startswith(("rpn", "roi.regressor", "roi.class")) else v for k, v in state.items()}
    module.network.load_state_dict(state)
    for new, old in (("rpn.head", theirs.rpn.head), ("roi.classifier", theirs.roi_heads.box_predictor.cls_score)):
        old.load_state_dict({k.removeprefix(f"{new}."): v for k, v in state.items() if k.startswith(f"{new}.")})
    regressor = {k.removeprefix("roi.regressor."): v for k, v in state.items() if k.startswith("roi.regressor.")}
    theirs.roi_heads.box_predictor.bbox_pred.load_state_dict(regressor)
    pixels = torch.randn(2, 3, 128, 192)
    boxes = torch.rand(2, 9, 4) * 40 + torch.tensor([0, 0, 60, 60])
    with torch.inference_mode():
        maps = maps_of(module.network.trunk(pixels))
        output = module.network.rpn(maps)
        logits, offset = module.network.roi(maps, boxes)
        features = theirs.backbone(pixels)
        objectness, moves = theirs.rpn.head(list(features.values()))
        pooled = theirs.roi_heads.box_roi_pool(features, list(boxes), [(128, 192)] * 2)
        expected = theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(pooled))
        anchors = theirs.rpn.anchor_generator(ImageList(pixels, [(128, 192)] * 2), list(features.values()))[0]
    assert output.objectness.std() > 1e-3
    torch.testing.assert_close(output.objectness[0, : 3 * 32 * 48].view(32, 48, 3), objectness[0][0].permute(1, 2, 0))
    torch.testing.assert_close(output.offset[1, : 3 * 32 * 48].view(32, 48, 12), moves[0][1].permute(1, 2, 0))
    torch.testing.assert_close(logits.flatten(0, 1), expected[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(offset.flatten(0, 1).flatten(1), expected[1], atol=1e-4, rtol=1e-3)
    # Theirs are centerd on the cells' corners and have whole pixels.
    assert anchors.shape == output.anchors.shape
    halves = torch.cat(
        [torch.full((count, 4), stride / 2) for count, stride in zip(output.counts, (4, 8, 16, 32, 64), strict=True)]
    )
    torch.testing.assert_close(output.anchors - anchors, halves, atol=0.5, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 8, "pooling": "align"}, {"backbone": "resnet50", "frozen": True}, PYRAMID]
)
def test_it_trains_on_objects_and_on_none(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = small(**options)
    for batch in (a_batch(), {**a_batch(), "target": [NOTHING, NOTHING]}):
        module.zero_grad()
        terms = module.losses(batch)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        assert set(terms) == {"rpn_class", "rpn_box", "class", "box"}
        trained = [p for p in module.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert (terms["box"] > 0) == bool(len(batch["target"][0]["boxes"]))
    with torch.inference_mode():
        found = module.eval().predict(batch["image"])
    for entry, (height, width) in zip(found, ((64, 96), (80, 50)), strict=True):
        assert entry["boxes"].shape == (len(entry["scores"]), 4)
        assert (entry["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert ((entry["labels"] >= 0) & (entry["labels"] < 3)).all()


def test_the_loss_is_in_single_precision_under_autocast() -> None:
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        terms = small().losses(a_batch())
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_pictures_of_two_sizes_are_filled_up_with_the_mean() -> None:
    """As what lies beyond an image has it for a convolution; nothing is found there."""
    torch.manual_seed(0)
    module = small(score_threshold=0.0).eval()
    one, other = (torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((60, 64), (96, 128)))
    pixels, size = pad_images([one, other], module.preprocess)
    assert pixels.shape == (2, 3, 96, 128)
    assert size.tolist() == [[64, 60], [128, 96]]
    assert (pixels[0, :, 60:] == 0).all()
    assert (pixels[0, :, :, 64:] == 0).all()
    torch.testing.assert_close(pixels[0, :, :60, :64], module.preprocess(one[None])[0])
    assert pad_images(one[None], module.preprocess)[0].shape == (1, 3, 64, 64)
    with torch.inference_mode():
        found = module.predict([one, other])
    assert (found[0]["boxes"] <= torch.tensor([64, 60, 64, 60])).all()
    assert (found[1]["boxes"] > 64).any()


def test_weights_of_a_resnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ImageNet's layers end where they belong: the trunk and conv5 compute what the whole network does."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet50(width_per_group=3).eval()
    for module in resnet.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    pixels = torch.randn(1, 3, 64, 64)
    resnet.fc = torch.nn.Identity()  # type: ignore[assignment]
    for frozen in (False, True):
        network = small(backbone="resnet50", frozen=frozen, weights=str(tmp_path / "resnet.pth")).network.eval()
        with torch.inference_mode():
            torch.testing.assert_close(network.roi.head(network.trunk(pixels)), resnet(pixels), atol=1e-4, rtol=1e-4)
        assert "newly initialized: rpn.head" in capsys.readouterr().out
    pyramid = small(**PYRAMID, weights=str(tmp_path / "resnet.pth")).network
    state = pyramid.state_dict()
    for key, value in resnet.state_dict().items():
        assert torch.equal(state[f"trunk.body.{key}"], value)


def test_weights_of_a_vgg16_and_of_a_proposal_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = small()
    names = {"trunk": "features", "roi.head.fc6": "classifier.0", "roi.head.fc7": "classifier.3"}
    state = {}
    for key, value in first.network.state_dict().items():
        place = next((p for p in names if key.startswith(f"{p}.")), None)
        if place:
            state[names[place] + key[len(place) :]] = value
    torch.save(state, tmp_path / "vgg16.pth")
    second = small(weights=str(tmp_path / "vgg16.pth")).network.state_dict()
    for key, value in first.network.state_dict().items():
        assert torch.equal(second[key], value) or not key.startswith(("trunk", "roi.head"))
    # Torchvision's file of features alone has no numbers behind them: those layers keep what they have.
    state = {k: v * torch.nan if k.startswith("classifier") else v for k, v in state.items()}
    torch.save(state, tmp_path / "features.pth")
    assert all(p.isfinite().all() for p in small(weights=str(tmp_path / "features.pth")).parameters())
    assert "newly initialized: rpn.head" in capsys.readouterr().out
    proposer = RPN(width=0.05, batch_norm=True, anchor_sizes=[16, 32])
    torch.save({"state_dict": proposer.state_dict()}, tmp_path / "rpn.ckpt")
    third = small(weights=str(tmp_path / "rpn.ckpt")).network.state_dict()
    assert all(torch.equal(third[key], value) for key, value in proposer.network.state_dict().items())
    capsys.readouterr()
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected weights of vgg16_bn"):
        small(weights=str(tmp_path / "other.pth"))


def test_no_gradient_goes_through_proposals() -> None:
    torch.manual_seed(0)
    module = small()
    pixels, size = pad_images(a_batch()["image"], module.preprocess)
    output = module.network.rpn(maps_of(module.network.trunk(pixels)))
    found = propose(output, size, 100, 20, least=2)
    assert output.objectness.requires_grad
    assert not found.boxes.requires_grad
    assert not found.scores.requires_grad
