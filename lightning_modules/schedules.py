"""Learning-rate schedules: of the step and the length of the run, or of what validation measures (`Plateau`).

A config names one as the model's ``schedule``; ``VisionModule`` calls it with (optimizer, total steps)::

    schedule: {class_path: lightning_modules.schedules.Cosine, init_args: {warmup_steps: 100}}

Each gives a factor, by which every parameter group's own rate is multiplied. During the first ``warmup_steps`` steps
the factor is further multiplied by a line that rises to 1 (Goyal et al. 2017, section 2.2). The factor depends on the
step alone, so that a resumed run goes on exactly; `Plateau`'s state is in the checkpoint.
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
    """A LambdaLR whose factor is a function of the progress, 0 at the first step and 1 after the last."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        factor: Callable[[int, int], float],
        warmup_steps: int,
        warmup_power: float = 1.0,
    ) -> None:
        name = type(self).__name__
        if total_steps < 1 or warmup_steps < 0:
            raise UserError(
                f"{name}: expected total_steps of 1 or more and warmup_steps of 0 or more, "
                f"found {total_steps} and {warmup_steps}"
            )
        if total_steps <= warmup_steps:
            rank_zero_warn(f"{name}: the run's {total_steps} steps all lie within its {warmup_steps} warm-up steps")

        # A plain function: LambdaLR would put the state of any other callable into the checkpoint.
        def scale(step: int) -> float:
            warmup = min(1.0, (step + 1) / warmup_steps) ** warmup_power if warmup_steps else 1.0
            return warmup * factor(min(step, total_steps), total_steps)

        super().__init__(optimizer, scale)


class Cosine(_Schedule):
    """Half a cosine, from 1 down to ``minimum`` (SGDR, Loshchilov and Hutter 2017, equation 5, without restarts).

    Args:
        optimizer: the optimizer whose rates move.
        total_steps: steps of the whole run, warm-up included.
        warmup_steps: steps over which the rate rises in a line. The cosine starts where they end.
        minimum: last factor, as a fraction of the optimizer's own rate.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, minimum: float = 0.0) -> None:
        def factor(step: int, total: int) -> float:
            progress = max(0, step - warmup_steps) / max(1, total - warmup_steps)
            return minimum + (1 - minimum) * (1 + math.cos(math.pi * progress)) / 2

        super().__init__(optimizer, total_steps, factor, warmup_steps)


class Step(_Schedule):
    """Multiplied by ``gamma`` at each milestone: "divided by 10 at 32k and 48k of 64k iterations" (He et al. 2016).

    Args:
        optimizer: the optimizer whose rates move.
        total_steps: steps of the whole run.
        milestones: fractions of the run, rising, between 0 and 1: [0.5, 0.75].
        gamma: what the rate is multiplied by.
        warmup_steps: steps over which the rate rises; the milestones stay where they are.
        warmup_power: of that rise: 1 is a line, 4 the "burn-in" of YOLOv2's authors (darknet, network.c).
        forget_momentum: set momentum to 0 at each milestone (Mahendran and Vedaldi's code): what was gathered before
            would go on for many steps of the new rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        milestones: Sequence[float] = (0.5, 0.75),
        gamma: float = 0.1,
        warmup_steps: int = 0,
        warmup_power: float = 1.0,
        forget_momentum: bool = False,
    ) -> None:
        if list(milestones) != sorted(milestones) or not all(0 < m < 1 for m in milestones):
            raise UserError(f"milestones: expected rising fractions of the run between 0 and 1, found {milestones}")

        def factor(step: int, total: int) -> float:
            return gamma ** sum(step >= round(milestone * total) for milestone in milestones)

        self.forgets_at = [round(milestone * total_steps) for milestone in milestones] if forget_momentum else []
        super().__init__(optimizer, total_steps, factor, warmup_steps, warmup_power)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """As ever; the momentum's tensors stay and become 0."""
        super().step(*args, **kwargs)
        if self.last_epoch in self.forgets_at:
            for state in self.optimizer.state.values():
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"].zero_()


