"""Figures of an evaluation: a contact sheet of samples with their predictions, on disk and in W&B."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from errors import UserError
from visualization.base import Table
from visualization.drawing import contact_sheet, to_pil
from visualization.samples import Sample, samples_of
from visualization.views import view_of


class Figures(pl.Callback):
    """Draw evaluation samples with their predictions, in each epoch the same ones, spread evenly over the set.

    Writes ``<run>/figures/<split>_step=<global step, 8 digits>.png``, split ``val`` or ``test``, and logs the sheet to
    W&B as ``<split>/figures``. The view of the prediction (``visualization/views.py``) may add a table,
    ``<split>/predictions`` in W&B, and further figures: ``<split>_<name>_step=...png``, ``<split>/<name>`` in W&B.
    Predictions that no view matches are skipped. With several ranks, the samples are those of rank 0.

    Args:
        count: samples on a contact sheet.
        keep: figures of each split that are kept on disk: the first one and the latest ``keep - 1``.
    """

    def __init__(self, count: int = 16, keep: int = 20) -> None:
        if count < 1 or keep < 2:
            raise UserError(f"--figures: expected count >= 1 and keep >= 2, found count {count} and keep {keep}")
        self.count, self.keep = count, keep
        self._samples: list[Sample] = []
        self._reported: set[str] = set()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._samples = []

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._samples = []

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._collect(trainer, *args, **kwargs)

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._collect(trainer, *args, **kwargs)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _collect(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        batches = sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
        count = sum(int(k * batches / self.count) == batch_idx for k in range(self.count))
        with skip_on_error("figures", self._reported):
            for sample in samples_of(outputs, batch, count):
                if view := view_of(sample.prediction):
                    self._samples.append(sample._replace(prediction=view.reduce(sample.prediction)))

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        samples, self._samples = self._samples, []
        if not samples or trainer.sanity_checking or not trainer.is_global_zero:
            return
        names, view = prediction_names(pl_module), view_of(samples[0].prediction)
        assert view is not None
        with skip_on_error("figures", self._reported):
            sheet = contact_sheet([view.tile(to_pil(x), prediction, truth, names) for x, prediction, truth in samples])
            save_figure(sheet, trainer, f"{split}_step=", self.keep)
            log_to_wandb(trainer, {f"{split}/figures": sheet, f"{split}/predictions": view.table(samples, names)})
            for name, figure in view.extra_figures(samples, names).items():
                save_figure(figure, trainer, f"{split}_{name}_step=", self.keep)
                log_to_wandb(trainer, {f"{split}/{name}": figure})


def prediction_names(pl_module: pl.LightningModule) -> Any:
    """Return the names of a module's joints if it has joints, else of its classes."""
    return getattr(pl_module, "joint_names", None) or getattr(pl_module, "class_names", None)


def save_figure(figure: Image.Image, trainer: pl.Trainer, prefix: str, keep: int) -> Path:
    """Write ``<run>/figures/<prefix><global step>.png``; keep the first and the latest ``keep - 1`` of this prefix."""
    folder = Path(trainer.default_root_dir) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}{trainer.global_step:08d}.png"
    figure.save(path)
    for old in sorted(folder.glob(f"{prefix}*.png"))[1 : -(keep - 1)]:
        old.unlink(missing_ok=True)
    return path


def log_to_wandb(trainer: pl.Trainer, values: dict[str, Image.Image | Table | None]) -> None:
    """Log images and tables to the run's W&B loggers, if there are any."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if not loggers:
        return
    import wandb

    def media(value: Any) -> Any:
        return wandb.Image(value) if isinstance(value, Image.Image) else value

    logged: dict[str, Any] = {}
    columns: list[str | int]
    for key, value in values.items():
        if isinstance(value, tuple):
            columns, rows = [*value[0]], value[1]
            logged[key] = wandb.Table(columns=columns, data=[[media(cell) for cell in row] for row in rows])
        elif value is not None:
            logged[key] = media(value)
    for logger in loggers:
        logger.log_metrics(logged, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


@contextmanager
def skip_on_error(what: str, reported: set[str]) -> Iterator[None]:
    """Report a failure once, on one line, and go on: a figure must not end a training run."""
    try:
        yield
    except Exception as error:
        if what not in reported:
            reported.add(what)
            print(f"{what}: skipped ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
