"""Optimized images: they improve, resume exactly, and fit into memory."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
import torch
from PIL import Image

import cli.parser
from callbacks.metrics_file import read_metrics
from lightning_modules.style import base
from lightning_modules.style.neural_style import NeuralStyle
from tests.lightning_modules.style.optimized_image import prepare
from tests.small_system import differences, kill_and_resume, outcome

# --- runs -------------------------------------------------------------------------------------------------------------

OPTIONS = [
    "--data", "ImagePair", "--data.image_size", "32", "--data.steps", "4", "--trainer.max_epochs", "3",
    "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled", "--experiment", "run",
    "--last.every_n_steps", "5", "--last.keep", "9",
]  # fmt: skip
RUNS = {
    "neural_style": ["NeuralStyle", "--model.content_layers", "[relu2_2]",
                     "--model.style_layers", "[relu1_1, relu2_1]", "--model.style_weight", "100"],
    "texture": ["TextureSynthesis", "--model.layers", "[conv1_1, pool1]", "--model.normalize_distances", "true"],
    "inversion": ["FeatureInversion", "--model.layer", "relu2_1", "--model.tv_weight", "1"],
    "inversion by Adam": ["FeatureInversion", "--model.layer", "relu1_2", "--model.optimizer", "torch.optim.Adam",
                          "--model.optimizer.lr", "0.05", "--model.schedule", "lightning_modules.schedules.Cosine"],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_its_resume(
    name: str,
    image_paths: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that is killed within an epoch resumes to the same image, bit for bit, with L-BFGS, SGD and Adam."""
    monkeypatch.chdir(tmp_path)
    given = ["--data.content", image_paths["content"]]
    if name == "neural_style":
        given += ["--data.style", image_paths["style"]]
    cli.parser.run(
        ["fit", "--model", *RUNS[name], "--model.backbone", "vgg16", "--model.weights", "random", *OPTIONS, *given]
    )
    (complete,) = Path("runs/run").iterdir()
    assert "32x" in capsys.readouterr().out
    rows = [row for row in read_metrics(complete / "metrics.csv") if "val/loss" in row]
    assert rows[-1]["val/loss"] < 0.9 * rows[0]["val/loss"]
    assert ("val/psnr" in rows[0]) == name.startswith("inversion")
    expected = outcome(complete)
    assert len(list(complete.glob("frames/step=*.png"))) == 3
    assert cv2.VideoCapture(str(complete / "film.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 3 + 16
    panels = Image.open(max(complete.glob("figures/val_step=*.png"))).width
    assert (panels > 1000) == (name == "neural_style"), "three images side by side, or two"
    killed = kill_and_resume(complete, 5)
    assert differences(expected, outcome(killed)) == []
    frames = [sorted(run.glob("frames/step=*.png")) for run in (complete, killed)]
    assert [frame.read_bytes() for frame in frames[0]] == [frame.read_bytes() for frame in frames[1]]


# --- image sizes ----------------------------------------------------------------------------------------------------


def test_an_image_that_does_not_fit_into_memory_is_refused(
    image_paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "free_memory", lambda device: 8 * 2**20)
    with pytest.raises(ValueError, match=r"found 40x\d+ pixels, which need about 0.0 GiB; set --data.image_size \d"):
        prepare(NeuralStyle(weights="random", backbone="vgg16"), image_paths, 40)


def test_memory_is_checked_on_the_device_of_the_run(
    image_paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[torch.device] = []
    monkeypatch.setattr(base, "free_memory", devices.append)
    prepare(NeuralStyle(weights="random", backbone="vgg16"), image_paths, 40, device="cuda:1")
    assert devices == [torch.device("cuda:1")]


def test_an_image_that_is_too_small_is_refused(image_paths: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="image_size: expected an image large enough for relu5_1, found 8x"):
        prepare(NeuralStyle(backbone="vgg16", weights="random"), image_paths, 8)


def test_a_style_image_that_is_too_small_is_refused(image_paths: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "tiny.png")
    with pytest.raises(ValueError, match="style: expected an image large enough for relu5_1, found 2x2"):
        prepare(
            NeuralStyle(backbone="vgg16", weights="random"), {**image_paths, "style": str(tmp_path / "tiny.png")}, 40
        )
