"""Run directories: creation, configuration files, and lookup for resuming."""

from __future__ import annotations

import time
from pathlib import Path

import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from callbacks.checkpoint import checkpoints_by_age
from errors import CheckpointError

RUNS = Path("runs")


class SaveRunConfig(SaveConfigCallback):
    """Writes the run folder's config.yaml, which ``--config`` takes back, and gives the same to W&B."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        config = {key: value for key, value in yaml.safe_load(text).items() if key not in NOT_INHERITED}
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


class RunFolder(pl.Callback):
    """Makes all ranks agree on rank 0's run folder: torchrun and SLURM start every rank by itself."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer._default_root_dir = trainer.strategy.broadcast(  # type: ignore[attr-defined]  # Lightning has no setter
            str(trainer.default_root_dir)
        )


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint that was written last in a run folder.

    Raises:
        CheckpointError: no such folder, or none in it: there is nothing to resume.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run folder (runs/<experiment>/<time>), so there is nothing to resume")
    found = checkpoints_by_age(run / "checkpoints")
    if not found:
        raise CheckpointError(f"{run}: no checkpoints/step=*.ckpt in it, so there is nothing to resume")
    return found[0]


def _last_run(args: list[str]) -> Path:
    """The experiment's run folder whose checkpoint is the newest."""
    experiment = None
    options = list(args)
    for config in _take(options, "--config", "-c"):
        if Path(config).is_file():
            content = yaml.safe_load(Path(config).read_text())
            experiment = (content or {}).get("experiment", experiment)
    experiment = next(reversed(_take(options, "--experiment")), experiment)
    if experiment is None:
        raise CheckpointError("which run is the last one? Name it: --experiment NAME, or --resume RUN_FOLDER")
    folder = RUNS / experiment
    runs = [path for path in folder.glob("*") if checkpoints_by_age(path / "checkpoints")]
    if not runs:
        raise CheckpointError(f"{folder}: no run with a checkpoint in it, so there is nothing to resume")
    return max(runs, key=lambda run: newest_checkpoint(run).stat().st_mtime_ns)


def _new_run_folder(experiment: str, command: str) -> Path:
    name = time.strftime("%Y-%m-%d_%H-%M-%S") + ("" if command == "fit" else f"_{command}")
    folder, n = RUNS / experiment / name, 1
    while folder.exists():
        n += 1
        folder = RUNS / experiment / f"{name}_{n}"
    return folder


@rank_zero_only
def rank_zero_print(line: str) -> None:
    print(line, flush=True)


# What a run's config.yaml holds for its own command only, and what must not be carried to the next one.
NOT_INHERITED = ("ckpt_path", "weights_only", "verbose", "return_predictions", "resume")


def _take(args: list[str], *options: str) -> list[str]:
    """Removes every ``option value`` and ``option=value`` from the command line and gives the values in order."""
    values, kept = [], []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in options:
            kept.append(word)
        elif equals:
            values.append(value)
        elif (following := next(words, None)) is not None:
            values.append(following)
        else:  # the option stands last: the parser says what it misses
            kept.append(word)
    args[:] = kept
    return values
