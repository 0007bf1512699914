"""Schedules: equal to torch's, resumable, built by jsonargparse."""

import io
import warnings

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, PolynomialLR, StepLR

from lightning_modules.base import VisionModule
from lightning_modules.schedules import Cosine, Plateau, Polynomial, Staircase, Step

STEPS = 40


def optimizer():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    return torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)


def rates(make, steps=STEPS):
    sgd = optimizer()
    schedule = make(sgd)
    out = []
    for _ in range(steps):
        out.append([group["lr"] for group in sgd.param_groups])
        sgd.step()
        schedule.step()
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda o: Cosine(o, STEPS), lambda o: CosineAnnealingLR(o, STEPS)),
        (lambda o: Step(o, STEPS, [0.5, 0.75], 0.2), lambda o: MultiStepLR(o, [20, 30], 0.2)),
        (lambda o: Polynomial(o, STEPS, 0.9), lambda o: PolynomialLR(o, STEPS, 0.9)),
        (lambda o: Staircase(o, STEPS, 0.9, 5), lambda o: StepLR(o, 8, 0.9)),
    ],
)
def test_equals_torch(ours, torchs):
    torch.testing.assert_close(rates(ours), rates(torchs), rtol=1e-9, atol=1e-12)


def test_warmup_is_a_line_and_the_cosine_starts_where_it_ends():
    found = rates(lambda o: Cosine(o, STEPS, warmup_steps=10, min_factor=0.1), STEPS + 1)[:, 0]
    torch.testing.assert_close(found[:10], torch.arange(1, 11, dtype=torch.float64) / 100)
    assert found[10] == pytest.approx(0.1)
    assert found[25] == pytest.approx(0.1 * (0.1 + 0.9 / 2))
    assert found[40] == pytest.approx(0.1 * 0.1)


def test_yolov2s_burn_in_rises_by_the_fourth_power():
    found = rates(lambda o: Step(o, STEPS, [0.5], 0.1, warmup_steps=10, warmup_power=4))[:, 0]
    torch.testing.assert_close(found[:10], 0.1 * (torch.arange(1, 11, dtype=torch.float64) / 10) ** 4)
    torch.testing.assert_close(found[10:20], torch.full((10,), 0.1, dtype=torch.float64))


def test_a_warmup_may_start_at_a_fraction():
    found = rates(lambda o: Step(o, STEPS, [0.5], 0.1, warmup_steps=10, warmup_start=0.3))[:, 0]
    expected = torch.tensor([0.3, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0]).to(found)
    torch.testing.assert_close(found[:11] / found[10], expected)
    with pytest.raises(ValueError, match="warmup_start: expected a factor of 0 to 1, found 3"):
        Step(optimizer(), STEPS, warmup_start=3)


def test_warmup_longer_than_the_run_is_said():
    with pytest.warns(UserWarning, match="all lie within its 100 warm-up steps"):
        found = rates(lambda o: Step(o, STEPS, [0.99], warmup_steps=100))[:, 0]
    assert found[0] == pytest.approx(0.001)


@pytest.mark.parametrize("milestones", [[0.75, 0.5], [30, 60], [0.0]])
def test_milestones_are_fractions(milestones):
    with pytest.raises(ValueError, match="increasing fractions of the run"):
        Step(optimizer(), STEPS, milestones)


