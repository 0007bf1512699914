"""Every config trains for two steps on generated data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import cli.parser
from callbacks.metrics_file import read_metrics
from datamodules.synthetic.mpii import write_mpii
from datamodules.synthetic.style_images import write_style_images
from datamodules.synthetic.voc_segmentation import write_voc_segmentation
from lightning_modules.components.networks import build_network
from tests.command import CELLS, QUICK, ROOT
from tests.datamodules.pose.test_lsp import write as write_lsp

SHORT = [
    "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1",
    "--trainer.num_sanity_val_steps", "0", "--trainer.log_every_n_steps", "1", "--trainer.check_val_every_n_epoch", "1",
    "--trainer.enable_checkpointing", "false",
]  # fmt: skip


def configs(case_study: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / case_study).glob("*.yaml"))


def read_config(case_study: str, config: str) -> dict[str, Any]:
    text: dict[str, Any] = yaml.safe_load((ROOT / "configs" / case_study / f"{config}.yaml").read_text())
    assert text["experiment"] == config
    return text


def train(case_study: str, config: str, *options: str) -> tuple[Path, list[dict[str, float]], list[float]]:
    """Train a config for two steps; return the run's folder, the rows of its metrics.csv and the losses."""
    path = ROOT / "configs" / case_study / f"{config}.yaml"
    cli.parser.run(["fit", "--config", str(path), *QUICK, *SHORT, *options])
    (run,) = Path("runs", config).iterdir()
    rows = read_metrics(run / "metrics.csv")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert all(loss == loss for loss in losses)
    return run, rows, losses


# Networks that refuse 64 pixels, and their smallest side.
SMALL_INPUTS = {"inception_v3_imagenet": "299", "alexnet2012_imagenet": "227", "inception_v3_food101": "299"}


@pytest.mark.parametrize("config", ["yolo_v1_voc", "yolo_v1_bccd", "yolo_v2_voc", "yolo_v2_bccd"])
def test_yolo_trains_without_difficult_objects(config: str) -> None:
    """As darknet's scripts/voc_label.py, which does not write them to the label files."""
    assert read_config("detection", config)["data"]["init_args"]["train_difficult"] is False


@pytest.mark.parametrize("config", configs("classification"))
def test_every_config_trains_on_generated_data(config: str, roots: dict[str, Path], tmp_path: Path) -> None:
    text = read_config("classification", config)
    own_size = "cifar" in config or "fer2013" in config or config == "demo"
    side = SMALL_INPUTS.get(config, "64")
    size = [] if own_size else ["--data.image_size", side, "--data.eval_crop_size", side, "--data.resize", "320"]
    weights: list[str] = []
    if text["model"]["init_args"].get("weights"):  # in place of torchvision's: the same network, for 1000 classes
        weights = ["--model.weights", str(tmp_path / "weights.pth")]
        torch.save(build_network(text["model"]["init_args"]["backbone"], 1000).state_dict(), weights[1])
    _, rows, _ = train(
        "classification", config, *size, *weights, "--data.root", str(roots[text["data"]["class_path"]]),
        "--data.batch_size", "4", "--data.eval_batch_size", "4",
    )  # fmt: skip
    assert any(("val/mean_macro_f1" if "yummly" in config else "val/top1") in row for row in rows)


SMALL_IMAGES = ["--data.image_size", "[96, 160]"]


FEW_TEST_PROPOSALS = ["--model.rpn_pre_nms_top_n_test", "200", "--model.rpn_post_nms_top_n_test", "20"]
FEW_PROPOSALS = [
    *FEW_TEST_PROPOSALS, "--model.rpn_pre_nms_top_n_train", "200", "--model.rpn_post_nms_top_n_train", "50",
]  # fmt: skip


SMALL_DETECTORS = {
    "yolo_v1_voc": ["--model.hidden_units", "64"],
    # Untrained, every window is an object, and merging takes its time.
    "overfeat_bccd": ["--model.top_k", "20"],
    "overfeat_voc": ["--model.top_k", "20"],
    "sliding_window_bccd": ["--model.detections_per_image", "20"],
    **{
        f"faster_rcnn_{name}": [*SMALL_IMAGES, *FEW_PROPOSALS, "--model.rois_per_image", "8"]
        for name in ("voc", "resnet101_voc", "fpn_voc")
    },
    "fast_rcnn_voc": [*SMALL_IMAGES, "--model.rois_per_image", "8"],
}


