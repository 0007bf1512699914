"""Precedence of options, run directories, resuming, and what a run logs."""

from __future__ import annotations

import csv
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import cli.parser
from callbacks.metrics_file import read_metrics
from datamodules.classification.fer2013 import FER2013
from datamodules.classification.food101 import Food101
from datamodules.classification.image_folder import ImageFolder
from datamodules.classification.places365 import Places365
from datamodules.classification.yummly import Yummly28K
from datamodules.detection.voc import VOCDetection
from datamodules.pose.lsp import LSP
from datamodules.pose.mpii import MPII
from datamodules.pose.rendered_solids import RenderedSolids
from datamodules.segmentation.voc_semantic import VOCSegmentation
from datamodules.style.style_images import StyleImages
from datamodules.synthetic.imagenet import write_imagenet
from tests.callbacks.wandb_reader import read_run
from tests.command import QUICK, TINY, config_of, refusal


def test_run_folder(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "figures"} <= names
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
    """Command line beats YAML beats checkpoint beats the defaults, inside a run directory and for a lone file."""
    alone = tmp_path / "alone.ckpt"
    shutil.copy(trained / "checkpoints" / "best.ckpt", alone)
    (tmp_path / "over.yaml").write_text(
        "model: {class_path: ImageClassifier, init_args: {label_smoothing: 0.2, head_lr_scale: 2.0}}"
    )
    over = ["--config", "over.yaml", "--model.label_smoothing", "0.3"]
    for checkpoint in (alone, trained / "checkpoints" / "best.ckpt"):
        from_checkpoint = config_of("fit", "--ckpt_path", str(checkpoint), capsys=capsys)
        assert from_checkpoint["model"]["init_args"]["base_channels"] == 4
        assert from_checkpoint["data"]["init_args"]["image_size"] == 16
        model = config_of("fit", "--ckpt_path", str(checkpoint), *over, capsys=capsys)["model"]["init_args"]
        assert (model["base_channels"], model["head_lr_scale"], model["label_smoothing"]) == (4, 2.0, 0.3)


