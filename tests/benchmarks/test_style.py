"""Style benchmarks at a small size: output, equal losses of the peers, figures."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import cli.parser
from benchmarks import inversion_by_layer, style_figures, style_speed
from datamodules.synthetic.style_images import write_style_images


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_style_images(str(folder), contents=3, styles=1, size=48)
    return folder


@pytest.fixture(autouse=True)
def restore_globals() -> Iterator[None]:
    """Restore the number of threads and the level of Lightning's logger, which the benchmarks set."""
    logger = logging.getLogger("pytorch_lightning")
    count, level = torch.get_num_threads(), logger.level
    yield
    torch.set_num_threads(count)
    logger.setLevel(level)


def test_neural_style_and_its_peers_reach_the_same_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert style_speed.main(["--parts", "neural_style", "--size", "32", "--steps", "8", "--backbone", "vgg16"]) == 0
    printed = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"loss ([\d.e+-]+)", printed)]
    assert len(losses) == 4
    assert max(losses) < 1.05 * min(losses)
    assert len(re.findall(r"^ratio [\d.]+: ", printed, re.M)) == 3


def test_times_of_one_pass(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--parts", "one_pass", "--sizes", "32", "256", "--repeats", "1", "--backbone", "vgg16"]
    assert style_speed.main(arguments) == 0
    printed = capsys.readouterr().out
    for name in ("neural style, 500 steps", "FastStyle", "AdaIN", "StylePrediction"):
        (numbers,) = re.findall(rf"^{name} +([\d.]+) +([\d.]+)    ", printed, re.M)
        assert 0 < float(numbers[0]) < float(numbers[1])
    assert "15860 (256)" in printed


def test_one_pass_against_steps(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.parser.run([
        "fit", "--model", "FastStyle", "--model.weights", "random", "--model.width_multiplier", "0.1",
        "--model.normalize_distances", "true",
        "--model.style_layers", "[relu1_1, relu1_2]", "--model.content_layer", "relu1_2", "--model.style",
        str(next((root / "style").iterdir())), "--data", "StyleImages", "--data.content", str(root / "content"),
        "--data.with_style", "false", "--data.image_size", "32", "--data.num_workers", "0", "--trainer.max_epochs", "1",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--wandb.mode", "disabled",
        "--trainer.enable_model_summary", "false", "--experiment", "run",
    ])  # fmt: skip
    (checkpoint,) = Path("runs/run").glob("*/checkpoints/best.ckpt")
    arguments = [
        "--parts",
        "curve",
        "--fast_style",
        str(checkpoint),
        "--held_out",
        str(root / "content"),
        "--size",
        "32",
    ]
    assert style_speed.main([*arguments, "--steps", "6", "--num_images", "2", "--figure", "curve.png"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"content image [\d.e+-]+, one pass [\d.e+-]+, after 6 steps", printed)) == 2
    assert Image.open("curve.png").width > 300


def test_figures(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, style = (str(next((root / name).iterdir())) for name in ("content", "style"))
    arguments = ["--content", content, "--style", style, "--size", "48", "--steps", "2", "--backbone", "vgg16"]
    arguments += ["--weights", "random", "--layers", "relu1_1", "fc8", "--out", str(tmp_path)]
    assert style_figures.main(arguments) == 0
    widths = {name: Image.open(tmp_path / f"{name}.png").width for name in style_figures.FIGURES}
    tile = style_figures.TILE
    assert widths["inversion"] // tile == 3
    assert widths["textures"] // tile == 6
    assert widths["row"] // tile == 7
    assert widths["styles"] // tile == 2
    assert "relu1_1" in capsys.readouterr().out


def test_inversion_by_layer(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "row.png"
    arguments = ["--content", str(root / "content"), "--layers", "pool1", "fc6", "--weights", "random", "--steps", "1"]
    assert inversion_by_layer.main([*arguments, "--batch_size", "2", "--size", "48", "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^pool1 +[\d,]+ +[\d.]+ +[\d.]+ +[+-][\d.]+$", printed, re.M)
    assert re.search(r"^fc6 ", printed, re.M)
    assert figure.exists()


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert style_figures.main(["--content", str(tmp_path / "no.jpg"), "--out", str(tmp_path), "--steps", "2"]) == 2
    assert style_speed.main(["--parts", "curve", "--fast_style", "no.ckpt", "--held_out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("style_figures: ")
    assert lines[1].startswith("style_speed: ")
