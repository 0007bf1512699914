"""What every system shares: a batch becomes named losses in training and predictions everywhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MetricCollection

from errors import UserError
from hyperparameters import constructor_frame
from lightning_modules.components.unsaved import Constant
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
      (a confusion matrix, per-class values) stay in ``epoch_results`` for the callbacks.

    Batches follow the contract of ``datamodules/base.py``: images are uint8 and are normalized here, on the device.

    The base class saves the constructor's arguments as hyperparameters, those of the subclass included; a subclass
    calls ``super().__init__(...)`` first and does nothing else for it.

    Args:
        optimizer: makes the optimizer from parameter groups. Default: SGD with the momentum and weight decay of
            He et al. 2016 (a lambda, because jsonargparse turns its arguments into options).
        schedule: makes the learning-rate schedule from (optimizer, total steps); it advances once per step. See
            ``lightning_modules/schedules.py``. None keeps the learning rate constant.
        mean: mean of the pixels in 0..1 per RGB channel, as used when the weights were trained.
        std: standard deviation of the pixels in 0..1 per RGB channel, as used when the weights were trained.
        channels_last: keep weights and images in NHWC memory, which is faster on CPUs and tensor cores.
    """

    #: The metric that selects the best checkpoint, and whether more or less is better: ``("val/top1", "max")``.
    monitor: tuple[str, Literal["max", "min"]] | None = None
    #: One name per class if the system has classes; ``{attribute: names}`` if it predicts several attributes.
    class_names: list[str] | dict[str, list[str]] | None = None

    def __init__(
        self,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4),
        schedule: ScheduleFactory | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self._save_arguments(constructor_frame(self))
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.pixel_mean = Constant(torch.tensor(mean).view(1, -1, 1, 1) * 255)
        self.pixel_std = Constant(torch.tensor(std).view(1, -1, 1, 1) * 255)
        self.metrics = nn.ModuleDict()
        self.epoch_results: dict[str, dict[str, Tensor]] = {}

    def _save_arguments(self, frame: FrameType) -> None:
        """Save the arguments of the subclass's constructor as hyperparameters.

        The optimizer and the schedule are plain dicts if they come from the command line; callables would make the
        checkpoint unreadable with ``weights_only=True`` and are not saved.
        """
        self.save_hyperparameters(frame=frame)
        callables = [name for name in ("optimizer", "schedule") if callable(self.hparams.get(name))]
        self.save_hyperparameters(ignore=callables, frame=frame)
        # The command line links the data's classes to every model. A name that no constructor accepts would make the
        # module impossible to load.
        constructors = [vars(base)["__init__"] for base in type(self).__mro__ if "__init__" in vars(base)]
        accepted = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
        for name in [n for n in self.hparams if n not in accepted and not n.startswith("_")]:
            del self.hparams[name]

    # --- what a system writes -----------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Named scalar terms whose sum is minimized."""
        raise NotImplementedError(f"{type(self).__name__} is not trained: it has no losses")

    def predict(self, images: Tensor | list[Tensor]) -> Any:
        """Post-processed predictions for uint8 images (B,3,H,W), or a list of (3,H,W), in their own pixels."""
        raise NotImplementedError(f"{type(self).__name__} has no predict")

    def predict_batch(self, batch: dict[str, Any]) -> Any:
        """`predict` of a batch, for a system that takes more of it than the images where it is there (proposals)."""
        return self.predict(batch["image"])

    def build_metrics(self) -> MetricCollection:
        """The metrics of one evaluation split."""
        return MetricCollection({})

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        """Adds one batch to the metrics; never takes the value that their forward returns (it averages batches)."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer. ``lr_scale`` in a group multiplies its learning rate; frozen parameters are out."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    # --- images ---------------------------------------------------------------------------------------------------

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) to normalized float32 (B,3,H,W) in the module's memory format, on the device."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected uint8 pixels (they are normalized on the device), found {images.dtype}")
        images = images.to(memory_format=self.memory_format)
        return (images - self.pixel_mean.value) / self.pixel_std.value

    # --- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        terms = self.losses(batch)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        # Each log costs about half a millisecond, so the terms are logged only where the loggers will take them.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside of Trainer.__init__
        if len(terms) > 1 and (self.global_step + 1) % every == 0:
            named = {f"train/{name}": term.detach() for name, term in terms.items()}
            self.log_dict(named, on_step=True, on_epoch=False, batch_size=1)
        return loss

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
        results = metrics.compute() if len(metrics) else {}
        metrics.reset()
        scalars = {f"{split}/{name}": value for name, value in results.items() if value.ndim == 0}
        shown = self.monitor[0] if self.monitor else f"{split}/loss"
        for name, value in scalars.items():
            # compute() has already joined the ranks; a second reduction would average equal values.
            self.log(name, value, on_step=False, on_epoch=True, prog_bar=name == shown, batch_size=1)
        self.epoch_results[split] = {name: value for name, value in results.items() if value.ndim > 0}
        if split == "val" and not self.trainer.sanity_checking and isinstance(plateau := self.lr_schedulers(), Plateau):
            assert self.monitor is not None
            plateau.observe(float(scalars[self.monitor[0]]), self.monitor[1])

    def _enter_evaluation(self) -> None:
        """Ranks enter evaluation with rank 0's batch statistics and then stay apart.

        DDP may or may not broadcast the buffers in the first evaluation forward, after accumulation or an EMA swap it
        does not, and a rank without a batch would be waited for. So they are broadcast once here, by all ranks.
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
        """A checkpoint holds its own weights: reading it must not ask for the file that the training began with."""
        hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "weights" in hparams:
            hparams["weights"] = None

    # --- set-up ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        for split in ("val", "test"):
            if split not in self.metrics:
                self.metrics[split] = self.build_metrics()
        self.metrics.to(self.device)

    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups()
        if not any(group["params"] for group in groups):
            raise UserError(f"{type(self).__name__}: every parameter is frozen, nothing is left to train")
        optimizer = self.optimizer_factory(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_scale", 1.0)
        if self.schedule_factory is None:
            return optimizer
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("a schedule needs the length of the run: set trainer.max_epochs or trainer.max_steps")
        schedule = self.schedule_factory(optimizer, int(total))
        if isinstance(schedule, ReduceLROnPlateau):
            raise UserError(
                "ReduceLROnPlateau does not resume exactly (Lightning skips its update in the resumed epoch): "
                "take lightning_modules.schedules.Plateau"
            )
        if isinstance(schedule, Plateau) and self.monitor is None:
            raise UserError(f"Plateau needs a metric to look at, and {type(self).__name__} names none as its monitor")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
