"""A small system with everything that complicates exact resume: batch norm, dropout, augmentation, a schedule."""

from __future__ import annotations

import importlib
import shutil
import time
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import cli.parser
from callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint
from callbacks.metrics_file import MetricsFile, read_metrics
from callbacks.resume import LastCheckpoint, StepSeed
from datamodules.base import Split, VisionDataModule
from lightning_modules.base import ScheduleFactory, VisionModule
from lightning_modules.schedules import Cosine


class Blobs(Dataset):
    """Noise images of three colors, augmented at random by albumentations and by NumPy."""

    def __init__(self, size: int, train: bool, seconds: float = 0.0) -> None:
        self.size, self.train, self.seconds = size, train, seconds
        self.transform = A.Compose([A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.8)])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        rng = np.random.default_rng(index)
        label = index % 3
        image = rng.integers(0, 120, (8, 8, 3)).astype(np.uint8)
        image[..., label] += 60
        if self.train:
            image = self.transform(image=image)["image"]
            image = np.roll(image, np.random.randint(3), axis=1)
        return {"image": torch.from_numpy(image).permute(2, 0, 1).contiguous(), "label": label, "id": str(index)}


class BlobsData(VisionDataModule):
    """`Blobs` as a datamodule; no batch size divides the default numbers of samples."""

    def __init__(self, train: int = 22, val: int = 13, seconds: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sizes, self.seconds = {"train": train, "val": val}, seconds

    @property
    def class_names(self) -> list[str]:
        return ["red", "green", "blue"]

    def labels(self, split: Split) -> np.ndarray:
        return np.arange(len(self.dataset(split))) % 3  # type: ignore[arg-type]

    def dataset(self, split: Split) -> Dataset:
        training = split == "train"
        return Blobs(self.sizes["train" if training else "val"], training, self.seconds)


class SmallNet(VisionModule):
    """Convolution, batch normalization and dropout, with a loss of two terms."""

    monitor = ("val/accuracy", "max")

    def __init__(self, norm: bool = True, dropout: float = 0.3, schedule: ScheduleFactory | None = None) -> None:
        super().__init__(
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            schedule=schedule or (lambda o, n: Cosine(o, n, 3)),
        )
        self.save_hyperparameters(ignore=["schedule"])
        self.network = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(144, 3),
        )

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits = self.network(self.preprocess(batch["image"]))
        return {"cross_entropy": F.cross_entropy(logits, batch["label"]), "size": 1e-3 * logits.square().mean()}

    def predict(self, images: Any) -> dict[str, Tensor]:
        return {"probabilities": self.network(self.preprocess(images)).softmax(1)}

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(3, average="micro"), "confidence": MeanMetric()})

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics["accuracy"].update(predictions["probabilities"], batch["label"])
        metrics["confidence"].update(predictions["probabilities"].amax(1))


def fit(folder: Path, resume: Path | None = None, every_n_steps: int = 1, **options: Any) -> pl.Trainer:
    """Train the small system.

    Args:
        folder: run directory.
        resume: checkpoint to resume from.
        every_n_steps: interval of the checkpoints.
        **options: ``data`` and ``model`` (dicts of arguments), ``callbacks`` (function that returns a list), and
            arguments of the Trainer.
    """
    data = {"batch_size": 4, "num_workers": 0, "seed": 3, **options.pop("data", {})}
    model = options.pop("model", {})
    extra = options.pop("callbacks", list)()
    logger = MetricsFile(folder)
    if resume is not None:
        logger.resume(torch.load(resume, weights_only=True)["global_step"] - 1)
    last = LastCheckpoint(every_n_steps=every_n_steps, keep=1000)
    best = BestCheckpoint()
    last.dirpath = best.dirpath = str(folder / "checkpoints")
    defaults = {"max_epochs": 3, "log_every_n_steps": 2, "num_sanity_val_steps": 2}
    trainer = pl.Trainer(
        **{**defaults, **options},
        default_root_dir=folder,
        accelerator="cpu",
        logger=logger,
        callbacks=[StepSeed(3), last, best, *extra],
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(3, verbose=False)
    trainer.fit(SmallNet(**model), datamodule=BlobsData(**data), ckpt_path=resume, weights_only=True)
    return trainer


def outcome(folder: Path) -> dict[str, Any]:
    """Return the results of a run.

    They are weights, optimizer and schedule of the last checkpoint, all logged values, and the best checkpoint.
    """
    final = max((folder / "checkpoints").glob("step=*.ckpt"))
    checkpoint = torch.load(final, weights_only=True)
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "current_model_state", "averaging_state")
    logged = [
        {k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder / "metrics.csv")
    ]
    (state,) = [value for name, value in checkpoint["callbacks"].items() if name.startswith("BestCheckpoint")]
    best: dict[str, Any] = {"score": state["best_model_score"]}
    if state["best_model_path"]:
        stored = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
        best |= {key: stored[key] for key in ("state_dict", "global_step", "epoch")}
    found = {key: checkpoint[key] for key in keys if key in checkpoint}
    return {"metrics": logged, "file": final.name, "best": best, **found}


def kill_and_resume(run: Path, step: int) -> Path:
    """Copy a finished run as a kill after the checkpoint of ``step`` would leave it, and resume the copy.

    After a kill, that checkpoint is the last one, and the log has later steps.
    """
    killed = run.parent.parent / f"killed_{step}" / run.name
    shutil.copytree(run, killed)
    for path in killed.glob("checkpoints/step=*.ckpt"):
        if path.name > f"step={step:08d}.ckpt":
            path.unlink()
    cli.parser.run(["fit", "--resume", str(killed)])
    return killed


def load_system(path: Path) -> Any:
    """Return the system of a checkpoint that ``train.py`` wrote."""
    class_path = torch.load(path, weights_only=True)["hyper_parameters"]["_class_path"]
    module, name = class_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name).load_from_checkpoint(path, weights_only=True)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """List the places where two nested results are not bit-identical; NaN equals NaN."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{where}.{key}: only in one" for key in a.keys() ^ b.keys()]
        return missing + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} entries"]
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{where}[{i}]")]
    same = torch.equal(a, b) if isinstance(a, Tensor) else a == b or (a != a and b != b)
    return [] if same else [f"{where}: {a} and {b}"]
