"""Learning-rate schedules that are functions of the step and the length of the run, and `Plateau`.

A config names one as the model's ``schedule``; `VisionModule` calls it with (optimizer, total steps)::

    schedule: {class_path: lightning_modules.schedules.Cosine, init_args: {warmup_steps: 100}}

Each schedule computes a factor f(t) of the step t in a run of T steps; it multiplies the learning rate of every
parameter group. During the first W warm-up steps it is also multiplied by (t + 1) / W (Goyal et al. 2017, section 2.2).
The factor depends on the step alone, so that a run resumes exactly; `Plateau` keeps its state in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from errors import UserError


class _Schedule(LambdaLR):
    """LambdaLR with a factor of (step, total steps) and a warm-up."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        factor: Callable[[int, int], float],
        warmup_steps: int,
        warmup_power: float = 1.0,
        warmup_start: float = 0.0,
    ) -> None:
        name = type(self).__name__
        if total_steps < 1 or warmup_steps < 0:
            raise UserError(
                f"{name}: expected total_steps of 1 or more and warmup_steps of 0 or more, "
                f"found {total_steps} and {warmup_steps}"
            )
        if not 0 <= warmup_start <= 1:
            raise UserError(f"warmup_start: expected a factor of 0 to 1, found {warmup_start}")
        if total_steps <= warmup_steps:
            rank_zero_warn(f"{name}: the run's {total_steps} steps all lie within its {warmup_steps} warm-up steps")

        # A plain function: LambdaLR would save the state of any other callable in the checkpoint.
        def scale(step: int) -> float:
            progress = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
            return max(warmup_start, progress**warmup_power) * factor(min(step, total_steps), total_steps)

        super().__init__(optimizer, scale)


class Cosine(_Schedule):
    """Cosine annealing without restarts (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5).

    f(t) = m + (1 - m) (1 + cos(pi (t - W) / (T - W))) / 2 after W warm-up steps, with m = ``min_factor``.

    Args:
        optimizer: the optimizer.
        total_steps: steps of the run, warm-up included.
        warmup_steps: steps of linear warm-up; the cosine starts after them.
        min_factor: factor at the end of the run.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_factor: float = 0.0) -> None:
        def factor(step: int, total: int) -> float:
            progress = max(0, step - warmup_steps) / max(1, total - warmup_steps)
            return min_factor + (1 - min_factor) * (1 + math.cos(math.pi * progress)) / 2

        super().__init__(optimizer, total_steps, factor, warmup_steps)


class Step(_Schedule):
    """Multi-step decay: f(t) = gamma^(number of milestones reached), as in He et al., CVPR 2016.

    Args:
        optimizer: the optimizer.
        total_steps: steps of the run, warm-up included.
        milestones: increasing fractions of the run between 0 and 1, such as [0.5, 0.75].
        gamma: factor at each milestone.
        warmup_steps: steps of warm-up; they do not move the milestones.
        warmup_power: exponent of the warm-up: 1 is linear, 4 is YOLOv2's "burn-in" (darknet/src/network.c).
        warmup_start: smallest factor of the warm-up, 0 to 1; YOLO's starts at a tenth of the learning rate.
        reset_momentum: set SGD's momentum to 0 at each milestone, as Mahendran and Vedaldi's code does. Momentum of the
            higher learning rate would last for many steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        milestones: Sequence[float] = (0.5, 0.75),
        gamma: float = 0.1,
        warmup_steps: int = 0,
        warmup_power: float = 1.0,
        warmup_start: float = 0.0,
        reset_momentum: bool = False,
    ) -> None:
        if list(milestones) != sorted(milestones) or not all(0 < m < 1 for m in milestones):
            raise UserError(f"milestones: expected increasing fractions of the run in 0..1, found {milestones}")

        def factor(step: int, total: int) -> float:
            return gamma ** sum(step >= round(milestone * total) for milestone in milestones)

        self.reset_steps = [round(milestone * total_steps) for milestone in milestones] if reset_momentum else []
        super().__init__(optimizer, total_steps, factor, warmup_steps, warmup_power, warmup_start)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Advance by one step; reset the momentum at milestones if requested."""
        super().step(*args, **kwargs)
        if self.last_epoch in self.reset_steps:
            for state in self.optimizer.state.values():
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"].zero_()


class Polynomial(_Schedule):
    """Polynomial decay: f(t) = (1 - t / T)^power ("poly", Chen et al. 2017, DeepLab, section 4.1).

    Args:
        optimizer: the optimizer.
        total_steps: steps of the run, warm-up included.
        power: exponent; 0.9 in DeepLab, 1 is linear.
        warmup_steps: steps of linear warm-up; the polynomial starts at step 0 nonetheless.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, power: float = 0.9, warmup_steps: int = 0) -> None:
        def factor(step: int, total: int) -> float:
            return (1 - step / total) ** power

        super().__init__(optimizer, total_steps, factor, warmup_steps)