@pytest.mark.parametrize("config", configs("detection"))
def test_every_detector_trains_on_generated_data(config: str, devkit: Path, request: pytest.FixtureRequest) -> None:
    text = read_config("detection", config)
    narrow = ["--model.width_multiplier", "0.1", *CELLS] if config.endswith("_voc") else []
    weights = ["--model.weights", "null"] if text["model"]["init_args"].get("weights") else []
    if config.startswith(("fast_rcnn", "rcnn")):
        narrow += ["--data.proposals", request.getfixturevalue("proposals")]
    run, rows, losses = train(
        "detection", config, *narrow, *SMALL_DETECTORS.get(config, []), *weights, "--data.root", str(devkit),
        "--data.batch_size", "4", "--data.eval_batch_size", "4", "--trainer.accumulate_grad_batches", "1",
    )  # fmt: skip
    assert len(losses) == 2
    assert list(run.glob("figures/val_step=*.png"))
    if text["model"]["class_path"] == "RPN":
        assert any("val/recall_300" in row for row in rows)
        return
    assert any("val/map" in row for row in rows)
    assert (run / "per_class_ap_val.csv").read_text().count("\n") == 4
    assert list(run.glob("figures/val_precision_recall_step=*.png"))


# What makes the full networks small; a narrow variant for real data is small as it is.
UNTRAINED = ["--model.weights", "null", "--model.width_multiplier", "0.1"]


SMALL_SEGMENTERS = {
    "deconvnet_camvid": ["--data.crop_size", "160"],
    "deconvnet_stage1_voc": ["--model.weights", "null", "--model.width_multiplier", "0.02", "--data.crop_size", "224"],
    "deconvnet_stage2_voc": ["--model.weights", "null", "--model.width_multiplier", "0.02", "--data.crop_size", "224",
                             "--model.inference", "image", "--data.crops", "objects", "--data.proposals", "null"],
    "patch_classifier_voc": [*UNTRAINED, "--model.patch_size", "32"],
    "deeplab_largefov_voc": UNTRAINED,
    "deeplab_v2_resnet101_voc": UNTRAINED,
    "deeplab_v3_voc": UNTRAINED,
    "fcn32s_voc": UNTRAINED,
    "fcn16s_voc": UNTRAINED,
    "fcn8s_voc": UNTRAINED,
    "fcn8s_atonce_voc": UNTRAINED,
    "mask_rcnn_voc": [*UNTRAINED, "--model.freeze_backbone", "false",
                      "--data.image_size", "[96, 160]", *FEW_PROPOSALS],
    "mask_rcnn_synthetic": FEW_TEST_PROPOSALS,
}  # fmt: skip


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A devkit with masks, 12 training and 4 validation images with the ids 0 to 3."""
    folder = tmp_path_factory.mktemp("masks")
    write_voc_segmentation(str(folder), classes=3, train=12, val=4, size=64)
    (folder / "classes.txt").write_text("sky\nbuilding\npole\nroad\n")
    return folder


@pytest.mark.parametrize("config", configs("segmentation"))
def test_every_segmentation_config_trains_on_generated_data(config: str, masks: Path) -> None:
    text = read_config("segmentation", config)
    instances = text["data"]["class_path"] == "VOCInstance"
    options = SMALL_SEGMENTERS.get(config, [])
    if instances:
        options = [*options, "--data.classes", "[disc, square, triangle]"]
    else:
        options = ["--data.crop_size", "64", *options, "--data.classes", str(masks / "classes.txt")]
    run, rows, losses = train(
        "segmentation", config, *options, "--data.root", str(masks / "VOCdevkit"),
        "--data.train", "[VOC2012/train]", "--data.batch_size", "4", "--data.eval_batch_size", "4",
    )  # fmt: skip
    assert len(losses) == 2
    assert any(("val/apr_50" if instances else "val/miou") in row for row in rows)
    assert list(run.glob("figures/val_step=*.png"))
    table = "per_class_ap_val.csv" if instances else "per_class_iou_val.csv"
    assert (run / table).read_text().count("\n") == (4 if instances else 5)


NARROW_REGRESSORS = ["--model.width_multiplier", "0.02", "--model.input_size", "64", "--data.image_size", "72",
                     "--model.stage_epochs", "[1, 1, 1]", "--trainer.max_epochs", "3"]  # fmt: skip


SMALL_POSES = {
    "orientation_solids": ["--data.train_size", "64", "--data.val_size", "32"],
    "stacked_hourglass_mpii": ["--model.channels", "8", "--model.num_stacks", "2", "--data.image_size", "64"],
    "deeppose_mpii": NARROW_REGRESSORS,
    "deeppose_lsp": NARROW_REGRESSORS,
    "deeppose_synthetic": NARROW_REGRESSORS,
    "keypoint_rcnn_mpii": [*UNTRAINED, "--model.freeze_backbone", "false",
                           "--data.image_size", "[96, 160]", *FEW_PROPOSALS],
    "keypoint_rcnn_synthetic": FEW_TEST_PROPOSALS,
}  # fmt: skip


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn people in MPII's layout, and in that of LSP and LSPET."""
    folder = tmp_path_factory.mktemp("people")
    write_mpii(str(folder), train=8, val=4, size=64)
    joints = np.random.default_rng(0).uniform(1, 40, (2000, 14, 3))
    for name, count, extended in (("lsp", 300, False), ("lsp_dataset", 2000, False), ("lspet_dataset", 4, True)):
        write_lsp(folder / name, joints[:count], extended)
    return folder


