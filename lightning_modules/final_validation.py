"""Validation of the last weights of a run, whatever ends it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


def validate_last_weights(trainer: pl.Trainer) -> None:
    """Make the validation due after the last training batch of a fit, in addition to the trainer's own schedule.

    Lightning validates by its schedule only. A run that ends between two validations (``max_steps`` in mid-epoch,
    ``max_time``, epochs that ``check_val_every_n_epoch`` does not divide) would keep an earlier model as its result.

    The rule extends Lightning's own decision, so the validation is the last one of the loop. Log steps, checkpoints and
    exact resume therefore need no special case, and weights that the schedule validates are validated once. A run that
    is interrupted, or that has no validation (``limit_val_batches: 0``), is not validated.

    A longer run that continues from the checkpoint of such a validation does not repeat it, although its own schedule
    has none there.

    Args:
        trainer: the trainer of the fit; a second call changes nothing.
    """
    loop = trainer.fit_loop.epoch_loop
    if "_should_check_val_fx" in vars(loop):
        return
    scheduled = loop._should_check_val_fx

    def is_due(data_fetcher: Any) -> bool:
        if scheduled(data_fetcher) or _resumes_after_validation(trainer):
            return True
        return trainer.enable_validation and ends_run(trainer)

    loop._should_check_val_fx = is_due  # type: ignore[method-assign]


def ends_run(trainer: pl.Trainer) -> bool:
    """Return whether the fit ends after the current training batch; call it after the optimizer step."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if 0 <= loop.max_steps <= loop.global_step:
        return True
    ends_epoch = loop._num_ready_batches_reached()
    epochs = fit.epoch_progress.current.processed + ends_epoch  # type: ignore[attr-defined]
    if ends_epoch and fit.max_epochs is not None and 0 <= fit.max_epochs <= epochs:
        return True
    # Early stopping, or the timer of ``max_time``.
    return trainer.should_stop and epochs >= (fit.min_epochs or 0) and loop.global_step >= (fit.min_steps or 0)


def _resumes_after_validation(trainer: pl.Trainer) -> bool:
    """Return whether the loop stands at a checkpoint that was written at the end of a validation.

    Lightning then finishes the step without validating again. If no validation were due, it would not count the step,
    and all later log steps would be too small by one.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    return loop.restarting and loop.restarted_on_last and fit.restarted_mid_epoch
