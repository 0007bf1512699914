"""What every datamodule shares: loaders whose order is a pure function of (seed, epoch), so that a run resumes exactly.

The batch contract
------------------
A batch is a dict. Images travel as uint8 and are normalized on the device by the module.

====================  =========================================================================================
case                  keys
====================  =========================================================================================
all                   ``image`` uint8 (B,3,H,W), or a list of (3,H,W) where sizes differ; ``id`` list[str]
classification        ``label`` int64 (B,), or ``labels`` {attribute: int64 (B,)} with -100 where missing and
                      ``ingredients`` uint8 (B,V) of 0 and 1, a row of 255 where missing;
                      emotion's ``image`` are gray faces, uint8 (B,1,H,W), but whole photographs in prediction
detection             ``target`` list of {boxes float32 (N,4) xyxy pixels, labels int64 (N,), difficult bool (N,)};
                      instance segmentation adds masks uint8 (N,H,W); where the data has them ``proposals``,
                      list of float32 (N,4) xyxy pixels, best first: boxes that may hold objects
segmentation          ``mask`` int64 (B,H,W), 255 = void, in training, a list where sizes differ; in evaluation
                      ``original_mask``, list of int64 (h,w) at the images' own sizes
pose                  ``keypoints`` float32 (B,K,2) in the image's pixels, centers at whole numbers, maybe outside, 0
                      where not labeled; ``labeled`` bool (B,K); ``head_size`` float32 (B,) in pixels of the image
                      on disk, nan where unknown; ``to_original`` float32 (B,2,3), from the image to the image on
                      disk; an ``id`` is <path>#<person>. Whole images: ``target``, list of {boxes float32 (N,4) xyxy
                      edges, labels int64 (N,) of 0, keypoints (N,K,2), labeled (N,K), head_size (N,)}, and
                      ``to_original``. Prediction: ``to_original`` alone
orientation           ``rotation`` float32 (B,3,3), from the body's axes to the camera's (x right, y down, z away)
style                 ``style`` uint8 (B,3,H,W), what the image is to look like; ``image`` is its content
====================  =========================================================================================

Exact resume
------------
Nothing is stored. The order of the samples is a function of (seed, epoch); each item's augmentation is seeded by
(seed, epoch, index, repetition), in the workers too; and the loader reads where to start from the trainer's own
progress, which Lightning restores from the checkpoint before the loader's generator body first runs.
"""

from __future__ import annotations

import os
import sys
from typing import Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset

from datamodules.loading import EpochSampler, ResumingLoader, SeededDataset, collate, init_worker
from errors import UserError
from hyperparameters import constructor_frame

Split = Literal["train", "val", "test", "predict"]


class VisionDataModule(pl.LightningDataModule):
    """Base of all datamodules: a subclass says what its datasets are, the loaders are made here.

    A subclass defines `dataset` and, where there are classes, `class_names`. A dataset is map-style, gives one dict a
    sample by the contract above, draws its randomness from ``random``, ``numpy.random``, torch or an albumentations
    ``transform``, and raises `BrokenImageError` for an image that it cannot read.

    Args:
        batch_size: samples a step and a rank (N ranks make N times that a step).
        eval_batch_size: the same in evaluation; ``batch_size`` where None.
        num_workers: loader processes a rank; None takes the cores of this rank, 8 at most. It changes no result.
        broken_images: what evaluation does with an image that cannot be read: ``error`` names it and stops, ``skip``
            leaves it out, names and counts it. Training always puts the next image in its place and counts it.
        seed: of order and augmentation; None takes the run's ``seed_everything``.
        drop_last: leave out the last, smaller training batch.
        sampling: ``balanced`` draws every class equally often in training, for sets with rare classes; an epoch keeps
            its length. See `EpochSampler`.
    """

    #: Samples a step in prediction, where a subclass reads images at their full size; None: as in evaluation.
    predict_batch_size: int | None = None

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        broken_images: Literal["error", "skip"] = "error",
        seed: int | None = None,
        drop_last: bool = False,
        sampling: Literal["uniform", "balanced"] = "uniform",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, frame=constructor_frame(self))
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise UserError(f"batch_size: expected at least 1, found {batch_size} and {eval_batch_size}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.broken_images = broken_images
        self.seed = seed
        self.drop_last = drop_last
        self.sampling = sampling

    def dataset(self, split: Split) -> Dataset:
        """The dataset of one split, with its transform. Called once a loader, on every rank."""
        raise NotImplementedError(f"{type(self).__name__} has no {split} split")

    @property
    def class_names(self) -> list[str] | None:
        """One name a class, in label order, known before ``setup``; None where there are no classes."""
        return None

    def labels(self, split: Split) -> np.ndarray | None:
        """int64 (N,): each sample's class in the dataset's order, -1 where it has none.

        None where there are no classes. Read without opening an image, for balanced sampling and class weights.
        """
        return None

    @property
    def num_classes(self) -> int:
        """Number of classes; ``train.py`` links it to the model's ``num_classes``."""
        return len(self.class_names or ())

    def train_dataloader(self) -> ResumingLoader:
        return self._loader("train")

    def val_dataloader(self) -> ResumingLoader:
        return self._loader("val")

    def test_dataloader(self) -> ResumingLoader:
        return self._loader("test")

    def predict_dataloader(self) -> ResumingLoader:
        return self._loader("predict")

    def _loader(self, split: Split) -> ResumingLoader:
        training, trainer = split == "train", self.trainer
        world = trainer.world_size if trainer else 1
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        dataset = SeededDataset(self.dataset(split), seed, replace=training)
        if len(dataset) == 0:
            raise UserError(f"{type(self).__name__}: the {split} split has no samples")
        if len(dataset) < world:  # Lightning leaves a loop out on the rank without samples, and the others wait for it
            raise UserError(f"{type(self).__name__}: {split} has {len(dataset)} samples for {world} ranks: use fewer")
        overfit = trainer is not None and bool(getattr(trainer, "overfit_batches", 0))
        labels = self._balanced_labels(len(dataset)) if training and self.sampling == "balanced" else None
        sampler = EpochSampler(len(dataset), seed, shuffle=training and not overfit, pad=training, labels=labels)
        sampler.rank, sampler.world = (trainer.global_rank if trainer else 0), world
        workers = self.num_workers
        if workers is None:
            local = trainer.num_devices if trainer else 1
            workers = max(1, min(8, len(os.sched_getaffinity(0)) // local)) if sys.platform == "linux" else 0
        batch_size = self.batch_size if training else self.eval_batch_size
        if split == "predict":
            batch_size = self.predict_batch_size or batch_size
        if training and self.drop_last and len(sampler) < batch_size:
            raise UserError(f"batch_size {batch_size} is larger than a rank's {len(sampler)} samples: lower it")
        return ResumingLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            drop_last=training and self.drop_last,
            persistent_workers=workers > 0 and split in ("train", "val"),
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # else each pass over the data draws from the training's own generator
            trainer=trainer,
            training=training,
            stop_on_broken=not training and self.broken_images == "error",
        )

    def _balanced_labels(self, size: int) -> np.ndarray:
        labels, name = self.labels("train"), type(self).__name__
        if labels is None or not (labels >= 0).any():
            raise UserError(f"sampling: balanced needs one class a sample, {name} has none: leave it out")
        if len(labels) != size:
            raise UserError(f"{name}.labels: expected {size}, one a sample, found {len(labels)}")
        without = int((labels < 0).sum())
        if without:
            rank_zero_warn(f"sampling balanced: {without} of {size} training samples have no class and are not drawn")
        return labels
