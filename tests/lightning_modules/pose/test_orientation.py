"""Orientation: losses that are equal for q and -q, metrics over ranks, learning."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from scipy.spatial.transform import Rotation
from torch import Tensor

import cli.parser
from callbacks.metrics_file import read_metrics
from datamodules.pose.rendered_solids import RenderedSolids
from lightning_modules.classification.image_classifier import ImageClassifier
from lightning_modules.pose.orientation import (
    OrientationError,
    OrientationRegressor,
    chordal_loss,
    sine_loss,
)
from lightning_modules.pose.rotations import quaternion_to_matrix
from tests.small_system import differences, kill_and_resume, outcome


def drawn(count: int, seed: int = 0) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return pairs of random rotations, and SciPy's angles between them in degrees."""
    one, other = Rotation.random(count, random_state=seed), Rotation.random(count, random_state=seed + 1)
    degrees = np.degrees((one.inv() * other).magnitude())
    return torch.from_numpy(one.as_matrix()).float(), torch.from_numpy(other.as_matrix()).float(), degrees


# --- loss -------------------------------------------------------------------------------------------------------------


def test_the_chordal_loss_is_one_minus_the_squared_product_of_quaternions() -> None:
    q = torch.nn.functional.normalize(torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    expected = np.mean([1 - (np.dot(a, b)) ** 2 for a, b in zip(*q.double().numpy(), strict=True)])
    assert float(chordal_loss(quaternion_to_matrix(q[0]), quaternion_to_matrix(q[1]))) == pytest.approx(
        expected, abs=1e-6
    )


def test_the_sine_loss_is_that_of_half_the_angle() -> None:
    one, other, degrees = drawn(300)
    assert float(sine_loss(one, other)) == pytest.approx(np.sin(np.radians(degrees) / 2).mean(), abs=1e-5)


def test_q_and_minus_q_are_one_rotation_for_both_losses_but_not_for_a_distance_of_numbers() -> None:
    q = torch.nn.functional.normalize(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    target = quaternion_to_matrix(q)
    assert float(chordal_loss(quaternion_to_matrix(-q), target)) == pytest.approx(0, abs=1e-6)
    assert float(sine_loss(quaternion_to_matrix(-q), target)) < 1e-3
    assert float((-q - q).square().sum(-1).mean()) == pytest.approx(4)


@pytest.mark.parametrize("loss", [chordal_loss, sine_loss])
@pytest.mark.parametrize("degrees", [0, 1e-3, 90, 179.999, 180])
def test_gradients_are_finite_and_lead_to_the_target(loss, degrees: float) -> None:  # type: ignore[no-untyped-def]
    target = torch.eye(3)[None]
    turn = Rotation.from_euler("ZYX", [degrees, 0, 0], degrees=True).as_quat(scalar_first=True)
    q = torch.tensor(turn, dtype=torch.float32)[None].requires_grad_()
    loss(quaternion_to_matrix(q), target).backward()
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()
    if degrees == 90:
        with torch.no_grad():
            before = loss(quaternion_to_matrix(q), target)
            assert loss(quaternion_to_matrix(q - 0.01 * q.grad), target) < before


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_errors_against_scipy() -> None:
    one, other, degrees = drawn(401)
    metric = OrientationError()
    for part in torch.arange(401).split(100):
        metric.update(one[part], other[part])
    values = {name: float(value) for name, value in metric.compute().items()}
    expected = {
        "median_error": np.median(degrees),
        "mean_error": degrees.mean(),
        "acc_10": (degrees <= 10).mean(),
        "acc_30": (degrees <= 30).mean(),
    }
    assert values == pytest.approx(expected, abs=1e-3)
    assert 0 < values["acc_10"] + values["acc_30"] < 1


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    one, other, _ = drawn(31)
    metric = OrientationError()
    metric.update(one[rank::world], other[rank::world])
    results = metric.compute()
    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))
    torch.distributed.destroy_process_group()


def test_ranks_with_uneven_shards_give_what_one_process_gives(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    _one, _other, degrees = drawn(31)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert float(results["median_error"]) == pytest.approx(np.median(degrees), abs=1e-3)
    assert float(results["mean_error"]) == pytest.approx(degrees.mean(), abs=1e-3)


# --- module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "numbers"), [("quaternion", 4), ("6d", 6)])
@pytest.mark.parametrize("backbone", ["small", "resnet18", "resnet20_cifar", "googlenet"])
def test_predictions_are_rotations(head: str, numbers: int, backbone: str) -> None:
    torch.manual_seed(0)
    module = OrientationRegressor(backbone, head).eval()  # type: ignore[arg-type]
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = module.predict(images)["rotation"]
        listed = module.predict(list(images))["rotation"]
    assert found.dtype == torch.float32
    assert found.shape == (3, 3, 3)
    torch.testing.assert_close(found.mT @ found, torch.eye(3).expand(3, 3, 3))
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(3))
    assert torch.equal(found, listed)
    assert any(len(p) == numbers for p in module.parameters() if p.ndim == 1)


def test_an_image_classifiers_weights_are_taken_but_for_the_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = ImageClassifier("resnet20_cifar", 10)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "c.ckpt")
    module = OrientationRegressor("resnet20_cifar", "6d", weights=str(tmp_path / "c.ckpt"))
    own = module.network.state_dict()
    for name, value in classifier.network.state_dict().items():
        assert name.startswith("fc.") or torch.equal(own[name], value)
    assert "newly initialized: fc.weight (10, 64) -> (6, 64)" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["quaternion", "6d"])
def test_a_small_network_learns_a_few_turns(head: str) -> None:
    torch.manual_seed(0)
    loader = RenderedSolids(["corner"], image_size=32, val_size=24, batch_size=24, num_workers=0).val_dataloader()
    batch = next(iter(loader))
    module = OrientationRegressor("small", head, base_channels=8)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    first = None
    for _ in range(60):
        loss = module.losses(batch)["rotation"]
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metrics = module.build_metrics()
    module.update_metrics(metrics, {"rotation": module._rotations(batch["image"]).detach()}, batch)
    values = metrics.compute()
    assert first is not None
    assert first > 0.4
    assert float(loss.detach()) < 0.05
    assert float(values["median_error"]) < 15
    assert float(values["acc_30"]) > 0.8


def test_a_run_resumed_in_mid_epoch_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli.parser.run([
        "fit", "--model", "OrientationRegressor", "--model.backbone", "resnet20_cifar", "--data", "RenderedSolids",
        "--data.train_size", "20", "--data.val_size", "6", "--data.image_size", "32", "--data.batch_size", "4",
        "--data.num_workers", "0", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled", "--last.every_n_steps", "7",
        "--last.keep", "9", "--experiment", "run", "--model.schedule", "lightning_modules.schedules.Cosine",
    ])  # fmt: skip
    (whole,) = Path("runs/run").iterdir()
    expected = outcome(whole)
    assert expected["file"] == "step=00000015.ckpt"
    assert any("val/median_error" in row for row in read_metrics(whole / "metrics.csv"))
    assert list(whole.glob("figures/val_step=*.png"))
    assert differences(expected, outcome(kill_and_resume(whole, 7))) == []
