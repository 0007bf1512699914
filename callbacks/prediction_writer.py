"""`train.py predict`: annotated images, and the predictions as JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
from PIL import Image, ImageOps
from torch import Tensor

from callbacks.figures import prediction_names, skip_on_error
from datamodules.images import image_size, read_image
from datamodules.segmentation.masks import save_ids
from errors import BrokenImageError
from visualization.drawing import to_pil
from visualization.samples import Sample, samples_of
from visualization.segmentation import resize_ids
from visualization.video import VideoFile
from visualization.views import view_of, view_of_record

LONG_SIDE = 1280  # pixels of an annotated image
PLAIN_MODES = ("RGB", "L", "CMYK", "YCbCr")


class PredictionWriter(pl.Callback):
    """Write predictions batch by batch, in constant memory.

    - ``<run>/predictions/<path of the image in its folder>.jpg``: an annotated copy, long side at most 1280 px. A name
      that ends in ``.jpg`` is kept, others get it appended (``a.png.jpg``), so that no two images share a file.
    - ``<run>/predictions.rank<r>.jsonl``: one line per image, flushed per batch; these remain after a kill.
    - ``<run>/predictions.json`` and ``<run>/predictions.csv`` at the end, all ranks, in the order of the input; the
      ``.jsonl`` files are then removed. Several ranks must share the run directory. If they skip unreadable images,
      neighbors from different ranks may swap.
    - ``<run>/masks/<path of the annotated copy>`` with ``.png`` for ``.jpg``: a PNG with VOC's palette, in the pixels
      of the image file, if the prediction has a mask.

    A JSON record has ``file``, ``annotated`` (path in the run directory), ``mask`` if there is one, and what the view
    of the prediction records (``visualization/``); an optional ``remark`` is counted at the end. The columns and rows
    of the CSV come from the view too. Coordinates are in pixels of the image file.

    The frames of a video (``original`` and ``fps`` in the batch) become one annotated video,
    ``<run>/predictions/<name>.mp4``; ``file`` is ``name#frame``, frames are counted from 0.

    Args:
        folder: folder of the images, to which the paths of annotated copies are relative; None: the datamodule's
            ``images``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._lines: IO[str] | None = None
        self._video: VideoFile | None = None
        self._reported: set[str] = set()

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
        data = getattr(trainer, "datamodule", None)
        folder, exif_orientation = self.folder or getattr(data, "images", None), getattr(data, "exif_orientation", True)
        names = prediction_names(pl_module)
        for sample in samples_of(outputs, batch, len(batch["id"])):
            record = self._write_sample(sample, names, run, folder, exif_orientation)
            if record is not None:
                self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()

    def _write_sample(
        self, sample: Sample, names: Any, run: Path, folder: str | None, exif_orientation: bool
    ) -> dict[str, Any] | None:
        """Write the annotated copy and the mask of one image, and return its record."""
        image, prediction, batch = sample
        if (view := view_of(prediction)) is None:
            if "view" not in self._reported:
                self._reported.add("view")
                print("predictions: no view matches this kind of prediction; nothing is written", flush=True)
            return None
        source, size = str(batch["id"]), (image.shape[-1], image.shape[-2])
        scale = scale_to_file(source, image, batch, exif_orientation)
        prediction = view.to_original(prediction, batch, scale)
        is_frame = "fps" in batch
        file, suffix = (source.rpartition("#")[0], ".mp4") if is_frame else (source, ".jpg")
        copy = annotated_name(file, folder, suffix)
        target = Path("predictions") / copy
        record: dict[str, Any] = {"file": source, "annotated": target.as_posix()}
        with skip_on_error("annotated images", self._reported):
            (run / target).parent.mkdir(parents=True, exist_ok=True)
            original = to_pil(batch["original"]) if is_frame else read_original(source, image, exif_orientation)
            annotated = view.annotate(original, prediction, names, size, scale)
            if is_frame:
                self._video = self._video or VideoFile(run / target, float(batch["fps"]), annotated.size)
                self._video.append(annotated)
            else:
                annotated.save(run / target, quality=92)
        if (ids := view.mask(prediction)) is not None:
            # For a.jpg this is a.png, which VOC's evaluation server expects; for frame 3 of film.avi film.avi#3.png.
            frame = f"{source.removeprefix(file)}.png"
            mask = Path("masks") / (annotated_name(file, folder, frame) if is_frame else copy.with_suffix(".png"))
            (run / mask).parent.mkdir(parents=True, exist_ok=True)
            save_ids(str(run / mask), resize_ids(ids, (round(size[0] * scale[0]), round(size[1] * scale[1]))))
            record["mask"] = mask.as_posix()
        return record | view.record(prediction, names, scale)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            run = Path(trainer.default_root_dir)
            count, remarks = merge_parts(run, trainer.world_size)
            print(
                f"{count} image{'' if count == 1 else 's'}: {run}/predictions.json, predictions.csv, predictions/",
                flush=True,
            )
            for remark, times in remarks.items():
                print(f"{remark} in {times} of {count} images", flush=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for file in (self._video, self._lines):
            if file is not None:
                file.close()
        self._video = self._lines = None


def part_path(run: Path, rank: int) -> Path:
    """Return the file to which one rank writes its records."""
    return run / f"predictions.rank{rank}.jsonl"


def merge_parts(run: Path, world_size: int) -> tuple[int, Counter[str]]:
    """Join the ranks' records to predictions.json and predictions.csv, and remove the parts.

    Returns:
        The number of images, and the number of images per remark.
    """
    count, remarks = 0, Counter[str]()
    with (
        open(run / "predictions.json", "w", encoding="utf-8") as json_file,
        # A file name may have bytes that are not UTF-8; they are written unchanged.
        open(run / "predictions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as csv_file,
    ):
        table = csv.writer(csv_file, lineterminator="\n")
        json_file.write("[")
        for line in _interleaved(run, world_size):
            json_file.write((",\n" if count else "\n") + line)
            record = json.loads(line)
            view = view_of_record(record)
            if not count:
                table.writerow(["file", *view.columns(record)])
            table.writerows([record["file"], *row] for row in view.rows(record))
            remarks.update([record["remark"]] if "remark" in record else [])
            count += 1
        json_file.write("\n]\n")
    for rank in range(world_size):
        part_path(run, rank).unlink()
    return count, remarks


def _interleaved(run: Path, world_size: int) -> Iterator[str]:
    """Yield the ranks' lines in turn, as the sampler distributes the images (0, 1, 0, 1 ...)."""
    with ExitStack() as stack:
        parts = [stack.enter_context(open(part_path(run, r), encoding="utf-8")) for r in range(world_size)]
        while parts:
            for part in list(parts):
                line = part.readline()
                if line:
                    yield line.rstrip("\n")
                else:
                    parts.remove(part)


def scale_to_file(
    source: str, image: Tensor, batch: dict[str, Any], exif_orientation: bool = True
) -> tuple[float, float]:
    """Return the factors of x and y from the pixels of ``image`` (3, H, W) to those of the image file.

    Args:
        source: the image file.
        image: uint8 (3, H, W).
        batch: with the frame ``original``, uint8 (3, h, w), if the file is a video.
        exif_orientation: the EXIF orientation of the file was applied.
    """
    if "original" in batch:
        height, width = batch["original"].shape[-2:]
    else:
        try:
            height, width = image_size(source, exif_orientation)
        except BrokenImageError:  # the dataset generates its images
            return 1.0, 1.0
    return width / image.shape[-1], height / image.shape[-2]


def annotated_name(source: str, folder: str | None, suffix: str = ".jpg") -> Path:
    """Return the relative path of the annotated copy, which no other image has."""
    path = Path(os.path.abspath(source))
    root = Path(os.path.abspath(folder)) if folder else None
    if path == root:
        relative = Path(path.name)
    elif root is not None and path.is_relative_to(root):
        relative = path.relative_to(root)
    else:
        relative = path.relative_to(path.anchor)
    if relative.suffix == suffix:
        return relative
    added = suffix
    # An image that is called a.png.jpg keeps that name.
    while path.with_name(path.name + added).exists():
        added += suffix
    return relative.with_name(relative.name + added)


def read_original(source: str, crop: Tensor, exif_orientation: bool = True) -> Image.Image:
    """Read the image file as RGB, long side at most 1280 px; return the crop if it cannot be read."""
    try:
        with Image.open(source) as image:
            image.draft("RGB", (LONG_SIDE, LONG_SIDE))
            # Pillow turns a TIFF by itself, and wrongly if it is uncompressed, gray and opened by its name.
            is_plain = image.mode in PLAIN_MODES and image.format != "TIFF"
            oriented = ImageOps.exif_transpose(image) if exif_orientation else image
            original = oriented.convert("RGB") if is_plain else _read_strictly(source, exif_orientation)
    except Exception:  # Pillow raises SyntaxError, struct.error and more for broken files
        try:
            original = _read_strictly(source, exif_orientation)
        except Exception:
            return to_pil(crop)
    original.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.BICUBIC)
    return original


def _read_strictly(source: str, exif_orientation: bool) -> Image.Image:
    """Read 16-bit images, palettes, transparency and damaged files as the datamodules do."""
    return Image.fromarray(read_image(source, exif_orientation))
