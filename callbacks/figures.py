"""Images of what the model predicts: one contact sheet an evaluation, on disk and at W&B."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from errors import UserError
from visualization.attributes import (
    attribute_choices,
    draw_attributes,
    is_attributes,
    likely_ingredients,
    true_ingredients,
)
from visualization.classification import draw_classification, top_classes
from visualization.detections import count_found, draw_cells, draw_detections, is_detections, without_faint_masks
from visualization.drawing import (
    PAPER,
    class_name,
    contact_sheet,
    fit,
    to_picture,
)
from visualization.orientation import draw_orientation, is_orientation
from visualization.pose_stages import draw_stages
from visualization.poses import draw_heatmaps, draw_people, draw_pose, is_pose
from visualization.segmentation import draw_segmentation, is_segmentation
from visualization.style import draw_stylized, is_stylized

TILE = 256  # pixels, the width of one image on a contact sheet
WIDE_TILE = 384  # the same, where two names stand beside each other below it
PEOPLE = ["person"]  # what detectors with joints find


class Pictures(pl.Callback):
    """Draws evaluation samples of each epoch with their predictions: always the same, spread evenly over the set.

    Writes ``<run>/images/<split>_step=<global step, 8 digits>.png``, split ``val`` or ``test``, and logs the same
    sheet to W&B as ``<split>/images``; classification adds a table ``<split>/predictions``. With several ranks they
    are rank 0's samples. A prediction that no function of this file draws gives no image. Of a network with heatmaps
    ``<split>_heatmaps_step=...png`` has those of the first sample, ``<split>/heatmaps`` at W&B; of a cascade
    ``<split>_stages_step=...png`` has what each stage found, ``<split>/stages`` at W&B.

    Args:
        count: samples on a sheet.
        keep: sheets kept on disk of each split: the first one and the latest ``keep - 1``.
    """

    def __init__(self, count: int = 16, keep: int = 20) -> None:
        if count < 1 or keep < 2:
            raise UserError(f"images: expected count >= 1 and keep >= 2, found {count} and {keep}")
        self.count, self.keep = count, keep
        self._samples: list[tuple[Tensor, Any, dict[str, Any]]] = []
        self._told: set[str] = set()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._samples = []

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._samples = []

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._collect(trainer, *args, **kwargs)

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._collect(trainer, *args, **kwargs)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _collect(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        batches = sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
        wanted = sum(int(k * batches / self.count) == batch_idx for k in range(self.count))
        with harmless("pictures", self._told):
            for image, prediction, truth in samples_of(outputs, batch, wanted):
                self._samples.append((image, without_faint_masks(prediction), truth))

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        samples, self._samples = self._samples, []
        if not samples or trainer.sanity_checking or not trainer.is_global_zero:
            return
        names = names_of(pl_module)
        with harmless("pictures", self._told):
            drawn = [draw_sample(to_picture(image), prediction, truth, names) for image, prediction, truth in samples]
            tiles = [tile for tile in drawn if tile is not None]
            if not tiles:
                return
            sheet = contact_sheet(tiles)
            save_picture(sheet, trainer, f"{split}_step=", self.keep)
            log_to_wandb(trainer, {f"{split}/pictures": sheet, f"{split}/predictions": _table(samples, names)})
            image, prediction, _ = samples[0]
            if is_pose(prediction) and "heatmaps" in prediction:
                heatmaps = draw_heatmaps(to_picture(image), prediction["heatmaps"], names)
                save_picture(heatmaps, trainer, f"{split}_heatmaps_step=", self.keep)
                log_to_wandb(trainer, {f"{split}/heatmaps": heatmaps})
            if is_pose(prediction) and "stages" in prediction:
                stages = draw_stages([(to_picture(x), found["stages"], truth) for x, found, truth in samples], names)
                save_picture(stages, trainer, f"{split}_stages_step=", self.keep)
                log_to_wandb(trainer, {f"{split}/stages": stages})


def names_of(pl_module: pl.LightningModule) -> Any:
    """Names of the joints of a system that finds joints, else of the classes."""
    return getattr(pl_module, "joint_names", None) or getattr(pl_module, "class_names", None)


def draw_sample(image: Image.Image, prediction: Any, truth: dict[str, Any], class_names: Any) -> Image.Image | None:
    """The drawing that belongs to the prediction's keys, for a sheet; None where there is none.

    ``class_names`` is the module's: a list, {attribute: list} or None; of joints, their names, see `names_of`.
    """
    if is_attributes(prediction):
        return draw_attributes(fit(image, WIDE_TILE), prediction, truth, class_names)
    if isinstance(prediction, dict) and "probabilities" in prediction:
        return draw_classification(fit(image, TILE), prediction, truth, class_names)
    if is_orientation(prediction):
        return draw_orientation(fit(image, TILE), prediction, truth)
    if is_stylized(prediction):
        return draw_stylized(fit(image, WIDE_TILE), prediction, truth)
    if is_detections(prediction) or is_segmentation(prediction) or is_pose(prediction):
        size, scale = image.size, (TILE if is_pose(prediction) else WIDE_TILE) / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        if is_pose(prediction):
            return draw_pose(image, prediction, truth, class_names, size)
        if is_detections(prediction) and "keypoints" in prediction:
            return draw_detections(draw_people(image, prediction, class_names, size), prediction, truth, PEOPLE, size)
        if is_segmentation(prediction):
            return draw_segmentation(image, prediction, truth, class_names)
        drawn = draw_detections(image, prediction, truth, class_names, size)
        if "cells" not in prediction:
            return drawn
        pair = Image.new("RGB", (2 * drawn.width + 4, drawn.height), PAPER)
        pair.paste(drawn, (0, 0))
        pair.paste(draw_cells(image, prediction, truth, size), (drawn.width + 4, 0))
        return pair
    return None


def samples_of(outputs: Any, batch: Any, count: int) -> list[tuple[Tensor, Any, dict[str, Any]]]:
    """(image on the CPU, prediction, truth) of ``count`` samples, spread evenly over the batch.

    There are none where the batch does not follow the contract. ``outputs`` is a dict of per-sample tensors or lists,
    or a list of one prediction a sample.
    """
    if outputs is None or not isinstance(batch, dict) or "image" not in batch:
        return []
    samples, size = [], len(batch["image"])
    for i in range(size) if count >= size else (int(k * size / count) for k in range(count)):
        truth = {key: _sample(value, i) for key, value in batch.items() if key != "image"}
        samples.append((batch["image"][i].detach().cpu(), _sample(outputs, i), truth))
    return samples


def _sample(value: Any, i: int) -> Any:
    if isinstance(value, dict):
        return {key: _sample(item, i) for key, item in value.items()}
    return _on_cpu(value[i])


def _on_cpu(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _on_cpu(value) for key, value in item.items()}
    return item.detach().cpu() if isinstance(item, Tensor) else item


def save_picture(picture: Image.Image, trainer: pl.Trainer, prefix: str, keep: int) -> Path:
    """Writes ``<run>/images/<prefix><global step>.png`` and removes all but the first and the latest ones."""
    folder = Path(trainer.default_root_dir) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}{trainer.global_step:08d}.png"
    picture.save(path)
    for old in sorted(folder.glob(f"{prefix}*.png"))[1 : -(keep - 1)]:
        old.unlink(missing_ok=True)
    return path


def log_to_wandb(trainer: pl.Trainer, values: dict[str, Any]) -> None:
    """Logs images (PIL) and tables (columns, rows) to the run's W&B logger, if there is one."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if not loggers:
        return
    import wandb

    def media(value: Any) -> Any:
        return wandb.Image(value) if isinstance(value, Image.Image) else value

    logged: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, tuple):
            columns, rows = value
            logged[key] = wandb.Table(columns=columns, data=[[media(cell) for cell in row] for row in rows])
        elif value is not None:
            logged[key] = media(value)
    for logger in loggers:
        logger.log_metrics(logged, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _table(samples: list[tuple[Tensor, Any, dict[str, Any]]], class_names: Any) -> Any:
    if samples and is_attributes(samples[0][1]):
        return _attribute_table(samples, class_names)
    if samples and is_detections(samples[0][1]):
        return _detection_table(samples, class_names)
    rows = []
    for image, prediction, truth in samples:
        if not isinstance(prediction, dict) or "probabilities" not in prediction or "label" not in truth:
            return None
        index, name, probability = top_classes(prediction["probabilities"], class_names, 1)[0]
        label = int(truth["label"])
        cells = [to_picture(image), class_name(label, class_names), name, probability, index == label]
        rows.append([str(truth.get("id", "")), *cells])
    return ["id", "image", "truth", "top-1", "probability", "right"], rows


def _attribute_table(
    samples: list[tuple[Tensor, Any, dict[str, Any]]], class_names: Mapping[str, Sequence[str]] | None
) -> Any:
    rows = []
    columns = ["id", "image"]
    for name in samples[0][1]["attributes"]:
        columns += [f"{name} truth", f"{name} predicted", f"{name} probability", f"{name} right"]
    if with_ingredients := "ingredients" in samples[0][1]:
        columns += ["ingredients truth", "ingredients predicted"]
    for image, prediction, truth in samples:
        cells: list[Any] = [str(truth.get("id", "")), to_picture(image)]
        for name, ((chosen, text, probability), label) in attribute_choices(prediction, truth, class_names).items():
            known = None if label is None else class_name(label, (class_names or {}).get(name))
            cells += [known, text, probability, None if label is None else chosen == label]
        if with_ingredients:
            present = truth.get("ingredients")
            cells.append(None if present is None else ", ".join(true_ingredients(present, class_names)))
            cells.append(", ".join(name for name, _ in likely_ingredients(prediction["ingredients"], class_names)))
        rows.append(cells)
    return columns, rows


def _detection_table(samples: list[tuple[Tensor, Any, dict[str, Any]]], class_names: Any) -> Any:
    rows = []
    for image, prediction, truth in samples:
        picture = to_picture(image)
        names = PEOPLE if "keypoints" in prediction else class_names
        drawn = draw_detections(picture, prediction, truth, names, picture.size)
        rows.append([str(truth.get("id", "")), drawn, *count_found(prediction, truth.get("target"))])
    return ["id", "image", "objects", "found", "false"], rows


@contextmanager
def harmless(what: str, told: set[str]) -> Iterator[None]:
    """Turns a failure into one printed line, once: an image is never worth a training run."""
    try:
        yield
    except Exception as error:
        if what not in told:
            told.add(what)
            print(f"{what}: left out ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
