"""A minimal module and dataset that follow the batch contract, for the tests of the callbacks."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

NAMES = ["red", "größer", "$cost_$"]


class Samples(Dataset):
    def __init__(self, count: int = 12, seconds: float = 0.0) -> None:
        self.count, self.seconds = count, seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        image = torch.full((3, 24, 24), 10, dtype=torch.uint8)
        image[i % 3] = 200
        return {"image": image, "label": i % 3, "id": f"sample {i}"}


class Files(Dataset):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = torch.full((3, 24, 24), i % 256, dtype=torch.uint8)
        return {"image": image, "id": str(self.paths[i])}


class Tiny(pl.LightningModule):
    """Predict the brightest channel at even positions of the batch, and the next class at odd ones."""

    def __init__(self, names: list[str] | None = NAMES, fail_at: int | None = None, sleep: float = 0.0) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.class_names, self.fail_at, self.sleep = names, fail_at, sleep
        self.epoch_results: dict[str, dict[str, torch.Tensor]] = {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        time.sleep(self.sleep)
        loss = self.layer(batch["image"].float().mean(dim=(1, 2, 3))[:, None] / 255).pow(2).mean()
        self.log("train/loss", loss.detach())
        return loss

    def _predict(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        brightest = batch["image"].float().mean(dim=(2, 3)).argmax(dim=1)
        brightest[1::2] = (brightest[1::2] + 1) % 3
        return {"probabilities": torch.nn.functional.one_hot(brightest, 3).float() * 0.7 + 0.1}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        self.log("val/loss", torch.tensor(0.25), on_step=False, on_epoch=True, batch_size=1)
        return self._predict(batch)

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        if self.fail_at == batch_idx:
            raise KeyboardInterrupt
        return self._predict(batch)

    def on_validation_epoch_end(self) -> None:
        self.epoch_results["val"] = {"confusion_matrix": torch.tensor([[3, 1, 0], [0, 0, 0], [2, 1, 5]])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(count: int = 12, batch_size: int = 4, seconds: float = 0.0) -> DataLoader:
    return DataLoader(Samples(count, seconds), batch_size=batch_size)


def trainer(folder: Path, **kwargs: Any) -> pl.Trainer:
    options: dict[str, Any] = {
        "default_root_dir": str(folder),
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**{**options, **kwargs})


def write_image(path: Path, size: tuple[int, int] = (40, 30), **kwargs: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 140, 60)).save(path, **kwargs)
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
