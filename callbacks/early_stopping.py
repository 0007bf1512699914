"""Early stopping that survives a kill: a resumed run stops where the one that never stopped does."""

from __future__ import annotations

from typing import Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping


class EarlyStop(EarlyStopping):
    """Ends the run when ``patience`` validations in a row have not improved a metric.

    Lightning's, but for two things. It decides when the validation ends, before that step's checkpoint is written;
    Lightning's decides at the epoch's end, where a run resumed from that checkpoint has no metric to look at. And a
    checkpoint that was written after the decision is not trained on.

    Args:
        monitor: the metric, ``val/<name>``.
        mode: ``max`` or ``min``: which end is better.
        patience: validations without an improvement.
    """

    def __init__(self, monitor: str, mode: Literal["max", "min"], patience: int = 50) -> None:
        super().__init__(monitor, patience=patience, mode=mode, check_on_train_epoch_end=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True
