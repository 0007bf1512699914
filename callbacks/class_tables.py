"""Base class of the callbacks that write a table and a figure of an evaluation's results per class."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from callbacks.figures import log_to_wandb, save_figure, skip_on_error
from errors import UserError

Rows = list[dict[str, Any]]


class ClassTables(pl.Callback):
    """Write a table and a figure of ``epoch_results[split]`` after each evaluation, on rank 0.

    A subclass implements `rows` and `plot` and sets the attributes below. Split is ``val`` or ``test``. Files:

    - ``<run>/<table>_<split>.csv``, of the latest evaluation; ``train.py validate`` and ``test`` print it too.
    - ``<run>/figures/<split>_<figure>_step=<global step, 8 digits>.png``; also in W&B as ``<split>/<wandb_key>``.

    Args:
        keep: figures of each split that are kept on disk: the first one and the latest ``keep - 1``.
    """

    #: Name in messages.
    title = ""
    #: Results without which nothing is written.
    requires: frozenset[str] = frozenset()
    #: Attribute of the module with the names of the table's rows.
    names_attribute = "class_names"
    #: Start of the table's file name; differs between subclasses, so that no table replaces another.
    table = ""
    #: Part of the figure's file name, and its key in W&B.
    figure = ""
    wandb_key = ""
    #: Whether the table is printed, and how an empty cell is.
    printed = True
    missing = "-"

    def __init__(self, keep: int = 20) -> None:
        if keep < 2:
            raise UserError(f"{self.title}: expected keep >= 2, found {keep}")
        self.keep = keep
        self._reported: set[str] = set()

    def rows(self, results: dict[str, Tensor], names: Any) -> Rows:
        """Return the rows of the table from results on the CPU."""
        raise NotImplementedError

    def plot(self, results: dict[str, Tensor], rows: Rows, names: Any, title: str) -> Image.Image:
        """Return the figure of the same results."""
        raise NotImplementedError

    def write(self, results: dict[str, Tensor], names: Any, split: str, trainer: pl.Trainer) -> None:
        """Write the table and the figure, and print the table unless the evaluation is part of a training."""
        rows = self.rows(results, names)
        write_csv(Path(trainer.default_root_dir) / f"{self.table}_{split}.csv", rows)
        figure = self.plot(results, rows, names, f"{split}, step {trainer.global_step}")
        save_figure(figure, trainer, f"{split}_{self.figure}_step=", self.keep)
        log_to_wandb(trainer, {f"{split}/{self.wandb_key}": figure})
        if self.printed and trainer.state.fn != TrainerFn.FITTING:
            print(format_table(rows, self.missing), flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        results = getattr(pl_module, "epoch_results", {}).get(split, {})
        if not self.requires <= results.keys():
            return
        names = getattr(pl_module, self.names_attribute, None)
        with skip_on_error(self.title, self._reported):
            self.write({name: value.detach().cpu() for name, value in results.items()}, names, split, trainer)


def rounded(value: float, digits: int = 4) -> float | str:
    """Round a value; nan becomes an empty cell."""
    return "" if value != value else round(value, digits)


def format_table(rows: Rows, missing: str = "-") -> str:
    """Format rows as text under their columns' names; the first column is left-aligned, floats have four decimals."""
    cells = [list(rows[0])] if rows else []
    for row in rows:
        values = row.values()
        cells.append([missing if v == "" else f"{v:.4f}" if isinstance(v, float) else str(v) for v in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return "\n".join(lines)


def write_csv(path: Path, rows: Rows) -> None:
    """Replace the file atomically; nothing is written for no rows."""
    if not rows:
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
