"""The command line behind train.py: LightningCLI with run folders, resume, W&B and answers to typing errors."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities.warnings import PossibleUserWarning

import datamodules
import lightning_modules
from callbacks.average_precision import AveragePrecision
from callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint, read_checkpoint
from callbacks.class_iou import ClassIoU
from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.figures import Pictures
from callbacks.film import Film
from callbacks.joint_tables import JointTables
from callbacks.metrics_file import MetricsFile
from callbacks.prediction_writer import PredictionWriter
from callbacks.resume import EXIT_INTERRUPTED, EXIT_RESUMABLE, LastCheckpoint, StepSeed
from callbacks.throughput import Throughput
from callbacks.wandb_run import make_wandb_logger
from cli.messages import FriendlyParser
from cli.runs import (
    NOT_INHERITED,
    RunFolder,
    SaveRunConfig,
    _last_run,
    _new_run_folder,
    _take,
    newest_checkpoint,
    rank_zero_print,
)
from errors import CheckpointError, UserError

ROOT = Path(__file__).resolve().parent.parent
# What a model takes from its data, where both know it.
LINKED = ("num_classes", "class_names", "attributes", "ingredient_names", "joint_names")


class VisionCLI(LightningCLI):
    """LightningCLI whose precedence is: command line, then YAML, then the checkpoint, then the defaults.

    Args:
        args: the command line without the program's name.
    """

    def __init__(self, args: list[str]) -> None:
        self.resumed: dict[str, Any] = {}
        self.run_folder: Path | None = None
        self._inherited: Path | None = None
        args = self._inherit(args)
        defaults = {"default_config_files": [str(ROOT / "configs" / "trainer.yaml")]}
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_class=FriendlyParser,
            parser_kwargs={"allow_abbrev": False, **{name: dict(defaults) for name in self.subcommands()}},
            args=args,
        )

    # --- options --------------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--experiment", type=str | None, default=None, help="runs/<experiment>/<time>/ is the run")
        parser.add_argument("--wandb.mode", type=Literal["auto", "online", "offline", "disabled"], default="auto")
        parser.add_argument("--wandb.project", type=str, default="vision-case-studies")
        parser.add_argument("--resume", type=str | None, default=None, help="run folder to go on with, or 'last'")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(Pictures, "pictures")
        if not self._predicting:
            for name in LINKED:
                parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        # Images to predict say nothing of classes: there the model's own, from its checkpoint or weights, stand.
        self._predicting = subcommand == "predict"
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        finally:
            if self._inherited is not None:
                self._inherited.unlink()

    # --- what a checkpoint brings -----------------------------------------------------------------------------------

    def _inherit(self, args: list[str]) -> list[str]:
        """Puts the configuration of a checkpoint's run before all others, so that YAML and command line beat it."""
        args = list(args)
        if not args or args[0] not in self.subcommands():
            return args
        resume, path = (next(reversed(_take(args, option)), None) for option in ("--resume", "--ckpt_path"))
        if resume and path:
            raise CheckpointError("--resume and --ckpt_path both name a checkpoint: give one of them")
        if resume:
            path = str(newest_checkpoint(_last_run(args) if resume == "last" else Path(resume)))
        elif path == "last":
            path = str(newest_checkpoint(_last_run(args)))
        elif path in ("best", "hpc", "registry"):
            raise CheckpointError(f"--ckpt_path {path}: give the file, runs/<experiment>/<time>/checkpoints/best.ckpt")
        if not path or path == "null":
            return args
        self.resumed = read_checkpoint(path, mmap=True) if not Path(path).is_dir() else {}
        base = self._config_of(Path(path))
        if args[0] == "fit" and (Path(path).parent.parent / "config.yaml").is_file():
            self.run_folder = Path(path).parent.parent
        if args[0] == "predict":
            hparams = self.resumed.get("hyper_parameters", {})
            # Lightning notes a link even where the model has no such argument, with the little that its data knew.
            own = {name: hparams[name] for name in LINKED if hparams.get(name)}
            base.get("model", {}).setdefault("init_args", {}).update(own)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
            yaml.safe_dump(base, file, sort_keys=False)
        self._inherited = Path(file.name)
        return [args[0], "--config", file.name, *args[1:], "--ckpt_path", path]

    def _config_of(self, checkpoint: Path) -> dict[str, Any]:
        saved = checkpoint.parent.parent / "config.yaml"
        if saved.is_file():
            config = yaml.safe_load(saved.read_text()) or {}
            return {key: value for key, value in config.items() if key not in NOT_INHERITED}
        config = {}
        for key, name in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
            hparams = dict(self.resumed.get(name, {}))
            hparams.pop("_instantiator", None)
            class_path = hparams.pop("_class_path", None)
            if class_path:
                linked = LINKED if key == "model" else ()
                init = {k: v for k, v in hparams.items() if k not in linked}
                config[key] = {"class_path": class_path, "init_args": init}
        return config

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning lets the checkpoint's hyperparameters beat explicit flags here; see `_inherit`."""

    # --- the run ----------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        for key in ("model", "data"):
            if config.get(key) is None:
                self._parser(self.subcommand).error(f"--{key} is missing: name a class, or a --config that does")
        trainer = config.trainer
        if trainer.precision is None and trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            trainer.precision = "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
        names = [config[key].class_path.rsplit(".", 1)[-1].lower() for key in ("model", "data")]
        config.experiment = config.experiment or "_".join(names)
        if self.run_folder is None:
            self.run_folder = _new_run_folder(config.experiment, str(self.subcommand))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config, folder = self.config[self.subcommand], self.run_folder
        assert folder is not None
        run_id = self.resumed.get("callbacks", {}).get("LastCheckpoint", {}).get("run_id")
        self.run_id = (run_id if self.subcommand == "fit" else None) or uuid.uuid4().hex[:8]
        last, best = self._get(self.config_init, "last"), self._get(self.config_init, "best")
        last.dirpath = best.dirpath = str(folder / "checkpoints")
        last.run_id = self.run_id
        kwargs["default_root_dir"] = str(folder)
        own_logger = config.trainer.logger not in (None, True)
        if self.subcommand == "predict":
            kwargs["logger"] = False  # predictions are files; there is nothing to log
        elif not own_logger and not config.trainer.fast_dev_run:
            kwargs["logger"] = self._loggers(folder)
        if _takes_checkpoint_io(config.trainer.strategy):
            kwargs["plugins"] = [*(self._get(self.config_init, "trainer").plugins or []), AtomicCheckpointIO()]
        self.trainer_defaults["callbacks"] = [
            RunFolder(),
            StepSeed(int(config.seed_everything)),
            Throughput(),
            ConfusionMatrix(),
            AveragePrecision(),
            ClassIoU(),
            JointTables("pckh"),
            JointTables("pck"),
            Film(),
            *([PredictionWriter()] if self.subcommand == "predict" else []),
            *([LearningRateMonitor("step")] if kwargs.get("logger") and self.subcommand == "fit" else []),
        ]
        kwargs["use_distributed_sampler"] = False
        if config.trainer.enable_checkpointing is False:
            keys = self._parser(self.subcommand).callback_keys
            keys[:] = [key for key in keys if key not in ("last", "best")]
        trainer = super().instantiate_trainer(**kwargs)
        rank_zero_print(f"run folder: {folder}")
        return trainer

    def _loggers(self, folder: Path) -> list[Any]:
        config = self.config[self.subcommand]
        step = self.resumed.get("global_step") if self.subcommand == "fit" else None
        file = MetricsFile(folder, resume_step=None if step is None else step - 1)
        wandb = make_wandb_logger(folder, config.wandb.project, self.run_id, config.wandb.mode)
        return [file] if wandb is None else [file, wandb]

    def after_fit(self) -> None:
        trainer, folder = self.trainer, self.run_folder
        if self.resumed.get("global_step") == trainer.global_step:
            rank_zero_print(f"this run was complete at step {trainer.global_step}: raise --trainer.max_epochs")
        values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        rank_zero_print("\n" + ", ".join(f"{name} {float(value):.4f}" for name, value in values.items()))
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)), None)
        if best is not None and best.best_model_path:
            rank_zero_print(f"best checkpoint: {best.best_model_path} ({best.monitor} {best.best_model_score:.4f})")
        for name in ("pictures", "wandb"):
            if folder is not None and (folder / name).is_dir():
                rank_zero_print(f"{name}: {folder / name}")
        rank_zero_print(f"train on: python train.py fit --resume {folder} --trainer.max_epochs N")

    def predict(self, model: Any, datamodule: Any, **kwargs: Any) -> None:
        """Predictions are written as they come (`PredictionWriter`), not collected in memory."""
        self.trainer.predict(model, datamodule=datamodule, **{**kwargs, "return_predictions": False})


