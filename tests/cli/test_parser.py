"""train.py: precedence of options, answers to mistakes, run folders, and every config on generated data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import cli.parser
from callbacks.metrics_file import read_metrics
from datamodules.classification.fer2013 import EMOTIONS
from datamodules.synthetic.fer2013 import write_fer2013
from datamodules.synthetic.food101 import write_food101
from datamodules.synthetic.imagenet import write_imagenet
from datamodules.synthetic.mpii import write_mpii
from datamodules.synthetic.places365 import write_places365
from datamodules.synthetic.segmentation import write_voc_segmentation
from datamodules.synthetic.style_images import write_style_images
from datamodules.synthetic.voc import write_voc
from datamodules.synthetic.yummly import write_yummly
from lightning_modules.components.networks import build_network
from tests.callbacks.wandb_reader import read_run
from tests.datamodules.pose.test_lsp import write as write_lsp
from tests.datamodules.test_video import write_video
from tests.lightning_modules.detection.test_resume import write_any_proposals

ROOT = Path(__file__).resolve().parents[2]
QUICK = [
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--wandb.mode", "disabled", "--data.num_workers", "0",
]  # fmt: skip
TINY = [
    "--model", "ImageClassifier", "--model.network", "resnet20_cifar", "--model.width", "4",
    "--data", "ImageFolder", "--data.image_size", "16", "--data.batch_size", "8",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight training and four validation images."""
    folder = tmp_path_factory.mktemp("data")
    write_imagenet(str(folder), classes=3, train=8, val=4, size=32)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.parser.run(
            ["fit", *TINY, *QUICK, "--data.root", str(data), "--trainer.max_epochs", "2", "--experiment", "tiny"]
        )
    (run,) = (folder / "runs" / "tiny").iterdir()
    return run


