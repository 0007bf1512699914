"""DeepPose: parameter counts, encoding, loss, crops and errors of the cascade, stages, resume, learning."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import cli.parser
from datamodules.pose.crops import PersonCrop
from datamodules.pose.mpii import MPII
from datamodules.synthetic.mpii import write_mpii
from lightning_modules.components.unsaved import Constant
from lightning_modules.pose.deeppose import (
    DeepPose,
    PoseRegressor,
    crop_squares,
    decode,
    encode,
    error_moments,
    fit_gaussian,
    image_box,
    joint_loss,
    torso_diameters,
)  # fmt: skip
from lightning_modules.pose.joints import MPII_JOINTS
from tests.processes import finish, train_ranks
from tests.small_system import differences, kill_and_resume, outcome

TORSO = MPII_JOINTS.index("left_shoulder"), MPII_JOINTS.index("right_hip")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def some_batch(seed: int = 0, people: int = 3, side: int = 64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (people, 3, side, side), dtype=torch.uint8, generator=generator),
        "keypoints": torch.rand(people, 16, 2, generator=generator) * (side - 1),
        "labeled": torch.rand(people, 16, generator=generator) < 0.7,
        "head_size": torch.full((people,), 10.0),
        "to_original": torch.eye(2, 3).repeat(people, 1, 1),
        "id": [f"{i}.jpg#0" for i in range(people)],
    }


def narrow(**options: Any) -> DeepPose:
    torch.manual_seed(0)
    return DeepPose(**{"width_multiplier": 0.02, "input_size": 64, "stage_epochs": [1, 1, 1], **options})


def in_stage(stage: int, **options: Any) -> DeepPose:
    """Return a module that trains ``stage``; errors of earlier stages are 0.01 torso diameters."""
    module = narrow(**options)
    module.stage = stage
    module.gaussians.extend(Constant(torch.full((2, 16, 2), 0.01)) for _ in range(stage))
    return module


# --- network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("joints", "parameters"), [(14, 58_396_060), (16, 58_412_448)])
def test_the_papers_number_of_parameters(joints: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(PoseRegressor(joints)) == parameters


def test_maps_are_as_large_as_in_the_paper() -> None:
    with torch.device("meta"):
        x, sides = torch.zeros(1, 3, 220, 220), []
        for layer in PoseRegressor().trunk.children():
            x = layer(x)
            sides += [x.shape[2]] if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)) else []
    assert sides == [55, 27, 27, 13, 13, 13, 13, 6]


@pytest.mark.parametrize(
    ("options", "side"),
    [({"input_size": 100, "width_multiplier": 0.05}, 100),
     ({"input_size": 59, "width_multiplier": 0.05, "batch_norm": True}, 59),
     ({"backbone": "resnet18"}, 64), ({"backbone": "mobilenet_v3_small"}, 40)],
)  # fmt: skip
def test_any_network_gives_a_place_a_joint(options: dict[str, Any], side: int) -> None:
    network = PoseRegressor(5, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(torch.randn(2, 3, side, side))
    assert found.shape == (2, 5, 2)
    assert found.dtype == torch.float32


def test_a_backbone_has_its_own_last_layer_replaced() -> None:
    with torch.device("meta"):
        assert count(PoseRegressor(16, "resnet18")) == 11_689_512 - 513 * 1000 + 513 * 32
        assert count(PoseRegressor(16, "vgg16")) == 138_357_544 - 4097 * 1000 + 4097 * 32


def test_weights_of_a_backbone(tmp_path: Path) -> None:
    """The trunk is loaded from a file of ImageNet weights; all stages start from the same weights."""
    import torchvision

    torch.manual_seed(1)
    network = torchvision.models.resnet18(num_classes=1000)
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    module = DeepPose(backbone="resnet18", weights=str(tmp_path / "resnet18.pth"), stage_epochs=[1, 1])
    for regressor in module.regressors:
        for name, value in regressor.trunk.state_dict().items():  # type: ignore[union-attr, operator]
            assert torch.equal(value, network.state_dict()[name])


# --- target encoding --------------------------------------------------------------------------------------------------


def test_normalizing_and_back() -> None:
    keypoints, images = torch.rand(4, 16, 2) * 300 - 100, torch.zeros(4, 3, 50, 80)
    center, size = image_box(images)
    torch.testing.assert_close(decode(encode(keypoints, center, size), center, size), keypoints)
    edges = torch.tensor([[-0.5, -0.5], [39.5, 24.5], [79.5, 49.5]])
    assert encode(edges, center, size).tolist() == [[-0.5, -0.5], [0, 0], [0.5, 0.5]]


def test_a_joint_keeps_its_place_when_the_image_is_resized() -> None:
    """Predictions of the first stage, made in the resized image, refer to the input image."""

    class Brightest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            light = (x[:, 0] - x[:, 0].amin((1, 2), keepdim=True)).double()
            light = light / light.sum((1, 2), keepdim=True)
            line = torch.arange(x.shape[2], dtype=torch.float64)
            place = torch.stack([(light.sum(1) * line).sum(1), (light.sum(2) * line).sum(1)], 1)
            return encode(place, *image_box(x)).float()[:, None].expand(-1, 16, -1)

    module = narrow()
    module.regressors[0] = Brightest()
    image = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    image[:, :, 30:34, 77:81] = 255
    found = module.predict(image)["keypoints"]
    torch.testing.assert_close(found, torch.tensor([78.5, 31.5]).expand(1, 16, 2), atol=1e-3, rtol=0)


# --- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_the_loss_equals_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, target = rng.normal(0, 1, (2, 4, 7, 2))
    counted = rng.random((4, 7)) < rng.choice([0, 0.3, 0.8, 1])
    total = 0.0
    for b in range(4):
        for i in range(7):
            if counted[b, i]:
                total += (found[b, i, 0] - target[b, i, 0]) ** 2 + (found[b, i, 1] - target[b, i, 1]) ** 2
    loss = joint_loss(torch.from_numpy(found), torch.from_numpy(target), torch.from_numpy(counted))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(total / 4, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("stage", [0, 1])
def test_joints_without_a_label_get_no_gradient(stage: int) -> None:
    module, batch = in_stage(stage, crops_per_person=16), some_batch()
    batch["labeled"][:] = True
    batch["labeled"][:, 5] = False
    (loss,) = module.losses(batch).values()
    loss.backward()
    gradient = module.regressors[stage].joints.bias.grad.unflatten(0, (16, 2)).abs().sum(1)  # type: ignore[union-attr, operator]
    assert gradient[5] == 0
    assert (gradient[[i for i in range(16) if i != 5]] > 0).all()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_batch_without_a_label_is_finite(stage: int) -> None:
    module, batch = in_stage(stage), some_batch()
    batch["labeled"][:], batch["keypoints"][:] = False, 0
    (loss,) = module.losses(batch).values()
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_an_unlabeled_torso_is_the_one_that_was_found() -> None:
    module, batch = in_stage(1), some_batch()
    batch["labeled"][:] = True
    batch["labeled"][1, TORSO[0]] = False
    found = batch["keypoints"] * 3
    expected = torso_diameters(batch["keypoints"], TORSO, 6.4) * torch.tensor([1, 3, 1])
    torch.testing.assert_close(module._diameters(batch, found), expected)


@pytest.mark.parametrize("stage", [0, 2])
def test_the_loss_is_float32_under_autocast(stage: int) -> None:
    module = in_stage(stage)
    with torch.autocast("cpu", torch.bfloat16):
        terms = module.losses(some_batch())
    assert {name: term.dtype for name, term in terms.items()} == {f"stage_{stage + 1}": torch.float32}


# --- cascade --------------------------------------------------------------------------------------------------------


def coordinates(people: int, height: int, width: int) -> Tensor:
    """Return images whose pixel values are their own x and y."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]).float().expand(people, -1, -1, -1)