def _takes_checkpoint_io(strategy: Any) -> bool:
    """Sharded strategies write folders in their own way."""
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", strategy))
    return not any(word in name.lower() for word in ("fsdp", "deepspeed", "model_parallel", "modelparallel"))


def run(args: list[str]) -> None:
    """Runs one command; what our own code refuses is printed as one line, a bug shows its traceback."""
    register_classes()
    quieten()
    command = VisionCLI.__new__(VisionCLI)  # made before it runs, since the run may end in its constructor
    status = 1
    try:
        command.__init__(args)  # type: ignore[misc]
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        raise
    except Exception as error:
        message = _user_error(error)
        if message is None or os.environ.get("SHOW_TRACEBACK"):
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
            sys.modules["wandb"].finish(exit_code=status)
        if (folder := getattr(command, "run_folder", None)) is not None and folder.is_dir():
            if status in (EXIT_RESUMABLE, EXIT_INTERRUPTED):
                rank_zero_print(f"go on with: python train.py fit --resume {folder}")
            rank_zero_print(f"run folder: {folder}")


def _user_error(error: BaseException | None) -> UserError | None:
    """Return the error, or the cause of it, that was raised for the user to correct; None for a bug."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def register_classes() -> None:
    """Imports what ``--model`` and ``--data`` name by their short names."""
    lightning_modules.import_all()
    datamodules.import_all()


def quieten() -> None:
    """Switches off what Lightning says of things that this design has already answered."""
    warnings.filterwarnings("ignore", message=".*recommended to use .*sync_dist=True.*", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer`.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    answered = ("litlogger", "`weights_only` was not set", "Loading `train_dataloader` to estimate", "TPU available")
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(lambda record: not any(text in record.getMessage() for text in answered))