def config_of(*args: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``--print_config`` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.parser.run([*args, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command line is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.parser.run(args)
    assert stop.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['train.py', '--help']\nimport train\n"
    code += "try: train.main()\nfinally: assert not {'torch', 'pytorch_lightning', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("fit", "validate", "test", "predict", "--config", "--resume"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("args", "found", "nearest"),
    [
        (["--trainer.max_epoch", "3"], "trainer.max_epoch", "trainer.max_epochs"),
        (["--trainer.acumulate_grad_batches=3"], "trainer.acumulate_grad_batches", "trainer.accumulate_grad_batches"),
        (["--model", "ImageClasifier"], "ImageClasifier", "ImageClassifier"),
        (["--data", "ImageNt"], "ImageNt", "ImageNet"),
        (["--model.netwrk", "vgg16"], "netwrk", "network"),
        (["--data.batchsize", "3"], "batchsize", "batch_size"),
        (["--model.optimizer", "AdmW"], "AdmW", "AdamW"),
        (["--model.optimizer.momentm", "0.1"], "momentm", "momentum"),
        (["--model.schedule", "Cosin"], "Cosin", "Cosine"),
        (["--trainer.max_epochs", "many"], "many", "int or null"),
        (["--data.batch_size", "many"], "many", "int"),
        (["--config", "nowhere.yaml"], "nowhere.yaml", "no such file"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    args: list[str], found: str, nearest: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(["fit", *TINY, "--data.root", str(data), *args], capsys)
    assert found in line
    assert nearest in line
    assert len(line) < 300


def test_a_mistake_in_yaml(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, found, nearest in (
        ("trainer: {max_epoch: 3}", "trainer.max_epoch", "trainer.max_epochs"),
        ("modle: {class_path: ImageClassifier}", "modle", "model"),
        ("model: {class_path: ImageClassifier, init_args: {widht: 4}}", "widht", "width"),
        ("trainer: [3", "YAML", "line 1"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        line = refusal(["fit", *TINY, "--data.root", str(data), "--config", "bad.yaml"], capsys)
        assert found in line
        assert nearest in line


def test_a_command_mistyped(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean fit?" in refusal(["fti"], capsys)


def test_missing_parts(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data is missing" in refusal(["fit", "--model", "ImageClassifier"], capsys)
    assert "--model is missing" in refusal(["fit", "--data", "ImageNet", "--data.root", str(data)], capsys)
    assert "--data.root" in refusal(["fit", "--model", "ImageClassifier", "--data", "ImageNet"], capsys)
    assert "ImageFolder" in refusal(["fit", *TINY, *QUICK, "--data.root", str(tmp_path / "nothing")], capsys)


def test_run_folder(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "pictures"} <= names
    files = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert files == ["best.ckpt", "step=00000003.ckpt", "step=00000006.ckpt"]
    rows = read_metrics(trained / "metrics.csv")
    assert {"val/top1", "val/loss"} <= {name for row in rows for name in row}
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["num_classes"] == 3


def test_the_saved_config_repeats_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    printed = config_of("fit", "--config", str(trained / "config.yaml"), capsys=capsys)
    assert saved["model"] == printed["model"]
    assert saved["data"] == printed["data"]
    assert saved["trainer"]["max_epochs"] == printed["trainer"]["max_epochs"] == 2


def test_precedence(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Command line beats YAML beats checkpoint beats the defaults, inside a run folder and for a lone file."""
    alone = tmp_path / "alone.ckpt"
    shutil.copy(trained / "checkpoints" / "best.ckpt", alone)
    (tmp_path / "over.yaml").write_text(
        "model: {class_path: ImageClassifier, init_args: {label_smoothing: 0.2, head_lr_scale: 2.0}}"
    )
    over = ["--config", "over.yaml", "--model.label_smoothing", "0.3"]
    for checkpoint in (alone, trained / "checkpoints" / "best.ckpt"):
        from_checkpoint = config_of("fit", "--ckpt_path", str(checkpoint), capsys=capsys)
        assert from_checkpoint["model"]["init_args"]["width"] == 4
        assert from_checkpoint["data"]["init_args"]["image_size"] == 16
        model = config_of("fit", "--ckpt_path", str(checkpoint), *over, capsys=capsys)["model"]["init_args"]
        assert (model["width"], model["head_lr_scale"], model["label_smoothing"]) == (4, 2.0, 0.3)


def test_an_explicit_flag_reaches_the_resumed_model(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the printed configuration: the model that trains on has the flag's value."""
    seen = []
    monkeypatch.setattr(cli.parser.VisionCLI, "fit", lambda self, model, **_: seen.append(model), raising=False)
    cli.parser.run(["fit", "--resume", str(trained), "--model.label_smoothing", "0.3"])
    assert seen[0].label_smoothing == 0.3
    assert seen[0].hparams.width == 4


def test_resume_goes_on_in_place(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny" / trained.name
    shutil.copytree(trained, run)
    cli.parser.run(["fit", "--ckpt_path", "last", "--experiment", "tiny", "--trainer.max_epochs", "3"])
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == [trained.name]
    assert (run / "checkpoints" / "step=00000009.ckpt").is_file()
    before, after = read_metrics(trained / "metrics.csv"), read_metrics(run / "metrics.csv")
    assert after[: len(before)] == before
    assert [row["epoch"] for row in after if "val/top1" in row] == [0, 1, 2]


def test_a_complete_run_says_so(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, tmp_path / "run")
    cli.parser.run(["fit", "--resume", "run"])
    assert "this run was complete at step 6" in capsys.readouterr().out


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs" / "empty" / "2026").mkdir(parents=True)
    for args in (
        ["--ckpt_path", "last", "--experiment", "empty"],
        ["--resume", "last", "--experiment", "empty"],
        ["--resume", "runs/empty/2026"],
        ["--resume", "runs/nowhere"],
    ):
        assert "nothing to resume" in refusal(["fit", *TINY, *args], capsys)
    assert "--experiment" in refusal(["fit", *TINY, "--ckpt_path", "last"], capsys)
    assert "no such checkpoint" in refusal(["test", "--ckpt_path", "nowhere.ckpt"], capsys)
    assert "URL" in refusal(["fit", *TINY, "--ckpt_path", "https://example.org/model.ckpt"], capsys)


def test_a_damaged_checkpoint_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = run / "checkpoints" / "step=00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:-2000])
    newest.touch()
    line = refusal(["fit", "--resume", str(run)], capsys)
    assert "step=00000006.ckpt: truncated" in line
    assert "step=00000003.ckpt is sound" in line


def test_validate_and_test_measure_a_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = str(trained / "checkpoints" / "best.ckpt")
    for command, name in (("validate", "val/top1"), ("test", "test/top1")):
        cli.parser.run([command, "--ckpt_path", best])
        (run,) = Path("runs/tiny").glob(f"*_{command}")
        (row,) = read_metrics(run / "metrics.csv")
        best_row = max(read_metrics(trained / "metrics.csv"), key=lambda r: r.get("val/top1", -1))
        assert row[name] == best_row["val/top1"]


def test_predict_needs_only_the_checkpoint(trained: Path, data: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / "alone.ckpt")
    cli.parser.run(
        ["predict", *QUICK, "--ckpt_path", "alone.ckpt", "--data.root", "null", "--data.images", str(data / "val")]
    )
    (run,) = Path("runs").glob("*/*_predict")
    assert (run / "predictions.json").is_file()
    assert len((run / "predictions.csv").read_text().splitlines()) == 1 + 12
    assert "disk" in (run / "predictions.csv").read_text()


def test_wandb_gets_everything(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from the offline run: metrics, configuration, images, tables, learning rate, throughput."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    quick = [word for word in QUICK if word not in ("--wandb.mode", "disabled")]
    cli.parser.run([
        "fit", *TINY, *quick, "--data.root", str(data), "--trainer.max_epochs", "2", "--experiment", "logged",
        "--trainer.log_every_n_steps", "1", "--wandb.mode", "offline",
    ])  # fmt: skip
    (run,) = Path("runs/logged").iterdir()
    (offline,) = (run / "wandb").glob("offline-run-*")
    logged = read_run(offline)
    names = {name for row in logged["history"] for name in row}
    assert {"train/loss", "val/top1", "val/loss", "lr-SGD", "time/images_per_second"} <= names
    assert {"val/pictures", "val/predictions", "val/confusion_matrix"} <= {name.split(".")[0] for name in names}
    in_file = {row["step"]: row["val/top1"] for row in read_metrics(run / "metrics.csv") if "val/top1" in row}
    in_wandb = {row["trainer/global_step"]: row["val/top1"] for row in logged["history"] if "val/top1" in row}
    assert in_file == in_wandb
    assert logged["config"]["model"]["init_args"]["width"] == 4
    assert list(offline.glob("files/media/**/*.png"))


# The networks that refuse 64 pixels, and the least that they take.
SMALL_INPUTS = {"inception_v3_imagenet": "299", "alexnet2012_imagenet": "227", "inception_v3_food101": "299"}


@pytest.fixture(scope="module")
def roots(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A root for each datamodule that a config names."""
    roots = {"ImageFolder": data, "ImageNet": data}
    for name, write in (("Food101", write_food101), ("Places365", write_places365)):
        roots[name] = tmp_path_factory.mktemp(name)
        write(str(roots[name]), classes=3, train=4, val=2, size=32)
    roots["FER2013"] = tmp_path_factory.mktemp("FER2013")
    write_fer2013(str(roots["FER2013"]), train=4, val=2)
    roots["Yummly28K"] = tmp_path_factory.mktemp("Yummly28K")
    write_yummly(str(roots["Yummly28K"]), classes=3, train=10, val=4, size=32)
    return roots


@pytest.mark.parametrize("config", sorted(path.stem for path in (ROOT / "configs" / "classification").glob("*.yaml")))
def test_every_config_trains_on_generated_data(config: str, roots: dict[str, Path], tmp_path: Path) -> None:
    text = yaml.safe_load((ROOT / "configs" / "classification" / f"{config}.yaml").read_text())
    assert text["experiment"] == config
    own_size = "cifar" in config or "fer2013" in config or config == "demo"
    side = SMALL_INPUTS.get(config, "64")
    size = [] if own_size else ["--data.image_size", side, "--data.eval_crop", side, "--data.resize", "320"]
    weights: list[str] = []
    if text["model"]["init_args"].get("weights"):  # in place of torchvision's: the same network, for 1000 classes
        weights = ["--model.weights", str(tmp_path / "weights.pth")]
        torch.save(build_network(text["model"]["init_args"]["network"], 1000).state_dict(), weights[1])
    cli.parser.run([
        "fit", "--config", str(ROOT / "configs" / "classification" / f"{config}.yaml"), *QUICK, *size, *weights,
        "--data.root", str(roots[text["data"]["class_path"]]), "--data.batch_size", "4",
        "--data.eval_batch_size", "4", "--trainer.max_epochs", "1",
        "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.num_sanity_val_steps", "0",
        "--trainer.log_every_n_steps", "1", "--trainer.enable_checkpointing", "false",
    ])  # fmt: skip
    (run,) = Path("runs", config).iterdir()
    rows = read_metrics(run / "metrics.csv")
    assert all(row["train/loss"] == row["train/loss"] for row in rows if "train/loss" in row)
    assert any(("val/mean_macro_f1" if "yummly" in config else "val/top1") in row for row in rows)


# What makes the full networks small; a narrow variant for real data is small as it is.
SMALL_PICTURES = ["--data.image_size", "[96, 160]"]
FEW_REGIONS = [
    "--model.train_proposals", "[200, 50]", "--model.test_proposals", "[200, 20]", "--model.regions", "8",
]  # fmt: skip
SMALL_DETECTORS = {
    "yolo_v1_voc": ["--model.hidden", "64"],
    # Untrained, every window is an object, and merging takes its time.
    "overfeat_bccd": ["--model.top", "20"],
    "overfeat_voc": ["--model.top", "20"],
    "sliding_window_bccd": ["--model.keep", "20"],
    **{f"faster_rcnn_{name}": [*SMALL_PICTURES, *FEW_REGIONS] for name in ("voc", "resnet101_voc", "fpn_voc")},
    "fast_rcnn_voc": [*SMALL_PICTURES, "--model.regions", "8"],
}


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC2007 and VOC2012, 12 training and 6 validation images each, of the classes that BCCD's configs name."""
    folder = tmp_path_factory.mktemp("VOC")
    names = write_voc(str(folder), classes=3, train=4, val=2, size=64)
    for path in folder.rglob("*.xml"):
        text = path.read_text()
        for name, cell in zip(names, ("WBC", "RBC", "Platelets"), strict=True):
            text = text.replace(f"<name>{name}</name>", f"<name>{cell}</name>")
        path.write_text(text)
    return folder / "VOCdevkit"


@pytest.fixture(scope="module")
def proposals(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("proposals"))
    write_any_proposals(devkit, folder)
    return folder


CELLS = ["--data.classes", "[WBC, RBC, Platelets]"]


@pytest.mark.parametrize("config", sorted(path.stem for path in (ROOT / "configs" / "detection").glob("*.yaml")))
def test_every_detector_trains_on_generated_data(config: str, devkit: Path, request: pytest.FixtureRequest) -> None:
    path = ROOT / "configs" / "detection" / f"{config}.yaml"
    text = yaml.safe_load(path.read_text())
    assert text["experiment"] == config
    narrow = ["--model.width", "0.1", *CELLS] if config.endswith("_voc") else []
    weights = ["--model.weights", "null"] if text["model"]["init_args"].get("weights") else []
    if config.startswith(("fast_rcnn", "rcnn")):
        narrow += ["--data.proposals", request.getfixturevalue("proposals")]
    cli.parser.run([
        "fit", "--config", str(path), *QUICK, *narrow, *SMALL_DETECTORS.get(config, []), *weights,
        "--data.root", str(devkit), "--data.batch_size", "4", "--data.eval_batch_size", "4",
        "--trainer.max_epochs", "1",
        "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.num_sanity_val_steps", "0",
        "--trainer.log_every_n_steps", "1", "--trainer.check_val_every_n_epoch", "1",
        "--trainer.accumulate_grad_batches", "1",
        "--trainer.enable_checkpointing", "false",
    ])  # fmt: skip
    (run,) = Path("runs", config).iterdir()
    rows = read_metrics(run / "metrics.csv")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert all(loss == loss for loss in losses)
    assert list(run.glob("pictures/val_step=*.png"))
    if text["model"]["class_path"] == "RPN":
        assert any("val/recall_300" in row for row in rows)
        return
    assert any("val/map" in row for row in rows)
    assert (run / "per_class_val.csv").read_text().count("\n") == 4
    assert list(run.glob("pictures/val_precision_recall_step=*.png"))


# --- segmentation -----------------------------------------------------------------------------------------------------

# What makes the full networks small; a narrow variant for real data is small as it is.
UNTRAINED = ["--model.weights", "null", "--model.width", "0.1"]
SMALL_SEGMENTERS = {
    "deconvnet_camvid": ["--data.crop_size", "160"],
    "deconvnet_stage1_voc": ["--model.weights", "null", "--model.width", "0.02", "--data.crop_size", "224"],
    "deconvnet_stage2_voc": ["--model.weights", "null", "--model.width", "0.02", "--data.crop_size", "224",
                             "--model.inference", "image", "--data.crops", "objects", "--data.proposals", "null"],
    "patch_classifier_voc": [*UNTRAINED, "--model.patch", "32"],
    "deeplab_largefov_voc": UNTRAINED,
    "deeplab_v2_resnet101_voc": UNTRAINED,
    "deeplab_v3_voc": UNTRAINED,
    "fcn32s_voc": UNTRAINED,
    "fcn16s_voc": UNTRAINED,
    "fcn8s_voc": UNTRAINED,
    "fcn8s_atonce_voc": UNTRAINED,
    "mask_rcnn_voc": [*UNTRAINED, "--model.frozen", "false", "--model.eval_size", "[96, 160]",
                      "--data.image_size", "[96, 160]", "--model.train_proposals", "[200, 50]",
                      "--model.test_proposals", "[200, 20]"],
    "mask_rcnn_synthetic": ["--model.test_proposals", "[200, 20]"],
}  # fmt: skip


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A devkit with masks, 12 training and 4 validation images with the ids 0 to 3."""
    folder = tmp_path_factory.mktemp("masks")
    write_voc_segmentation(str(folder), classes=3, train=12, val=4, size=64)
    (folder / "classes.txt").write_text("sky\nbuilding\npole\nroad\n")
    return folder


@pytest.mark.parametrize("config", sorted(path.stem for path in (ROOT / "configs" / "segmentation").glob("*.yaml")))
def test_every_segmentation_config_trains_on_generated_data(config: str, masks: Path) -> None:
    path = ROOT / "configs" / "segmentation" / f"{config}.yaml"
    text = yaml.safe_load(path.read_text())
    assert text["experiment"] == config
    instances = text["data"]["class_path"] == "VOCInstance"
    options = SMALL_SEGMENTERS.get(config, [])
    if instances:
        options = [*options, "--data.classes", "[disc, square, triangle]"]
    else:
        options = ["--data.crop_size", "64", *options, "--data.classes", str(masks / "classes.txt")]
    cli.parser.run([
        "fit", "--config", str(path), *QUICK, *options, "--data.root", str(masks / "VOCdevkit"),
        "--data.train", "[VOC2012/train]", "--data.batch_size", "4", "--data.eval_batch_size", "4",
        "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1",
        "--trainer.num_sanity_val_steps", "0", "--trainer.log_every_n_steps", "1",
        "--trainer.check_val_every_n_epoch", "1", "--trainer.enable_checkpointing", "false",
    ])  # fmt: skip
    (run,) = Path("runs", config).iterdir()
    rows = read_metrics(run / "metrics.csv")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert all(loss == loss for loss in losses)
    assert any(("val/apr_50" if instances else "val/miou") in row for row in rows)
    assert list(run.glob("pictures/val_step=*.png"))
    table = "per_class_val.csv" if instances else "per_class_iou_val.csv"
    assert (run / table).read_text().count("\n") == (4 if instances else 5)


# --- pose -------------------------------------------------------------------------------------------------------------

NARROW_REGRESSORS = ["--model.width", "0.02", "--model.input_size", "64", "--data.image_size", "72",
                     "--model.stage_epochs", "[1, 1, 1]", "--trainer.max_epochs", "3"]  # fmt: skip
SMALL_POSES = {
    "orientation_solids": ["--data.train", "64", "--data.val", "32"],
    "stacked_hourglass_mpii": ["--model.features", "8", "--model.stacks", "2", "--data.image_size", "64"],
    "deeppose_mpii": NARROW_REGRESSORS,
    "deeppose_lsp": NARROW_REGRESSORS,
    "deeppose_synthetic": NARROW_REGRESSORS,
    "keypoint_rcnn_mpii": [*UNTRAINED, "--model.frozen", "false", "--model.eval_size", "[96, 160]",
                           "--data.image_size", "[96, 160]", "--model.train_proposals", "[200, 50]",
                           "--model.test_proposals", "[200, 20]"],
    "keypoint_rcnn_synthetic": ["--model.test_proposals", "[200, 20]"],
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


@pytest.mark.parametrize("config", sorted(path.stem for path in (ROOT / "configs" / "pose").glob("*.yaml")))
def test_every_pose_config_trains_on_generated_data(config: str, people: Path) -> None:
    path = ROOT / "configs" / "pose" / f"{config}.yaml"
    text = yaml.safe_load(path.read_text())
    assert text["experiment"] == config
    options = ["--trainer.max_epochs", "1", *SMALL_POSES.get(config, []), "--data.batch_size", "4"]
    if text["data"]["class_path"] != "RenderedSolids":
        options += ["--data.root", str(people)]
    cli.parser.run([
        "fit", "--config", str(path), *QUICK, *options, "--data.eval_batch_size", "4",
        "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1",
        "--trainer.num_sanity_val_steps", "0", "--trainer.log_every_n_steps", "1",
        "--trainer.check_val_every_n_epoch", "1", "--trainer.enable_checkpointing", "false",
    ])  # fmt: skip
    (run,) = Path("runs", config).iterdir()
    rows = read_metrics(run / "metrics.csv")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    stages = len(text["model"]["init_args"].get("stage_epochs", [1]))
    assert len(losses) == 2 * stages
    assert all(loss == loss for loss in losses)
    metric = text["model"]["init_args"].get("metric", "pckh")
    of = "val/median_error" if config.startswith("orientation") else f"val/{metric}/total"
    assert any(of in row for row in rows)
    assert list(run.glob("pictures/val_step=*.png"))
    assert (run / f"per_joint_{metric}_val.csv").exists() or config.startswith("orientation")


# --- style ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("styles")
    write_style_images(str(folder), contents=4, styles=2, size=64)
    return folder


@pytest.mark.parametrize("config", sorted(path.stem for path in (ROOT / "configs" / "style").glob("*.yaml")))
def test_every_style_config_trains_on_generated_data(config: str, styles: Path) -> None:
    path = ROOT / "configs" / "style" / f"{config}.yaml"
    text = yaml.safe_load(path.read_text())
    assert text["experiment"] == config
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
        options += ["--model.style", style, "--model.width", "0.1", "--data.batch_size", "2", "--data.resize", "null"]
    cli.parser.run([
        "fit", "--config", str(path), *QUICK, "--model.weights", "random", *options, "--trainer.max_epochs", "1",
        "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1",
        "--trainer.check_val_every_n_epoch", "1", "--trainer.num_sanity_val_steps", "0",
        "--trainer.enable_checkpointing", "false",
    ])  # fmt: skip
    (run,) = Path("runs", config).iterdir()
    rows = read_metrics(run / "metrics.csv")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert all(loss == loss for loss in losses)
    assert any("val/loss" in row or "val/psnr" in row for row in rows)
    assert list(run.glob("pictures/val_step=*.png"))


def test_detections_of_pictures_and_of_a_video(
    devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint alone; boxes lie in the images' own pixels."""
    cli.parser.run([
        "fit", "--model", "YOLOv1", "--model.grid", "2", "--model.input_size", "128", "--model.width", "0.05",
        "--model.hidden", "16", "--model.batch_norm", "true", "--data", "VOCDetection", "--data.image_size", "128",
        "--data.root", str(devkit), *CELLS, *QUICK, "--trainer.max_epochs", "2", "--experiment", "cells",
    ])  # fmt: skip
    (best,) = Path("runs/cells").glob("*/checkpoints/best.ckpt")
    shutil.copy(best, tmp_path / "alone.ckpt")
    pictures = devkit / "VOC2007" / "JPEGImages"
    # No cell is sure of itself after six steps: everything is taken.
    alone = ["predict", *QUICK, "--ckpt_path", "alone.ckpt", "--data.root", "null", "--model.score_threshold", "-1"]
    cli.parser.run([*alone, "--data.images", str(pictures), "--experiment", "pictures"])
    (run,) = Path("runs/pictures").glob("*_predict")
    records = json.loads((run / "predictions.json").read_text())
    assert [record["file"] for record in records] == sorted(str(path) for path in pictures.iterdir())
    found = [(item, record["file"]) for record in records for item in record["detections"]]
    assert {item["class"] for item, _ in found} <= {"WBC", "RBC", "Platelets"}
    corners = torch.tensor([item["box"][2:] for item, _ in found])
    sizes = torch.tensor([Image.open(path).size for _, path in found])
    assert (corners <= sizes + 0.1).all()
    assert (corners > 128).any() or sizes.max() <= 128
    assert len(list((run / "predictions").iterdir())) == len(records)

    write_video(tmp_path / "film.avi", frames=5)
    cli.parser.run([*alone, "--data.images", "film.avi", "--experiment", "film"])
    (run,) = Path("runs/film").glob("*_predict")
    records = json.loads((run / "predictions.json").read_text())
    assert [record["file"] for record in records] == [f"film.avi#{k}" for k in range(5)]
    capture = cv2.VideoCapture(str(run / records[0]["annotated"]))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (5, 10)
    assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 48
    capsys.readouterr()
    assert "expected a video, found nothing there" in refusal([*alone, "--data.images", "nowhere.mp4"], capsys)


def test_predict_finds_the_faces_of_photographs(roots: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A model that was trained on gray faces is given photographs of two people, of one and of nobody."""
    config = str(ROOT / "configs" / "classification" / "mini_xception_fer2013.yaml")
    data = roots["FER2013"]
    cli.parser.run([
        "fit", "--config", config, *QUICK, "--data.root", str(data), "--trainer.max_epochs", "1",
        "--trainer.limit_train_batches", "1", "--trainer.num_sanity_val_steps", "0",
    ])  # fmt: skip
    (best,) = Path("runs/mini_xception_fer2013").glob("*/checkpoints/best.ckpt")
    assert list(best.parent.parent.glob("pictures/val_step=*.png"))
    cli.parser.run(["predict", *QUICK, "--ckpt_path", str(best), "--data.images", str(data / "photographs")])
    (run,) = Path("runs/mini_xception_fer2013").glob("*_predict")
    records = json.loads((run / "predictions.json").read_text())
    assert [len(record["faces"]) for record in records] == [0, 0, 1, 1, 2, 2]
    assert all(face["aligned"] for record in records for face in record["faces"])
    assert records[-1]["faces"][0]["predictions"][0]["class"] in EMOTIONS
    assert "no face found in 2 of 6 images" in capsys.readouterr().out


def test_attributes_are_predicted_from_the_checkpoint_alone(
    roots: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names of attributes, classes and ingredients come from the data in training, from the checkpoint after it."""
    cli.parser.run([
        "fit", "--model", "AttributeClassifier", "--model.network", "resnet20_cifar", "--model.width", "2",
        "--model.channels", "4", "--data", "Yummly28K", "--data.image_size", "16", "--data.ingredients", "5", *QUICK,
        "--data.root", str(roots["Yummly28K"]), "--trainer.max_epochs", "1", "--experiment", "attributes",
    ])  # fmt: skip
    (best,) = Path("runs/attributes").glob("*/checkpoints/best.ckpt")
    assert list(best.parent.parent.glob("pictures/val_step=*.png"))
    shutil.copy(best, tmp_path / "alone.ckpt")
    pictures = str(roots["Yummly28K"] / "Yummly28K" / "images27638")
    cli.parser.run(["predict", *QUICK, "--ckpt_path", "alone.ckpt", "--data.root", "null", "--data.images", pictures])
    (run,) = Path("runs").glob("*/*_predict")
    records = json.loads((run / "predictions.json").read_text())
    assert len(records) == 42
    assert {name: len(items) for name, items in records[0]["attributes"].items()} == {
        "cuisine": 3, "course": 4, "taste": 5,
    }  # fmt: skip
    assert {item["class"] for item in records[0]["attributes"]["cuisine"]} == {"American", "Chinese", "Mexican"}
    assert all(set(record) == {"file", "annotated", "attributes", "ingredients"} for record in records)
    line = refusal(
        [
            "fit",
            "--model",
            "AttributeClassifier",
            "--data",
            "ImageFolder",
            "--data.root",
            str(roots["ImageFolder"]),
            *QUICK,
        ],
        capsys,
    )
    assert "attributes: expected one or more" in line
    line = refusal(["fit", *TINY, "--data", "Yummly28K", "--data.root", str(roots["Yummly28K"]), *QUICK], capsys)
    assert "num_classes: expected 1 or more, found 0" in line
