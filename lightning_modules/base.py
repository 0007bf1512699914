"""What every system shares: a batch becomes named losses in training and predictions everywhere else."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.components.unsaved import Constant
from lightning_modules.final_validation import validate_last_weights
from lightning_modules.schedules import Plateau

OptimizerFactory = Callable[[Any], Optimizer]
ScheduleFactory = Callable[[Optimizer, int], LRScheduler]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VisionModule(pl.LightningModule):
    """Base class of all systems.

    A subclass implements `losses`, `predict` and, if it is evaluated, `build_metrics` and `update_metrics`:

    - ``losses(batch)`` returns the named terms of the loss. Their sum is minimized; it is logged as ``train/loss`` and
      each term as ``train/<term>``.
    - ``predict(images)`` returns post-processed predictions in the pixels of its input. Validation, test and predict
      use it; callbacks draw and write what it returns.
    - ``build_metrics()`` returns one MetricCollection; each split has its own copy. It is updated per batch and
      computed once per epoch over the whole set, on all ranks. Scalars are logged as ``val/<metric>``; other results
      (a confusion matrix, per-class values) stay in ``epoch_results`` for the callbacks. A metric names the latter in
      ``array_results``, {name: number of dimensions}, because torchmetrics squeezes those of a single class.

    Batches follow the contract of ``datamodules/base.py``: images are uint8 and are normalized here, on the device.

    The constructor's arguments, those of subclasses included, are saved as hyperparameters. A subclass only has to call
    ``super().__init__(...)`` first.

    Args:
        optimizer: makes the optimizer from parameter groups. Default: SGD with the momentum and weight decay of
            He et al. 2016.
        schedule: makes the learning-rate schedule from (optimizer, total steps); it advances once per step. See
            ``lightning_modules/schedules.py``. None keeps the learning rate constant.
        mean: mean of the pixels in 0..1 per RGB channel, as used when the weights were trained.
        std: standard deviation of the pixels in 0..1 per RGB channel, as used when the weights were trained.
        channels_last: keep weights and images in NHWC memory, which is faster on CPUs and tensor cores.
    """

    #: Metric that selects the best checkpoint, and whether larger or smaller is better: ``("val/top1", "max")``.
    monitor: tuple[str, Literal["max", "min"]] | None = None
    #: One name per class if the system has classes; ``{attribute: names}`` if it predicts several attributes.
    class_names: list[str] | dict[str, list[str]] | None = None

    # The default optimizer is a lambda because jsonargparse turns its arguments into options.
    def __init__(
        self,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4),
        schedule: ScheduleFactory | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self._save_arguments()
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.pixel_mean = Constant(torch.tensor(mean).view(1, -1, 1, 1) * 255)
        self.pixel_std = Constant(torch.tensor(std).view(1, -1, 1, 1) * 255)
        self.metrics = nn.ModuleDict()
        self.epoch_results: dict[str, dict[str, Tensor]] = {}

    def _save_arguments(self) -> None:
        """Save the arguments of the outermost constructor as hyperparameters, so that subclasses do nothing for it.

        The optimizer and the schedule are plain dicts if they come from the command line; callables would make the
        checkpoint unreadable with ``weights_only=True`` and are not saved.
        """
        frame = sys._getframe(1)
        while (caller := frame.f_back) is not None and _is_constructor(caller, self):
            frame = caller
        # If Lightning searched for the frame itself, it would leave a reference cycle, which keeps data loaders alive.
        self.save_hyperparameters(frame=frame)
        callables = [name for name in ("optimizer", "schedule") if callable(self.hparams.get(name))]
        self.save_hyperparameters(ignore=callables, frame=frame)
        # The command line links the data's classes to every model, those that do not accept them included. A checkpoint
        # with such an argument could not be loaded.
        arguments = inspect.getargvalues(frame)
        given = {*arguments.args, *arguments.locals.get(arguments.keywords or "", ())}
        for name in [n for n in self.hparams if n not in given and not n.startswith("_")]:
            del self.hparams[name]

    # --- what a system implements ---------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the named terms of the loss, scalars; their sum is minimized."""
        raise NotImplementedError(f"{type(self).__name__} does not implement losses")

    def predict(self, images: Tensor | list[Tensor]) -> Any:
        """Return post-processed predictions, in pixels of the images: uint8 (B, 3, H, W), or a list of (3, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement predict")

    def predict_batch(self, batch: dict[str, Any]) -> Any:
        """Return `predict` of a batch; override it for a system that needs more than the images, such as proposals."""
        return self.predict(batch["image"])

    def build_metrics(self) -> MetricCollection:
        """Return the metrics of one evaluation split."""
        return MetricCollection({})

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        """Update the metrics with one batch. Call ``update``, not ``forward``, whose result averages batches."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, without frozen parameters; ``lr_scale`` multiplies a group's learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    # --- images ---------------------------------------------------------------------------------------------------

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalize uint8 (B, 3, H, W) to float32 (B, 3, H, W) in the module's memory format, on the device."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected uint8 pixels (the module normalizes them), found {images.dtype}")
        images = images.to(memory_format=self.memory_format)
        return (images - self.pixel_mean.value) / self.pixel_std.value

    # --- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        terms = self._training_losses(batch)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        # One log call costs about 0.5 ms, so the terms are logged only in steps that the loggers record.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside of Trainer.__init__
        if len(terms) > 1 and (self.global_step + 1) % every == 0:
            named = {f"train/{name}": term.detach() for name, term in terms.items()}
            self.log_dict(named, on_step=True, on_epoch=False, batch_size=1)
        return loss

    def _training_losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return `losses`; a batch that batch normalization cannot normalize is a `UserError`.

        Datamodules drop a last batch of one sample. This remains for a batch size or a dataset of one.
        """
        try:
            return self.losses(batch)
        except ValueError as error:
            if not str(error).startswith("Expected more than 1 value per channel when training"):
                raise
        raise UserError(
            "batch_size: expected 2 or more training samples per step and rank for batch normalization on 1x1 maps, "
            "found 1; increase --data.batch_size, or the number of samples"
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self._evaluate("test", batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self.predict_batch(batch)

    def _evaluate(self, split: str, batch: dict[str, Any]) -> Any:
        predictions = self.predict_batch(batch)
        self.update_metrics(self.metrics[split], predictions, batch)  # type: ignore[arg-type]
        return predictions

    def on_validation_epoch_start(self) -> None:
        self._enter_evaluation()

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def _log_epoch(self, split: str) -> None:
        metrics = self.metrics[split]
        assert isinstance(metrics, MetricCollection)
        results = compute_arrays(metrics) if len(metrics) else {}
        metrics.reset()
        scalars = {f"{split}/{name}": value for name, value in results.items() if value.ndim == 0}
        in_progress_bar = self.monitor[0] if self.monitor else f"{split}/loss"
        for name, value in scalars.items():
            # No sync_dist: compute() has already reduced over the ranks.
            self.log(name, value, on_step=False, on_epoch=True, prog_bar=name == in_progress_bar, batch_size=1)
        self.epoch_results[split] = {name: value for name, value in results.items() if value.ndim > 0}
        if split == "val" and not self.trainer.sanity_checking and isinstance(plateau := self.lr_schedulers(), Plateau):
            assert self.monitor is not None
            name, mode = self.monitor
            if name not in scalars:
                raise UserError(
                    f"schedule: Plateau needs {name}, found {', '.join(scalars) or 'no metric'}; use Cosine"
                )
            plateau.observe(float(scalars[name]), mode)

    def _enter_evaluation(self) -> None:
        """Broadcast rank 0's buffers to all ranks, and stop DDP from doing so during evaluation.

        DDP's own broadcast in the first forward is skipped after gradient accumulation or an EMA swap, and it deadlocks
        if a rank has no batch.
        """
        if self.trainer.world_size > 1 and isinstance(self.trainer.strategy, DDPStrategy):
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)
            self._set_buffer_sync(False)

    def on_validation_end(self) -> None:
        self._set_buffer_sync(True)

    def _set_buffer_sync(self, enabled: bool) -> None:
        model = self.trainer.strategy.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.require_forward_param_sync = enabled

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the file of initial weights: a checkpoint has its own and must load without that file."""
        hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "weights" in hparams:
            hparams["weights"] = None

    # --- setup ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        for split in ("val", "test"):
            if split not in self.metrics:
                self.metrics[split] = self.build_metrics()
        self.metrics.to(self.device)

    def on_fit_start(self) -> None:
        validate_last_weights(self.trainer)
        self._report_slow_statistics()

    def _report_slow_statistics(self) -> None:
        """Warn if the run is too short for ``batch_norm_momentum``: evaluation would be far from training."""
        momentum = self.hparams.get("batch_norm_momentum")
        if momentum is None or self.hparams.get("freeze_batch_norm"):
            return
        steps = float(self.trainer.estimated_stepping_batches)
        percent = 100 * (1 - momentum) ** steps
        if percent > 5:
            rank_zero_warn(
                f"batch_norm_momentum: after the {steps:g} steps of this run, {round(percent)}% of new layers' running "
                f"statistics are initial values; set --model.batch_norm_momentum {min(0.1, 3 / steps):.1g} or more"
            )

    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups()
        if not any(group["params"] for group in groups):
            raise UserError(f"{type(self).__name__}: expected trainable parameters, found all of them frozen")
        optimizer = self.optimizer_factory(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_scale", 1.0)
        if self.schedule_factory is None:
            return optimizer
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("schedule: expected a run of known length; set --trainer.max_epochs or --trainer.max_steps")
        schedule = self.schedule_factory(optimizer, int(total))
        if isinstance(schedule, ReduceLROnPlateau):
            raise UserError(
                "schedule: ReduceLROnPlateau does not resume exactly (Lightning skips an update on resume); "
                "use lightning_modules.schedules.Plateau"
            )
        if isinstance(schedule, Plateau) and self.monitor is None:
            raise UserError(f"schedule: Plateau needs a monitored metric, {type(self).__name__} has none; use Cosine")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def compute_arrays(metrics: MetricCollection) -> dict[str, Tensor]:
    """Compute metrics, with the dimensions of ``array_results`` also for a single class: (1,), (1, 1).

    torchmetrics squeezes every result of one element to a scalar.
    """
    dimensions = {k: n for metric in metrics.values() for k, n in getattr(metric, "array_results", {}).items()}
    results = metrics.compute()
    return {
        name: value.reshape((1,) * dimensions[name]) if name in dimensions and value.numel() == 1 else value
        for name, value in results.items()
    }


def _is_constructor(frame: FrameType, module: nn.Module) -> bool:
    """Whether a frame is an ``__init__`` that constructs the module."""
    return frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is module
