"""Keypoint R-CNN: torchvision's network, weights and loss, heatmap cells, assignment to people, exact resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import keypointrcnn_resnet50_fpn
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, keypointrcnn_loss

import cli.parser
from callbacks.metrics_file import read_metrics
from datamodules.synthetic.mpii import write_mpii
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.pose.keypoint_rcnn import (
    HEATMAP_SIZE,
    KeypointRCNN,
    assign_to_people,
    encode_cells,
    keypoint_loss,
)
from tests.lightning_modules.detection.test_faster_rcnn import SMALL
from tests.small_system import differences, kill_and_resume, outcome

PYRAMID = {"backbone": "resnet50_fpn", "batch_norm": False, "anchor_sizes": (32, 64, 128, 256, 512)}
JOINTS = ["upper_neck", "head_top", "right_wrist", "left_wrist"]


def small(**options: Any) -> KeypointRCNN:
    return KeypointRCNN(**{**SMALL, "joint_names": JOINTS, "backbone": "vgg16", "rois_per_image": 16, **options})


def no_people() -> dict[str, Tensor]:
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "keypoints": torch.zeros(0, 4, 2),
        "labeled": torch.zeros(0, 4, dtype=torch.bool),
        "head_size": torch.zeros(0),
    }


def small_batch() -> dict[str, Any]:
    """Two images of different sizes, the second without people."""
    torch.manual_seed(0)
    image = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 96), (80, 50))]
    people = {
        "boxes": torch.tensor([[10.0, 10, 40, 60], [50, 10, 80, 60]]),
        "labels": torch.zeros(2, dtype=torch.int64),
        "keypoints": torch.tensor(
            [[[20.0, 20], [20, 12], [15, 40], [38, 45]], [[60.0, 20], [60, 12], [0, 0], [300, 45]]]
        ),
        "labeled": torch.tensor([[True] * 4, [True, True, False, True]]),
        "head_size": torch.tensor([8.0, 9.0]),
    }
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, 2, 3)
    return {"image": image, "target": [people, no_people()], "to_original": matrix}


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("freeze_backbone", "parameters"), [(True, 59_137_258), (False, 59_190_378)])
def test_the_network_is_torchvisions(freeze_backbone: bool, parameters: int) -> None:
    with torch.device("meta"):
        network = KeypointRCNN(joint_names=[f"joint{i}" for i in range(17)], freeze_backbone=freeze_backbone).network
        theirs = keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(p.numel() for p in theirs.parameters()) == 59_190_378


@pytest.mark.parametrize("options", [{"stride": 8}, PYRAMID])
def test_it_trains_with_and_without_people(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = small(**options)
    for batch in (small_batch(), {**small_batch(), "target": [no_people(), no_people()]}):
        module.zero_grad()
        terms = module.losses(batch)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        assert set(terms) == {"rpn_class", "rpn_box", "class", "box", "keypoint"}
        trained = [p for p in module.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert (terms["keypoint"] > 0) == bool(len(batch["target"][0]["boxes"]))
    images = small_batch()["image"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        detections = module.eval().predict(images)
    assert sum(len(entry["boxes"]) for entry in detections) > 0
    for entry in detections:
        count = len(entry["scores"])
        assert entry["keypoints"].shape == (count, 4, 2)
        assert entry["keypoint_scores"].shape == (count, 4)
        assert entry["keypoints"].dtype == entry["keypoint_scores"].dtype == torch.float32
        inside = (entry["keypoints"] + 0.5 >= entry["boxes"][:, None, :2]) & (
            entry["keypoints"] + 0.5 <= entry["boxes"][:, None, :2].maximum(entry["boxes"][:, None, 2:]) + 1
        )
        assert inside.all()


def test_the_loss_is_in_single_precision_under_autocast() -> None:
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        terms = small().losses(small_batch())
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_heatmaps_are_in_single_precision_under_autocast() -> None:
    """In bf16 the best cell of one heatmap in six ties with another one."""
    torch.manual_seed(0)
    module = small().eval()
    boxes = torch.rand(1, 60, 4) * 30 + torch.tensor([0, 0, 30, 30])
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            maps = module.network.feature_maps(torch.randn(1, 3, 64, 64))
            logits = module.branch_logits(maps, boxes)
        assert logits.dtype == torch.float32
        assert (logits == logits.bfloat16().float()).float().mean() < 0.01
    cells = logits.flatten(3)
    tied = (cells == cells.amax(3, keepdim=True)).sum(3) > 1
    assert tied.float().mean() < 0.01


def test_crops_of_people_are_refused() -> None:
    with pytest.raises(ValueError, match="expected whole images, found crops of people; use --data.crop image"):
        small().losses({"image": torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "keypoints": torch.zeros(1, 4, 2)})


# --- torchvision's weights --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """Torchvision's network with random weights."""
    torch.manual_seed(0)
    network = keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # as in that of COCO_V1
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
        if name == "roi_heads.keypoint_predictor.kps_score_lowres":
            for parameter in module.parameters(recurse=False):
                parameter.data.normal_(std=0.03)
    return network