def test_an_explicit_flag_reaches_the_resumed_model(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the printed configuration: the model that trains on has the flag's value."""
    seen = []
    monkeypatch.setattr(cli.parser.VisionCLI, "fit", lambda self, model, **_: seen.append(model), raising=False)
    cli.parser.run(["fit", "--resume", str(trained), "--model.label_smoothing", "0.3"])
    assert seen[0].label_smoothing == 0.3
    assert seen[0].hparams.base_channels == 4


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
    assert "step=00000003.ckpt is intact" in line


def test_validate_and_test_measure_a_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = str(trained / "checkpoints" / "best.ckpt")
    for command, name in (("validate", "val/top1"), ("test", "test/top1")):
        cli.parser.run([command, "--ckpt_path", best])
        (run,) = Path("runs/tiny").glob(f"*_{command}")
        (row,) = read_metrics(run / "metrics.csv")
        best_row = max(read_metrics(trained / "metrics.csv"), key=lambda r: r.get("val/top1", -1))
        assert row[name] == best_row["val/top1"]


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
    assert {"val/figures", "val/predictions", "val/confusion_matrix"} <= {name.split(".")[0] for name in names}
    in_file = {row["step"]: row["val/top1"] for row in read_metrics(run / "metrics.csv") if "val/top1" in row}
    in_wandb = {row["trainer/global_step"]: row["val/top1"] for row in logged["history"] if "val/top1" in row}
    assert in_file == in_wandb
    assert logged["config"]["model"]["init_args"]["base_channels"] == 4
    assert list(offline.glob("files/media/**/*.png"))


def test_one_class_has_tables_and_figures(tmp_path: Path) -> None:
    """The results per class are no scalars of the log."""
    write_imagenet(str(tmp_path / "data"), classes=2, train=4, val=2, size=32)
    for split in ("train", "val"):
        shutil.rmtree(max((tmp_path / "data" / split).iterdir()))
    cli.parser.run(["fit", *TINY, *QUICK, "--data.root", "data", "--trainer.max_epochs", "1", "--experiment", "one"])
    (run,) = (tmp_path / "runs" / "one").iterdir()
    logged = {name for row in read_metrics(run / "metrics.csv") for name in row if name.startswith("val/")}
    assert logged == {"val/top1", "val/mean_class_accuracy", "val/macro_f1", "val/loss"}
    (row,) = csv.DictReader((run / "per_class_val.csv").read_text().splitlines())
    assert (row["count"], row["accuracy"]) == ("2", "1.0")
    assert (run / "figures" / "val_confusion_step=00000001.png").is_file()


def test_pose_without_head_boxes_is_selected_by_pck(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MPII's JSON conversions have no head boxes; PCKh would be nan and keep the first checkpoint."""
    (tmp_path / "images").mkdir()
    (tmp_path / "annot").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("valid", 2)):
        people = []
        for i in range(count):
            name = f"{split}{i}.jpg"
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "images" / name)
            joints = rng.uniform(5, 60, (16, 2)).tolist()
            person = {"image": name, "joints": joints, "joints_vis": [1] * 16, "center": [32, 32], "scale": 0.3}
            people.append(person)
        (tmp_path / "annot" / f"{split}.json").write_text(json.dumps(people))
    model = ["--model", "StackedHourglass", "--model.num_stacks", "1", "--model.channels", "4", "--model.depth", "1"]
    data = ["--data", "MPII", "--data.root", ".", "--data.image_size", "64", "--data.batch_size", "2"]
    cli.parser.run(["fit", *model, *data, *QUICK, "--trainer.max_epochs", "1", "--experiment", "pose"])
    printed = capsys.readouterr().out
    assert "best.ckpt: selected by the maximum of val/pck/total\n" in printed
    assert "(val/pck/total 0." in printed
    (run,) = (tmp_path / "runs" / "pose").iterdir()
    assert (run / "per_joint_pck_val.csv").is_file()
    # Prediction has no annotations: the checkpoint says that there were no head boxes.
    best = str(run / "checkpoints" / "best.ckpt")
    cli.parser.run(["predict", *QUICK, "--ckpt_path", best, "--data.root", "null", "--data.images", "images"])
    (run,) = (tmp_path / "runs" / "pose").glob("*_predict")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["head_boxes"] is False


def test_test_on_the_samples_of_val_says_so(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a test folder, the numbers are those of val under another name."""
    arguments = ["test", "--ckpt_path", str(trained / "checkpoints" / "best.ckpt"), *QUICK]
    line = r"ImageFolder: test has the samples of val \(val/\); best.ckpt is selected on them too"
    with pytest.warns(UserWarning, match=line):
        cli.parser.run(arguments)
    printed = capsys.readouterr().out
    assert re.search(r"^test metric \(samples of val\) +value$", printed, re.MULTILINE)
    assert re.search(r"^test/top1 +[01]\.\d{4}$", printed, re.MULTILINE)
    assert "DataLoader 0" not in printed

    copy = Path("with_test")
    shutil.copytree(data, copy)
    shutil.copytree(copy / "val", copy / "test")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=line)
        cli.parser.run([*arguments, "--data.root", str(copy)])
    assert "samples of val" not in capsys.readouterr().out


def test_sources_of_test_and_val(tmp_path: Path) -> None:
    """Whatever datamodule has no test split of its own says so."""
    same = [
        MPII(str(tmp_path)), LSP(str(tmp_path)), StyleImages(str(tmp_path)), VOCDetection(str(tmp_path)),
        VOCSegmentation(str(tmp_path)), Food101(str(tmp_path)), Places365(str(tmp_path)), ImageFolder(str(tmp_path)),
    ]  # fmt: skip
    for module in same:
        assert module.test_is_val.startswith(f"{type(module).__name__}: test has the samples of val (")
    different = [
        RenderedSolids(), FER2013(str(tmp_path)), Yummly28K(str(tmp_path)), Food101(str(tmp_path), val_fraction=0.1),
        VOCDetection(str(tmp_path), val=["VOC2007/val"]), LSP(str(tmp_path), val=["lsp_dataset:1-10"]),
    ]  # fmt: skip
    assert [module.test_is_val for module in different] == [""] * len(different)
