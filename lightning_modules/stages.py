"""Training in stages: one fit trains the parts of a system one after the other (R-CNN, DeepPose)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from errors import UserError
from lightning_modules.base import ScheduleFactory, VisionModule


class StagedModule(VisionModule):
    """Base class of systems whose parts are trained one after the other in one fit.

    Each stage trains one part. All other parts are frozen: they are in eval mode and get no gradient, so neither
    momentum nor weight decay changes them. The step alone determines the stage, so a run resumes exactly, within a
    stage and between two. The stage, from 1, is logged as ``train/stage``.

    ``losses`` and ``predict`` read two attributes, which are part of the checkpoint:

    - ``stage``: index of the stage that is trained, or was trained last, from 0;
    - ``finished_stages``: number of stages that are complete after the current step.

    A subclass implements ``stage_modules`` and ``plan_stages``, and the other methods below where it needs them.

    Args:
        schedule: see `VisionModule`. It applies to each stage separately, and must be a function of the step.
        **kwargs: see `VisionModule`.
    """

    #: One name per stage for the messages; empty if the stages are only numbered.
    stage_names: Sequence[str] = ()

    def __init__(self, schedule: ScheduleFactory | None = None, **kwargs: Any) -> None:
        super().__init__(schedule=self._schedule_stages, **kwargs)
        self._schedule = schedule
        self.stage = 0
        self.finished_stages = 0
        self.stage_ends: list[int] = []

    # --- what a system writes -----------------------------------------------------------------------------------------

    def stage_modules(self) -> Sequence[nn.Module]:
        """Return the part that each stage trains, in order."""
        raise NotImplementedError

    def plan_stages(self, total_steps: int) -> list[int]:
        """Return the step at which each stage ends, in order; the last entry is ``total_steps``."""
        raise NotImplementedError

    def stage_schedule(self, stage: int) -> ScheduleFactory | None:
        """Return the learning-rate schedule over the steps of one stage; None keeps the learning rate constant."""
        return self._schedule

    def stage_parameter_groups(self, stage: int) -> list[dict[str, Any]]:
        """Return the optimizer's groups for one stage, see `VisionModule.parameter_groups`."""
        return [{"params": [p for p in self.stage_modules()[stage].parameters() if p.requires_grad]}]

    def on_stage_end(self) -> None:
        """Measure what the next stage needs; ``stage`` is still the one that ends."""

    def stage_state(self) -> dict[str, Any]:
        """Return what has been measured, for the checkpoint."""
        return {}

    def load_stage_state(self, state: dict[str, Any]) -> None:
        """Restore what `stage_state` returned."""

    # --- stages -------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self.train()
        if self.global_step == 0:
            self._announce_stage()

    def on_train_epoch_start(self) -> None:
        self._update_stage()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self._update_stage()
        # Checkpoints and validation follow the step, so they see the stages that are complete after it.
        self.finished_stages = sum(self.global_step + 1 >= end for end in self.stage_ends)
        loss = super().training_step(batch, batch_idx)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/stage", float(self.stage + 1), on_step=True, on_epoch=False, batch_size=1)
        if self.trainer.world_size > 1:
            # DDP waits for the gradient of every parameter; `on_before_optimizer_step` removes those of frozen ones.
            loss = loss + 0 * torch.stack([p.sum() for p in self._frozen_parameters()] or [loss.new_zeros(())]).sum()
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for parameter in self._frozen_parameters():
            parameter.grad = None

    def train(self, mode: bool = True) -> StagedModule:
        """Set the training mode; frozen parts stay in eval mode."""
        super().train(mode)
        for stage, module in enumerate(self.stage_modules()):
            module.train(mode and stage == self.stage)
        return self

    @torch.no_grad()
    def training_batches(self) -> Iterator[dict[str, Any]]:
        """Iterate over this rank's training set of the current epoch in eval mode, for `on_stage_end`.

        Raises:
            UserError: the trainer has no datamodule.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise UserError(f"{type(self).__name__}: expected a datamodule to measure a stage on, found none")
        loader = data.train_dataloader()
        # Read the whole epoch, whatever the progress of the trainer's own loader.
        loader.training, loader.sampler.epoch = False, self.current_epoch
        self._enter_evaluation()
        self.eval()
        for batch in islice(loader, int(self.trainer.num_training_batches)):
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            with self.trainer.precision_plugin.forward_context():
                yield batch
        self.train()
        self._set_buffer_sync(True)

    def _update_stage(self) -> None:
        stage = sum(self.global_step >= end for end in self.stage_ends[:-1])
        if stage == self.stage:
            return
        while self.stage < stage:
            self.on_stage_end()
            self.stage += 1
        self.stage = stage  # a longer run than that of the checkpoint may return to an earlier stage
        self.train()
        self._announce_stage()

    def _announce_stage(self) -> None:
        name = f", {self.stage_names[self.stage]}," if self.stage_names else ""
        rank_zero_only(print)(
            f"{type(self).__name__}: stage {self.stage + 1} of {len(self.stage_ends)}{name} "
            f"starts at step {self.global_step}",
            flush=True,
        )

    def _frozen_parameters(self) -> Iterator[nn.Parameter]:
        frozen = [module for stage, module in enumerate(self.stage_modules()) if stage != self.stage]
        return (p for module in frozen for p in module.parameters() if p.requires_grad)

    # --- optimizer ----------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        stages = range(len(self.stage_modules()))
        return [{**group, "stage": stage} for stage in stages for group in self.stage_parameter_groups(stage)]

    def _schedule_stages(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """Apply each stage's schedule to its own parameter groups, from the step at which the stage starts."""
        self.stage_ends = self.plan_stages(total_steps)
        count, reached = len(self.stage_ends), 1 + sum(end < total_steps for end in self.stage_ends[:-1])
        if reached < count:
            rank_zero_warn(
                f"{type(self).__name__}: the run of {total_steps} steps ends in stage {reached} of {count}; "
                "increase --trainer.max_epochs to train all stages"
            )
        factors = [self._stage_factor(stage) for stage in range(count)]
        return LambdaLR(optimizer, [factors[group["stage"]] for group in optimizer.param_groups])

    def _stage_factor(self, stage: int) -> Callable[[int], float]:
        schedule = self.stage_schedule(stage)
        if schedule is None:
            return lambda step: 1.0
        start, end = [0, *self.stage_ends][stage : stage + 2]
        own = schedule(SGD([torch.zeros(1)], lr=1.0), max(1, end - start))
        if not isinstance(own, LambdaLR):
            raise UserError(
                f"schedule: expected a function of the step, found {type(own).__name__}; use Cosine or Step"
            )
        factor = own.lr_lambdas[0]
        return lambda step: factor(max(0, step - start))

    # --- checkpoint ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stages"] = {
            "stage": self.stage,
            "finished": self.finished_stages,
            **self.stage_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["stages"]
        self.stage, self.finished_stages = saved["stage"], saved["finished"]
        self.load_stage_state(saved)
