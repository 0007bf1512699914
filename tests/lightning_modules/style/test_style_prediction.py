"""Style prediction: parameter counts, the loss, interpolation, images of any size, exact resume, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cli.parser
from callbacks.metrics_file import read_metrics
from datamodules.synthetic.style_images import write_style_images
from lightning_modules.style.losses import gram_matrix
from lightning_modules.style.style_prediction import StylePrediction, StylePredictor, StyleTransferNetwork
from tests.small_system import differences, kill_and_resume, outcome

LAYERS: dict[str, Any] = {"content_layer": "relu1_2", "style_layers": ["relu1_1", "relu1_2"], "weights": "random"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_style_images(str(folder), contents=4, styles=3, size=40)
    return folder


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Return weights with which styles differ."""
    torch.manual_seed(0)
    module = StylePrediction(**LAYERS)
    for name, parameter in module.transformer.named_parameters():
        if "beta.weight" in name or "gamma.weight" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    # Without batch statistics, the embeddings of an untrained Inception are constant in eval mode.
    for layer in module.predictor.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        module.predictor.train()(torch.rand(8, 3, 80, 80))
    return module.state_dict()


def build(state: dict[str, Tensor], root: Path, count: int = 0, **options: Any) -> StylePrediction:
    styles = [str(path) for path in sorted((root / "style").iterdir())[:count]]
    module = StylePrediction(**{**LAYERS, "styles": styles or None, **options})
    module.load_state_dict(state)
    module.setup("fit")
    return module.eval()


def images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def test_the_papers_numbers_of_parameters() -> None:
    with torch.device("meta"):
        predictor, transformer = StylePredictor(), StyleTransferNetwork()
    assert sum(p.numel() for p in predictor.inception.parameters()) == 8_965_856
    heads = [p for name, p in transformer.named_parameters() if "beta" in name or "gamma" in name]
    assert sum(p.numel() for p in heads if p.ndim == 1) == 2758
    assert sum(p.numel() for p in [*heads, *predictor.embed.parameters()]) == 355_458


def test_the_loss_is_the_papers(state: dict[str, Tensor], root: Path) -> None:
    module = build(state, root, content_weight=2.0, style_weight=3.0, tv_weight=5.0)
    stylized, content, style = (torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(i)) for i in range(3))
    found, target, source = (module.features(x) for x in (stylized, content, style))
    grams = {name: gram_matrix(source[name]) for name in module.style_layers}
    terms = {k: v.item() for k, v in module.image_losses(stylized, target["relu1_2"], grams).items()}
    energy = 0.0
    for name in ("relu1_1", "relu1_2"):
        flat = [x[name][0].double().flatten(1).numpy() for x in (found, source)]
        energy += ((flat[0] @ flat[0].T / 576 - flat[1] @ flat[1].T / 576) ** 2).mean()
    x = stylized[0].double().numpy()
    assert terms["style"] == pytest.approx(3 * energy, rel=1e-3)
    assert terms["content"] == pytest.approx(
        2 * (found["relu1_2"] - target["relu1_2"]).square().mean().item(), rel=1e-4
    )
    squares = (np.diff(x, axis=1) ** 2).sum() + (np.diff(x, axis=2) ** 2).sum()
    assert terms["tv"] == pytest.approx(5 * squares / 2 / x.size, rel=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (33, 17)])
def test_images_of_any_size_keep_theirs(state: dict[str, Tensor], root: Path, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert build(state, root, 1).predict(images(1, *size))["stylized"].shape == (1, 3, *size)


def test_a_flat_image_stays_flat() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        found = StyleTransferNetwork().eval()(torch.full((1, 3, 40, 48), 0.7), torch.randn(1, 100))
    assert found.std((2, 3)).max() < 1e-4


def stylized(module: StylePrediction) -> Tensor:
    with torch.no_grad():
        return module.predict(images(1, 48, 48))["stylized"].float()


def test_interpolation_of_styles(state: dict[str, Tensor], root: Path) -> None:
    first, second, middle = (
        stylized(build(state, root, 2, style_interpolation_weights=weights)) for weights in ([1, 0], [0, 2], None)
    )
    assert torch.equal(first, stylized(build(state, root, 1)))
    assert (first - second).square().mean() > 1
    assert (first - middle).square().mean() < (first - second).square().mean()


def test_alpha(state: dict[str, Tensor], root: Path) -> None:
    """With alpha 0 an image keeps its own style."""
    none, full = (stylized(build(state, root, 1, alpha=alpha)) for alpha in (0.0, 1.0))
    with torch.no_grad():
        alone = build(state, root).predict_batch({"image": images(1, 48, 48), "style": images(1, 48, 48)})["stylized"]
    assert (none - alone.float()).abs().max() <= 1
    assert not torch.equal(none, full)


def test_the_embedding_follows_the_module(state: dict[str, Tensor], root: Path) -> None:
    """The embedding is kept after the first prediction; it is not part of the state."""
    module = build(state, root, 1)
    stylized(module)
    assert list(module.state_dict()) == list(state)
    assert module.embedding is not None
    assert module.to("meta").embedding().device.type == "meta"


def test_a_run_and_its_resume(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli.parser.run([
        "fit", "--model", "StylePrediction", "--model.weights", "random", "--model.content_layer", "relu1_2",
        "--model.style_layers", "[relu1_1, relu2_1]", "--model.normalize_distances", "true", "--model.tv_weight", "0",
        "--data", "StyleImages", "--data.root", str(root), "--data.image_size", "16", "--data.batch_size", "2",
        "--data.num_workers", "0", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled", "--experiment", "run",
        "--last.every_n_steps", "1", "--last.keep", "9",
    ])  # fmt: skip
    (complete,) = Path("runs/run").iterdir()
    expected = outcome(complete)
    assert expected["global_step"] == 4
    assert not any("features" in key for key in expected["state_dict"])
    assert any("val/style_ratio" in row for row in read_metrics(complete / "metrics.csv"))
    assert differences(expected, outcome(kill_and_resume(complete, 3))) == []


def test_it_learns_two_styles(state: dict[str, Tensor], root: Path) -> None:
    torch.manual_seed(0)
    module = StylePrediction(**LAYERS, normalize_distances=True, content_weight=0.01, style_weight=1.0, tv_weight=0)
    module.setup("fit")
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    batch = {"image": images(), "style": torch.stack([images(1)[0] // 4, 255 - images(1)[0] // 3])}
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = torch.stack(list(module.losses(batch).values())).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def test_bad_input() -> None:
    for options, message in (
        ({"alpha": -0.5}, "alpha: expected 0 to 1, found -0.5"),
        (
            {"style_interpolation_weights": [1]},
            r"style_interpolation_weights: expected one weight of 0 or more per style \(0\), found \[1\]",
        ),
        ({"tv_weight": -1}, "tv_weight: expected 0 or more, found -1"),
    ):
        with pytest.raises(ValueError, match=message):
            StylePrediction(**{**LAYERS, **options})
    module = StylePrediction(**LAYERS)
    with pytest.raises(ValueError, match="styles: expected paths of style images, found none; set --model.styles"):
        module.predict(images())
    with pytest.raises(ValueError, match="expected style images, found none; set --data.with_style true"):
        module.losses({"image": images()})