class Polynomial(_Schedule):
    """(1 - progress) to the power of ``power`` ("poly", Chen et al. 2017, DeepLab, section 4.1).

    Args:
        optimizer: the optimizer whose rates move.
        total_steps: steps of the whole run, warm-up included.
        power: 0.9 in DeepLab; 1 is a straight line.
        warmup_steps: steps over which the rate rises in a line; the polynomial counts from step 0 all the same.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, power: float = 0.9, warmup_steps: int = 0) -> None:
        def factor(step: int, total: int) -> float:
            return (1 - step / total) ** power

        super().__init__(optimizer, total_steps, factor, warmup_steps)


class InverseTime(_Schedule):
    """1 / (1 + decay t) after t steps, as Torch7's optimizers had it and AdaIN's authors use it.

    Args:
        optimizer: the optimizer whose rates move.
        total_steps: steps of the whole run.
        decay: of AdaIN 5e-5.
        warmup_steps: steps over which the rate rises in a line.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, decay: float = 5e-5, warmup_steps: int = 0) -> None:
        if decay < 0:
            raise UserError(f"decay: expected 0 or more, found {decay}")
        super().__init__(optimizer, total_steps, lambda step, total: 1 / (1 + decay * step), warmup_steps)


class Staircase(_Schedule):
    """Multiplied by ``gamma`` at the end of each of ``stairs`` equal parts of the run.

    GoogLeNet falls by 4% every 8 epochs: in 80 epochs that is gamma 0.96 and 10 stairs.

    Args:
        optimizer: the optimizer whose rates move.
        total_steps: steps of the whole run.
        gamma: what the rate is multiplied by.
        stairs: number of equal parts.
        warmup_steps: steps over which the rate rises in a line; the stairs stay where they are.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, gamma: float = 0.96, stairs: int = 10, warmup_steps: int = 0
    ) -> None:
        if stairs < 1:
            raise UserError(f"stairs: expected 1 or more, found {stairs}")

        def factor(step: int, total: int) -> float:
            return gamma ** (step * stairs // total)

        super().__init__(optimizer, total_steps, factor, warmup_steps)


class Plateau(LRScheduler):
    """Multiplied by ``factor`` when ``patience`` validations in a row have not improved the module's ``monitor``.

    Keras's ReduceLROnPlateau. `VisionModule` calls `observe` at the end of each validation, before checkpoints are
    written; torch's class of this name would be called later by Lightning, and not at all in a resumed epoch.

    Args:
        optimizer: the optimizer whose rates move.
        total_steps: steps of the whole run, on which nothing depends here.
        factor: what the rate is multiplied by.
        patience: validations without an improvement; counted anew after each reduction.
        threshold: what is gained by less is no improvement.
        minimum: least factor, as a fraction of the optimizer's own rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        factor: float = 0.1,
        patience: int = 12,
        threshold: float = 1e-4,
        minimum: float = 0.0,
    ) -> None:
        if not (0 < factor < 1 and patience >= 1 and threshold >= 0 and 0 <= minimum < 1):
            raise UserError(
                "Plateau: expected factor and minimum of 0 to 1, patience of 1 or more and threshold of 0 or more, "
                f"found {factor}, {minimum}, {patience} and {threshold}"
            )
        self.factor, self.patience, self.threshold, self.minimum = factor, patience, threshold, minimum
        self.scale, self.best, self.waited = 1.0, math.nan, 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Each group's rate now."""
        return [rate * self.scale for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """What has happened so far. The arguments are not in it, so that a resumed run takes those that it is given."""
        arguments = ("factor", "patience", "threshold", "minimum")
        return {key: value for key, value in super().state_dict().items() if key not in arguments}

    def observe(self, value: float, better: Literal["max", "min"]) -> None:
        """Takes what the validation measured; the rates change at once. A value that is nan is no improvement."""
        gain = value - self.best if better == "max" else self.best - value
        if gain > self.threshold or (math.isnan(self.best) and not math.isnan(value)):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.waited, self.scale = 0, max(self.minimum, self.scale * self.factor)
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = rate
