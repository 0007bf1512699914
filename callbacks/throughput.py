"""Speed of the training, and time spent waiting for data."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

GIB = 2**30


class Throughput(pl.Callback):
    """Log the training speed every ``trainer.log_every_n_steps`` optimizer steps, averaged since the last log.

    - ``time/images_per_second``: of all ranks.
    - ``time/step_ms``: milliseconds per optimizer step, including waiting.
    - ``time/data_wait``: fraction (0..1) of that time between batches: waiting for the loader, the transfer to the
      device, and other callbacks.
    - ``time/gpu_memory_gib``: peak of allocated GPU memory of this rank since the start, in GiB; only on CUDA.

    Validation, checkpoints and the first batch of each epoch (worker start, kernel selection) are not measured. The
    device is synchronized only before logging. Tests of exact resume ignore ``time/``.
    """

    def __init__(self) -> None:
        self._batch_start = 0.0
        self._batch_end: float | None = None
        self._global_step = 0
        self._reset()

    def _reset(self) -> None:
        self._seconds = self._waited = 0.0
        self._images = self._steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset()
        self._batch_end, self._global_step = None, trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batch_end = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batch_end = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._batch_end = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._global_step
        self._global_step = trainer.global_step
        # Use the steps of Lightning's own logging, so that a resumed run logs at the steps of an uninterrupted one.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        log = stepped and (step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if log and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        if self._batch_end is not None:
            self._seconds += now - self._batch_end
            self._waited += self._batch_start - self._batch_end
            self._images += count_images(batch)
            self._steps += stepped
        self._batch_end = now
        if log:
            self._log(trainer, pl_module, step)
            self._reset()

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if not self._seconds or not trainer.is_global_zero:
            return
        values = {
            "time/images_per_second": self._images * trainer.world_size / self._seconds,
            "time/data_wait": self._waited / self._seconds,
        }
        if self._steps:
            values["time/step_ms"] = 1000 * self._seconds / self._steps
        if pl_module.device.type == "cuda":
            values["time/gpu_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / GIB
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)


def count_images(batch: Any) -> int:
    """Return the number of images in a batch that follows ``datamodules/base.py``; 0 for any other."""
    if not isinstance(batch, dict):
        return 0
    images = batch.get("image", batch.get("content"))
    return len(images) if isinstance(images, (Tensor, list, tuple)) else 0
