"""Checkpoint files: written atomically, verified when read, never unpickled to code."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from errors import CheckpointError, UserError

STEP_FILES = "step=*.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary file, sync it to disk and rename it; verify checksums when reading.

    After a kill, the name holds either the old file or the new one. No separate checksum file is needed: torch writes a
    zip archive with a CRC-32 per tensor. torch does not verify it; `read_checkpoint` does.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)


def read_checkpoint(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """Load a Lightning checkpoint to the CPU with ``weights_only=True`` after verifying every byte of it.

    Args:
        path: a local file. URLs are rejected, because a pickle can execute code.
        mmap: map the tensors instead of reading them; use it if only other entries are needed.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or not a checkpoint of a Lightning run.
    """
    if "://" in str(path):
        raise CheckpointError(f"{path}: expected a local file, found a URL; download the checkpoint first")
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint{_suggestion(path)}")
    damage = _damage(path)
    if damage is not None:
        raise CheckpointError(f"{path}: {damage}{_suggestion(path)}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise CheckpointError(f"{path}: not a checkpoint of this project ({reason}){_suggestion(path)}") from None
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise CheckpointError(
            f"{path}: expected a checkpoint of a run, found other data; if these are weights, use --model.weights"
        )
    return checkpoint


def _damage(path: Path) -> str | None:
    """Describe the damage of a file; None if it is intact."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        return "the file is empty"
    if not zipfile.is_zipfile(path):
        return "truncated" if start == b"PK\x03\x04" else "not a checkpoint (expected the zip format of torch.save)"
    try:
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except Exception as error:  # zipfile raises many types of exceptions for damaged headers
        return f"damaged ({error})"
    return f"damaged (wrong checksum in {name})" if name else None


def _suggestion(path: Path) -> str:
    """Name the newest intact checkpoint in the same directory."""
    for other in checkpoints_by_age(path.parent):
        if other != path and _damage(other) is None:
            return f"; {other} is intact, use --ckpt_path {other}"
    return ""


def checkpoints_by_age(folder: Path) -> list[Path]:
    """Return the resumable checkpoints of a directory, latest first."""
    return sorted(folder.glob(STEP_FILES), key=lambda p: (p.stat().st_mtime_ns, _step(p)), reverse=True)


def _step(path: Path) -> int:
    match = re.search(r"step=(\d+)", path.name)
    return int(match[1]) if match else -1


class BestCheckpoint(ModelCheckpoint):
    """Keep ``best.ckpt``, the state at the best value of a validation metric.

    One line at the start names the metric. nan is never the best value: the validation is reported and not considered.
    A metric that is not logged ends the run at the first validation.

    Args:
        monitor: the metric, ``val/<name>``; None uses the module's ``monitor`` attribute.
        mode: ``max`` if higher is better, ``min`` if lower is; required with ``monitor``.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["max", "min"] | None = None) -> None:
        if (monitor is None) != (mode is None):
            raise UserError(f"--best: expected monitor and mode together, found monitor {monitor} and mode {mode}")
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode or "min",
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self._reported_nan = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.monitor is None:
            self.monitor, self.mode = getattr(pl_module, "monitor", None) or (None, "min")
            self.kth_value = torch.tensor(float("-inf" if self.mode == "max" else "inf"))
            self.save_top_k = 0 if self.monitor is None else 1
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is not None:
            rank_zero_only(print)(f"best.ckpt: selected by the {self.mode}imum of {self.monitor}", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and self.monitor is not None:
            require_metric(trainer, self.monitor, "--best.monitor")
        super().on_validation_end(trainer, pl_module)

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Return whether a value is the best so far; any value replaces nan, and nan replaces none."""
        if current is not None and trainer.strategy.reduce_boolean_decision(bool(current.isnan()), all=False):
            if not self._reported_nan:
                rank_zero_only(print)(
                    f"best.ckpt: {self.monitor} is nan after step {trainer.global_step}; validations without a value "
                    "are not considered",
                    flush=True,
                )
            self._reported_nan = True
            return False
        best = self.best_k_models.get(self.kth_best_model_path)
        return (best is not None and bool(best.isnan())) or super().check_monitor_top_k(trainer, current)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Follow a run directory that was moved or has another path; Lightning would forget the best value."""
        folder = str(self.dirpath)
        moved = {str(Path(folder, Path(path).name)): score for path, score in state_dict["best_k_models"].items()}
        paths = {
            key: str(Path(folder, Path(state_dict[key]).name)) for key in ("best_model_path", "kth_best_model_path")
        }
        super().load_state_dict({**state_dict, **paths, "best_k_models": moved, "dirpath": self.dirpath})


def require_metric(trainer: pl.Trainer, name: str, option: str) -> None:
    """Require that a monitored metric has been logged.

    Before the first training step, only metrics of the validation exist, so others are not required there.

    Args:
        trainer: the trainer, at the end of a validation.
        name: the metric, such as ``val/top1``.
        option: the option that names it.

    Raises:
        UserError: the metric is missing.
    """
    metrics = trainer.callback_metrics
    if name not in metrics and not (trainer.sanity_checking and not name.startswith("val/")):
        known = ", ".join(sorted(key for key in metrics if key.startswith("val/"))) or "no metric"
        raise UserError(f"{option}: expected a metric that is logged, found {name}; logged are {known}")
