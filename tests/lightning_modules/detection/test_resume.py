"""A detector's run resumed in the middle of an epoch ends in the same bits, with all that is random in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import cli
from datamodules.synthetic.voc import write_voc
from tests.small_system import differences, outcome

# The augmentation of each system, and the smallest network that has all that makes a resume hard.
DETECTORS = {
    "yolo_v1": [
        "--model", "YOLOv1", "--model.grid", "2", "--model.input_size", "128", "--model.width", "0.05",
        "--model.hidden", "16", "--model.batch_norm", "true", "--data.image_size", "128",
        "--data.photometric", "yolo", "--data.jitter", "0.2",
    ],
    # The size changes every ten steps, and the pull to the anchors ends on the way.
    "yolo_v2": [
        "--model", "YOLOv2", "--model.width", "0.05", "--model.train_sizes", "[64, 96, 128]",
        "--model.early_images", "17", "--data.image_size", "128", "--data.photometric", "yolo2", "--data.jitter", "0.3",
    ],
    "ssd": [
        "--model", "SSD", "--model.width", "0.02", "--model.batch_norm", "true", "--data.image_size", "300",
        "--data.photometric", "ssd", "--data.expand", "4", "--data.iou_crop", "true",
    ],
    # Windows to train on are drawn in the training step.
    "sliding_window": [
        "--model", "SlidingWindow", "--model.width", "0.1", "--model.window", "24", "--model.sizes", "[24, 40]",
        "--model.crops", "8", "--data.image_size", "96", "--data.photometric", "yolo",
    ],
    "overfeat": [
        "--model", "OverFeat", "--model.variant", "small", "--model.width", "0.02", "--model.batch_norm", "true",
        "--model.scales", "[63, 91]", "--model.crops", "8", "--data.image_size", "96", "--data.jitter", "0.1",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training pictures and four for validation."""
    folder = tmp_path_factory.mktemp("VOC")
    write_voc(str(folder), classes=2, train=5, val=2, size=48)
    return folder / "VOCdevkit"


@pytest.mark.parametrize("detector", DETECTORS)
def test_resume_in_mid_epoch(detector: str, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "fit", "--data", "VOCDetection", *DETECTORS[detector], "--data.root", str(devkit),
        "--data.train", "[VOC2007/train]", "--data.val", "[VOC2007/val]", "--data.batch_size", "2",
        "--data.num_workers", "0", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled", "--last.every_n_steps", "7",
        "--last.keep", "9", "--experiment", "run", "--model.schedule", "lightning_modules.schedules.Cosine",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    cli.run(options)
    (whole,) = Path("runs/run").iterdir()
    expected = outcome(whole)
    assert expected["file"] == "step=00000015.ckpt"
    # As a kill after step 9 leaves it: the checkpoint of step 7, and a log that went further.
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    for path in killed.glob("checkpoints/step=*.ckpt"):
        if path.name > "step=00000007.ckpt":
            path.unlink()
    cli.run(["fit", "--resume", str(killed)])
    assert differences(expected, outcome(killed)) == []
