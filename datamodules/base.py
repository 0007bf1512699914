"""The batch contract and the base class of all datamodules. See ``datamodules/loading.py`` for exact resume.

A batch is a dict. Images travel as uint8 and are normalized on the device by the module. They have the orientation of
their annotation (``datamodules/orientation.py``). This table is the only one:

====================  ==================================================================================================
case study            keys
====================  ==================================================================================================
all                   ``image`` uint8 (B, 3, H, W), a list of (3, H, W) if sizes differ; ``id`` list[str]
classification        ``label`` int64 (B,); or ``labels`` {attribute: int64 (B,)}, -100 if missing, and ``ingredients``
                      uint8 (B, V) of 0 and 1, a row of 255 if missing. For emotions, ``image`` is a gray face,
                      uint8 (B, 1, 48, 48); in prediction a full RGB photo
detection             ``target`` list of {``boxes`` float32 (N, 4), xyxy in pixels; ``labels`` int64 (N,);
                      ``difficult`` bool (N,)}; for instance segmentation also ``masks`` uint8 (N, H, W). Always
                      ``original_size`` int64 (B, 2), (height, width) of the image on disk. With a proposals option,
                      ``proposals`` list of float32 (P, 4), xyxy in pixels, best first. In evaluation of instance
                      segmentation ``original_target``, the target in pixels of the image on disk. In training,
                      `VOCDetection` yields the objects of an image in random order
segmentation          ``mask`` int64 (B, H, W), 255 = void, a list if sizes differ, in training; ``original_mask`` list
                      of int64 (h, w) at the size on disk in evaluation
pose                  ``keypoints`` float32 (B, K, 2) in pixels of the image, pixel centers at integers, maybe outside
                      the image, 0 if not labeled; ``labeled`` bool (B, K); ``head_size`` float32 (B,) in pixels of the
                      image on disk, nan if unknown; ``to_original`` float32 (B, 2, 3), affine map from the image to the
                      image on disk; ``id`` is <path>#<person>. For full images: ``target`` list of {``boxes`` float32
                      (N, 4), xyxy edges in pixels; ``labels`` int64 (N,), all 0; ``keypoints`` (N, K, 2); ``labeled``
                      (N, K); ``head_size`` (N,)}, and ``to_original``. In prediction only ``to_original``
orientation           ``rotation`` float32 (B, 3, 3), from body axes to camera axes (x right, y down, z forward)
style                 ``image`` is the content image; ``style`` uint8 (B, 3, H, W) is the style image
====================  ==================================================================================================
"""

from __future__ import annotations

import os
import sys
from typing import Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from datamodules.loading import EpochSampler, ResumingLoader, SeededDataset, collate, init_worker
from errors import DatasetError, UserError

Split = Literal["train", "val", "test", "predict"]


