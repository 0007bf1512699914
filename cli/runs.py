"""Run directories ``runs/<experiment>/<time>/``: creation, configuration files, and lookup for resuming."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from callbacks.checkpoint import checkpoints_by_age
from errors import CheckpointError

RUNS = Path("runs")
# Entries of config.yaml that belong to one command only: the next command does not inherit them.
NOT_INHERITED = ("ckpt_path", "weights_only", "verbose", "return_predictions", "resume")
# Arguments that a model takes from its data if both have them.
LINKED = ("num_classes", "class_names", "attributes", "ingredient_names", "joint_names", "head_boxes")


# --- creation -----------------------------------------------------------------------------------------------------


def new_run_directory(experiment: str, command: str) -> Path:
    """Return a path ``runs/<experiment>/<time>`` that does not exist yet; commands other than fit append their name."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S") + ("" if command == "fit" else f"_{command}")
    directory, n = RUNS / experiment / name, 1
    while directory.exists():
        n += 1
        directory = RUNS / experiment / f"{name}_{n}"
    return directory


class SaveRunConfig(SaveConfigCallback):
    """Write config.yaml, which ``--config`` reads again, into the run directory, and log it to W&B."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        config = without_command_options(yaml.safe_load(text))
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


class ShareRunDirectory(pl.Callback):
    """Use rank 0's run directory on all ranks: torchrun and SLURM start each rank by itself."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer._default_root_dir = trainer.strategy.broadcast(  # type: ignore[attr-defined]  # Lightning has no setter
            str(trainer.default_root_dir)
        )


@rank_zero_only
def print_once(line: str) -> None:
    """Print a line on rank 0 at once."""
    print(line, flush=True)


# --- resuming -----------------------------------------------------------------------------------------------------


def newest_checkpoint(run: Path) -> Path:
    """Return the latest checkpoint of a run directory.

    Raises:
        CheckpointError: the directory does not exist, or holds no checkpoint.
    """
    if not run.is_dir():
        raise CheckpointError(
            f"{run}: expected a run directory (runs/<experiment>/<time>), found none: nothing to resume"
        )
    found = checkpoints_by_age(run / "checkpoints")
    if not found:
        raise CheckpointError(f"{run}: expected checkpoints/step=*.ckpt, found none: nothing to resume")
    return found[0]


def latest_run(args: list[str]) -> Path:
    """Return the run directory with the latest checkpoint of the experiment that the command line names.

    Raises:
        CheckpointError: no experiment is named, or it has no run with a checkpoint.
    """
    experiment = None
    options = list(args)
    for config in take_options(options, "--config", "-c"):
        if Path(config).is_file():
            content = yaml.safe_load(Path(config).read_text())
            experiment = (content or {}).get("experiment", experiment)
    experiment = next(reversed(take_options(options, "--experiment")), experiment)
    if experiment is None:
        raise CheckpointError(
            "last: expected an experiment whose latest run to resume; add --experiment NAME, or use "
            "--resume RUN_DIRECTORY"
        )
    directory = RUNS / experiment
    runs = [path for path in directory.glob("*") if checkpoints_by_age(path / "checkpoints")]
    if not runs:
        raise CheckpointError(f"{directory}: expected a run with a checkpoint, found none: nothing to resume")
    return max(runs, key=lambda run: newest_checkpoint(run).stat().st_mtime_ns)


def take_options(args: list[str], *options: str) -> list[str]:
    """Remove every ``option value`` and ``option=value`` from the arguments; return the values in order."""
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
        else:  # an option without its value: the parser reports it
            kept.append(word)
    args[:] = kept
    return values


def config_of_checkpoint(path: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the run that wrote a checkpoint.

    Args:
        path: the checkpoint's file. The run's config.yaml is used if the file is in its run directory.
        checkpoint: its content, whose hyperparameters are used otherwise.
    """
    saved = path.parent.parent / "config.yaml"
    if saved.is_file():
        return without_command_options(yaml.safe_load(saved.read_text()) or {})
    config = {}
    for key, name in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        hparams = dict(checkpoint.get(name, {}))
        hparams.pop("_instantiator", None)
        class_path = hparams.pop("_class_path", None)
        if class_path:
            linked = LINKED if key == "model" else ()
            init_args = {name: value for name, value in hparams.items() if name not in linked}
            config[key] = {"class_path": class_path, "init_args": init_args}
    return config


def without_command_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the entries of `NOT_INHERITED`."""
    return {key: value for key, value in config.items() if key not in NOT_INHERITED}
