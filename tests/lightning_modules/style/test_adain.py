"""AdaIN: parameter counts, statistics, both reductions, alpha, interpolation, masks, exact resume, training."""

from __future__ import annotations

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
from lightning_modules.style.adain import LAYERS, STRIDE, AdaIN, AdaINDecoder, adain
from lightning_modules.style.losses import moments
from lightning_modules.style.stylization import pad_replicate
from tests.small_system import differences, kill_and_resume, outcome


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_style_images(str(folder), contents=5, styles=3, size=40)
    return folder


@pytest.fixture(scope="module")
def module() -> AdaIN:
    torch.manual_seed(0)
    return AdaIN(weights="random").eval()


def with_styles(module: AdaIN, root: Path, count: int = 2, **options: Any) -> AdaIN:
    """Return the same module with other prediction options."""
    styles = [str(path) for path in sorted((root / "style").iterdir())[:count]]
    other = AdaIN(weights="random", styles=styles, **options).eval()
    other.load_state_dict(module.state_dict())
    return other


def images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


# --- network ----------------------------------------------------------------------------------------------------------


def test_the_papers_numbers_of_parameters(module: AdaIN) -> None:
    """The authors' encoder starts with a 1x1 convolution of 12 parameters, which normalizes the pixels."""
    assert sum(p.numel() for p in module.encoder.parameters()) == 3_505_740 - 12
    with torch.device("meta"):
        assert sum(p.numel() for p in AdaINDecoder().parameters()) == 3_505_219
    assert sum(p.numel() for group in module.parameter_groups() for p in group["params"]) == 3_505_219


def test_an_encoder_that_had_batch_normalization_is_the_same_network(module: AdaIN) -> None:
    normalized = AdaIN(backbone="vgg19_bn", weights="random")
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (normalized, module))
    assert shapes == expected


def test_statistics_are_exchanged() -> None:
    """AdaIN equals loops over channels; features with their own statistics do not change."""
    rng = np.random.default_rng(0)
    content, style = rng.normal(2, 3, (2, 4, 5, 6)), rng.normal(-1, 2, (2, 4, 7, 3))
    found = adain(torch.from_numpy(content), torch.from_numpy(style))
    for b in range(2):
        for c in range(4):
            x, y = content[b, c], style[b, c]
            expected = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * np.sqrt(y.var() + 1e-5) + y.mean()
            np.testing.assert_allclose(found[b, c].numpy(), expected, rtol=1e-4, atol=1e-4)
    same = torch.from_numpy(content).float()
    torch.testing.assert_close(adain(same, same), same, rtol=1e-5, atol=1e-5)


def test_a_flat_image_stays_flat() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        found = AdaINDecoder()(torch.full((1, 512, 5, 6), 0.7))
    assert found.shape == (1, 3, 40, 48)
    assert found.std((2, 3)).max() < 1e-5


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_both_reductions(reduction: Any) -> None:
    """The sum over channels times 0.01, as in the authors' code, and the mean times 10."""
    module = AdaIN(reduction, weights="random")
    generator = torch.Generator().manual_seed(0)
    found, style = ({name: torch.rand(2, 64 * 2**i, 8, 8, generator=generator) for i, name in enumerate(LAYERS)}
                    for _ in range(2))  # fmt: skip
    target = torch.rand(2, 512, 8, 8, generator=generator)
    terms = module.image_losses(found, target, style)
    expected = torch.zeros(2)
    for name in LAYERS:
        for one, other in zip(moments(found[name]), moments(style[name]), strict=True):
            squares = (one - other).square().flatten(1)
            expected += squares.sum(1) * 0.01 if reduction == "sum" else squares.mean(1) * 10
    torch.testing.assert_close(terms["style"], expected)
    torch.testing.assert_close(terms["content"], (found["relu4_1"] - target).square().mean((1, 2, 3)))


def test_content_loss_compares_with_the_decoded_features(module: AdaIN) -> None:
    """The content loss of an exact decoder is 0."""
    batch = {"image": images(), "style": images().flip(0)}
    style = module.encoder(batch["style"].float() / 255)
    target = adain(module.encoder(batch["image"].float() / 255)["relu4_1"], style["relu4_1"])
    exact = {**style, "relu4_1": target}
    terms = module.image_losses(exact, target, style)
    assert terms["content"].abs().max() == 0
    assert terms["style"].max() < 1e-3 * module.losses(batch)["style"]


# --- prediction -------------------------------------------------------------------------------------------------------


def test_content_as_style_changes_nothing_before_the_decoder(module: AdaIN) -> None:
    content = images(1, 48, 40)
    features = module.encoder(pad_replicate(content.float() / 255, STRIDE))["relu4_1"]
    with torch.no_grad():
        plain = (module.decode(features)[..., :48, :40].clamp(0, 1) * 255).round()
        found = module.predict_batch({"image": content, "style": content})["stylized"]
    assert (found.float() - plain).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (33, 17)])