class InverseTime(_Schedule):
    """Inverse time decay: f(t) = 1 / (1 + decay t), as in Torch7's optimizers and AdaIN.

    Args:
        optimizer: the optimizer.
        total_steps: steps of the run.
        decay: decay per step; 5e-5 in AdaIN.
        warmup_steps: steps of linear warm-up.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, decay: float = 5e-5, warmup_steps: int = 0) -> None:
        if decay < 0:
            raise UserError(f"decay: expected 0 or more, found {decay}")
        super().__init__(optimizer, total_steps, lambda step, total: 1 / (1 + decay * step), warmup_steps)


class Staircase(_Schedule):
    """Staircase decay: f(t) = gamma^floor(t N / T), N = ``num_intervals``.

    GoogLeNet decreases by 4% every 8 epochs: gamma 0.96 with 10 intervals in 80 epochs.

    Args:
        optimizer: the optimizer.
        total_steps: steps of the run.
        gamma: factor at the end of each interval.
        num_intervals: number of equal intervals of the run, N.
        warmup_steps: steps of linear warm-up; they do not move the intervals.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        gamma: float = 0.96,
        num_intervals: int = 10,
        warmup_steps: int = 0,
    ) -> None:
        if num_intervals < 1:
            raise UserError(f"num_intervals: expected 1 or more, found {num_intervals}")

        def factor(step: int, total: int) -> float:
            return gamma ** (step * num_intervals // total)

        super().__init__(optimizer, total_steps, factor, warmup_steps)


class Plateau(LRScheduler):
    """Multiply the learning rate by ``factor`` after ``patience`` validations without improvement.

    It watches the module's ``monitor``, as Keras's ReduceLROnPlateau does. `VisionModule` calls `observe` at the end of
    each validation, before checkpoints are written. Lightning would update torch's ReduceLROnPlateau later, and not at
    all in a resumed epoch.

    Args:
        optimizer: the optimizer.
        total_steps: steps of the run; not used.
        factor: factor of each reduction.
        patience: validations without improvement before a reduction; counted anew after it.
        threshold: smallest absolute change of the metric that counts as an improvement.
        min_factor: lower bound of the product of all reductions.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        factor: float = 0.1,
        patience: int = 12,
        threshold: float = 1e-4,
        min_factor: float = 0.0,
    ) -> None:
        if not (0 < factor < 1 and patience >= 1 and threshold >= 0 and 0 <= min_factor < 1):
            raise UserError(
                "Plateau: expected factor and min_factor of 0 to 1, patience of 1 or more and threshold of 0 or more, "
                f"found {factor}, {min_factor}, {patience} and {threshold}"
            )
        self.factor, self.patience, self.threshold, self.min_factor = factor, patience, threshold, min_factor
        self.scale, self.best, self.num_bad_validations = 1.0, math.nan, 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the current learning rate of each group."""
        return [lr * self.scale for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the arguments, so that a resumed run uses those of its own config."""
        arguments = ("factor", "patience", "threshold", "min_factor")
        return {key: value for key, value in super().state_dict().items() if key not in arguments}

    def observe(self, value: float, mode: Literal["max", "min"]) -> None:
        """Update the learning rates with a validation result; nan is not an improvement.

        Args:
            value: value of the metric.
            mode: whether larger (``max``) or smaller (``min``) is better.
        """
        gain = value - self.best if mode == "max" else self.best - value
        if gain > self.threshold or (math.isnan(self.best) and not math.isnan(value)):
            self.best, self.num_bad_validations = value, 0
            return
        self.num_bad_validations += 1
        if self.num_bad_validations >= self.patience:
            self.num_bad_validations, self.scale = 0, max(self.min_factor, self.scale * self.factor)
            for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = lr
