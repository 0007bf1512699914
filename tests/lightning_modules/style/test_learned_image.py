"""Images that are learned: losses against loops, that they are learned, bounds, memory, exact resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule
from torch import Tensor

import cli.parser
from callbacks.metrics_file import read_metrics
from datamodules.style.style_images import ImagePair
from datamodules.synthetic.style_images import write_style_images
from lightning_modules.components.features import Features
from lightning_modules.style import learned_image
from lightning_modules.style.feature_inversion import SIGMA, FeatureInversion
from lightning_modules.style.learned_image import LONGEST, LearnedImage, keep_in_bounds, memory_of
from lightning_modules.style.neural_style import NeuralStyle
from lightning_modules.style.texture_synthesis import TextureSynthesis
from tests.small_system import differences, kill_and_resume, outcome

SMALL: dict[str, Any] = {"network": "vgg16", "weights": "random"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pictures")
    write_style_images(str(folder), contents=1, styles=1, size=40)
    return {name: str(next((folder / name).iterdir())) for name in ("content", "style")}


def prepared(module: LearnedImage, pictures: dict[str, str], size: int = 32) -> dict[str, Any]:
    """The module with its image and targets, and the batch."""
    data = ImagePair(pictures["content"], pictures["style"], size)
    module._trainer = SimpleNamespace(datamodule=data, world_size=1)  # type: ignore[assignment]
    module.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module.targets(batch)
    return batch


# --- losses -----------------------------------------------------------------------------------------------------------


def grams(features: dict[str, Tensor], name: str) -> np.ndarray:
    flat = features[name][0].double().flatten(1).numpy()
    return flat @ flat.T / flat.shape[1]


def test_neural_style_is_the_authors_loss(pictures: dict[str, str]) -> None:
    module = NeuralStyle(["relu2_2"], ["relu1_1", "relu2_1"], 2.0, 3.0, 5.0, **SMALL, start="noise")
    batch = prepared(module, pictures)
    assert module.image is not None
    found = module.features(module.image.detach())
    content, style = (module.features(batch[key].float() / 255) for key in ("image", "style"))
    energy = sum(
        1000 / found[name].shape[1] ** 2 * ((grams(found, name) - grams(style, name)) ** 2).mean()
        for name in ("relu1_1", "relu2_1")
    )
    terms = {name: term.item() for name, term in module.losses(batch).items()}
    assert terms["content"] == pytest.approx(
        2 * float((found["relu2_2"] - content["relu2_2"]).square().mean()), rel=1e-4
    )
    assert terms["style"] == pytest.approx(3 * energy, rel=1e-3)
    x = module.image.detach()[0].double().numpy()
    tv = (np.diff(x, axis=1) ** 2).sum() + (np.diff(x, axis=2) ** 2).sum()
    assert terms["tv"] == pytest.approx(5 * tv / x.size, rel=1e-4)


def test_the_style_has_filters_of_mean_one(pictures: dict[str, str]) -> None:
    random, trained = (NeuralStyle(["relu2_2"], ["relu1_1"], **SMALL) for _ in range(2))
    trained.setup_features()
    trained.features.random = False
    for module, ones in ((trained, True), (random, False)):
        batch = prepared(module, pictures)
        means = module.features(batch["style"].float() / 255)["relu1_1"].mean((0, 2, 3))
        assert bool(((means - 1).abs() < 1e-3).sum() > 32) is ones


def test_texture_is_the_papers_energy(pictures: dict[str, str]) -> None:
    for relative in (False, True):
        module = TextureSynthesis(["conv1_1", "pool1"], relative, **SMALL)
        batch = prepared(module, pictures)
        assert module.image is not None
        found, source = (module.features(x) for x in (module.image.detach(), batch["image"].float() / 255))
        for name, term in module.losses(batch).items():
            n = found[name].shape[1]
            energy = ((grams(found, name) - grams(source, name)) ** 2).sum() / (4 * n**2)
            if relative:
                energy /= (grams(source, name) ** 2).sum() / (4 * n**2)
            assert float(term) == pytest.approx(energy, rel=1e-3)


def test_inversion_is_the_papers_loss(pictures: dict[str, str]) -> None:
    """Times (s / 255)^2; and s makes the norm of an image of 227 pixels the authors' constant."""
    assert abs(SIGMA * (3 * 227**2) ** 0.5 - 27098.1) < 0.01
    module = FeatureInversion("relu2_1", tv_weight=10, beta=2, alpha_weight=0.5, **SMALL)
    batch = prepared(module, pictures)
    assert module.image is not None
    found, source = (
        module.features(x)["relu2_1"].double() for x in (module.image.detach(), batch["image"].float() / 255)
    )
    mean = np.array([0.485, 0.456, 0.406])[:, None, None]
    x = (module.image.detach()[0].double().numpy() - mean) * 255
    s2 = SIGMA**2 * x.size
    expected = {
        "feature": float((found - source).square().sum() / source.square().sum()),
        "tv": 10 / 2 * ((np.diff(x, axis=1) ** 2).sum() + (np.diff(x, axis=2) ** 2).sum()) / s2,
        "alpha": 0.5 / 2 * (x**6).sum() / s2,
    }
    for name, term in module.losses(batch).items():
        assert float(term) == pytest.approx(expected[name] * s2 / 255**2, rel=1e-3), name


