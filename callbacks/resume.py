"""Exact resume: seeded steps, checkpoints that match the logged metrics, and a clean stop on a signal."""

from __future__ import annotations

import random
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint

from callbacks.checkpoint import checkpoints_by_age
from errors import UserError

EXIT_RESUMABLE = 75  # EX_TEMPFAIL, "try again later": batch systems can requeue on it
EXIT_INTERRUPTED = 130  # the status that a shell reports after Ctrl-C
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StepSeed(Callback):
    """Seed all generators at every training step by (seed, rank, epoch, batch), so that dropout resumes exactly.

    The loader's workers seed themselves (``datamodules.loading.SeededDataset``). Random numbers that must agree over
    ranks come from a separate generator that is seeded without the rank.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        key = (self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        state = np.random.SeedSequence(key).generate_state(3)
        random.seed(int(state[0]))
        np.random.seed(state[1])
        # torch.manual_seed does the same and takes 100 us more, for devices that are absent.
        torch.default_generator.manual_seed(int(state[2]))
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(int(state[2]))


class LastCheckpoint(Checkpoint):
    """Save ``checkpoints/step=N.ckpt`` every N steps, at the end of each epoch, and when the job is told to stop.

    A checkpoint after k steps is written after everything of those steps has been logged: the metrics of the step go to
    the loggers first, and if a validation is due the checkpoint waits for its end. (When Lightning resumes from a step
    checkpoint, it skips a validation that was due there, and its metrics would be missing.) It is the last callback of
    the trainer, whatever their order: other callbacks, such as `BestCheckpoint`, act first and are saved as they are
    then.

    SIGTERM and SIGUSR1 (batch systems) end the run with status 75, Ctrl-C with 130, after the current step is complete
    and saved; a second Ctrl-C stops at once. With several ranks, any of them may receive the signal.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep: number of checkpoints to keep; at least 2, so that an older one remains if the newest is damaged.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 2:
            raise UserError(f"--last: expected every_n_steps >= 1 and keep >= 2, found {every_n_steps} and {keep}")
        self.every_n_steps, self.keep = every_n_steps, keep
        #: Directory of the checkpoints; train.py sets ``<run>/checkpoints``. None saves nothing.
        self.dirpath: str | None = None
        #: Id of the run; it is saved in the checkpoint so that W&B continues the same run.
        self.run_id: str | None = None
        self.last_saved_step = -1
        self._signal: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    # --- when to save ---------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop
        # A step is complete after the optimizer step, and after the validation if one is due.
        assert loop._data_fetcher is not None
        if loop._should_accumulate() or loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            return
        self._save_or_stop(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fit_loop._should_accumulate():
            self._save_or_stop(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def _save_or_stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop = self._agreed_to_stop(trainer, pl_module)
        if stop or trainer.global_step % self.every_n_steps == 0:
            if trainer.training:
                trainer._logger_connector.update_train_step_metrics()
            self.save(trainer)
        if stop:
            trainer.strategy.barrier("stopped")
            interrupted = self._signal == signal.SIGINT
            if trainer.is_global_zero:
                name = signal.Signals(self._signal).name if self._signal else "a signal to another rank"
                saved = "which is saved" if self.last_saved_step == trainer.global_step else "which is not saved"
                print(f"\nstopped by {name} after step {trainer.global_step}, {saved}", flush=True)
            raise SystemExit(EXIT_INTERRUPTED if interrupted else EXIT_RESUMABLE)

    def _agreed_to_stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        if trainer.world_size == 1:
            return self._signal is not None
        # The collective waits for the device, so a GPU does it every 10 steps only.
        if pl_module.device.type == "cuda" and trainer.global_step % 10:
            return False
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    # --- saving ---------------------------------------------------------------------------------------------------

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint of the current step, on all ranks together, and remove those beyond ``keep``."""
        if (
            getattr(trainer, "fast_dev_run", False)
            or self.dirpath is None
            or trainer.global_step == self.last_saved_step
        ):
            return
        self.last_saved_step = trainer.global_step
        folder = Path(self.dirpath)
        trainer.save_checkpoint(folder / f"step={trainer.global_step:08d}.ckpt", weights_only=False)
        if trainer.is_global_zero:
            for old in checkpoints_by_age(folder)[self.keep :]:
                trainer.strategy.remove_checkpoint(old)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Act after all other callbacks: a checkpoint contains the best model of its validation, and a stop loses none.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None:
            for part in Path(self.dirpath).glob(".*.part"):
                part.unlink()

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "last_saved_step": self.last_saved_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_saved_step = state_dict["last_saved_step"]

    # --- signals --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            # Lightning installs its own handlers at the start of the run; replace them afterwards.
            self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if getattr(trainer, "received_sigterm", False):
            self._signal = signal.SIGTERM

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        if number == signal.SIGINT:
            print(
                "\nfinishing and saving the current step; press Ctrl-C again to stop at once",
                file=sys.stderr,
                flush=True,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}