def test_torchvisions_weights_compute_the_same(
    theirs: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hub" / "checkpoints" / "keypointrcnn_resnet50_fpn_coco-fc266e95.pth"
    path.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    ours = KeypointRCNN(joint_names=[f"joint{i}" for i in range(17)], freeze_backbone=True, weights="COCO_V1").eval()
    assert "newly initialized" not in capsys.readouterr().out
    pixels, boxes = torch.randn(1, 3, 128, 192), torch.rand(1, 5, 4) * 40 + torch.tensor([0, 0, 60, 60])
    with torch.inference_mode():
        logits = ours.branch_logits(ours.network.feature_maps(pixels), boxes)
        heads = theirs.roi_heads
        pooled = heads.keypoint_roi_pool(theirs.backbone(pixels), list(boxes), [(128, 192)])  # type: ignore[operator]
        expected = heads.keypoint_predictor(heads.keypoint_head(pooled))  # type: ignore[operator]
    assert logits.std() > 0.01
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-3)
    # For other joints only the last layer keeps its initial weights.
    small(**PYRAMID, width_multiplier=1.0, weights="COCO_V1")
    new = capsys.readouterr().out.split("newly initialized")[1]
    assert "keypoint.predictor.kps_score_lowres.weight (512, 17, 4, 4) -> (512, 4, 4, 4)" in new
    assert "roi." not in new


def test_weights_of_a_faster_rcnn_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = FasterRCNN(num_classes=1, width_multiplier=0.05, batch_norm=True, anchor_sizes=(16, 32))
    torch.save({"state_dict": first.state_dict()}, tmp_path / "faster.ckpt")
    loaded = small(weights=str(tmp_path / "faster.ckpt")).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in first.network.state_dict().items())
    assert "newly initialized: keypoint.head.0.weight absent" in capsys.readouterr().out


# --- target encoding --------------------------------------------------------------------------------------------------