def test_images_of_any_size_keep_theirs(module: AdaIN, root: Path, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert with_styles(module, root).predict(images(1, *size))["stylized"].shape == (1, 3, *size)


def stylized(module: AdaIN, root: Path, count: int = 2, **options: Any) -> Tensor:
    with torch.no_grad():
        return with_styles(module, root, count, **options).predict(images(1, 64, 64))["stylized"].float()


def test_alpha(module: AdaIN, root: Path) -> None:
    none, half, full = (stylized(module, root, 1, alpha=alpha) for alpha in (0.0, 0.5, 1.0))
    with torch.no_grad():
        plain = module.decode(module.encoder(images(1, 64, 64).float() / 255)["relu4_1"]).clamp(0, 1) * 255
    assert (none - plain.round()).abs().max() <= 1
    assert not torch.equal(half, full)
    assert (half - none).square().mean() < (full - none).square().mean()


def test_interpolation(module: AdaIN, root: Path) -> None:
    first, second = (
        stylized(module, root, 2, style_interpolation_weights=[1, 0]),
        stylized(module, root, 2, style_interpolation_weights=[0, 3]),
    )
    assert torch.equal(first, stylized(module, root, 1))
    middle = stylized(module, root, 2)
    assert torch.equal(middle, stylized(module, root, 2, style_interpolation_weights=[2, 2]))
    assert not torch.equal(middle, first)
    assert (middle - first).square().mean() < (second - first).square().mean()


def test_masks(module: AdaIN, root: Path, tmp_path: Path) -> None:
    """The first style is on the left, the second on the right; far from the border each is as if applied alone."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with torch.no_grad():
        large = images(1, 128, 128)
        both = with_styles(module, root, mask=str(tmp_path / "mask.png")).predict(large)["stylized"].float()
        one, other = (
            with_styles(module, root, style_interpolation_weights=weights).predict(large)["stylized"].float()
            for weights in ([1, 0], [0, 1])
        )
    assert (both - one)[..., :24].abs().max() <= 1
    assert (both - other)[..., -24:].abs().max() <= 1


def test_encoded_styles_follow_the_module(module: AdaIN, root: Path) -> None:
    """The encoded styles are kept after the first prediction; they are not part of the state."""
    other = with_styles(module, root)
    with torch.no_grad():
        other.predict(images())
    assert list(other.state_dict()) == list(module.state_dict())
    assert [features().device.type for features in other.to("meta").style_features] == ["meta", "meta"]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_its_resume_and_what_it_predicts(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli.parser.run([
        "fit", "--model", "AdaIN", "--model.weights", "random", "--model.normalize_distances", "true",
        "--model.schedule", "lightning_modules.schedules.InverseTime", "--data", "StyleImages",
        "--data.root", str(root), "--data.image_size", "16", "--data.batch_size", "2", "--data.num_workers", "0",
        "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
        "--wandb.mode", "disabled", "--experiment", "run", "--last.every_n_steps", "2", "--last.keep", "9",
    ])  # fmt: skip
    (complete,) = Path("runs/run").iterdir()
    expected = outcome(complete)
    assert expected["global_step"] == 6
    assert differences(expected, outcome(kill_and_resume(complete, 2))) == []
    assert any("val/style_ratio" in row for row in read_metrics(complete / "metrics.csv"))
    alone = AdaIN.load_from_checkpoint(complete / "checkpoints" / expected["file"], weights_only=True)
    assert alone.encoder.random
    cli.parser.run([
        "predict", "--ckpt_path", str(complete / "checkpoints/best.ckpt"), "--data.root", "null", "--model.styles",
        f"[{min((root / 'style').iterdir())}]", "--data.images", str(root / "content"), "--experiment", "stylized",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--wandb.mode", "disabled",
    ])  # fmt: skip
    assert len(list(Path("runs/stylized").glob("*/predictions/*.jpg"))) == 5


def test_it_learns_to_decode() -> None:
    torch.manual_seed(0)
    module = AdaIN(weights="random", normalize_distances=True, style_loss_reduction="mean", style_weight=1.0)
    optimizer = torch.optim.Adam(module.decoder.parameters(), 1e-3)
    batch = {"image": images(), "style": images().flip(0)}
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.stack(list(module.losses(batch).values())).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    assert all(p.grad is None for p in module.encoder.parameters())


def test_bad_input(root: Path) -> None:
    for options, message in (
        ({"alpha": 1.5}, "alpha: expected 0 to 1, found 1.5"),
        (
            {"style_interpolation_weights": [1]},
            r"style_interpolation_weights: expected one weight of 0 or more per style \(0\), found \[1\]",
        ),
        ({"mask": "a.png", "styles": ["a.jpg"]}, "mask: expected two styles, found 1"),
        ({"style_weight": -1}, "style_weight: expected 0 or more, found -1"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaIN(weights="random", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="styles: expected paths of style images, found none; set --model.styles"):
        AdaIN(weights="random").predict(images())
    with pytest.raises(ValueError, match="expected style images, found none; set --data.with_style true"):
        AdaIN(weights="random").losses({"image": images()})