@pytest.mark.parametrize("config", configs("pose"))
def test_every_pose_config_trains_on_generated_data(config: str, people: Path) -> None:
    text = read_config("pose", config)
    options = [*SMALL_POSES.get(config, []), "--data.batch_size", "4"]
    if text["data"]["class_path"] != "RenderedSolids":
        options += ["--data.root", str(people)]
    run, rows, losses = train("pose", config, *options, "--data.eval_batch_size", "4")
    stages = len(text["model"]["init_args"].get("stage_epochs", [1]))
    assert len(losses) == 2 * stages
    metric = text["model"]["init_args"].get("metric", "pckh")
    of = "val/median_error" if config.startswith("orientation") else f"val/{metric}/total"
    assert any(of in row for row in rows)
    assert list(run.glob("figures/val_step=*.png"))
    assert (run / f"per_joint_{metric}_val.csv").exists() or config.startswith("orientation")


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("styles")
    write_style_images(str(folder), contents=4, styles=2, size=64)
    return folder


@pytest.mark.parametrize("config", configs("style"))
def test_every_style_config_trains_on_generated_data(config: str, styles: Path) -> None:
    text = read_config("style", config)
    content, style = (str(min((styles / name).iterdir())) for name in ("content", "style"))
    folders = text["data"]["class_path"] == "StyleImages"
    options = ["--data.content", str(styles / "content") if folders else content, "--data.image_size", "96"]
    if config == "neural_style":
        options += ["--data.style", style]
    elif config.startswith(("adain", "style_prediction")):
        options += ["--data.style", str(styles / "style"), "--data.image_size", "32", "--data.resize", "null"]
        options += ["--data.batch_size", "2"]
        if config == "style_prediction":
            options += ["--model.predictor_weights", "null"]
    elif config == "inversion_network":
        options += ["--data.batch_size", "2"]
    elif config.startswith("fast_style"):
        options += ["--model.style", style, "--model.width_multiplier", "0.1"]
        options += ["--data.batch_size", "2", "--data.resize", "null"]
    run, rows, losses = train("style", config, "--model.weights", "random", *options)
    assert len(losses) == 2
    assert any("val/loss" in row or "val/psnr" in row for row in rows)
    assert list(run.glob("figures/val_step=*.png"))


