"""Sampling, seeding and loading: the order of samples is a pure function of (seed, epoch)."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler, default_collate

from errors import BrokenImageError, DatasetError, UserError

# (epoch, index, how often the index came before in this epoch): it travels to the worker, so that persistent workers
# know the epoch, and a rare sample that is drawn again is augmented anew.
Key = tuple[int, int, int]


# Kept as lists even where the sizes happen to agree, so that a batch's type does not depend on its content.
LIST_KEYS = ("target", "proposals", "original_mask")


class EpochSampler(SequentialSampler):
    """Yields `Key`s for one rank, from position ``start``; the order depends on (seed, epoch) alone.

    In training the order is padded by its own beginning to a multiple of ``world``, so that all ranks take as many
    steps. In evaluation it is not: each sample is seen exactly once, on any number of ranks.

    Balanced, an epoch is as long as ever, but holds every class equally often (give or take one), and of a class every
    sample equally often (give or take one). Samples without a class are not drawn.

    It is a SequentialSampler only by name: Lightning replaces every other sampler under ``overfit_batches``.

    Args:
        size: number of samples in the dataset.
        seed: the run's seed.
        shuffle: permute in every epoch.
        pad: repeat samples so that all ranks have equally many (training).
        labels: int (N,), each sample's class, -1 where it has none: draw balanced. Takes effect with ``shuffle``.
    """

    def __init__(self, size: int, seed: int, shuffle: bool, pad: bool, labels: np.ndarray | None = None) -> None:
        self.size, self.seed, self.shuffle, self.pad = size, seed, shuffle, pad
        self.epoch, self.start, self.rank, self.world = 0, 0, 0, 1
        self.members: list[torch.Tensor] = []
        if labels is not None:
            labels = np.asarray(labels)
            self.members = [torch.from_numpy(np.flatnonzero(labels == c)) for c in np.unique(labels[labels >= 0])]

    def order(self) -> torch.Tensor:
        """The indices of the whole epoch, all ranks together: int64 (N,)."""
        if not self.shuffle:
            return torch.arange(self.size)
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        if not self.members:
            return torch.randperm(self.size, generator=generator)
        share, rest = divmod(self.size, len(self.members))
        drawn = []
        for place, c in enumerate(torch.randperm(len(self.members), generator=generator).tolist()):
            members, count = self.members[c], share + (place < rest)
            rounds = [torch.randperm(len(members), generator=generator) for _ in range(-(-count // len(members)))]
            drawn.append(members[torch.cat(rounds)[:count]] if rounds else members[:0])
        order = torch.cat(drawn)
        return order[torch.randperm(len(order), generator=generator)]

    def __iter__(self) -> Iterator[Key]:  # type: ignore[override]
        order = self.order()
        repetition = _repetitions(order) if self.members else torch.zeros_like(order)
        if self.pad and len(order) % self.world:
            missing = self.world - len(order) % self.world
            padding = torch.arange(missing) % len(order)
            order, repetition = torch.cat([order, order[padding]]), torch.cat([repetition, repetition[padding]])
        mine = slice(self.rank, None, self.world)
        order, repetition = order[mine][self.start :], repetition[mine][self.start :]
        return iter([(self.epoch, i, k) for i, k in zip(order.tolist(), repetition.tolist(), strict=True)])

    def __len__(self) -> int:
        if self.pad:
            return -(-self.size // self.world)
        return len(range(self.rank, self.size, self.world))


def _repetitions(order: torch.Tensor) -> torch.Tensor:
    """How often each element came before: [7, 3, 7, 7] gives [0, 0, 1, 2]."""
    by_value = torch.argsort(order, stable=True)
    _, counts = torch.unique_consecutive(order[by_value], return_counts=True)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.empty_like(order).scatter_(0, by_value, torch.arange(len(order)) - first)


class SeededDataset(Dataset):
    """Wraps a dataset of dicts so that sample i of epoch e is always the same, whichever process makes it.

    Before ``dataset[index]`` it seeds ``random``, ``numpy.random``, torch's CPU generator and, where the dataset has a
    ``transform`` with ``set_random_state`` (albumentations), that too: albumentations otherwise repeats itself in
    workers and over epochs.

    A dataset raises `BrokenImageError` for an image that cannot be read. With ``replace`` (training) the next readable
    sample takes its place, else the sample is left out; either way the batch carries the messages under ``skipped``,
    and the loader, in the main process, counts and prints them or stops. A `DatasetError` goes the same way, under
    ``refused``, and always stops: a worker's own exception would be lost in the text of its traceback.
    """

    def __init__(self, dataset: Dataset, seed: int, replace: bool) -> None:
        self.dataset, self.seed, self.replace = dataset, seed, replace

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> dict[str, Any]:
        if torch.utils.data.get_worker_info() is not None:
            return self._get(*key)
        # In the main process the generators belong to the training step too.
        states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
        try:
            return self._get(*key)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.default_generator.set_state(states[2])

    def _get(self, epoch: int, index: int, repetition: int = 0) -> dict[str, Any]:
        skipped: list[str] = []
        for attempt in range(len(self)):
            i = (index + attempt) % len(self)
            self._seed(epoch, i, repetition)
            try:
                sample = self.dataset[i]
            except BrokenImageError as error:
                skipped.append(str(error))
                if not self.replace:
                    return {"skipped": skipped}
            except UserError as error:
                return {"refused": str(error)}
            else:
                return {**sample, "skipped": skipped} if skipped else sample
        raise UserError(f"not one of the {len(self)} images could be read; the last: {skipped[-1]}")

    def _seed(self, epoch: int, index: int, repetition: int) -> None:
        state = np.random.SeedSequence((self.seed, epoch, index, repetition)).generate_state(4)
        random.seed(int(state[0]))
        np.random.seed(state[1])
        torch.default_generator.manual_seed(int(state[2]))
        transform = getattr(self.dataset, "transform", None)
        if transform is not None and hasattr(transform, "set_random_state"):
            transform.set_random_state(np.random.default_rng(state[3]), random.Random(int(state[3])))


class ResumingLoader(DataLoader):
    """A DataLoader that starts where the trainer's restored progress says, and that counts what could not be read.

    Args:
        trainer: the trainer whose progress decides epoch, start and rank; None outside of a trainer.
        training: follow the training progress; an evaluation loader always starts at the beginning of epoch 0.
        stop_on_broken: raise at the first image that cannot be read, instead of counting it.
    """

    def __init__(
        self,
        *args: Any,
        trainer: pl.Trainer | None = None,
        training: bool = False,
        stop_on_broken: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.trainer, self.training, self.stop_on_broken = trainer, training, stop_on_broken
        self.skipped: set[str] = set()

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        # A generator: this body runs at the first next(), after Lightning has restored its loops.
        sampler = self.sampler
        if self.training and self.trainer is not None:
            assert isinstance(sampler, EpochSampler)
            sampler.epoch = self.trainer.current_epoch
            batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            sampler.start = batches * (self.batch_size or 1)
        for batch in super().__iter__():
            if "refused" in batch:
                raise DatasetError(batch["refused"])
            self._report(batch.pop("skipped", ()))
            if batch:
                yield batch

    def _report(self, skipped: Sequence[str]) -> None:
        for line in skipped:
            if self.stop_on_broken:
                raise UserError(f"{line}; to leave such images out of the evaluation: --data.broken_images skip")
            if line not in self.skipped:
                self.skipped.add(line)
                print(f"skipped, {len(self.skipped)} so far: {line}", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Empty: having it tells Lightning that this loader resumes by itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: see the module's docstring."""


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins samples into a batch by the contract: tensors stack, numbers become tensors, strings and targets list.

    Images of different sizes stay a list. The dict ``labels`` is joined attribute by attribute.
    """
    for sample in samples:
        if "refused" in sample:
            return sample
    skipped = [line for sample in samples for line in sample.get("skipped", ())]
    samples = [sample for sample in samples if len(sample) > ("skipped" in sample)]
    batch: dict[str, Any] = {"skipped": skipped} if skipped else {}
    for key in samples[0] if samples else ():
        if key != "skipped":
            batch[key] = _join(key, [sample[key] for sample in samples])
    return batch


def _join(key: str, values: list[Any]) -> Any:
    first = values[0]
    if key in LIST_KEYS:
        return values
    if key == "labels":
        return {name: _join(name, [value[name] for value in values]) for name in first}
    if isinstance(first, torch.Tensor):
        # In a worker default_collate stacks straight into shared memory, which saves a copy of the batch.
        return default_collate(values) if all(value.shape == first.shape for value in values) else values
    if isinstance(first, (bool, int, float)):
        return torch.tensor(values, dtype=torch.float32 if isinstance(first, float) else None)
    return values


def init_worker(worker_id: int) -> None:
    """One thread a worker, and signals are the main process's business: it saves, then ends its workers.

    A batch system sends SIGTERM to every process of the job, so a worker obeys it from its parent alone: the loader and
    multiprocessing's exit end workers that way. Where the sender cannot be known (macOS) SIGTERM keeps its meaning.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # Blocked before any thread is started, since threads inherit the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    cv2.setNumThreads(0)


def _obey_parent(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