@pytest.mark.parametrize("schedule", [Cosine, Step, Polynomial, Staircase])
def test_resumes_through_a_weights_only_checkpoint(schedule):
    whole = rates(lambda o: schedule(o, STEPS, warmup_steps=5))
    sgd = optimizer()
    first = schedule(sgd, STEPS, warmup_steps=5)
    for _ in range(17):
        sgd.step()
        first.step()
    file = io.BytesIO()
    torch.save({"schedule": first.state_dict(), "optimizer": sgd.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    sgd = optimizer()
    second = schedule(sgd, STEPS, warmup_steps=5)
    sgd.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["schedule"])
    for step in range(17, STEPS):
        assert [group["lr"] for group in sgd.param_groups] == whole[step].tolist()
        sgd.step()
        second.step()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_reduces_after_patience_validations(mode):
    sgd = optimizer()
    plateau = Plateau(sgd, STEPS, factor=0.1, patience=2, threshold=0.01, min_factor=0.05)
    sign = 1 if mode == "max" else -1
    seen = []
    for value in [1, 2, 2.005, 3, float("nan"), 2, 2.5, 2.6, 2.7, 4]:
        plateau.observe(sign * value, mode)
        for _ in range(3):  # steps between validations change nothing
            sgd.step()
            plateau.step()
        seen.append([round(group["lr"] / start, 9) for group, start in zip(sgd.param_groups, (0.1, 0.5), strict=True)])
    assert [a for a, _ in seen] == [b for _, b in seen] == [1, 1, 1, 1, 1, 0.1, 0.1, 0.05, 0.05, 0.05]


def test_plateau_goes_on_from_a_checkpoint():
    def observed(values, saved=None):
        sgd = optimizer()
        plateau = Plateau(sgd, STEPS, patience=2)
        if saved:
            sgd.load_state_dict(saved[0])
            plateau.load_state_dict(saved[1])
        for value in values:
            plateau.observe(value, "min")
            plateau.step()
        return sgd.state_dict(), plateau.state_dict()

    values = [3.0, 2.0, 2.5, 2.4, 2.3, 1.0, 1.5, 1.4]
    whole = observed(values)
    assert whole[0]["param_groups"][0]["lr"] == pytest.approx(0.001)
    for i in range(1, len(values)):
        file = io.BytesIO()
        torch.save(observed(values[:i]), file)
        file.seek(0)
        assert observed(values[i:], torch.load(file, weights_only=True)) == whole


def test_plateau_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match="factor and min_factor of 0 to 1"):
        Plateau(optimizer(), STEPS, factor=1.5)


def parse(*args):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VisionModule, "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = parser.parse_args(["--model=lightning_modules.base.VisionModule", *args])
        return parser.dump(config), parser.instantiate_classes(config).model


def test_momentum_is_forgotten_at_milestones_alone():
    weight = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    schedule = Step(sgd, 10, [0.3, 0.7], reset_momentum=True)
    found = []
    for _ in range(9):
        weight.grad = torch.ones(1)
        sgd.step()
        schedule.step()
        found.append(sgd.state[weight]["momentum_buffer"].item())
    assert [i + 1 for i, value in enumerate(found) if value == 0] == [3, 7]
    assert found[3] == pytest.approx(1.0)
    assert found[1] == pytest.approx(1.9)


@pytest.mark.parametrize("name", ["lightning_modules.schedules.Cosine", "Cosine"])
def test_jsonargparse_builds_a_schedule_from_optimizer_and_steps(name):
    _, module = parse(f"--model.schedule={name}", "--model.schedule.warmup_steps=100")
    schedule = module.schedule_factory(optimizer(), 1000)
    assert isinstance(schedule, Cosine)
    assert schedule.get_last_lr()[0] == pytest.approx(0.001)
    _, module = parse('--model.schedule={"class_path": "' + name + '", "init_args": {"warmup_steps": 10}}')
    assert module.schedule_factory(optimizer(), 1000).get_last_lr()[0] == pytest.approx(0.01)


def test_jsonargparse_shows_and_builds_the_optimizer():
    dumped, module = parse("--model.optimizer.lr=.2")
    assert "class_path: torch.optim.SGD" in dumped
    assert "weight_decay: 0.0001" in dumped
    made = module.optimizer_factory([nn.Parameter(torch.zeros(1))])
    assert made.defaults["lr"] == 0.2
    assert made.defaults["momentum"] == 0.9
    _, module = parse("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=.05")
    assert module.optimizer_factory([nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.05
