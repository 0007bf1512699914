"""Pictures of what the model predicts: one contact sheet an evaluation, on disk and at W&B."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image, ImageDraw
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from callbacks.detections import count_found, draw_cells, draw_detections, is_detections, without_faint_masks
from callbacks.drawing import (
    BAR_BED,
    BLUE,
    GREEN,
    INK,
    PAPER,
    RED,
    class_name,
    contact_sheet,
    fit,
    load_font,
    shorten,
    to_picture,
)
from callbacks.orientation import draw_orientation, is_orientation
from callbacks.pose_stages import draw_stages
from callbacks.poses import draw_heatmaps, draw_people, draw_pose, is_pose
from callbacks.segmentation import draw_segmentation, is_segmentation
from callbacks.style import draw_stylised, is_stylised

TILE = 256  # pixels, the width of one picture on a contact sheet
WIDE_TILE = 384  # the same, where two names stand beside each other below it
TOP = 5
NOTHING = "\N{EN DASH}"
PEOPLE = ["person"]  # what detectors with joints find


class Pictures(pl.Callback):
    """Draws evaluation samples of each epoch with their predictions: always the same, spread evenly over the set.

    Writes ``<run>/pictures/<split>_step=<global step, 8 digits>.png``, split ``val`` or ``test``, and logs the same
    sheet to W&B as ``<split>/pictures``; classification adds a table ``<split>/predictions``. With several ranks they
    are rank 0's samples. A prediction that no function of this file draws gives no picture. Of a network with heatmaps
    ``<split>_heatmaps_step=...png`` has those of the first sample, ``<split>/heatmaps`` at W&B; of a cascade
    ``<split>_stages_step=...png`` has what each stage found, ``<split>/stages`` at W&B.

    Args:
        count: samples on a sheet.
        keep: sheets kept on disk of each split: the first one and the latest ``keep - 1``.
    """

    def __init__(self, count: int = 16, keep: int = 20) -> None:
        if count < 1 or keep < 2:
            raise ValueError(f"pictures: expected count >= 1 and keep >= 2, found {count} and {keep}")
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
    if is_stylised(prediction):
        return draw_stylised(fit(image, WIDE_TILE), prediction, truth)
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


def draw_classification(
    image: Image.Image, prediction: dict[str, Tensor], truth: dict[str, Any], class_names: Sequence[str] | None
) -> Image.Image:
    """The picture, below it the truth, if known, and the five most probable classes with their bars.

    Right is green, wrong is red; without a truth the bars are blue. The picture keeps its size, the text is scaled to
    it.

    Args:
        image: RGB.
        prediction: ``probabilities`` float (C,).
        truth: ``label``, an int, or nothing.
        class_names: C names; None shows the numbers.
    """
    label = truth.get("label")
    best = top_classes(prediction["probabilities"], class_names)
    width = max(image.width, 224)
    size = max(13, min(40, round(width / 20)))
    font, pad, row = load_font(size), round(size * 0.4), round(size * 1.5)
    headline = 0 if label is None else row + pad // 2
    canvas = Image.new("RGB", (width, image.height + headline + row * len(best) + 2 * pad), PAPER)
    canvas.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    y = image.height + pad
    if label is not None:
        right = best[0][0] == int(label)
        colour = GREEN if right else RED
        text = shorten(f"{'✓' if right else '✗'} truth: {class_name(int(label), class_names)}", font, width - 2 * pad)
        draw.rectangle((0, image.height, width, image.height + row + pad // 2), fill=colour)
        draw.text((pad, image.height + (row + pad // 2) // 2), text, fill=PAPER, font=font, anchor="lm")
        y = image.height + headline + pad
    for index, name, probability in best:
        colour = BLUE if label is None else GREEN if index == int(label) else RED
        box = (pad, y, width - pad - 1, y + row - max(2, size // 6))
        middle = (box[1] + box[3]) // 2
        draw.rectangle(box, fill=BAR_BED)
        draw.rectangle((box[0], box[1], box[0] + probability * (box[2] - box[0]), box[3]), fill=_pale(colour))
        percent = f"{100 * probability:.1f}%"
        room = box[2] - box[0] - font.getlength(percent) - 3 * pad
        draw.text((box[0] + pad, middle), shorten(name, font, room), fill=INK, font=font, anchor="lm")
        draw.text((box[2] - pad, middle), percent, fill=INK, font=font, anchor="rm")
        y += row
    return canvas


def is_attributes(prediction: Any) -> bool:
    """Whether it is ``{"attributes": {name: probabilities (C,)}}``, with or without ``"ingredients": (V,)``."""
    return isinstance(prediction, dict) and "attributes" in prediction


def draw_attributes(
    image: Image.Image,
    prediction: dict[str, Any],
    truth: dict[str, Any],
    class_names: Mapping[str, Sequence[str]] | None,
) -> Image.Image:
    """The picture, below it a line for each attribute: its name, the truth after GT, the prediction after PD.

    A right prediction is green, a wrong one red, one without a truth black; a missing truth is a dash. The probability
    takes the truth's place where there are no labels at all. Ingredients have a line for GT and one for PD. The picture
    keeps its size, the text is scaled to it.

    Args:
        image: RGB.
        prediction: see `is_attributes`.
        truth: ``labels`` {name: int, negative where missing} and ``ingredients`` uint8 (V,) of 0, 1 and 255 (missing),
            or nothing.
        class_names: {name: C names, "ingredients": V names}; None shows the numbers.
    """
    width = max(image.width, 256)
    size = max(11, min(28, round(width / 25)))
    font, pad, row = load_font(size), round(size * 0.5), round(size * 1.5)
    columns = (pad, round(width * 0.3), round(width * 0.65), width)
    lines = []
    for name, (best, index) in attribute_choices(prediction, truth, class_names).items():
        _, chosen, probability = best
        cells = [(columns[0], columns[1], name.capitalize(), INK)]
        if "labels" in truth:
            colour = INK if index is None else GREEN if best[0] == index else RED
            label = NOTHING if index is None else class_name(index, (class_names or {}).get(name))
            cells += [(columns[1], columns[2], f"GT: {label}", INK), (columns[2], columns[3], f"PD: {chosen}", colour)]
        else:
            cells.append((columns[1], columns[3], f"PD: {chosen} {100 * probability:.0f}%", INK))
        lines.append(cells)
    if "ingredients" in prediction:
        listed = [("PD", [name for name, _ in likely_ingredients(prediction["ingredients"], class_names)])]
        if "ingredients" in truth:
            listed.insert(0, ("GT", true_ingredients(truth["ingredients"], class_names)))
        for k, (word, names) in enumerate(listed):
            title = [] if k else [(columns[0], columns[1], "Ingredients", INK)]
            lines.append([*title, (columns[1], columns[3], f"{word}: {', '.join(names) or NOTHING}", INK)])
    canvas = Image.new("RGB", (width, image.height + row * len(lines) + 2 * pad), PAPER)
    canvas.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for k, line in enumerate(lines):
        y = image.height + pad + k * row + row // 2
        for left, right, text, colour in line:
            draw.text((left, y), shorten(text, font, right - left - pad), fill=colour, font=font, anchor="lm")
    return canvas


def attribute_choices(
    prediction: dict[str, Any], truth: dict[str, Any], class_names: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[tuple[int, str, float], int | None]]:
    """{attribute: ((class, name, probability) of the most probable one, true class or None where missing)}."""
    choices = {}
    for name, probabilities in prediction["attributes"].items():
        label = int(truth.get("labels", {}).get(name, -1))
        best = top_classes(probabilities, (class_names or {}).get(name), 1)[0]
        choices[name] = best, label if label >= 0 else None
    return choices


def likely_ingredients(
    probabilities: Tensor, class_names: Mapping[str, Sequence[str]] | None
) -> list[tuple[str, float]]:
    """(name, probability) of those from .5 on, the most probable first."""
    ranked = top_classes(probabilities, (class_names or {}).get("ingredients"), len(probabilities))
    return [(name, probability) for _, name, probability in ranked if probability >= 0.5]


def true_ingredients(present: Tensor, class_names: Mapping[str, Sequence[str]] | None) -> list[str]:
    """Names of those that are marked 1 in (V,)."""
    return [class_name(i, (class_names or {}).get("ingredients")) for i in (present == 1).nonzero().flatten().tolist()]


def top_classes(
    probabilities: Tensor, class_names: Sequence[str] | None, count: int = TOP
) -> list[tuple[int, str, float]]:
    """(class, name, probability) of the most probable classes, best first; fewer where there are fewer classes."""
    values, indices = probabilities.detach().float().cpu().topk(min(count, len(probabilities)))
    return [(int(i), class_name(int(i), class_names), float(p)) for i, p in zip(indices, values, strict=True)]


def classification_record(probabilities: Tensor, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """The five most probable classes, best first."""
    return [{"label": i, "class": name, "probability": p} for i, name, p in top_classes(probabilities, class_names)]


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
    """Writes ``<run>/pictures/<prefix><global step>.png`` and removes all but the first and the latest ones."""
    folder = Path(trainer.default_root_dir) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}{trainer.global_step:08d}.png"
    picture.save(path)
    for old in sorted(folder.glob(f"{prefix}*.png"))[1 : -(keep - 1)]:
        old.unlink(missing_ok=True)
    return path


def log_to_wandb(trainer: pl.Trainer, values: dict[str, Any]) -> None:
    """Logs pictures (PIL) and tables (columns, rows) to the run's W&B logger, if there is one."""
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
    """Turns a failure into one printed line, once: a picture is never worth a training run."""
    try:
        yield
    except Exception as error:
        if what not in told:
            told.add(what)
            print(f"{what}: left out ({type(error).__name__}: {error})", file=sys.stderr, flush=True)


def _pale(colour: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple((value + 255) // 2 for value in colour)
