"""The command line behind train.py: LightningCLI with run directories, resume, W&B and answers to mistakes."""

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
from pytorch_lightning.cli import LightningCLI, _InstantiatorFn
from pytorch_lightning.utilities.warnings import PossibleUserWarning

import datamodules
import lightning_modules
from callbacks.average_precision import AveragePrecision
from callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint, read_checkpoint
from callbacks.class_iou import ClassIoU
from callbacks.class_tables import format_table
from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.figures import Figures
from callbacks.film import Film
from callbacks.joint_tables import JointTables
from callbacks.metrics_file import MetricsFile
from callbacks.prediction_writer import PredictionWriter
from callbacks.resume import EXIT_INTERRUPTED, EXIT_RESUMABLE, LastCheckpoint, StepSeed
from callbacks.throughput import Throughput
from callbacks.wandb_run import make_wandb_logger
from cli.command import print_any_name, print_short_warnings
from cli.messages import FriendlyParser, class_names, list_classes, missing_class, unknown_class
from cli.runs import (
    LINKED,
    SaveRunConfig,
    ShareRunDirectory,
    config_of_checkpoint,
    latest_run,
    new_run_directory,
    newest_checkpoint,
    print_once,
    take_options,
)
from datamodules.base import Split, VisionDataModule
from errors import CheckpointError, find_user_error

ROOT = Path(__file__).resolve().parent.parent
# The split whose dataset is read before the model is built.
FIRST_SPLIT: dict[str, Split] = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


class VisionCLI(LightningCLI):
    """LightningCLI in which the command line overrides YAML files, these a checkpoint, and that the defaults.

    Args:
        args: the command line without the program's name.
    """

    def __init__(self, args: list[str]) -> None:
        self.resumed: dict[str, Any] = {}
        self.run_directory: Path | None = None
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

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        # Data before model: classes are instantiated in the order in which they are added.
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument(
            "--experiment",
            type=str | None,
            default=None,
            help="name of the experiment: the run directory is runs/<experiment>/<time>/",
        )
        parser.add_argument(
            "--wandb.mode",
            type=Literal["auto", "online", "offline", "disabled"],
            default="auto",
            help="Weights & Biases: auto is online if you are logged in (wandb login), else offline",
        )
        parser.add_argument("--wandb.project", type=str, default="vision-case-studies", help="project in W&B")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="run directory to resume, or last: the experiment's latest"
        )
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(Figures, "figures")
        if not self._predicting:
            for name in LINKED:
                parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        # Images to predict have no classes: the model keeps those of its checkpoint or weights.
        self._predicting = subcommand == "predict"
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        finally:
            if self._inherited is not None:
                self._inherited.unlink()

    # --- configuration of a checkpoint ------------------------------------------------------------------------------

    def _inherit(self, args: list[str]) -> list[str]:
        """Insert the configuration of the checkpoint's run before all others, so that these override it."""
        args = list(args)
        if not args or args[0] not in self.subcommands():
            return args
        resume, path = (next(reversed(take_options(args, option)), None) for option in ("--resume", "--ckpt_path"))
        if resume and path:
            raise CheckpointError("--resume: expected no other checkpoint, found --ckpt_path too; use one of them")
        if resume:
            path = str(newest_checkpoint(latest_run(args) if resume == "last" else Path(resume)))
        elif path == "last":
            path = str(newest_checkpoint(latest_run(args)))
        elif path in ("best", "hpc", "registry"):
            raise CheckpointError(
                f"--ckpt_path: expected a file, found {path}; use runs/<experiment>/<time>/checkpoints/best.ckpt"
            )
        if not path or path == "null":
            return args
        self.resumed = read_checkpoint(path, mmap=True) if not Path(path).is_dir() else {}
        config = config_of_checkpoint(Path(path), self.resumed)
        if args[0] == "fit" and (Path(path).parent.parent / "config.yaml").is_file():
            self.run_directory = Path(path).parent.parent
        if args[0] == "predict":
            hparams = self.resumed.get("hyper_parameters", {})
            # Lightning records a link even if the model has no such argument; skip what its data did not have.
            linked = {n: value for n in LINKED if (value := hparams.get(n)) or value is False}
            config.get("model", {}).setdefault("init_args", {}).update(linked)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
            yaml.safe_dump(config, file, sort_keys=False)
        self._inherited = Path(file.name)
        return [args[0], "--config", file.name, *args[1:], "--ckpt_path", path]

    def _parse_ckpt_path(self) -> None:
        """Do nothing: here Lightning would let hyperparameters override explicit options; `_inherit` replaces it."""

    # --- the run ----------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        for key in ("model", "data"):
            if config.get(key) is None:
                self._parser(self.subcommand).error(missing_class(key))
        trainer = config.trainer
        if trainer.precision is None and trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            trainer.precision = "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
        names = [config[key].class_path.rsplit(".", 1)[-1].lower() for key in ("model", "data")]
        config.experiment = config.experiment or "_".join(names)
        if self.run_directory is None:
            self.run_directory = new_run_directory(config.experiment, str(self.subcommand))

    def _add_instantiators(self) -> None:
        """Check the data before the model is built: a missing dataset is reported before weights are looked up."""
        super()._add_instantiators()
        split = FIRST_SPLIT[str(self.subcommand)]

        class CheckedData(_InstantiatorFn):
            def __call__(
                self, class_type: type, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any
            ) -> Any:
                links = applied_instantiation_links
                data: Any = super().__call__(class_type, *args, applied_instantiation_links=links, **kwargs)
                if isinstance(data, VisionDataModule):
                    data.check(split)
                return data

        self.parser.add_instantiator(CheckedData(cli=self, key="data"), pl.LightningDataModule, subclasses=True)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config, directory = self.config[self.subcommand], self.run_directory
        assert directory is not None
        run_id = self.resumed.get("callbacks", {}).get("LastCheckpoint", {}).get("run_id")
        self.run_id = (run_id if self.subcommand == "fit" else None) or uuid.uuid4().hex[:8]
        last, best = self._get(self.config_init, "last"), self._get(self.config_init, "best")
        last.dirpath = best.dirpath = str(directory / "checkpoints")
        last.run_id = self.run_id
        kwargs["default_root_dir"] = str(directory)
        has_logger = config.trainer.logger not in (None, True)
        if self.subcommand == "predict":
            kwargs["logger"] = False  # predictions are files; there is nothing to log
        elif not has_logger and not config.trainer.fast_dev_run:
            kwargs["logger"] = self._loggers(directory)
        if _accepts_checkpoint_io(config.trainer.strategy):
            kwargs["plugins"] = [*(self._get(self.config_init, "trainer").plugins or []), AtomicCheckpointIO()]
        self.trainer_defaults["callbacks"] = [
            ShareRunDirectory(),
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
        print_once(f"run directory: {directory}")
        return trainer

    def _loggers(self, directory: Path) -> list[Any]:
        config = self.config[self.subcommand]
        step = self.resumed.get("global_step") if self.subcommand == "fit" else None
        file = MetricsFile(directory, resume_step=None if step is None else step - 1)
        wandb = make_wandb_logger(directory, config.wandb.project, self.run_id, config.wandb.mode)
        return [file] if wandb is None else [file, wandb]

    def after_fit(self) -> None:
        trainer, directory = self.trainer, self.run_directory
        if self.resumed.get("global_step") == trainer.global_step:
            print_once(f"this run was complete at step {trainer.global_step}; raise --trainer.max_epochs")
        values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        print_once("\n" + ", ".join(f"{name} {float(value):.4f}" for name, value in values.items()))
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)), None)
        if best is not None and best.best_model_path:
            print_once(f"best checkpoint: {best.best_model_path} ({best.monitor} {best.best_model_score:.4f})")
        elif best is not None and best.monitor is not None:
            print_once(f"best checkpoint: none, {best.monitor} had no value in any validation")
        for name in ("figures", "wandb"):
            if directory is not None and (directory / name).is_dir():
                print_once(f"{name}: {directory / name}")
        print_once(f"continue with: python train.py fit --resume {directory} --trainer.max_epochs N")

    def test(self, model: Any, datamodule: Any, verbose: bool = True, **kwargs: Any) -> None:
        """Test. If the test samples are those of val, the head of the table says so."""
        shared = isinstance(datamodule, VisionDataModule) and bool(datamodule.test_is_val)
        results = self.trainer.test(model, datamodule=datamodule, verbose=verbose and not shared, **kwargs)
        if verbose and shared:
            rows = [
                {"test metric (samples of val)": name, "value": value} for name, value in sorted(results[0].items())
            ]
            print_once(format_table(rows))

    def predict(self, model: Any, datamodule: Any, **kwargs: Any) -> None:
        """Run prediction without collecting the results in memory: `PredictionWriter` writes them."""
        self.trainer.predict(model, datamodule=datamodule, **{**kwargs, "return_predictions": False})


