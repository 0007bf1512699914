"""A segmentation run that is resumed in the middle of an epoch ends bit-identical."""

from __future__ import annotations

from pathlib import Path

import pytest

import cli.parser
from datamodules.synthetic.voc_segmentation import write_voc_segmentation
from tests.small_system import differences, kill_and_resume, load_system, outcome

SEMANTIC = ["--data", "VOCSegmentation", "--data.crop_size", "64", "--data.color_jitter", "0.3"]

# Small networks with everything that makes exact resume hard.
SEGMENTERS = {
    # The training step samples pixels.
    "patch_classifier": [
        "--model", "PatchClassifier", "--model.width_multiplier", "0.1", "--model.patch_size", "24",
        "--model.patches_per_image", "4", *SEMANTIC,
    ],
    # Dropout.
    "fcn": [
        "--model", "FCN", "--model.width_multiplier", "0.03", "--model.batch_norm", "true",
        "--model.conv1_padding", "1", *SEMANTIC,
    ],
    "encoder_decoder": ["--model", "EncoderDecoder", "--model.channels", "[8, 8, 8]", *SEMANTIC],
    # The workers sample the objects to crop.
    "deconvnet": [
        "--model", "DeconvNet", "--model.width_multiplier", "0.01", "--model.inference", "image",
        "--data", "VOCInstanceCrops",
    ],
    "deeplab": [
        "--model", "DeepLab", "--model.variant", "aspp", "--model.width_multiplier", "0.03",
        "--model.batch_norm", "true", "--model.scales", "[1, 0.5]", *SEMANTIC,
    ],
    "deeplab_v3": [
        "--model", "DeepLabV3", "--model.backbone", "resnet18", "--model.width_multiplier", "0.1",
        "--model.multi_grid", "[1, 2]", *SEMANTIC,
    ],
    # The training step samples anchors and RoIs; images differ in size.
    "mask_rcnn": [
        "--model", "MaskRCNN", "--model.backbone", "vgg16", "--model.width_multiplier", "0.03",
        "--model.batch_norm", "true",
        "--model.anchor_sizes", "[16, 32]", "--model.rpn_min_size", "2",
        "--model.rois_per_image", "8", "--model.rpn_pre_nms_top_n_test", "100",
        "--model.rpn_post_nms_top_n_test", "20", "--data", "VOCInstance", "--data.image_size", "[64, 80]",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of two classes and the background."""
    folder = tmp_path_factory.mktemp("masks")
    write_voc_segmentation(str(folder), classes=2, train=5, val=2, size=64)
    (folder / "classes.txt").write_text("background\ndisc\nsquare\n")
    return folder


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_resume_in_mid_epoch(segmenter: str, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SEGMENTERS[segmenter]
    classes = "[disc, square]" if "VOCInstance" in arguments else str(devkit / "classes.txt")
    options = [
        "fit", *arguments, "--data.root", str(devkit / "VOCdevkit"), "--data.classes", classes,
        "--data.train", "[VOC2012/train]", "--data.batch_size", "2",
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
    assert type(again).__name__ == arguments[1]
