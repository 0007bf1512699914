"""A run of each detector that is resumed within an epoch is bit-identical, with all its randomness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cli.parser
from datamodules.proposals import proposal_path, write_proposals
from datamodules.synthetic.voc import write_voc
from tests.small_system import differences, kill_and_resume, load_system, outcome

# Each system with its augmentation, and the smallest network with everything that makes resuming hard.
DETECTORS = {
    "yolo_v1": [
        "--model", "YOLOv1", "--model.grid_size", "2", "--model.input_size", "128",
        "--model.width_multiplier", "0.05", "--model.hidden_units", "16", "--model.batch_norm", "true",
        "--data.image_size", "128", "--data.photometric", "yolo", "--data.jitter", "0.2",
    ],
    # The size changes every 10 steps, and the prior term ends on the way.
    "yolo_v2": [
        "--model", "YOLOv2", "--model.width_multiplier", "0.05", "--model.train_sizes", "[64, 96, 128]",
        "--model.early_images", "17", "--data.image_size", "128", "--data.photometric", "yolo2",
        "--data.jitter", "0.3",
    ],
    "ssd": [
        "--model", "SSD", "--model.width_multiplier", "0.02", "--model.batch_norm", "true",
        "--data.image_size", "300", "--data.photometric", "ssd", "--data.expand", "4", "--data.iou_crop", "true",
    ],
    # The training step samples windows.
    "sliding_window": [
        "--model", "SlidingWindow", "--model.width_multiplier", "0.1", "--model.window_size", "24",
        "--model.window_sizes", "[24, 40]", "--model.windows_per_image", "8",
        "--data.image_size", "96", "--data.photometric", "yolo",
    ],
    "overfeat": [
        "--model", "OverFeat", "--model.variant", "small", "--model.width_multiplier", "0.02",
        "--model.batch_norm", "true", "--model.scales", "[63, 91]", "--model.windows_per_image", "8",
        "--data.image_size", "96", "--data.jitter", "0.1",
    ],
    # The training step samples anchors and RoIs.
    "faster_rcnn": [
        "--model", "FasterRCNN", "--model.width_multiplier", "0.03", "--model.batch_norm", "true",
        "--model.anchor_sizes", "[16, 32]", "--model.rpn_min_size", "2",
        "--model.rois_per_image", "8", "--model.rpn_pre_nms_top_n_test", "100",
        "--model.rpn_post_nms_top_n_test", "20", "--data.image_size", "64", "--data.photometric", "ssd",
        "--data.iou_crop", "true",
    ],
    "rpn": [
        "--model", "RPN", "--model.width_multiplier", "0.03", "--model.batch_norm", "true",
        "--model.anchor_sizes", "[16, 32]", "--model.rpn_min_size", "2", "--data.image_size", "[64, 80]",
    ],
    # With dropout, and images of two sizes.
    "fast_rcnn": [
        "--model", "FastRCNN", "--model.width_multiplier", "0.03", "--model.rois_per_image", "8",
        "--data.image_size", "[64, 80]", "--data.proposals", "PROPOSALS",
    ],
}  # fmt: skip


def write_random_proposals(devkit: Path, folder: str) -> None:
    """Write random boxes for all images; Selective Search would take too long."""
    rng = np.random.default_rng(0)
    for path in devkit.glob("*/JPEGImages/*.jpg"):
        corner = rng.uniform(0, 40, (30, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 20, (30, 2))], 1).astype(np.float32)
        write_proposals(proposal_path(folder, str(path.relative_to(devkit))), boxes, 30)


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A devkit with ten training and four validation images."""
    folder = tmp_path_factory.mktemp("VOC")
    write_voc(str(folder), classes=2, train=5, val=2, size=48)
    return folder / "VOCdevkit"


@pytest.fixture(scope="module")
def proposals(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("proposals"))
    write_random_proposals(devkit, folder)
    return folder


@pytest.mark.parametrize("detector", DETECTORS)
def test_resume_in_mid_epoch(
    detector: str, devkit: Path, proposals: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [proposals if option == "PROPOSALS" else option for option in DETECTORS[detector]]
    options = [
        "fit", "--data", "VOCDetection", *arguments, "--data.root", str(devkit),
        "--data.train", "[VOC2007/train]", "--data.val", "[VOC2007/val]", "--data.batch_size", "2",
        "--data.num_workers", "0", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled", "--last.every_n_steps", "7",
        "--last.keep", "9", "--experiment", "run", "--model.schedule", "lightning_modules.schedules.Cosine",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    cli.parser.run(options)
    (run,) = Path("runs/run").iterdir()
    expected = outcome(run)
    assert expected["file"] == "step=00000015.ckpt"
    assert differences(expected, outcome(kill_and_resume(run, 7))) == []
    # The checkpoint alone restores the system.
    again = load_system(run / "checkpoints" / expected["file"])
    assert type(again).__name__ == DETECTORS[detector][1]
