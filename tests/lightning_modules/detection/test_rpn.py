"""Region proposal network alone: parameters, training and predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from lightning_modules.detection.rpn import RPN
from tests.lightning_modules.components.test_boxes import NO_OBJECTS


def small(**options: Any) -> RPN:
    defaults = {"width_multiplier": 0.05, "batch_norm": True, "anchor_sizes": [16, 32], "rpn_min_size": 2.0}
    return RPN(**{**defaults, **options})


def test_the_papers_network() -> None:
    with torch.device("meta"):
        network = RPN().network
    assert sum(p.numel() for p in network.rpn.parameters()) == 512 * 512 * 9 + 512 + 9 * 513 + 36 * 513
    assert sum(p.numel() for p in network.trunk.parameters()) == 14_714_688


def test_predictions_are_translation_invariant() -> None:
    """Section 3.1.1: an image shifted by a stride has the same objectness and deltas, one cell further."""
    torch.manual_seed(0)
    network = RPN(width_multiplier=0.05, anchor_sizes=(32, 64)).network.eval()
    image = torch.randn(1, 3, 512, 512)
    with torch.inference_mode():
        output, shifted = (network.rpn(network.feature_maps(x)) for x in (image, image.roll((16, 32), (2, 3))))
    for name in ("objectness", "deltas"):
        a, b = (getattr(predictions, name).view(1, 32, 32, -1) for predictions in (output, shifted))
        inner = slice(10, 20)  # the receptive field is 114 pixels each way: exclude the borders
        assert a[:, inner, inner].std() > 1e-6
        torch.testing.assert_close(b[:, 11:21, 12:22], a[:, inner, inner], atol=1e-6, rtol=1e-4)
    anchors = output.anchors.view(32, 32, 6, 4)
    torch.testing.assert_close(anchors[1, 2], anchors[0, 0] + torch.tensor([32.0, 16, 32, 16]))


def test_wrong_anchors_are_refused() -> None:
    with torch.device("meta"):
        with pytest.raises(ValueError, match="anchor_sizes: expected 5 positive numbers, one per feature map, found"):
            RPN(backbone="resnet50_fpn")
        with pytest.raises(ValueError, match="anchor_sizes: expected positive numbers, found"):
            RPN(anchor_sizes=[0, 3])
        with pytest.raises(ValueError, match="stride: expected 16 for backbone resnet50, found 8"):
            RPN(backbone="resnet50", stride=8)


def test_images_without_objects_train_as_background() -> None:
    torch.manual_seed(0)
    module = small()
    image = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    terms = module.losses({"image": image, "target": [NO_OBJECTS, NO_OBJECTS]})
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert terms["rpn_box"] == 0
    assert terms["rpn_class"] > 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    # All anchors cross the border of an image that is smaller than each of them.
    terms = small(anchor_sizes=[128]).losses({"image": image, "target": [NO_OBJECTS, NO_OBJECTS]})
    assert terms["rpn_class"] == 0


@pytest.mark.parametrize(
    "option",
    [
        {"rpn_batch_size_per_image": 8},
        {"rpn_positive_fraction": 0.0},
        {"rpn_fg_iou_threshold": 0.3},
        {"rpn_bg_iou_threshold": 0.0},
        {"rpn_box_loss_weight": 1.0},
    ],
)
def test_options_of_the_loss_have_an_effect(option: dict[str, Any]) -> None:
    image = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    target = [{"boxes": torch.tensor([[20.0, 20, 50, 52]]), "labels": torch.tensor([0])}]
    losses = []
    for options in ({}, option):
        torch.manual_seed(0)
        module = small(**options)
        losses.append(sum(term.item() for term in module.losses({"image": image, "target": target}).values()))
    assert losses[0] != losses[1]


def test_predictions_for_images_of_two_sizes() -> None:
    torch.manual_seed(0)
    module = small(rpn_post_nms_top_n_test=30).eval()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 96), (80, 50))]
    with torch.inference_mode():
        predictions = module.predict(images)
    for entry, (height, width) in zip(predictions, ((64, 96), (80, 50)), strict=True):
        assert 0 < len(entry["boxes"]) <= 30
        assert entry["boxes"].amax(0)[2:].le(torch.tensor([width, height])).all()
        assert (entry["scores"].diff() <= 0).all()
        assert entry["labels"].dtype == torch.int64


def test_the_least_size_is_in_pixels_of_the_image_on_disk() -> None:
    """As in py-faster-rcnn: 16 px of an image that is enlarged to 1.5 times its size are 24 px of the network's."""
    torch.manual_seed(0)
    module = small(anchor_sizes=[16, 20, 32], rpn_min_size=16.0, rpn_post_nms_top_n_test=300).eval()
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.inference_mode():
        given = module.predict(images)
        batch = {"image": images, "original_size": torch.tensor([[64, 64], [96, 96]])}
        enlarged, same = module.predict_batch(batch)
        module.rpn_min_size = 24.0
        expected = module.predict(images)[0]
    assert torch.equal(same["boxes"], given[1]["boxes"])
    assert torch.equal(enlarged["boxes"], expected["boxes"])
    assert (given[0]["boxes"][:, 2:] - given[0]["boxes"][:, :2]).amin() < 24


def test_the_nms_threshold_limits_the_overlap_of_proposals() -> None:
    torch.manual_seed(0)
    module = small(rpn_nms_threshold=0.2).eval()
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        (entry,) = module.predict(image)
    assert len(entry["boxes"]) > 3
    assert box_iou(entry["boxes"], entry["boxes"]).fill_diagonal_(0).max() <= 0.2


def test_it_learns_where_objects_are() -> None:
    """Bright squares on dark: after a short training the first proposals are theirs."""
    torch.manual_seed(0)
    module = small(stride=8, anchor_sizes=[16], width_multiplier=0.1, allow_border_anchors=True)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    generator = np.random.default_rng(0)

    def batch(n: int) -> dict[str, Any]:
        image = torch.zeros(n, 3, 64, 64, dtype=torch.uint8)
        target = []
        for i in range(n):
            x, y = generator.integers(0, 46, 2).tolist()
            image[i, :, y : y + 18, x : x + 18] = 255
            target.append({"boxes": torch.tensor([[x, y, x + 18.0, y + 18.0]]), "labels": torch.tensor([0])})
        return {"image": image, "target": target}

    for _ in range(60):
        optimizer.zero_grad()
        sum(module.losses(batch(8)).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    test = batch(32)
    with torch.inference_mode():
        predictions = module.predict(test["image"])
    first = torch.stack([entry["boxes"][0] for entry in predictions])
    gt_boxes = torch.cat([entry["boxes"] for entry in test["target"]])
    assert box_iou(first, gt_boxes).diag().median() > 0.6