def _accepts_checkpoint_io(strategy: Any) -> bool:
    """Return False for sharded strategies, which write directories of their own."""
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", strategy))
    return not any(word in name.lower() for word in ("fsdp", "deepspeed", "model_parallel", "modelparallel"))


# --- entry point ----------------------------------------------------------------------------------------------------


def run(args: list[str]) -> None:
    """Run one command. A `UserError` is printed as one line; every other exception is a bug and keeps its traceback."""
    print_any_name()
    print_short_warnings()
    register_classes()
    if answer_class_help(args):
        return
    quieten()
    command = VisionCLI.__new__(VisionCLI)  # before its constructor, which runs the command and may raise
    status = 1
    try:
        command.__init__(args)  # type: ignore[misc]
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        raise
    except Exception as error:
        message = find_user_error(error)
        if message is None or os.environ.get("SHOW_TRACEBACK"):
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
            sys.modules["wandb"].finish(exit_code=status)
        if (directory := getattr(command, "run_directory", None)) is not None and directory.is_dir():
            if status in (EXIT_RESUMABLE, EXIT_INTERRUPTED):
                print_once(f"resume with: python train.py fit --resume {directory}")
            print_once(f"run directory: {directory}")


def answer_class_help(args: list[str]) -> bool:
    """Answer ``--model.help`` and ``--data.help`` without a name, or with an unknown one.

    Returns:
        Whether the classes were listed; an unknown name ends the program with status 2.
    """
    for slot in ("model", "data"):
        option = f"--{slot}.help"
        rest = list(args)
        names = take_options(rest, option)
        if option in rest or any(not name or name.startswith("-") for name in names):
            print(list_classes(slot))
            return True
        for name in names:
            if name.rsplit(".", 1)[-1] not in class_names(slot) and "." not in name:
                print(f"error: {unknown_class(slot, name)}", file=sys.stderr)
                sys.exit(2)
    return False


def register_classes() -> None:
    """Import all systems and datamodules, so that ``--model`` and ``--data`` find them by their short names."""
    lightning_modules.import_all()
    datamodules.import_all()


def quieten() -> None:
    """Silence Lightning's messages on matters that this command line has settled."""
    warnings.filterwarnings("ignore", message=".*recommended to use .*sync_dist=True.*", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer`.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    settled = ("litlogger", "`weights_only` was not set", "Loading `train_dataloader` to estimate", "TPU available")
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(lambda record: not any(text in record.getMessage() for text in settled))