def test_crops_show_what_lies_there() -> None:
    """Compare with loops, on an image of coordinates."""
    center, side = torch.tensor([[[30.0, 20.3], [41.7, 25.0]]]).expand(2, -1, -1), torch.tensor([16.0, 9.5])
    crops = crop_squares(coordinates(2, 50, 70), center, side, 8)
    assert crops.shape == (2, 2, 3, 8, 8)
    for b in range(2):
        for n in range(2):
            for i in range(8):
                for j in range(8):
                    x = center[b, n, 0] + ((j + 0.5) / 8 - 0.5) * side[b]
                    y = center[b, n, 1] + ((i + 0.5) / 8 - 0.5) * side[b]
                    torch.testing.assert_close(crops[b, n, :2, i, j], torch.stack([x, y]), atol=1e-3, rtol=0)


def test_a_crop_as_large_as_the_image_is_the_image() -> None:
    image = torch.randn(1, 3, 20, 20)
    crop = crop_squares(image, torch.full((1, 1, 2), 9.5), torch.tensor([20.0]), 20)
    torch.testing.assert_close(crop[:, 0], image, atol=1e-5, rtol=1e-5)
    assert (crop_squares(image + 5, torch.full((1, 1, 2), -40.0), torch.tensor([20.0]), 20) == 0).all()


