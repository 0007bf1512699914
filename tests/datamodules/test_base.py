"""VisionDataModule: options, checks before loading, and its loaders."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.classification.image_folder import ImageFolder
from datamodules.loading import EpochSampler
from datamodules.synthetic.imagenet import write_imagenet
from errors import DatasetError, UserError
from tests.small_system import fit


class Numbers(Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((3, 1, 1), index, dtype=torch.uint8), "id": str(index)}


class NumbersData(VisionDataModule):
    predict_batch_size = 1

    def __init__(self, size: int = 5, **kwargs: Any) -> None:
        super().__init__(num_workers=0, **kwargs)
        self.size, self.built = size, 0

    def dataset(self, split: Split) -> Dataset:
        self.built += 1
        return Numbers(self.size)


def test_batch_sizes_of_the_splits() -> None:
    data = NumbersData(batch_size=2, eval_batch_size=4)
    sizes = {split: len(next(iter(data.loader(split)))["id"]) for split in ("train", "val", "test", "predict")}  # type: ignore[arg-type]
    assert sizes == {"train": 2, "val": 4, "test": 4, "predict": 1}
    assert [len(batch["id"]) for batch in NumbersData(batch_size=2, drop_last=True).train_dataloader()] == [2, 2]
    assert NumbersData().num_classes == 0


def test_hyperparameters_of_the_subclass_are_saved() -> None:
    parameters = NumbersData(size=3, batch_size=2).hparams
    assert (parameters["size"], parameters["batch_size"]) == (3, 2)


def test_its_name_does_not_build_datasets() -> None:
    """The command line converts the data to a string for each link that they do not have."""
    data = NumbersData()
    assert str(data) == "NumbersData"
    assert data.built == 0


def test_a_checked_dataset_is_built_once() -> None:
    data = NumbersData()
    data.check("val")
    data.val_dataloader()
    assert data.built == 1
    data.val_dataloader()
    assert data.built == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "^batch_size: expected at least 1, found 0"),
        ({"eval_batch_size": 0}, "^eval_batch_size: expected at least 1, found 0"),
        ({"size": 0}, "NumbersData: expected samples in the train split, found none"),
        ({"batch_size": 9, "drop_last": True}, "batch_size: expected at most the 5 samples .*, found 9"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NumbersData(**options).train_dataloader()


def test_balanced_sampling_needs_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_imagenet(str(tmp_path), classes=3, train=5, val=4, size=24)
    data = ImageFolder(str(tmp_path), image_size=16, num_workers=0, sampling="balanced")
    monkeypatch.setattr(data, "labels", lambda split: None)
    with pytest.raises(UserError, match="sampling: expected one class per sample for balanced, found none in ImageFo"):
        data.train_dataloader()
    monkeypatch.setattr(data, "labels", lambda split: np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"ImageFolder.labels: expected one label for each of 15 samples, found 3"):
        data.train_dataloader()


def test_a_missing_root_is_named() -> None:
    assert isinstance(NumbersData().no_root_error(), DatasetError)
    expected = "root: expected the folder of NumbersData, found none; set --data.root FOLDER"
    assert str(NumbersData().no_root_error()) == expected


def test_a_datamodule_is_printed_without_its_datasets() -> None:
    """jsonargparse prints it in every run; Lightning's text would build the loaders of all splits."""

    class Unreadable(VisionDataModule):
        def dataset(self, split: Split) -> Dataset:
            raise AssertionError("read")

    assert str(Unreadable()) == "Unreadable"


@pytest.mark.parametrize(
    ("samples", "batch_size", "norm", "steps"),
    [(13, 4, True, 3), (13, 4, False, 4), (12, 4, True, 3), (14, 4, True, 4), (3, 1, True, 3), (1, 4, True, 1)],
)
def test_a_last_batch_of_one_is_dropped_for_batch_norm(
    tmp_path: Path, samples: int, batch_size: int, norm: bool, steps: int
) -> None:
    """The schedule's length agrees with the steps that are made."""
    data, totals = {"train": samples, "batch_size": batch_size}, []

    def constant(optimizer: Any, total: int) -> LambdaLR:
        totals.append(total)
        return LambdaLR(optimizer, lambda step: 1.0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(tmp_path, max_epochs=2, data=data, model={"norm": norm, "schedule": constant})
    assert trainer.global_step == totals[0] == 2 * steps
    lines = {str(warning.message) for warning in caught if "leave a batch of one" in str(warning.message)}
    expected = "batch_size: 13 training samples (per rank) in batches of 4 leave a batch of one, which batch "
    assert [line[: len(expected)] for line in lines] == ([expected] if (samples, norm) == (13, True) else [])


def test_another_sample_is_dropped_in_each_epoch() -> None:
    """Over the epochs, all samples are used."""
    sampler = EpochSampler(5, seed=0, shuffle=True, pad=True)
    dropped = []
    for sampler.epoch in range(40):
        dropped.append(list(sampler)[-1][1])
    assert set(dropped) == set(range(5))