def encode_in_loops(keypoints: np.ndarray, labeled: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cells, valid = np.zeros(labeled.shape, int), np.zeros(labeled.shape, bool)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        for k, (x, y) in enumerate(keypoints[i]):
            column = HEATMAP_SIZE - 1 if x + 0.5 == x2 else math.floor((x + 0.5 - x1) / (x2 - x1) * HEATMAP_SIZE)
            row = HEATMAP_SIZE - 1 if y + 0.5 == y2 else math.floor((y + 0.5 - y1) / (y2 - y1) * HEATMAP_SIZE)
            if labeled[i, k] and 0 <= column < HEATMAP_SIZE and 0 <= row < HEATMAP_SIZE:
                cells[i, k], valid[i, k] = row * HEATMAP_SIZE + column, True
    return cells, valid


def random_people(people: int = 200, joints: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(people, 4, generator=generator) * 50
    boxes[:, 2:] += boxes[:, :2] + 5
    part = torch.rand(people, joints, 2, generator=generator) * 1.4 - 0.2
    keypoints = boxes[:, None, :2] + part * (boxes[:, 2:] - boxes[:, :2])[:, None] - 0.5
    return keypoints, torch.rand(people, joints, generator=generator) < 0.8, boxes


def test_cells_equal_those_of_loops() -> None:
    keypoints, labeled, boxes = (x.double() if x.is_floating_point() else x for x in random_people())
    cells, valid = encode_cells(keypoints, labeled, boxes)
    expected, expected_valid = encode_in_loops(keypoints.numpy(), labeled.numpy(), boxes.numpy())
    np.testing.assert_array_equal(valid, expected_valid)
    np.testing.assert_array_equal(cells[valid], expected[expected_valid])
    assert 0.3 < valid.float().mean() < 0.7
    # A joint on the far edge is in the last cell, beyond it in none.
    edge = torch.tensor([[[59.5, 59.5], [59.6, 30.0]]])
    cells, valid = encode_cells(edge, torch.tensor([[True, True]]), torch.tensor([[10.0, 10, 60, 60]]))
    assert valid.tolist() == [[True, False]]
    assert cells[0, 0] == HEATMAP_SIZE**2 - 1


def test_torchvisions_decoding_inverts_the_encoding() -> None:
    """Up to half a cell and half a pixel, at the border up to a cell; in boxes of more pixels than cells."""
    keypoints, labeled, boxes = random_people()
    keypoints, boxes = 8 * keypoints, 8 * boxes + torch.tensor([0, 0, 20, 20])
    cells, valid = encode_cells(keypoints, labeled, boxes)
    heatmaps = nn.functional.one_hot(cells, HEATMAP_SIZE**2).float().unflatten(-1, (HEATMAP_SIZE, HEATMAP_SIZE))
    points, _ = heatmaps_to_keypoints(heatmaps, boxes)
    cell = (boxes[:, 2:] - boxes[:, :2])[:, None] / HEATMAP_SIZE
    error = (points[..., :2] - 0.5 - keypoints).abs()[valid]
    column, row = cells[valid] % HEATMAP_SIZE, cells[valid] // HEATMAP_SIZE
    border = torch.stack([(column == 0) | (column == HEATMAP_SIZE - 1), (row == 0) | (row == HEATMAP_SIZE - 1)], -1)
    assert (error <= (cell.expand_as(keypoints)[valid] * (1 + border.float()) + 1) / 2 + 0.01).all()
    shift = (points[..., :2] - 0.5 - keypoints)[valid].mean(0)
    assert (shift.abs() < 0.15).all(), "the mean shift is 0 only if the half pixel counts once"


# --- loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_torchvisions() -> None:
    keypoints, labeled, boxes = random_people()
    logits = torch.randn(200, 4, HEATMAP_SIZE, HEATMAP_SIZE)
    loss = keypoint_loss(logits, *encode_cells(keypoints, labeled, boxes))
    targets = torch.cat([keypoints + 0.5, labeled[..., None].float()], -1)
    expected = keypointrcnn_loss(logits, [boxes], [targets], [torch.arange(200)])
    torch.testing.assert_close(loss, expected)


def test_ignored_joints_have_no_gradient() -> None:
    keypoints, labeled, boxes = random_people(20)
    logits = torch.randn(20, 4, HEATMAP_SIZE, HEATMAP_SIZE, requires_grad=True)
    cells, valid = encode_cells(keypoints, labeled, boxes)
    keypoint_loss(logits, cells, valid).backward()
    assert logits.grad is not None
    has_gradient = logits.grad.flatten(2).abs().sum(2) > 0
    assert torch.equal(has_gradient, valid)
    assert keypoint_loss(logits, cells, torch.zeros_like(valid)) == 0


def test_cells_compete_for_a_joint() -> None:
    """As in a softmax, unlike independent decisions."""
    logits = torch.zeros(1, 1, HEATMAP_SIZE, HEATMAP_SIZE, requires_grad=True)
    keypoint_loss(logits, torch.tensor([[5]]), torch.tensor([[True]])).backward()
    assert logits.grad is not None
    gradient = logits.grad.flatten()
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-6)
    assert gradient[5] == pytest.approx(1 / HEATMAP_SIZE**2 - 1)
    assert gradient[6] == pytest.approx(1 / HEATMAP_SIZE**2)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_each_person_is_assigned_the_best_detection() -> None:
    people = torch.tensor([[0.0, 0, 10, 30], [8, 0, 20, 30], [50, 50, 60, 80]])
    boxes = torch.tensor([[7.0, 0, 20, 30], [0, 0, 10, 29], [1, 0, 10, 30]])
    keypoints = torch.arange(3.0)[:, None, None].expand(3, 4, 2)
    joints = assign_to_people({"boxes": boxes, "keypoints": keypoints}, people)
    assert joints[0, 0, 0] == 1
    assert joints[1, 0, 0] == 0
    assert joints[2].isnan().all()
    assert assign_to_people({"boxes": boxes[:0], "keypoints": keypoints[:0]}, people).isnan().all()
    assert assign_to_people({"boxes": boxes, "keypoints": keypoints}, people[:0]).shape == (0, 4, 2)


def test_joints_of_undetected_people_count_as_wrong() -> None:
    module, batch = small(), small_batch()
    people = batch["target"][0]
    correct = {"boxes": people["boxes"][:1], "keypoints": people["keypoints"][:1]}
    empty = {"boxes": torch.zeros(0, 4), "keypoints": torch.zeros(0, 4, 2)}
    metrics = module.build_metrics()
    module.update_metrics(metrics, [correct, empty], batch)
    values = metrics.compute()
    assert float(values["pckh/total"]) == pytest.approx(4 / 7)
    assert float(values["pckh/skipped"]) == 0


def test_distances_are_in_pixels_of_the_images_on_disk() -> None:
    module, batch = small(), small_batch()
    people = batch["target"][0]
    # A shift of 1.5 px, with heads of 8 and 9 px; on disk the image is three times as large.
    shifted = {"boxes": people["boxes"], "keypoints": people["keypoints"] + torch.tensor([1.5, 0])}
    empty = {"boxes": torch.zeros(0, 4), "keypoints": torch.zeros(0, 4, 2)}
    for scale, expected in ((1.0, 1.0), (3.0, 3 / 7)):
        metrics = module.build_metrics()
        matrix = torch.tensor([[scale, 0, 7], [0, scale, 7]]).expand(2, 2, 3)
        module.update_metrics(metrics, [shifted, empty], {**batch, "to_original": matrix})
        assert float(metrics.compute()["pckh/total"]) == pytest.approx(expected)


# --- module -----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mpii(str(tmp_path / "mpii"), train=10, val=4, size=96)
    monkeypatch.chdir(tmp_path)
    cli.parser.run([
        "fit", "--model", "KeypointRCNN", "--model.backbone", "vgg16", "--model.width_multiplier", "0.03",
        "--model.batch_norm", "true", "--model.anchor_sizes", "[16, 32]", "--model.rpn_min_size", "2",
        "--model.rois_per_image", "8", "--model.rpn_pre_nms_top_n_test", "100", "--model.rpn_post_nms_top_n_test", "20",
        "--data", "MPII", "--data.root", "mpii", "--data.crop", "image",
        "--data.image_size", "[64, 80]", "--data.batch_size", "2", "--data.num_workers", "0",
        "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled",
        "--last.every_n_steps", "7", "--last.keep", "9", "--experiment", "run",
        "--model.schedule", "lightning_modules.schedules.Cosine",
    ])  # fmt: skip
    (whole,) = Path("runs/run").iterdir()
    expected = outcome(whole)
    assert expected["file"] == "step=00000015.ckpt"
    assert any("val/pckh/total" in row for row in read_metrics(whole / "metrics.csv"))
    assert differences(expected, outcome(kill_and_resume(whole, 7))) == []
    # The data's number of classes is linked to every model, but it is no option of this one.
    checkpoint = whole / "checkpoints" / expected["file"]
    hparams = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert not {"num_classes", "class_names", "ap_method", "roi_pooling"} & set(hparams)
    restored = KeypointRCNN.load_from_checkpoint(checkpoint, weights_only=True)
    assert (restored.num_classes, restored.rois_per_image) == (1, 8)
