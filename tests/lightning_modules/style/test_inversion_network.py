"""SAE and SWWAE: decoder, switches, odd sizes, the loss, PSNR, exact resume."""

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
from lightning_modules.style.inversion_network import PSNR, InversionDecoder, InversionNetwork
from tests.small_system import differences, kill_and_resume, outcome


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_style_images(str(folder), contents=12, styles=1, size=40)
    return folder


def build(layer: Any, switches: bool = True, size: int = 32, **options: Any) -> InversionNetwork:
    torch.manual_seed(0)
    module = InversionNetwork(layer, switches, weights="random", image_size=size, **options)
    module.setup("fit")
    return module


def images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("backbone", ["vgg16", "vgg19"])
def test_the_decoder_mirrors_the_encoder(backbone: Any) -> None:
    """The decoder has as many weights as the encoder's convolutions; only the biases differ."""
    import torchvision

    with torch.device("meta"):
        decoder = sum(p.numel() for p in InversionDecoder(backbone, 5).parameters() if p.ndim == 4)
        theirs = torchvision.models.get_model(backbone).features.parameters()
    assert decoder == sum(p.numel() for p in theirs if p.ndim == 4)


@pytest.mark.parametrize("switches", [False, True])
@pytest.mark.parametrize(("layer", "size"), [("pool1", (33, 47)), ("pool3", (45, 61)), ("pool2", (2, 90))])
def test_images_of_odd_sizes_come_back_as_large(layer: str, size: tuple[int, int], switches: bool) -> None:
    module = build(layer, switches)
    if min(size) < 4:
        with pytest.raises(RuntimeError):
            module.predict(images(1, 1, 1))
        size = (4, 90)
    with torch.no_grad():
        assert module.predict(images(1, *size))["stylized"].shape == (1, 3, *size)


def test_switches_add_no_parameter() -> None:
    for layer in ("pool2", "fc6", "fc8"):
        counts = {sum(p.numel() for p in build(layer, switches).parameters()) for switches in (False, True)}
        assert len(counts) == 1


def test_unpooling_with_and_without_switches() -> None:
    """Unpool(pool(x)) is x at the maxima and 0 elsewhere; without switches, values are in the corners."""
    decoder = InversionDecoder("vgg16", 1)
    decoder.blocks[0] = torch.nn.Identity()
    x = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    values, switches = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    (found,) = decoder(values, [switches], [(6, 8)])
    assert ((found == x) | (found == 0)).all()
    assert (found > 0).sum() == values.numel()
    (fixed,) = decoder(values, None, [(6, 8)])
    assert torch.equal(fixed[..., ::2, ::2], values)
    assert (fixed > 0).sum() == values.numel()


def test_the_loss_is_of_pixels_and_of_the_levels_between() -> None:
    module = build("pool3", intermediate_weight=0.5)
    outputs, pooled = module.decode(images())
    terms = module.losses({"image": images()})
    pixels = module.preprocess(images()).double().numpy()
    assert terms["image"].item() == pytest.approx(
        ((outputs[-1].detach().double().numpy() - pixels) ** 2).mean(), rel=1e-4
    )
    total = 0.0
    for output, target in ((outputs[0], pooled[1]), (outputs[1], pooled[0])):
        assert output.shape == target.shape
        found, expected = (x.detach().double().numpy() for x in (output, target))
        total += np.mean([((f - e) ** 2).mean() / (e**2).mean() for f, e in zip(found, expected, strict=True)])
    assert terms["features"].item() == pytest.approx(0.5 * total, rel=1e-3)
    assert list(build("pool3").losses({"image": images()})) == ["image"]


def test_psnr_is_of_all_pixels_together() -> None:
    one, other = images(3), images(3).flip(0)
    metric = PSNR()
    for i in range(3):
        metric.update(one[i : i + 1], other[i : i + 1])
    error = ((one.double() - other.double()) ** 2).mean()
    assert metric.compute().item() == pytest.approx(10 * np.log10(255**2 / error.item()), rel=1e-4)
    perfect = PSNR()
    perfect.update(one, one)
    assert perfect.compute() > 90


def test_a_run_and_its_resume(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli.parser.run([
        "fit", "--model", "InversionNetwork", "--model.weights", "random", "--model.layer", "pool2",
        "--model.intermediate_weight", "0.1", "--data", "StyleImages", "--data.with_style", "false",
        "--data.root", str(root),
        "--data.image_size", "32", "--data.batch_size", "2", "--data.num_workers", "0", "--trainer.max_epochs", "3",
        "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled", "--experiment", "run",
        "--last.every_n_steps", "7", "--last.keep", "9",
    ])  # fmt: skip
    (complete,) = Path("runs/run").iterdir()
    expected = outcome(complete)
    assert expected["global_step"] // 3 != 7
    assert not any("features" in key for key in expected["state_dict"])
    rows = [row for row in read_metrics(complete / "metrics.csv") if "val/psnr" in row]
    assert rows[-1]["val/psnr"] > rows[0]["val/psnr"]
    assert differences(expected, outcome(kill_and_resume(complete, 7))) == []


def test_switches_reduce_the_loss() -> None:
    """After the same steps on the same images, the loss is lower with switches."""
    found = {}
    for switches in (False, True):
        module = build("pool2", switches)
        optimizer = torch.optim.Adam(module.parameters(), 2e-3)
        for _ in range(40):
            optimizer.zero_grad()
            loss = module.losses({"image": images(4)})["image"]
            loss.backward()
            optimizer.step()
        found[switches] = loss.item()
    assert found[True] < 0.8 * found[False]


def test_bad_input() -> None:
    for options, message in (
        ({"layer": "pool6"}, "layer: expected pool1 to pool5, fc6, fc7 or fc8, found pool6"),
        ({"backbone": "alexnet"}, "backbone: expected vgg16 or vgg19, found alexnet"),
        ({"layer": "fc6", "image_size": 20}, "image_size: expected 32 or more for fc6, found 20"),
        ({"intermediate_weight": -1}, "intermediate_weight: expected 0 or more, found -1"),
    ):
        with pytest.raises(ValueError, match=message):
            InversionNetwork(weights="random", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected images of 32 pixels for fc7, found 64x64"):
        build("fc7").losses({"image": images(1, 64, 64)})
