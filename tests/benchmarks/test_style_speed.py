"""Speed of style transfer: printed times, and equal losses of the peers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cli.parser


def test_neural_style_and_its_peers_reach_the_same_loss(run_benchmark: Callable[..., Any]) -> None:
    arguments = ["--parts", "neural_style", "--size", "32", "--steps", "8", "--backbone", "vgg16"]
    finished = run_benchmark("style_speed", *arguments)
    assert finished.status == 0, finished.err
    losses = [float(x) for x in re.findall(r"loss ([\d.e+-]+)", finished.out)]
    assert len(losses) == 4
    assert max(losses) < 1.05 * min(losses)
    peers = ("targets recomputed", "tutorial", "tutorial, frozen")
    assert list(finished.ratios()) == [f"seconds, {name} / ours" for name in peers]


def test_times_of_one_pass(run_benchmark: Callable[..., Any]) -> None:
    arguments = ["--parts", "one_pass", "--sizes", "32", "256", "--repeats", "1", "--backbone", "vgg16"]
    finished = run_benchmark("style_speed", *arguments)
    assert finished.status == 0, finished.err
    for name in ("neural style, 500 steps", "FastStyle", "AdaIN", "StylePrediction"):
        (numbers,) = re.findall(rf"^{name} +([\d.]+) +([\d.]+)    ", finished.out, re.M)
        assert 0 < float(numbers[0]) < float(numbers[1])
    assert "15860 (256)" in finished.out
    assert len(finished.ratios()) == 6


def test_one_pass_against_steps(
    run_benchmark: Callable[..., Any], style_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.parser.run([
        "fit", "--model", "FastStyle", "--model.weights", "random", "--model.width_multiplier", "0.1",
        "--model.normalize_distances", "true",
        "--model.style_layers", "[relu1_1, relu1_2]", "--model.content_layer", "relu1_2", "--model.style",
        str(next((style_images / "style").iterdir())), "--data", "StyleImages",
        "--data.content", str(style_images / "content"),
        "--data.with_style", "false", "--data.image_size", "32", "--data.num_workers", "0", "--trainer.max_epochs", "1",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--wandb.mode", "disabled",
        "--trainer.enable_model_summary", "false", "--experiment", "run",
    ])  # fmt: skip
    (checkpoint,) = Path("runs/run").glob("*/checkpoints/best.ckpt")
    finished = run_benchmark(
        "style_speed", "--parts", "curve", "--fast_style", str(checkpoint),
        "--held_out", str(style_images / "content"), "--size", "32", "--steps", "6", "--num_images", "2",
        "--figure", "curve.png",
    )  # fmt: skip
    assert finished.status == 0, finished.err
    assert len(re.findall(r"content image [\d.e+-]+, one pass [\d.e+-]+, after 6 steps", finished.out)) == 2
    assert Image.open("curve.png").width > 300


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["--parts", "curve", "--fast_style", "no.ckpt", "--held_out", str(tmp_path)]
    assert run_benchmark("style_speed", *arguments).user_error() == "no.ckpt: no such checkpoint"
    message = run_benchmark("style_speed", "--steps", "2").user_error()
    assert message == "steps: expected more than 2 (the warm-up), found 2"
    assert run_benchmark("style_speed", "--sizes", "8").user_error() == "sizes: expected at least 32 pixels, found 8"
