"""Early stopping that survives a kill: a resumed run stops at the same step as an uninterrupted one."""

from __future__ import annotations

from typing import Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from callbacks.checkpoint import require_metric


class EarlyStop(EarlyStopping):
    """Stop the run if a metric has not improved for ``patience`` validations.

    Some things differ from Lightning's callback. The decision is made at the end of the validation, before that step's
    checkpoint is written; at the end of the epoch, a run resumed from that checkpoint would have no metric. A run that
    is resumed after the decision does not train on. nan is no improvement, as in `Plateau`, and does not stop the run
    at once: it is the value of a metric without samples, too. One line reports the stop.

    Args:
        monitor: the metric, ``val/<name>``.
        mode: ``max`` if higher is better, ``min`` if lower is.
        patience: validations without an improvement.
    """

    def __init__(self, monitor: str, mode: Literal["max", "min"], patience: int = 50) -> None:
        super().__init__(monitor, patience=patience, mode=mode, check_finite=False, check_on_train_epoch_end=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            require_metric(trainer, self.monitor, "EarlyStop: monitor")
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking and self.wait_count == self.patience:
            rank_zero_only(print)(
                f"stopped early after step {trainer.global_step}: {self.monitor} has not improved in {self.patience} "
                "validations",
                flush=True,
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True