def test_a_picture_is_its_own_inversion_and_texture(pictures: dict[str, str]) -> None:
    for module in (FeatureInversion("relu2_1", 0, alpha_weight=0, start="content", **SMALL),
                   TextureSynthesis(["pool1"], start="content", **SMALL)):  # fmt: skip
        batch = prepared(module, pictures)
        assert all(float(term) < 1e-6 for term in module.losses(batch).values())


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
    "texture": ["TextureSynthesis", "--model.layers", "[conv1_1, pool1]", "--model.relative", "true"],
    "inversion": ["FeatureInversion", "--model.layer", "relu2_1", "--model.tv_weight", "1"],
    "inversion by Adam": ["FeatureInversion", "--model.layer", "relu1_2", "--model.optimizer", "torch.optim.Adam",
                          "--model.optimizer.lr", "0.05", "--model.schedule", "lightning_modules.schedules.Cosine"],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_its_resume(
    name: str,
    pictures: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """L-BFGS with its history, SGD, Adam: killed within an epoch, the image is the same in the last bit."""
    monkeypatch.chdir(tmp_path)
    given = ["--data.content", pictures["content"]]
    if name == "neural_style":
        given += ["--data.style", pictures["style"]]
    cli.parser.run(
        ["fit", "--model", *RUNS[name], "--model.network", "vgg16", "--model.weights", "random", *OPTIONS, *given]
    )
    (whole,) = Path("runs/run").iterdir()
    assert "32x" in capsys.readouterr().out
    rows = [row for row in read_metrics(whole / "metrics.csv") if "val/loss" in row]
    assert rows[-1]["val/loss"] < 0.9 * rows[0]["val/loss"]
    assert ("val/psnr" in rows[0]) == name.startswith("inversion")
    expected = outcome(whole)
    assert len(list(whole.glob("frames/step=*.png"))) == 3
    assert cv2.VideoCapture(str(whole / "film.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 3 + 16
    panels = Image.open(max(whole.glob("pictures/val_step=*.png"))).width
    assert (panels > 1000) == (name == "neural_style"), "three images side by side, or two"
    killed = kill_and_resume(whole, 5)
    assert differences(expected, outcome(killed)) == []
    frames = [sorted(run.glob("frames/step=*.png")) for run in (whole, killed)]
    assert [frame.read_bytes() for frame in frames[0]] == [frame.read_bytes() for frame in frames[1]]


def test_pixels_keep_within_the_pictures_own(pictures: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = TextureSynthesis(["pool1"], **SMALL)
    batch = prepared(module, pictures)
    assert module.image is not None

    def step(*args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            assert module.image is not None
            module.image.mul_(9).sub_(4)

    monkeypatch.setattr(LightningModule, "optimizer_step", step)
    module.optimizer_step(0, 0, None)
    content = batch["image"].float() / 255
    for c in range(3):
        assert float(module.image[0, c].min()) == pytest.approx(float(content[0, c].min()))
        assert float(module.image[0, c].max()) == pytest.approx(float(content[0, c].max()))


# --- memory, bad input ------------------------------------------------------------------------------------------------


def test_memory_is_counted_and_grows_with_the_pixels() -> None:
    features = Features(["relu1_2"], "vgg16", "random")
    weights = sum(p.numel() for p in features.parameters())
    assert memory_of(features, 50, 40) == 4 * (2 * 4 * 64 * 50 * 40 + weights)


def test_a_picture_that_does_not_fit_is_refused(pictures: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_image, "free_memory", lambda device: 8 * 2**20)
    with pytest.raises(
        ValueError, match=r"NeuralStyle: 40x\d+ pixels need about 0.0 GiB, 0.0 are free: --data.image_size \d"
    ):
        prepared(NeuralStyle(weights="random", network="vgg16"), pictures, 40)


def test_bad_input(pictures: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="NeuralStyle: of 8x. pixels nothing is left in relu5_1: take a larger image"):
        prepared(NeuralStyle(network="vgg16", weights="random"), pictures, 8)
    module = NeuralStyle(["relu1_1"], ["relu1_1"], **SMALL)
    with pytest.raises(ValueError, match="expected an image of style, found none: --data.style PICTURE"):
        prepared(module, {**pictures, "style": None})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="style_weight: expected 0 or more, found -1"):
        NeuralStyle(style_weight=-1)
    with pytest.raises(ValueError, match="beta: expected more than 0, found 0"):
        FeatureInversion(beta=0)
    with pytest.raises(ValueError, match="no image was learned: --ckpt_path CHECKPOINT"):
        TextureSynthesis(**SMALL).predict(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_a_step_of_lbfgs_that_is_too_long_is_shortened_and_remembered_as_made(bounds: Any) -> None:
    image = torch.nn.Parameter(torch.full((1, 3, 4, 4), 0.5))
    optimizer = torch.optim.LBFGS([image], lr=1.0, max_iter=1)
    slope = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (image * slope).sum() + 1e-3 * image.square().sum()
        loss.backward()
        return loss

    low, high = (None, None) if bounds is None else (torch.tensor(bound) for bound in bounds)
    for _ in range(6):
        before = image.detach().clone()
        optimizer.step(closure)  # type: ignore[arg-type]
        keep_in_bounds(optimizer, image, before, low, high)
        moved = (image - before).detach()
        assert moved.abs().max() <= LONGEST + 1e-6
        state = optimizer.state[image]
        torch.testing.assert_close(state["d"] * state["t"], moved.flatten())
    if bounds is None:
        assert image.abs().max() > 1, "without bounds it goes on"
    else:
        assert image.min() >= 0
        assert image.max() <= 1
    plain = torch.nn.Parameter(torch.zeros(1, 3, 4, 4))
    keep_in_bounds(torch.optim.SGD([plain], 1.0), plain, plain.detach() - 9, None, None)
    assert (plain == 0).all(), "other optimizers make the steps that they are told to"
