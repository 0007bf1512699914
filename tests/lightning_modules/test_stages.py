"""StagedModule: frozen parts, schedules, measurements and exact resume of a small system of three stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from callbacks.resume import LastCheckpoint, StepSeed
from lightning_modules.base import ScheduleFactory
from lightning_modules.schedules import Cosine, Plateau
from lightning_modules.stages import StagedModule
from tests.small_system import BlobsData, differences

NAMES = ("first", "second", "third")


class ThreeStages(StagedModule):
    """Three small networks; between two stages the training set is read and the end of a stage is noted."""

    stage_names = NAMES
    monitor = ("val/loss", "min")

    def __init__(self, ends: tuple[int, ...] = (4, 9), schedule: ScheduleFactory | None = Cosine) -> None:
        super().__init__(
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1), schedule=schedule
        )
        self.ends = ends
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Dropout(0.3), nn.Linear(192, 3)) for _ in NAMES
        )
        self.measured: list[int] = []
        self.seen: list[tuple[int, list[bool]]] = []

    def stage_modules(self) -> list[nn.Module]:
        return list(self.parts)

    def plan_stages(self, total_steps: int) -> list[int]:
        return [*(min(end, total_steps) for end in self.ends), total_steps]

    def stage_schedule(self, stage: int) -> ScheduleFactory | None:
        return None if stage == 2 else self._schedule

    def on_stage_end(self) -> None:
        labels = [batch["label"] for batch in self.training_batches() if not self.parts.training]
        assert sorted(torch.cat(labels).tolist()) == sorted(i % 3 for i in range(22))
        self.measured.append(self.stage)

    def stage_state(self) -> dict[str, Any]:
        return {"measured": self.measured}

    def load_stage_state(self, state: dict[str, Any]) -> None:
        self.measured = list(state["measured"])

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.seen.append((self.stage, [part.training for part in self.parts]))
        logits = self.parts[self.stage](self.preprocess(batch["image"]))
        return {"cross_entropy": nn.functional.cross_entropy(logits, batch["label"])}

    def predict(self, images: Any) -> Tensor:
        return self.parts[self.stage](self.preprocess(images))


def fit(folder: Path, module: StagedModule, resume: Path | None = None, **options: Any) -> dict[int, dict[str, Any]]:
    """Train on 6 batches per epoch; return the checkpoint of each step."""
    last = LastCheckpoint(every_n_steps=1, keep=1000)
    last.dirpath = str(folder)
    trainer = pl.Trainer(
        **{"max_epochs": 2, **options}, default_root_dir=folder, accelerator="cpu", logger=False,
        callbacks=[StepSeed(3), last], use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=BlobsData(batch_size=4, num_workers=0, seed=3), ckpt_path=resume, weights_only=True)
    checkpoints = {int(p.stem.split("=")[1]): torch.load(p, weights_only=True) for p in folder.glob("step=*.ckpt")}
    return dict(sorted(checkpoints.items()))


def three_stages(**options: Any) -> ThreeStages:
    torch.manual_seed(0)
    return ThreeStages(**options)


def test_each_stage_trains_its_own_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages of 4, 5 and 3 steps; weight decay, momentum and batch statistics leave frozen parts alone."""
    module = three_stages()
    checkpoints = fit(tmp_path, module)
    assert [stage for stage, _ in module.seen] == [0] * 4 + [1] * 5 + [2] * 3
    assert all(training == [i == stage for i in range(3)] for stage, training in module.seen)
    initial = {"state_dict": three_stages().state_dict()}
    for step, checkpoint in checkpoints.items():
        before = checkpoints.get(step - 1, initial)["state_dict"]
        changed = {key.split(".")[1] for key, value in checkpoint["state_dict"].items() if not value.equal(before[key])}
        assert changed == {str(module.seen[step - 1][0])}, step
    printed = capsys.readouterr().out
    for number, (name, start) in enumerate(zip(NAMES, (0, 4, 9), strict=True), 1):
        assert printed.count(f"ThreeStages: stage {number} of 3, {name}, starts at step {start}\n") == 1


def test_state_of_checkpoints(tmp_path: Path) -> None:
    """A stage counts as finished after its last step; measurements follow before the next step."""
    saved = {step: checkpoint["stages"] for step, checkpoint in fit(tmp_path, three_stages()).items()}
    assert [saved[step]["stage"] for step in (3, 4, 5, 9, 10, 12)] == [0, 0, 1, 1, 2, 2]
    assert [saved[step]["finished"] for step in (3, 4, 5, 9, 10, 12)] == [0, 1, 1, 2, 2, 3]
    assert [saved[step]["measured"] for step in (4, 5, 12)] == [[], [0], [0, 1]]


def test_each_stage_has_its_own_schedule(tmp_path: Path) -> None:
    checkpoints = fit(tmp_path, three_stages())
    rates = [[g["lr"] for g in c["optimizer_states"][0]["param_groups"]] for c in checkpoints.values()]
    alone = Cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), 5).lr_lambdas[0]
    # A checkpoint holds the learning rate of the step that follows it.
    for step, (first, second, third) in enumerate(rates, 1):
        assert second == 0.01 * alone(max(0, step - 4)), step
        assert third == 0.01
        assert (first == 0) == (step >= 4)


def test_a_killed_run_resumes_exactly(tmp_path: Path) -> None:
    expected = fit(tmp_path / "whole", three_stages())
    for step in (2, 4, 5, 6, 9, 11):
        resume = tmp_path / f"whole/step={step:08d}.ckpt"
        resumed = fit(tmp_path / str(step), three_stages(), resume)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "stages"):
            assert differences(expected[12][key], resumed[12][key]) == [], (step, key)


def test_a_longer_run_may_return_to_an_earlier_stage(tmp_path: Path) -> None:
    fit(tmp_path / "short", three_stages(ends=(2, 4)), max_epochs=1)
    module = three_stages(ends=(8, 12))
    fit(tmp_path / "long", module, tmp_path / "short/step=00000005.ckpt", max_epochs=3)
    assert [stage for stage, _ in module.seen] == [0] * 3 + [1] * 4 + [2] * 6


def test_a_run_that_is_too_short_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="run of 6 steps ends in stage 2 of 3; increase --trainer.max_epochs"):
        fit(tmp_path, three_stages(), max_epochs=1)


def test_a_schedule_must_be_a_function_of_the_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schedule: expected a function of the step, found Plateau"):
        fit(tmp_path, three_stages(schedule=Plateau))
