"""What the callbacks share that write a table and an image of what an evaluation says of each class."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from callbacks.figures import harmless, log_to_wandb, save_picture
from errors import UserError


class ClassTables(pl.Callback):
    """Takes ``epoch_results[split]`` after each evaluation, on the first rank; split is ``val`` or ``test``.

    Args:
        keep: images kept on disk of each split: the first one and the latest ``keep - 1``.
    """

    #: What it is called in messages, and the results without which there is nothing to write.
    title = ""
    takes: frozenset[str] = frozenset()
    #: The module's attribute that names what the tables have a row for.
    names = "class_names"

    def __init__(self, keep: int = 20) -> None:
        if keep < 2:
            raise UserError(f"{self.title}: expected keep >= 2, found {keep}")
        self.keep = keep
        self._told: set[str] = set()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def write(self, results: dict[str, Tensor], class_names: Any, split: str, trainer: pl.Trainer) -> None:
        """Writes what there is to say of the results, which are on the CPU."""
        raise NotImplementedError

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        results = getattr(pl_module, "epoch_results", {}).get(split, {})
        if not self.takes <= results.keys():
            return
        names = getattr(pl_module, self.names, None)
        with harmless(self.title, self._told):
            self.write({name: value.detach().cpu() for name, value in results.items()}, names, split, trainer)

    def save(self, picture: Image.Image, trainer: pl.Trainer, split: str, name: str, logged: str) -> None:
        """Writes ``<run>/images/<split>_<name>_step=<global step, 8 digits>.png``; to W&B as ``<split>/<logged>``."""
        save_picture(picture, trainer, f"{split}_{name}_step=", self.keep)
        log_to_wandb(trainer, {f"{split}/{logged}": picture})


def asked_for(trainer: pl.Trainer) -> bool:
    """Whether it is an evaluation that somebody asked for, and looks at, not one in the middle of a training."""
    return trainer.state.fn != TrainerFn.FITTING


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the file in one move; nothing is written for no rows."""
    if not rows:
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