class Knowing(nn.Module):
    """Regressor that reads the position of its crop from an image of coordinates and returns the exact delta.

    Args:
        true: ground truth, float (B, K, 2) in pixels.
    """

    def __init__(self, true: Tensor) -> None:
        super().__init__()
        self.true = true

    def forward(self, crops: Tensor) -> Tensor:
        size = crops.shape[-1]
        center = crops[:, :2].double().mean((2, 3))
        side = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]).double() * size / (size - 1)
        true = self.true.repeat_interleave(len(crops) // len(self.true), 0)
        return ((true - center[:, None]) / side[:, None, None]).float()


def test_the_exact_offset_puts_each_joint_on_the_truth() -> None:
    torch.manual_seed(3)
    module = narrow()
    true = torch.rand(3, 16, 2) * 80 + 160
    found = true + torch.randn(3, 16, 2) * 5
    refined = module.refine(Knowing(true), coordinates(3, 400, 400), found)
    assert (refined - true).abs().max() < 1e-3
    assert (found - true).abs().max() > 5


def test_each_joint_has_its_own_outputs() -> None:
    """Joint i is moved by output i of the crop around it."""

    class Numbers(nn.Module):
        def forward(self, crops: Tensor) -> Tensor:
            return torch.arange(16.0)[None, :, None].expand(len(crops), -1, 2)

    module = narrow()
    found = torch.full((1, 16, 2), 50.0)
    moved = module.refine(Numbers(), torch.zeros(1, 3, 100, 100), found) - found
    # The torso has length 0, so it counts as 0.1 of the image's side; a crop is two torsos wide.
    torch.testing.assert_close(moved[0], torch.arange(16.0)[:, None].expand(-1, 2) * 20)


def test_training_crops_contain_what_the_loss_says() -> None:
    """An exact regressor has a loss of 0: joints, crops and targets correspond."""
    module, batch = in_stage(1), some_batch(people=4)
    true = torch.rand(4, 16, 2) * 80 + 160
    batch |= {"keypoints": true, "labeled": torch.ones(4, 16, dtype=torch.bool)}
    batch["image"] = torch.zeros(4, 3, 400, 400, dtype=torch.uint8)
    module._pixels = lambda images: coordinates(4, 400, 400)  # type: ignore[method-assign]
    module.regressors[1] = Knowing(true)
    assert float(module.losses(batch)["stage_2"]) < 1e-8
    module.regressors[1] = Knowing(true + 3)
    assert float(module.losses(batch)["stage_2"]) > 1e-5


def test_a_short_torso_counts_as_a_tenth_of_the_image() -> None:
    keypoints = torch.zeros(3, 16, 2)
    keypoints[1, TORSO[0]] = torch.tensor([3.0, 4.0])
    keypoints[2, TORSO[1]] = torch.tensor([-30.0, 40.0])
    assert torso_diameters(keypoints, TORSO, 10.0).tolist() == [10, 10, 50]


@pytest.mark.parametrize("seed", range(20))
def test_the_gaussian_equals_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, true = rng.normal(0, 40, (2, 6, 5, 2))
    counted, diameter = rng.random((6, 5)) < 0.6, rng.uniform(10, 50, 6)
    tensors = [torch.from_numpy(values) for values in (found, true, counted, diameter)]
    # Two parts, like batches or ranks.
    gaussian = fit_gaussian(sum(error_moments(*(t[part] for t in tensors)) for part in (slice(4), slice(4, 6))))  # type: ignore[arg-type]
    for i in range(5):
        errors = [(found[b, i] - true[b, i]) / diameter[b] for b in range(6) if counted[b, i]]
        mean, deviation = (np.mean(errors, 0), np.std(errors, 0)) if errors else (np.zeros(2), np.zeros(2))
        np.testing.assert_allclose(gaussian[:, i], np.stack([mean, deviation]), atol=1e-5)


def test_a_known_gaussian_is_recovered_and_drawn_again() -> None:
    """The fit recovers a known mean and deviation; errors simulated from the fit have them too."""
    torch.manual_seed(0)
    mean, deviation = torch.randn(16, 2) * 0.2, torch.rand(16, 2) * 0.3 + 0.05
    true, everything = torch.rand(4000, 16, 2) * 200, torch.ones(4000, 16, dtype=torch.bool)
    diameter = torso_diameters(true, TORSO, 20.0)
    found = true + (mean + deviation * torch.randn_like(true)) * diameter[:, None, None]
    fitted = fit_gaussian(error_moments(found, true, everything, diameter))
    torch.testing.assert_close(fitted, torch.stack([mean, deviation]), atol=0.02, rtol=0)
    module = in_stage(1, crops_per_person=16)
    module.gaussians = nn.ModuleList([Constant(fitted)])
    joint, center, counted = module.simulate(true, everything, diameter)
    assert counted.all()
    assert (joint.sort(1).values == torch.arange(16)).all()
    again = center.gather(1, joint.argsort(1)[..., None].expand(-1, -1, 2))
    drawn = fit_gaussian(error_moments(again, true, everything, diameter))
    torch.testing.assert_close(drawn, fitted, atol=0.02, rtol=0)


def test_only_labeled_joints_are_drawn_while_there_are_any() -> None:
    module, batch = in_stage(1, crops_per_person=4), some_batch(people=50)
    batch["labeled"][:] = False
    batch["labeled"][:, [3, 7, *TORSO]] = True
    joint, _, counted = module.simulate(batch["keypoints"], batch["labeled"], torch.full((50,), 20.0))
    assert counted.all()
    assert (joint.sort(1).values == torch.tensor(sorted([3, 7, *TORSO]))).all()


# --- prediction -----------------------------------------------------------------------------------------------------


def test_predictions_and_metrics_of_each_stage() -> None:
    """Untrained stages return their input; each stage is measured in pixels of the images on disk."""
    module, batch = narrow().eval(), some_batch()
    batch["labeled"][:] = True
    for stage in range(3):
        module.stage = stage
        with torch.no_grad():
            found = module.predict(batch["image"])
        assert found["stages"].shape == (3, 3, 16, 2)
        assert torch.equal(found["keypoints"], found["stages"][:, -1])
        same = [torch.equal(found["stages"][:, s], found["stages"][:, s - 1]) for s in (1, 2)]
        assert same == [stage < 1, stage < 2]
    assert (found["scores"] == 1).all()
    batch["to_original"] = torch.tensor([[[3.0, 0, 7], [0, 3.0, -2]]]).repeat(3, 1, 1)
    shifts = torch.tensor([9.0, 1.7, 1.6])  # 3 * 5/3 = 5 is half a head
    stages = batch["keypoints"][:, None] + torch.stack([shifts, torch.zeros(3)], 1)[None, :, None]
    metrics = module.build_metrics()
    module.update_metrics(metrics, {"stages": stages}, batch)
    results = metrics.compute()
    assert [float(results[f"stage{i}/pckh_total"]) for i in (1, 2, 3)] == [0, 0, 1]
    assert results["pckh/total"] == 1
    assert results["pckh/curve"].shape == (8, 51)


def test_stages_are_measured_by_pck_and_pcp_too() -> None:
    module = narrow(metric="pck", stage_epochs=[1, 1])
    assert module.monitor == ("val/pck/total", "max")
    batch = some_batch()
    batch["labeled"][:] = True
    metrics = module.build_metrics()
    module.update_metrics(metrics, {"stages": torch.stack([batch["keypoints"] + 500, batch["keypoints"]], 1)}, batch)
    results = metrics.compute()
    assert [float(results[f"stage{i}/pcp_total"]) for i in (1, 2)] == [0, 1]
    assert [float(results[f"stage{i}/pck_total"]) for i in (1, 2)] == [0, 1]
    assert results["pcp_relaxed/total"] == 1


# --- arguments ------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    for options, message in (
        ({"input_size": 58}, "input_size: expected 59 pixels or more for alexnet_2014, found 58"),
        (
            {"backbone": "fcn_resnet50"},
            "backbone: expected alexnet_2014 or a torchvision classification network, found fcn_",
        ),
        ({"backbone": "squeezenet1_0"}, "backbone: expected a network that ends in a linear layer, found squeezenet"),
        ({"weights": "DEFAULT"}, "weights: expected null for alexnet_2014, found DEFAULT; choose another backbone"),
        ({"stage_epochs": [3, 0]}, r"stage_epochs: expected 1 or more for each .*, found \[3, 0\]"),
        ({"sigma": 0}, "sigma: expected more than 0, found 0"),
        ({"crops_per_person": 17}, "crops_per_person: expected 1 to 16, the number of joints, found 17"),
        ({"joint_names": ["left_wrist"], "crops_per_person": 1}, "for the torso, found no left_shoulder"),
    ):
        with pytest.raises(ValueError, match=message):
            narrow(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found whole images; set --data.crop person"):
        narrow().predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])
    module = narrow()
    module.trainer = SimpleNamespace(datamodule=None)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="DeepPose: expected a datamodule to measure a stage on"):
        module._measure_errors()


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write seven training images and two for validation."""
    folder = tmp_path_factory.mktemp("people")
    write_mpii(str(folder), train=7, val=2, size=64)
    return folder


OPTIONS = [
    "fit", "--model", "DeepPose", "--model.width_multiplier", "0.02", "--model.batch_norm", "true",
    "--model.input_size", "64", "--model.stage_epochs", "[2, 1, 2]", "--data", "MPII",
    "--data.image_size", "72", "--data.num_workers", "0",
    "--trainer.max_epochs", "5", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled",
    "--last.every_n_steps", "1", "--last.keep", "99", "--experiment", "run",
]  # fmt: skip
SCHEDULE = ["--model.schedule", "lightning_modules.schedules.Cosine"]


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / f"checkpoints/step={step:08d}.ckpt", weights_only=True)


def moved(run: Path, before: int, after: int) -> list[bool]:
    """Return for each stage whether its weights or statistics changed between two steps."""
    states = [checkpoint(run, step)["state_dict"] for step in (before, after)]
    keys = [[key for key in states[0] if key.startswith(f"regressors.{stage}.")] for stage in range(3)]
    return [any(not torch.equal(states[0][key], states[1][key]) for key in stage) for stage in keys]


def test_a_fit_and_its_resumes(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three stages; the run is killed within and between them."""
    monkeypatch.chdir(tmp_path)
    data = ["--data.root", str(people), "--data.batch_size", "4"]
    optimizer = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.01"]
    cli.parser.run([*OPTIONS, *SCHEDULE, *data, *optimizer])
    printed = capsys.readouterr().out
    (run,) = Path("runs/run").iterdir()
    expected = outcome(run)
    total = expected["global_step"]
    epoch, rest = divmod(total, 5)
    assert rest == 0
    assert epoch >= 2
    for number, start in ((1, 0), (2, 2), (3, 3)):
        assert printed.count(f"DeepPose: stage {number} of 3 starts at step {start * epoch}\n") == 1
    assert printed.count("DeepPose: errors of stage") == 2
    assert moved(run, 1, 2 * epoch) == [True, False, False]
    # Weight decay and momentum do not change frozen stages.
    assert moved(run, 2 * epoch, 3 * epoch) == [False, True, False]
    assert moved(run, 3 * epoch, total) == [False, False, True]
    stages = [row["train/stage"] for row in expected["metrics"] if "train/stage" in row]
    assert stages == [1] * 2 * epoch + [2] * epoch + [3] * 2 * epoch
    rates = [
        [group["lr"] for group in checkpoint(run, step)["optimizer_states"][0]["param_groups"]]
        for step in (2 * epoch - 1, 2 * epoch, 3 * epoch, total)
    ]
    assert 0 < rates[0][0] < 0.01
    assert rates[1][1] == rates[2][2] == 0.01
    assert rates[3][2] == pytest.approx(0, abs=1e-9)
    states = {step: checkpoint(run, step)["stages"] for step in (2 * epoch, 2 * epoch + 1, 3 * epoch, total)}
    assert [(s["stage"], len(s["gaussians"])) for s in states.values()] == [(0, 0), (1, 1), (1, 1), (2, 2)]
    assert states[total]["gaussians"][0].abs().min() > 0
    assert differences(states[2 * epoch + 1]["gaussians"][0], states[total]["gaussians"][0]) == []
    validated = [row for row in expected["metrics"] if "val/pckh/total" in row]
    assert all(row["val/pckh/total"] == row["val/stage3/pckh_total"] for row in validated)
    for step in (1, 2 * epoch - 1, 2 * epoch, 2 * epoch + 1, 3 * epoch, total - 1):
        killed = kill_and_resume(run, step)
        assert differences(expected, outcome(killed)) == [], step
        assert differences(states[total], checkpoint(killed, total)["stages"]) == [], step
    again = DeepPose.load_from_checkpoint(run / "checkpoints" / expected["file"], weights_only=True)
    assert again.stage == 2
    assert len(again.joint_names) == 16
    assert list(run.glob("figures/val_stages_step=*.png"))


