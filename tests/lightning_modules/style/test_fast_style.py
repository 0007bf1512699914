"""Fast style: parameter count, images of any size, no border artifacts, the loss, exact resume, training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import cli.parser
from callbacks.metrics_file import read_metrics
from datamodules.synthetic.style_images import write_style_images
from lightning_modules.components.features import Features
from lightning_modules.style.fast_style import FastStyle, TransformNetwork
from tests.datamodules.test_video import write_video
from tests.small_system import differences, kill_and_resume, outcome


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_style_images(str(folder), contents=12, styles=1, size=40)
    return folder


def style_of(root: Path) -> str:
    return str(next((root / "style").iterdir()))


def small(root: Path, **options: Any) -> FastStyle:
    torch.manual_seed(0)
    given = {
        "content_layer": "relu1_2",
        "style_layers": ["relu1_1", "relu2_1"],
        "width_multiplier": 0.1,
        "weights": "random",
    }
    module = FastStyle(style_of(root), **{**given, **options})
    module.setup("fit")
    return module


def images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


# --- network ----------------------------------------------------------------------------------------------------------


def test_the_papers_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in TransformNetwork().parameters()) == 1_679_235


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (17, 33), (64, 40), (65, 41)])
def test_images_of_any_size_keep_theirs(size: tuple[int, int], root: Path) -> None:
    module = small(root).eval()
    with torch.no_grad():
        found = module.predict(images(1, *size))["stylized"]
    assert found.shape == (1, 3, *size)
    assert found.dtype == torch.uint8


def test_a_flat_image_stays_flat() -> None:
    """A constant image stays constant: no border artifacts and no checkerboard."""
    torch.manual_seed(0)
    network = TransformNetwork(0.2).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-1, 1)
        found = network(torch.full((1, 3, 40, 48), 0.7))
    assert found.std((2, 3)).max() < 1e-4
    assert found.abs().max() > 0.01


def test_no_checkerboard_artifacts() -> None:
    """For white noise, the mean square is equal at all 4x4 phases; transposed convolutions would differ."""
    torch.manual_seed(1)
    network = TransformNetwork(0.1).eval()
    with torch.no_grad():
        found = network(torch.randn(6, 3, 96, 96))[..., 16:-16, 16:-16]
    phases = found.square().unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).mean((0, 1, 2, 4))
    assert phases.std() / phases.mean() < 0.1


# --- loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers(root: Path) -> None:
    """The squared Frobenius norm of the difference of Gram matrices divided by C H W, summed over layers."""
    module = small(root, content_weight=2.0, style_weight=3.0)
    stylized, content = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    features = Features(["relu1_2", "relu1_1", "relu2_1"], "vgg16", "random")
    style = torch.from_numpy(np.array(Image.open(style_of(root)))).permute(2, 0, 1)[None] / 255
    found, target, source = features(stylized), features(content), features(style)
    terms = module.image_losses(stylized, target["relu1_2"], module.style_targets({}))
    for b in range(2):
        total = 0.0
        for name in ("relu1_1", "relu2_1"):
            matrices = []
            for x in (found[name][b], source[name][0]):
                flat = x.double().flatten(1).numpy()
                matrices.append(flat @ flat.T / flat.size)
            total += ((matrices[0] - matrices[1]) ** 2).sum()
        assert terms["style"][b].item() == pytest.approx(3 * total, rel=1e-3)
        distance = (found["relu1_2"][b] - target["relu1_2"][b]).square().mean().item()
        assert terms["content"][b].item() == pytest.approx(2 * distance, rel=1e-4)


def test_normalized_distances_do_not_depend_on_scale(root: Path) -> None:
    module, louder = (small(root, normalize_distances=True) for _ in range(2))
    with torch.no_grad():
        louder.features.network.layers["conv1_1"].weight *= 7  # type: ignore[operator]
        stylized = torch.rand(1, 3, 24, 24)
        for grams in louder.style_grams.values():
            grams.value = 7**4 / 7**2 * grams.value
        terms = []
        for each in (module, louder):
            content = each.features(stylized + 0.1)["relu1_2"]
            terms.append(each.image_losses(stylized, content, each.style_targets({})))
        for name, value in terms[0].items():
            torch.testing.assert_close(value, terms[1][name], rtol=1e-3, atol=1e-4)


# --- runs -------------------------------------------------------------------------------------------------------------

OPTIONS = [
    "fit", "--model", "FastStyle", "--model.weights", "random", "--model.content_layer", "relu1_2",
    "--model.style_layers", "[relu1_1, relu2_1]", "--model.width_multiplier", "0.1",
    "--model.normalize_distances", "true",
    "--data", "StyleImages", "--data.with_style", "false", "--data.image_size", "32", "--data.batch_size", "2",
    "--data.num_workers", "0", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--wandb.mode", "disabled", "--experiment", "run", "--last.every_n_steps", "7", "--last.keep", "9",
]  # fmt: skip


def test_a_run_its_resume_and_what_it_predicts(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli.parser.run([*OPTIONS, "--model.style", style_of(root), "--data.root", str(root)])
    (complete,) = Path("runs/run").iterdir()
    expected = outcome(complete)
    assert not any("features" in key for key in expected["state_dict"])
    assert expected["global_step"] % 3 == 0
    assert expected["global_step"] // 3 != 7
    assert differences(expected, outcome(kill_and_resume(complete, 7))) == []
    rows = [row for row in read_metrics(complete / "metrics.csv") if "val/loss" in row]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert rows[-1]["val/style_ratio"] > 0
    # Prediction needs the checkpoint only, neither the style image nor the loss network.
    best = str(complete / "checkpoints/best.ckpt")
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--wandb.mode", "disabled"]
    predict = ["predict", "--ckpt_path", best, "--data.root", "null", "--model.style", "gone.jpg", *quiet]
    cli.parser.run([*predict, "--data.images", str(root / "content"), "--experiment", "stylized"])
    (stylized,) = Path("runs/stylized").iterdir()
    records = json.loads((stylized / "predictions.json").read_text())
    assert len(records) == 12
    for record in records:
        assert Image.open(stylized / record["annotated"]).size == Image.open(record["file"]).size
        assert record["random_features"]
    write_video(tmp_path / "film.avi", 3)
    cli.parser.run([*predict, "--data.images", "film.avi", "--experiment", "video"])
    assert list(Path("runs/video").glob("*/predictions/*.mp4"))


def test_it_learns_a_style(root: Path) -> None:
    module = small(root, normalize_distances=True, content_weight=0.01, width_multiplier=0.25)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    content = torch.from_numpy(np.array(Image.open(root / "content/000.jpg").resize((32, 32)))).permute(2, 0, 1)[None]
    with torch.no_grad():
        features = module.features(content / 255)
        unchanged = module.image_losses(content / 255, features["relu1_2"], module.style_targets({}))["style"].item()
    for _ in range(60):
        optimizer.zero_grad()
        terms = module.losses({"image": content})
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    assert terms["style"].item() < 0.3 * unchanged


def test_bad_input(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="style: expected the path of a style image, found none; set --model.style IMAGE"
    ):
        FastStyle(weights="random").setup("fit")
    (tmp_path / "a.jpg").write_text("no image")
    for path in ("nowhere.jpg", str(tmp_path / "a.jpg")):
        with pytest.raises(ValueError, match=f"style: expected an image, found .*{Path(path).name}"):
            FastStyle(path, weights="random").setup("fit")
    with pytest.raises(ValueError, match="tv_weight: expected 0 or more, found -1"):
        FastStyle(tv_weight=-1)
    with pytest.raises(ValueError, match="expected images of one size, found 32x32, 8x8; set --data.batch_size 1"):
        small(root).predict([images(1)[0], images(1, 8, 8)[0]])
