"""Sampling order, seeding, resuming, unreadable images and batches."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.base import VisionDataModule
from datamodules.classification.image_folder import ImageFolder
from datamodules.loading import EpochSampler, collate
from datamodules.synthetic.imagenet import write_imagenet
from errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("drawn")
    write_imagenet(str(folder), classes=3, train=5, val=4, size=24)
    return str(folder)


def module(root: str, **options: Any) -> ImageFolder:
    defaults = {"image_size": 16, "batch_size": 4, "num_workers": 0, "seed": 3, "color_jitter": 0.3, "pca_jitter": 0.1}
    return ImageFolder(root, **{**defaults, **options})


def batches(data: VisionDataModule, split: str = "train", epoch: int = 0, start: int = 0) -> list[dict[str, Any]]:
    loader = data.loader(split)  # type: ignore[arg-type]
    loader.sampler.epoch, loader.sampler.start = epoch, start  # type: ignore[union-attr]
    return list(loader)


def equal(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    return len(first) == len(second) and all(
        a["id"] == b["id"] and torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
        for a, b in zip(first, second, strict=True)
    )


# --- sampling order ---------------------------------------------------------------------------------------------------


def sampled(size: int, world: int, pad: bool, epoch: int = 0, start: int = 0) -> list[list[int]]:
    ranks = []
    for rank in range(world):
        sampler = EpochSampler(size, seed=7, shuffle=pad, pad=pad)
        sampler.epoch, sampler.start, sampler.rank, sampler.world = epoch, start, rank, world
        keys = list(sampler)
        assert all(e == epoch for e, _, _ in keys)
        assert start or len(sampler) == len(keys)
        ranks.append([i for _, i, _ in keys])
    return ranks


@pytest.mark.parametrize("size", [1, 2, 5, 8, 37])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_sees_each_sample_once_on_any_number_of_ranks(size: int, world: int) -> None:
    ranks = sampled(size, world, pad=False)
    assert sorted(i for rank in ranks for i in rank) == list(range(size))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("size", [1, 2, 5, 8, 37])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_training_gives_all_ranks_as_many_and_misses_none(size: int, world: int) -> None:
    ranks = sampled(size, world, pad=True)
    steps = -(-size // world)
    assert {len(rank) for rank in ranks} == {steps}
    counts = Counter(i for rank in ranks for i in rank)
    assert set(counts) == set(range(size))
    assert sum(counts.values()) - size < max(world, size)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_epoch_is_the_same_on_any_number_of_ranks() -> None:
    whole = sampled(24, 1, pad=True)[0]
    for world in (2, 3, 4):
        ranks = sampled(24, world, pad=True)
        assert [i for step in zip(*ranks, strict=True) for i in step] == whole


def test_epochs_are_permuted_anew() -> None:
    first, second = sampled(50, 1, True, epoch=0)[0], sampled(50, 1, True, epoch=1)[0]
    assert first != second
    assert first == sampled(50, 1, True, epoch=0)[0]
    assert sorted(first) == sorted(second) == list(range(50))


@pytest.mark.parametrize("start", [0, 1, 7, 12])
def test_start_goes_on_exactly_there(start: int) -> None:
    for rank, rest in zip(sampled(37, 3, True), sampled(37, 3, True, start=start), strict=True):
        assert rank[start:] == rest


# --- balanced ---------------------------------------------------------------------------------------------------------

RARE = np.repeat([2, 0, 1, -1], [3, 90, 7, 4])  # 104 samples, of which 4 have no class


def balanced(epoch: int = 0, rank: int = 0, world: int = 1, start: int = 0) -> list[tuple[int, int, int]]:
    sampler = EpochSampler(len(RARE), seed=7, shuffle=True, pad=True, labels=RARE)
    sampler.epoch, sampler.start, sampler.rank, sampler.world = epoch, start, rank, world
    keys = list(sampler)
    assert start or len(sampler) == len(keys)
    return keys


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_balanced_epoch_holds_every_class_and_of_a_class_every_sample_equally_often(epoch: int) -> None:
    keys = balanced(epoch)
    counts = Counter(int(RARE[i]) for _, i, _ in keys)
    assert set(counts) == {0, 1, 2}
    assert sum(counts.values()) == 104
    assert max(counts.values()) - min(counts.values()) <= 1
    for label in range(3):
        of_class = Counter(i for _, i, _ in keys if RARE[i] == label)
        often = [of_class[i] for i in np.flatnonzero(label == RARE)]
        assert max(often) - min(often) <= 1
    # A sample's repetitions are numbered, so that each is augmented in its own way.
    assert len(set(keys)) == len(keys)
    times = Counter(i for _, i, _ in keys)
    assert {(i, k) for _, i, k in keys} == {(i, k) for i, n in times.items() for k in range(n)}


def test_balanced_epochs_differ_resume_and_split_over_ranks() -> None:
    whole = balanced()
    assert whole == balanced()
    assert [i for _, i, _ in whole] != [i for _, i, _ in balanced(epoch=1)]
    assert whole[40:] == balanced(start=40)
    assert [key for step in zip(*(balanced(rank=r, world=4) for r in range(4)), strict=True) for key in step] == whole


def test_a_repeated_sample_is_augmented_anew(root: str, tmp_path: Path) -> None:
    rare = tmp_path / "rare"
    shutil.copytree(root, rare)
    classes = sorted((rare / "train").iterdir())
    for image in sorted(classes[0].iterdir())[1:]:
        image.unlink()
    data = module(str(rare), sampling="balanced")
    same = [image for b in batches(data) for i, image in zip(b["id"], b["image"], strict=True) if classes[0].name in i]
    assert len(same) >= 3
    assert all(not torch.equal(a, b) for n, a in enumerate(same) for b in same[:n])


# --- samples ------------------------------------------------------------------------------------------------------


def test_samples_are_a_function_of_seed_epoch_and_index(root: str) -> None:
    data = module(root)
    first = batches(data)
    assert equal(first, batches(data))
    assert equal(first, batches(module(root)))
    second = batches(data, epoch=1)
    assert not equal(first, second)
    of_epoch = [{i: image for b in e for i, image in zip(b["id"], b["image"], strict=True)} for e in (first, second)]
    assert not any(torch.equal(of_epoch[0][name], of_epoch[1][name]) for name in of_epoch[0])
    assert not equal(first, batches(module(root, seed=4)))


def test_workers_change_nothing(root: str) -> None:
    data = module(root, num_workers=2)
    loader = data.loader("train")
    for epoch in (0, 1):  # the workers persist, and must learn of the epoch
        loader.sampler.epoch = epoch  # type: ignore[union-attr]
        assert equal(list(loader), batches(module(root), epoch=epoch))


def test_a_resumed_epoch_is_the_rest_of_the_epoch(root: str) -> None:
    data = module(root)
    progress = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=2)))
    trainer = SimpleNamespace(current_epoch=1, fit_loop=SimpleNamespace(epoch_loop=progress))
    loader = data.loader("train")
    loader.trainer = trainer  # type: ignore[assignment]
    assert equal(list(loader), batches(data, epoch=1)[2:])


def test_the_main_process_keeps_its_random_state(root: str) -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    expected = np.random.rand(), torch.rand(1)
    np.random.seed(0)
    torch.manual_seed(0)
    batches(module(root))
    assert (np.random.rand(), torch.rand(1)) == expected


# --- unreadable images -------------------------------------------------------------------------------------


@pytest.fixture
def damaged(root: str, tmp_path: Path) -> str:
    folder = tmp_path / "damaged"
    shutil.copytree(root, folder)
    for split in ("train", "val"):
        images = sorted((folder / split).rglob("*.JPEG"))
        for image in images[:5]:  # one whole evaluation batch, and one more
            image.write_bytes(image.read_bytes()[:300])
    return str(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_them_and_counts(damaged: str, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = batches(module(damaged, num_workers=workers))
    assert sum(len(batch["id"]) for batch in found) == 15
    assert all(set(batch) == {"image", "label", "id"} for batch in found)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("skipped, 5 so far: ")
    assert all("truncated" in line for line in lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_them_out_if_told_to(damaged: str, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = batches(module(damaged, num_workers=workers, broken_images="skip"), "val")
    assert [len(batch["id"]) for batch in found] == [3, 4]
    assert "skipped, 5 so far" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_them_otherwise(damaged: str, workers: int) -> None:
    with pytest.raises(UserError) as caught:
        batches(module(damaged, num_workers=workers), "val")
    line = str(caught.value)
    del caught  # a cycle of its traceback and this frame: collected as one, the loader cannot tell its workers to end
    assert "\n" not in line
    assert "truncated" in line
    assert line.endswith("--data.broken_images skip")


def test_a_split_without_a_readable_image(damaged: str) -> None:
    for image in Path(damaged, "train").rglob("*.JPEG"):
        image.write_bytes(b"")
    with pytest.raises(UserError, match="expected a readable image, found none among 15"):
        batches(module(damaged))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_collate() -> None:
    samples = [
        {"image": torch.zeros(3, 2, n), "label": n, "weight": 0.5, "id": str(n), "labels": {"a": n, "b": -100}}
        for n in (1, 2)
    ]
    batch = collate(samples)
    assert [image.shape[2] for image in batch["image"]] == [1, 2]
    assert batch["label"].tolist() == [1, 2]
    assert batch["label"].dtype == batch["labels"]["a"].dtype == torch.int64
    assert batch["weight"].dtype == torch.float32
    assert batch["id"] == ["1", "2"]
    assert batch["labels"]["b"].tolist() == [-100, -100]
    assert collate([samples[0], {"skipped": ["x: broken"]}])["skipped"] == ["x: broken"]
    assert collate([{"skipped": ["x: broken"]}]) == {"skipped": ["x: broken"]}


def test_collate_passes_on_a_refused_sample() -> None:
    assert collate([{"id": "a"}, {"refused": "why"}]) == {"refused": "why"}