@pytest.mark.xdist_group("processes")
def test_two_ranks(tmp_path: Path) -> None:
    """Frozen stages do not change or block DDP, and errors are measured over all ranks."""
    write_mpii(str(tmp_path / "people"), train=6, val=2, size=64)
    # Two ranks read one person twice if the number of people is odd.
    assert len(MPII(str(tmp_path / "people"), image_size=64).dataset("train")) % 2 == 0  # type: ignore[arg-type]
    plain = [*OPTIONS, "--model.dropout", "0", "--model.batch_norm", "false", "--data.root", str(tmp_path / "people")]
    # No augmentation, so that the mean over ranks equals that of one batch.
    plain += ["--data.scale", "0", "--data.rotation", "0", "--data.hflip", "0", "--data.color_jitter", "0"]
    plain += ["--model.stage_epochs", "[2, 3]"]
    ranks = [*plain, "--data.batch_size", "1", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert finish(*train_ranks(ranks, tmp_path)) == [0, 0], (tmp_path / "log.txt").read_text()
    (run,) = (tmp_path / "runs/run").iterdir()
    last = max((run / "checkpoints").glob("step=*.ckpt"))
    step = int(last.stem.split("=")[1])
    (tmp_path / "one").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "one")
        cli.parser.run([*plain, "--data.batch_size", "2"])
    (alone,) = (tmp_path / "one/runs/run").iterdir()
    mine, theirs = (checkpoint(r, step)["stages"]["gaussians"][0] for r in (alone, run))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert theirs[1].min() > 0
    assert (tmp_path / "log.txt").read_text().count("DeepPose: stage 2 of 2 starts at step") == 1


