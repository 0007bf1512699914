"""Sampling, seeding and loading: exact resume without stored state.

A resumed run sees the same samples as an uninterrupted one, because nothing depends on the history:

- the order of samples is a function of (seed, epoch), see `EpochSampler`;
- each sample's augmentation is seeded by (seed, epoch, index, repetition), also inside workers, see `SeededDataset`;
- the loader reads its start from the trainer's own progress, see `ResumingLoader`. Lightning restores that progress
  from the checkpoint before the generator body of the loader first runs.
"""

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

from datamodules.orientation import take_notes
from errors import BrokenImageError, DatasetError, UserError

# (epoch, index, number of earlier occurrences of the index in the epoch). It travels to the worker, so that persistent
# workers know the epoch and a repeated sample is augmented differently each time.
SampleKey = tuple[int, int, int]

# Always lists, even if the sizes agree, so that the type of a batch does not depend on its content.
LIST_KEYS = ("target", "proposals", "original_mask")


class EpochSampler(SequentialSampler):
    """Yield the `SampleKey`s of one rank from position ``start``; the order depends on (seed, epoch) only.

    In training the order is padded with its own beginning to a multiple of ``world``, so that all ranks take the same
    number of steps. In evaluation it is not padded: each sample occurs exactly once, on any number of ranks.

    Balanced sampling keeps the length of the epoch. All classes occur equally often (+-1), and within a class all
    samples occur equally often (+-1). Samples without a class are not drawn.

    It subclasses SequentialSampler only because Lightning replaces every other sampler under ``overfit_batches``.

    Args:
        size: number of samples in the dataset.
        seed: seed of the run.
        shuffle: permute in every epoch.
        pad: repeat samples so that all ranks have the same number (training).
        labels: each sample's class, int (N,), -1 for none; enables balanced sampling. Requires ``shuffle``.
    """

    def __init__(self, size: int, seed: int, shuffle: bool, pad: bool, labels: np.ndarray | None = None) -> None:
        self.size, self.seed, self.shuffle, self.pad = size, seed, shuffle, pad
        self.epoch, self.start, self.rank, self.world = 0, 0, 0, 1
        self.class_indices: list[torch.Tensor] = []
        if labels is not None:
            labels = np.asarray(labels)
            self.class_indices = [torch.from_numpy(np.flatnonzero(labels == c)) for c in np.unique(labels[labels >= 0])]

    def order(self) -> torch.Tensor:
        """Return the indices of the epoch over all ranks, int64 (N,)."""
        if not self.shuffle:
            return torch.arange(self.size)
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        if not self.class_indices:
            return torch.randperm(self.size, generator=generator)
        per_class, remainder = divmod(self.size, len(self.class_indices))
        drawn = []
        for position, c in enumerate(torch.randperm(len(self.class_indices), generator=generator).tolist()):
            indices, count = self.class_indices[c], per_class + (position < remainder)
            rounds = [torch.randperm(len(indices), generator=generator) for _ in range(-(-count // len(indices)))]
            drawn.append(indices[torch.cat(rounds)[:count]] if rounds else indices[:0])
        order = torch.cat(drawn)
        return order[torch.randperm(len(order), generator=generator)]

    def __iter__(self) -> Iterator[SampleKey]:  # type: ignore[override]
        order = self.order()
        repetition = _count_earlier(order) if self.class_indices else torch.zeros_like(order)
        if self.pad and len(order) % self.world:
            padding = torch.arange(self.world - len(order) % self.world) % len(order)
            order, repetition = torch.cat([order, order[padding]]), torch.cat([repetition, repetition[padding]])
        of_rank = slice(self.rank, None, self.world)
        order, repetition = order[of_rank][self.start :], repetition[of_rank][self.start :]
        return iter([(self.epoch, i, k) for i, k in zip(order.tolist(), repetition.tolist(), strict=True)])

    def __len__(self) -> int:
        if self.pad:
            return -(-self.size // self.world)
        return len(range(self.rank, self.size, self.world))


def _count_earlier(order: torch.Tensor) -> torch.Tensor:
    """Count the earlier occurrences of each element: [7, 3, 7, 7] gives [0, 0, 1, 2]."""
    by_value = torch.argsort(order, stable=True)
    _, counts = torch.unique_consecutive(order[by_value], return_counts=True)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.empty_like(order).scatter_(0, by_value, torch.arange(len(order)) - first)


class SeededDataset(Dataset):
    """Make sample i of epoch e a function of the seed, in whichever process it is read.

    Before ``dataset[index]`` it seeds ``random``, ``numpy.random``, torch's CPU generator and, if it exists,
    ``dataset.transform.set_random_state`` (albumentations repeats itself in workers and epochs otherwise).

    If the dataset raises `BrokenImageError`, training (``replace``) uses the next readable sample and evaluation skips
    the sample. The batch carries the messages under ``skipped``; the loader, in the main process, reports them or
    stops. Notes on the EXIF orientation travel under ``notes``. The message of any other `UserError` travels under
    ``refused`` and always stops the loader: an exception of a worker would be lost in the text of its traceback.

    Args:
        dataset: map-style, one dict per sample.
        seed: seed of the run.
        replace: replace unreadable samples (training).
    """

    def __init__(self, dataset: Dataset, seed: int, replace: bool) -> None:
        self.dataset, self.seed, self.replace = dataset, seed, replace

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        if torch.utils.data.get_worker_info() is not None:
            return self._get(*key)
        # In the main process, the training step uses the same generators.
        states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
        try:
            return self._get(*key)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.default_generator.set_state(states[2])

    def _get(self, epoch: int, index: int, repetition: int = 0) -> dict[str, Any]:
        skipped: list[str] = []
        take_notes()  # those of images that others read in this process
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
                reports = {"skipped": skipped, "notes": take_notes()}
                return {**sample, **{key: report for key, report in reports.items() if report}}
        raise UserError(f"expected a readable image, found none among {len(self)}; the last: {skipped[-1]}")

    def _seed(self, epoch: int, index: int, repetition: int) -> None:
        state = np.random.SeedSequence((self.seed, epoch, index, repetition)).generate_state(4)
        random.seed(int(state[0]))
        np.random.seed(state[1])
        torch.default_generator.manual_seed(int(state[2]))
        transform = getattr(self.dataset, "transform", None)
        if transform is not None and hasattr(transform, "set_random_state"):
            transform.set_random_state(np.random.default_rng(state[3]), random.Random(int(state[3])))


class ResumingLoader(DataLoader):
    """A DataLoader that starts at the trainer's restored progress, counts unreadable images and prints notes once.

    Args:
        *args: see DataLoader.
        trainer: its progress determines epoch and start; None outside a trainer.
        training: follow the training progress. An evaluation loader always starts at the beginning of epoch 0.
        stop_on_broken: raise at the first unreadable image instead of counting it.
        noted: kinds of notes that were printed, shared by the loaders of a run.
        **kwargs: see DataLoader.
    """

    def __init__(
        self,
        *args: Any,
        trainer: pl.Trainer | None = None,
        training: bool = False,
        stop_on_broken: bool = False,
        noted: set[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.noted: set[str] = set() if noted is None else noted
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
            for kind, line in batch.pop("notes", {}).items():
                if kind not in self.noted:
                    self.noted.add(kind)
                    print(line, file=sys.stderr, flush=True)
            if batch:
                yield batch

    def _report(self, skipped: Sequence[str]) -> None:
        for line in skipped:
            if self.stop_on_broken:
                raise UserError(f"{line}; to skip such images in evaluation: --data.broken_images skip")
            if line not in self.skipped:
                self.skipped.add(line)
                print(f"skipped, {len(self.skipped)} so far: {line}", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict. The method tells Lightning that this loader resumes by itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Join samples into a batch: stack tensors, convert numbers to tensors, and list everything else.

    Images of different sizes and the keys `LIST_KEYS` stay lists. The dict ``labels`` is joined per attribute.
    """
    for sample in samples:
        if "refused" in sample:
            return sample
    skipped = [line for sample in samples for line in sample.get("skipped", ())]
    samples = [sample for sample in samples if len(sample) > ("skipped" in sample)]
    batch: dict[str, Any] = {"skipped": skipped} if skipped else {}
    notes = {kind: line for sample in reversed(samples) for kind, line in sample.get("notes", {}).items()}
    if notes:
        batch["notes"] = notes
    for key in samples[0] if samples else ():
        if key not in ("skipped", "notes"):
            batch[key] = _join(key, [sample[key] for sample in samples])
    return batch


def _join(key: str, values: list[Any]) -> Any:
    first = values[0]
    if key in LIST_KEYS:
        return values
    if key == "labels":
        return {name: _join(name, [value[name] for value in values]) for name in first}
    if isinstance(first, torch.Tensor):
        # In a worker, default_collate stacks into shared memory, which saves a copy of the batch.
        return default_collate(values) if all(value.shape == first.shape for value in values) else values
    if isinstance(first, (bool, int, float)):
        return torch.tensor(values, dtype=torch.float32 if isinstance(first, float) else None)
    return values


def init_worker(worker_id: int) -> None:
    """Limit a worker to one thread, and leave signals to the main process, which saves and then ends its workers.

    Batch systems send SIGTERM to every process of a job, so a worker obeys SIGTERM from its parent only: the loader and
    multiprocessing's exit handler end workers that way. Where the sender is unknown (macOS), SIGTERM is unchanged.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # Block the signal before any thread starts, because threads inherit the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of, args=(os.getppid(),), daemon=True).start()
    cv2.setNumThreads(0)


def _exit_on_sigterm_of(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
