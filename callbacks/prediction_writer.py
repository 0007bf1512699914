"""`train.py predict`: every picture annotated, and its five most probable classes as JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
from PIL import Image, ImageOps
from torch import Tensor

from callbacks.pictures import TOP, draw_classification, harmless, samples_of, to_picture, top_classes

LONG_SIDE = 1280  # pixels
PLAIN_MODES = ("RGB", "L", "CMYK", "YCbCr")


class PredictionWriter(pl.Callback):
    """Writes predictions as they come, in constant memory.

    - ``<run>/predictions/<path of the picture in its folder>.jpg``: an annotated copy, long side at most 1280 pixels.
      A name that ends in ``.jpg`` stays, others get it appended (``a.png.jpg``), so that no two pictures share a file.
    - ``<run>/predictions.rank<r>.jsonl``: one line a picture, flushed: what a killed run leaves behind.
    - ``<run>/predictions.json`` and ``<run>/predictions.csv`` at the end, all ranks, in the order of the input; then
      the ``.jsonl`` files go. Several ranks must share the run folder; where they leave unreadable pictures out,
      neighbours from different ranks may change places.

    A line of JSON: ``{"file": path, "annotated": path in the run folder, "predictions": [{"label", "class",
    "probability"} x 5]}``.

    Args:
        folder: the pictures' folder, to which their paths are relative; None takes the datamodule's ``images``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._lines: IO[str] | None = None
        self._told: set[str] = set()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        run.mkdir(parents=True, exist_ok=True)
        self._lines = open(part_path(run, trainer.global_rank), "w", encoding="utf-8")  # noqa: SIM115

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._lines is not None
        run = Path(trainer.default_root_dir)
        folder = self.folder or getattr(getattr(trainer, "datamodule", None), "images", None)
        names = getattr(pl_module, "class_names", None)
        for image, prediction, truth in samples_of(outputs, batch, len(batch["id"])):
            if not isinstance(prediction, dict) or "probabilities" not in prediction:
                if "kind" not in self._told:
                    self._told.add("kind")
                    print("predictions: this kind of prediction is not written", flush=True)
                continue
            source = str(truth["id"])
            target = Path("predictions") / annotated_name(source, folder)
            with harmless("annotated pictures", self._told):
                picture = draw_classification(read_original(source, image), prediction, {}, names)
                (run / target).parent.mkdir(parents=True, exist_ok=True)
                picture.save(run / target, quality=92)
            record = classification_record(prediction["probabilities"], names)
            line = {"file": source, "annotated": target.as_posix(), "predictions": record}
            self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            run = Path(trainer.default_root_dir)
            count = merge_parts(run, trainer.world_size)
            print(f"{count} pictures: {run}/predictions.json, predictions.csv, predictions/", flush=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def classification_record(probabilities: Tensor, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """The five most probable classes, best first."""
    return [{"label": i, "class": name, "probability": p} for i, name, p in top_classes(probabilities, class_names)]


def part_path(run: Path, rank: int) -> Path:
    """Where one rank streams its lines to."""
    return run / f"predictions.rank{rank}.jsonl"


def merge_parts(run: Path, world_size: int) -> int:
    """Joins the ranks' parts into predictions.json and predictions.csv, removes them, and returns the count."""
    count = 0
    header = ["file", *(f"{key}{k}" for k in range(1, TOP + 1) for key in ("class", "probability"))]
    with (
        open(run / "predictions.json", "w", encoding="utf-8") as as_json,
        # A file name may hold bytes that are no UTF-8; they are written as they are.
        open(run / "predictions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as as_csv,
    ):
        table = csv.writer(as_csv, lineterminator="\n")
        table.writerow(header)
        as_json.write("[")
        for line in _interleaved(run, world_size):
            as_json.write((",\n" if count else "\n") + line)
            record = json.loads(line)
            cells = [cell for item in record["predictions"] for cell in (item["class"], repr(item["probability"]))]
            table.writerow([record["file"], *cells, *[""] * (len(header) - 1 - len(cells))])
            count += 1
        as_json.write("\n]\n")
    for rank in range(world_size):
        part_path(run, rank).unlink()
    return count


def _interleaved(run: Path, world_size: int) -> Iterator[str]:
    """Ranks take the samples in turn (0, 1, 0, 1 ...), so their lines are read in turn too."""
    with ExitStack() as stack:
        parts = [stack.enter_context(open(part_path(run, r), encoding="utf-8")) for r in range(world_size)]
        while parts:
            for part in list(parts):
                line = part.readline()
                if line:
                    yield line.rstrip("\n")
                else:
                    parts.remove(part)


def annotated_name(source: str, folder: str | None) -> Path:
    """The relative path of the annotated copy; two pictures never get the same one."""
    path = Path(os.path.abspath(source))
    root = Path(os.path.abspath(folder)) if folder else None
    if path == root:
        relative = Path(path.name)
    elif root is not None and path.is_relative_to(root):
        relative = path.relative_to(root)
    else:
        relative = path.relative_to(path.anchor)
    if relative.suffix == ".jpg":
        return relative
    suffix = ".jpg"
    # A picture that is itself called a.png.jpg keeps that name.
    while path.with_name(path.name + suffix).exists():
        suffix += ".jpg"
    return relative.with_name(relative.name + suffix)


def read_original(source: str, crop: Tensor) -> Image.Image:
    """The picture on disk, upright, RGB, long side at most 1280 pixels; the network's crop where it cannot be read."""
    try:
        with Image.open(source) as image:
            image.draft("RGB", (LONG_SIDE, LONG_SIDE))
            upright = ImageOps.exif_transpose(image)
            picture = upright.convert("RGB") if upright.mode in PLAIN_MODES else _odd(source)
    except Exception:  # Pillow raises SyntaxError, struct.error and more on broken files
        try:
            picture = _odd(source)
        except Exception:
            return to_picture(crop)
    picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.BICUBIC)
    return picture


def _odd(source: str) -> Image.Image:
    """16 bits, palettes, transparency and damage: the reader of the datamodules settles what they look like."""
    from datamodules.images import read_image

    return Image.fromarray(read_image(source, exif_orientation=True))