def learn(module: DeepPose, batch: dict[str, Any], steps: int) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3)
    for _ in range(steps):
        (loss,) = module.losses(batch).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_it_learns_people_by_heart(tmp_path: Path) -> None:
    """The cascade overfits four people, from MPII's files to PCKh, and the second stage improves the result."""
    write_mpii(str(tmp_path), train=4, val=1, size=96)
    people = MPII(str(tmp_path), image_size=96).dataset("train")
    people.transform = PersonCrop(96)  # type: ignore[attr-defined]
    batch = default_collate([people[i] for i in range(4)])
    module = narrow(width_multiplier=0.1, batch_norm=True, dropout=0.0, stage_epochs=[1, 1], crops_per_person=8)
    module.setup("fit")
    learn(module, batch, 30)
    module.eval()
    with torch.no_grad():
        found = module.predict(batch["image"])["keypoints"]
    diameter = module._diameters(batch, found)
    moments = error_moments(found, batch["keypoints"], batch["labeled"], diameter)
    module.gaussians.append(Constant(fit_gaussian(moments)))
    module.stage = 1
    module.train()
    learn(module, batch, 300)
    module.eval()
    metrics = module.build_metrics()
    with torch.no_grad():
        module.update_metrics(metrics, module.predict(batch["image"]), batch)
    results = metrics.compute()
    print({key: float(value) for key, value in results.items() if "total" in key or key.endswith("auc")})
    assert results["pckh/total"] > 0.8
    assert results["pckh/auc"] > results["stage1/pckh_auc"] + 0.05