class VisionDataModule(pl.LightningDataModule):
    """Base class of all datamodules: a subclass implements `dataset`; the loaders are built here.

    A dataset is map-style and returns one dict per sample that follows the batch contract above. It draws randomness
    from ``random``, ``numpy.random``, torch or an albumentations ``transform``, and raises `BrokenImageError` for an
    unreadable image. A subclass with classes also implements `class_names` and `labels`.

    The constructor's arguments, those of subclasses included, are saved as hyperparameters. They are not logged:
    loggers refuse a name that the model has too (``image_size``).

    Args:
        batch_size: training samples per step and rank (N ranks use N times as many per step).
        eval_batch_size: samples per step and rank in evaluation; null uses batch_size.
        num_workers: loader processes per rank; null uses the cores of the rank, at most 8. Results do not depend on it.
        broken_images: what evaluation does with an unreadable image: ``error`` stops at it, ``skip`` skips, reports and
            counts it. Training always uses the next image instead and counts it.
        seed: seed of sample order and augmentation; null uses the run's ``seed_everything``.
        drop_last: drop the last, smaller training batch. A last batch of one sample is always dropped if the model has
            batch normalization, with a warning.
        sampling: ``balanced`` draws all classes equally often in training, for datasets with rare classes; the length
            of an epoch is unchanged. See `EpochSampler`.
        exif_orientation: apply the EXIF orientation of an image where its annotation gives no size that tells: in
            folders, in prediction, and for squares, flips and rotations by 180 degrees. false reads it as stored. Where
            the size in VOC's XML or of a mask tells, the image is read as it was annotated.

    Raises:
        UserError: an argument is out of range.
    """

    #: Samples per step in prediction if a subclass reads images at full size; None uses the evaluation batch size.
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
        exif_orientation: bool = True,
    ) -> None:
        super().__init__()
        # The frame is given: searching for it, Lightning would leave a reference cycle that keeps the loaders alive.
        self.save_hyperparameters(logger=False, frame=sys._getframe())
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size is not None and size < 1:
                raise UserError(f"{name}: expected at least 1, found {size}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.broken_images = broken_images
        self.seed = seed
        self.drop_last = drop_last
        self.sampling = sampling
        self.exif_orientation = exif_orientation
        self._checked: dict[Split, Dataset] = {}
        self._noted: set[str] = set()

    def dataset(self, split: Split) -> Dataset:
        """Return the dataset of a split, with its transform. Called once per loader, on every rank."""
        raise NotImplementedError(f"{type(self).__name__} has no {split} split")

    @property
    def class_names(self) -> list[str] | None:
        """One name per class in label order, known before ``setup``; None without classes."""
        return None

    def labels(self, split: Split) -> np.ndarray | None:
        """Return each sample's class in the dataset's order, int64 (N,), -1 for none; None without classes.

        Balanced sampling and class weights use it, so it must not open images.
        """
        return None

    def source_name(self, split: Split) -> str | None:
        """Name what a split is read from, such as a folder. Equal names mean equal samples; None is unknown."""
        return None

    @property
    def test_is_val(self) -> str:
        """One line that says so if ``test`` has the samples of ``val``; otherwise empty."""
        source = self.source_name("test")
        if source is None or source != self.source_name("val"):
            return ""
        return f"{type(self).__name__}: test has the samples of val ({source}); best.ckpt is selected on them too"

    @property
    def num_classes(self) -> int:
        """Number of classes; the command line links it to the model's ``num_classes``."""
        return len(self.class_names or ())

    def train_dataloader(self) -> ResumingLoader:
        return self.loader("train")

    def val_dataloader(self) -> ResumingLoader:
        return self.loader("val")

    def test_dataloader(self) -> ResumingLoader:
        if self.test_is_val:
            rank_zero_warn(self.test_is_val)
        return self.loader("test")

    def predict_dataloader(self) -> ResumingLoader:
        return self.loader("predict")

    def __str__(self) -> str:
        """Return the class name. Lightning's version builds the loaders of all splits; jsonargparse calls it to log."""
        return type(self).__name__

    def no_root_error(self) -> DatasetError:
        """Return the error for a dataset without ``root``."""
        return DatasetError(f"root: expected the folder of {type(self).__name__}, found none; set --data.root FOLDER")

    def check(self, split: Split) -> None:
        """Build the dataset of a split, so that its errors come before the model is built.

        The loader uses this dataset. Nothing is checked if a ``download`` option is set, since files may be missing.
        """
        if not getattr(self, "download", False):
            self._checked[split] = self.dataset(split)

    def loader(self, split: Split) -> ResumingLoader:
        """Build the loader of a split for this rank.

        Raises:
            UserError: the split has fewer samples than ranks, or than a batch with ``drop_last``.
            DatasetError: see the subclass.
        """
        training, trainer = split == "train", self.trainer
        world = trainer.world_size if trainer else 1
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        checked = self._checked.pop(split, None)
        dataset = SeededDataset(self.dataset(split) if checked is None else checked, seed, replace=training)
        if len(dataset) == 0:
            raise UserError(f"{type(self).__name__}: expected samples in the {split} split, found none")
        if len(dataset) < world:  # a rank without samples would skip the loop, and the others would wait for it
            found = f"{len(dataset)} for {world} ranks"
            raise UserError(
                f"{type(self).__name__}: expected a {split} sample per rank, found {found}; use fewer ranks"
            )
        overfit = trainer is not None and bool(getattr(trainer, "overfit_batches", 0))
        labels = self._balanced_labels(len(dataset)) if training and self.sampling == "balanced" else None
        sampler = EpochSampler(len(dataset), seed, shuffle=training and not overfit, pad=training, labels=labels)
        sampler.rank, sampler.world = (trainer.global_rank if trainer else 0), world
        workers = self.num_workers
        if workers is None:
            local_ranks = trainer.num_devices if trainer else 1
            workers = max(1, min(8, len(os.sched_getaffinity(0)) // local_ranks)) if sys.platform == "linux" else 0
        batch_size = self.batch_size if training else self.eval_batch_size
        if split == "predict":
            batch_size = self.predict_batch_size or batch_size
        if training and self.drop_last and len(sampler) < batch_size:
            raise UserError(
                f"batch_size: expected at most the {len(sampler)} samples of a rank with drop_last, found {batch_size}"
            )
        drop_last = training and (self.drop_last or self._drops_last_sample(len(sampler)))
        return ResumingLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            drop_last=drop_last,
            persistent_workers=workers > 0 and split in ("train", "val"),
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # the default would draw from the training's own generator in every epoch
            trainer=trainer,
            training=training,
            stop_on_broken=not training and self.broken_images == "error",
            noted=self._noted,
        )

    def _drops_last_sample(self, size: int) -> bool:
        """Whether an epoch ends with a batch of one sample that the model cannot normalize; warn if so.

        Batch normalization has no statistics of one sample on 1x1 maps, and poor ones on larger maps. All ranks have
        the same number of samples, so they drop alike.

        Args:
            size: training samples of a rank per epoch.
        """
        model = self.trainer.lightning_module if self.trainer else None
        if model is None or self.batch_size == 1 or size == 1 or size % self.batch_size != 1:
            return False
        if not any(isinstance(layer, _BatchNorm) and layer.training for layer in model.modules()):
            return False
        rank_zero_warn(
            f"batch_size: {size} training samples (per rank) in batches of {self.batch_size} leave a batch of one, "
            "which batch normalization cannot use; 1 sample (per rank) is not used in an epoch, a random one of them"
        )
        return True

    def _balanced_labels(self, size: int) -> np.ndarray:
        labels, name = self.labels("train"), type(self).__name__
        if labels is None or not (labels >= 0).any():
            raise UserError(f"sampling: expected one class per sample for balanced, found none in {name}; use uniform")
        if len(labels) != size:
            raise ValueError(f"{name}.labels: expected one label for each of {size} samples, found {len(labels)}")
        unlabeled = int((labels < 0).sum())
        if unlabeled:
            rank_zero_warn(f"sampling balanced: {unlabeled} of {size} training samples have no class and are not drawn")
        return labels