# One config of each system; those of `ImagePair` always have a batch of one.
SYSTEMS = {
    "classification": ("demo", "mini_xception_fer2013", "cuisinenet_yummly28k"),
    "detection": (
        "fast_rcnn_bccd", "faster_rcnn_bccd", "overfeat_bccd", "rcnn_bccd", "rpn_bccd", "sliding_window_bccd",
        "ssd300_bccd", "yolo_v1_bccd", "yolo_v2_bccd",
    ),
    "segmentation": (
        "deconvnet_stage1_voc", "deeplab_largefov_voc", "deeplab_v3_camvid", "encoder_decoder_camvid", "fcn8s_camvid",
        "mask_rcnn_synthetic", "patch_classifier_camvid",
    ),
    "pose": ("orientation_solids", "stacked_hourglass_mpii", "deeppose_synthetic", "keypoint_rcnn_synthetic"),
    "style": ("adain_cpu", "fast_style_cpu", "inversion_network", "style_prediction_cpu"),
}  # fmt: skip
CONFIG_TESTS = {
    "classification": (test_every_config_trains_on_generated_data, ("roots", "tmp_path")),
    "detection": (test_every_detector_trains_on_generated_data, ("devkit", "request")),
    "segmentation": (test_every_segmentation_config_trains_on_generated_data, ("masks",)),
    "pose": (test_every_pose_config_trains_on_generated_data, ("people",)),
    "style": (test_every_style_config_trains_on_generated_data, ("styles",)),
}
# These normalize maps of one pixel.
REFUSED = {"deconvnet_stage1_voc", "deeplab_v3_camvid", "stacked_hourglass_mpii"}


def test_the_systems_are_complete() -> None:
    def classes(chosen: dict[str, Any]) -> set[str]:
        texts = [read_config(case_study, config) for case_study in chosen for config in chosen[case_study]]
        return {text["model"]["class_path"] for text in texts if text["data"]["class_path"] != "ImagePair"}

    assert classes(SYSTEMS) == classes({case_study: configs(case_study) for case_study in SYSTEMS})


@pytest.mark.parametrize(
    ("case_study", "config"), [(case_study, config) for case_study in SYSTEMS for config in SYSTEMS[case_study]]
)
def test_every_system_trains_on_one_sample_or_refuses_it(
    case_study: str,
    config: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A batch of one sample gives a finite loss, or one line."""
    losses: list[float] = []
    train_config = train

    def train_on_one(*arguments: str) -> tuple[Path, list[dict[str, float]], list[float]]:
        found = train_config(*arguments, "--data.batch_size", "1")
        losses.extend(found[2])
        return found

    monkeypatch.setattr(sys.modules[__name__], "train", train_on_one)
    test, fixtures = CONFIG_TESTS[case_study]
    arguments = [request if name == "request" else request.getfixturevalue(name) for name in fixtures]
    if config in REFUSED:
        with pytest.raises(SystemExit):
            test(config, *arguments)
        assert "error: batch_size: expected 2 or more training " in capsys.readouterr().err
    else:
        test(config, *arguments)
        assert losses
        assert np.isfinite(losses).all()


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_weights_are_chosen_by_name(path: Path) -> None:
    """DEFAULT is another recipe's weights since torchvision 0.13; the references start from the first ones."""
    text = path.read_text()
    assert "eights DEFAULT" not in text
    assert "eights: DEFAULT" not in text
    assert "IMAGENET1K_V2" not in text


@pytest.mark.parametrize(
    ("config", "steps", "milestones"),
    [
        # Girshick 2015, section 5.3, and the solver of py-faster-rcnn: every 30,000 steps.
        ("fast_rcnn_voc", 60_000, [30_000]),
        ("faster_rcnn_voc", 110_000, [80_000]),
        ("faster_rcnn_resnet101_voc", 110_000, [80_000]),
    ],
)
def test_schedules_are_documented_ones(config: str, steps: int, milestones: list[int]) -> None:
    text = read_config("detection", config)
    assert text["trainer"]["max_steps"] == steps
    fractions = text["model"]["init_args"]["schedule"]["init_args"]["milestones"]
    assert [round(fraction * steps) for fraction in fractions] == milestones


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*rcnn*.yaml")), ids=lambda path: path.stem)
def test_pyramids_train_on_anchors_that_cross_the_border(path: Path) -> None:
    """Lin et al. 2017, section 5.1; Ren et al. 2015 ignore them."""
    model = yaml.safe_load(path.read_text())["model"]
    options = model["init_args"]
    branched = model["class_path"] in ("MaskRCNN", "KeypointRCNN")  # whose default is true
    if options.get("backbone", "").endswith("_fpn"):
        assert options.get("allow_border_anchors", branched) is True
    elif path.stem in ("faster_rcnn_voc", "faster_rcnn_resnet101_voc"):
        assert "allow_border_anchors" not in options
