"""`train.py predict`: every image annotated, and what was predicted as JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import pytorch_lightning as pl
from PIL import Image, ImageOps
from torch import Tensor

from callbacks.figures import PEOPLE, harmless, names_of, samples_of
from errors import UserError
from visualization.attributes import (
    attribute_row,
    attributes_record,
    draw_attributes,
    is_attributes,
)
from visualization.classification import TOP, classification_record, draw_classification
from visualization.detections import (
    DETECTION_COLUMNS,
    detection_rows,
    detections_record,
    draw_detections,
    is_detections,
)
from visualization.drawing import to_picture
from visualization.faces import FACE_COLUMNS, draw_faces, face_rows, faces_record, is_faces
from visualization.orientation import (
    ORIENTATION_COLUMNS,
    draw_orientation,
    is_orientation,
    orientation_record,
    orientation_row,
)
from visualization.poses import (
    KEYPOINT_COLUMNS,
    add_joints,
    draw_people,
    draw_pose,
    in_file_pixels,
    is_pose,
    pose_record,
    pose_rows,
)
from visualization.segmentation import draw_segmentation, ids_of, is_segmentation, save_ids, segmentation_record
from visualization.style import is_stylized, style_record

LONG_SIDE = 1280  # pixels
PLAIN_MODES = ("RGB", "L", "CMYK", "YCbCr")


class PredictionWriter(pl.Callback):
    """Writes predictions as they come, in constant memory.

    - ``<run>/predictions/<path of the image in its folder>.jpg``: an annotated copy, long side at most 1280 pixels.
      A name that ends in ``.jpg`` stays, others get it appended (``a.png.jpg``), so that no two images share a file.
    - ``<run>/predictions.rank<r>.jsonl``: one line an image, flushed: what a killed run leaves behind.
    - ``<run>/predictions.json`` and ``<run>/predictions.csv`` at the end, all ranks, in the order of the input; then
      the ``.jsonl`` files go. Several ranks must share the run folder; where they leave unreadable images out,
      neighbors from different ranks may change places.

    A line of JSON: ``{"file": path, "annotated": path in the run folder, "predictions": [{"label", "class",
    "probability"} x 5]}``. Of a photograph with faces ``faces`` takes the place of ``predictions``: a list of
    ``{"box": [x1, y1, x2, y2], "aligned", "predictions"}``, in the CSV one row a face. What an image lacks is said by
    its ``remark`` and counted at the end. Of attributes it is ``attributes``, ``{name: predictions}``, and
    ``ingredients``, a list of ``{"name", "probability"}``; in the CSV one column each and its probability. Of a
    detector it is ``detections``, a list of ``{"box": [x1, y1, x2, y2], "label", "class", "score"}``, boxes in the
    pixels of the image on disk; in the CSV one row a detection. Of a segmentation it is ``classes``, a list of
    ``{"label", "class", "share"}``, the part of the image's pixels; in the CSV one row a class. Of a body's rotation
    it is ``orientation``, ``{"quaternion": [w, x, y, z], "degrees": {"yaw", "pitch", "roll"}}``; in the CSV one column
    each. Of a person's joints it is ``keypoints``, a list of ``{"joint", "x", "y", "score"}`` in the pixels of the
    image on disk, the middle of whose first pixel is (0, 0); in the CSV one row a joint. Of detected people each
    detection has such ``keypoints``, too.

    Masks are written to ``<run>/masks/<path of the annotated copy>``, with ``.png`` for ``.jpg``, named as ``mask`` in
    the line of JSON: PNGs with VOC's palette, in the pixels of the image on disk. Of a segmentation they hold the
    classes' ids, of detections with masks 1 for the first detection and so on, those with a score of 0.3 or more.

    The frames of a video (``original`` and ``fps`` in the batch) become one annotated video,
    ``<run>/predictions/<name>.mp4``; ``file`` is ``name#frame``, frames counted from 0.

    Args:
        folder: the images' folder, to which their paths are relative; None takes the datamodule's ``images``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._lines: IO[str] | None = None
        self._video: cv2.VideoWriter | None = None
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
        names = names_of(pl_module)
        for image, prediction, truth in samples_of(outputs, batch, len(batch["id"])):
            source = str(truth["id"])
            scale = scale_of(source, image, truth)
            if is_pose(prediction) and "to_original" in truth:
                prediction = in_file_pixels(prediction, truth["to_original"])
            record = record_of(prediction, names, scale)
            if record is None:
                if "kind" not in self._told:
                    self._told.add("kind")
                    print("predictions: this kind of prediction is not written", flush=True)
                continue
            is_frame = "fps" in truth
            file, suffix = (source.rpartition("#")[0], ".mp4") if is_frame else (source, ".jpg")
            copy = annotated_name(file, folder, suffix)
            target = Path("predictions") / copy
            with harmless("annotated images", self._told):
                (run / target).parent.mkdir(parents=True, exist_ok=True)
                if is_frame:
                    self._append(annotate(to_picture(truth["original"]), image, prediction, names), truth, run / target)
                else:
                    picture = read_original(source, image)
                    annotate(picture, image, prediction, names, scale).save(run / target, quality=92)
            line = {"file": source, "annotated": target.as_posix()}
            if (ids := ids_of(prediction)) is not None:
                # Of a.jpg a.png, which is what VOC's evaluation server takes; of film.avi's frame 3 film.avi#3.png.
                frame = f"{source.removeprefix(file)}.png"
                mask = Path("masks") / (annotated_name(file, folder, frame) if is_frame else copy.with_suffix(".png"))
                save_ids(ids, (round(image.shape[-1] * scale[0]), round(image.shape[-2] * scale[1])), run / mask)
                line["mask"] = mask.as_posix()
            line |= record
            self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            run = Path(trainer.default_root_dir)
            count, remarks = merge_parts(run, trainer.world_size)
            print(f"{count} images: {run}/predictions.json, predictions.csv, predictions/", flush=True)
            for remark, times in remarks.items():
                print(f"{remark} in {times} of {count} images", flush=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _append(self, frame: Image.Image, truth: dict[str, Any], path: Path) -> None:
        # Codecs want even sides.
        pixels = np.asarray(frame)[: frame.height // 2 * 2, : frame.width // 2 * 2, ::-1]
        if self._video is None:
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._video = cv2.VideoWriter(str(path), codec, float(truth["fps"]), (pixels.shape[1], pixels.shape[0]))
            if not self._video.isOpened():
                raise UserError(f"{path}: OpenCV cannot write this video")
        self._video.write(np.ascontiguousarray(pixels))

    def _close(self) -> None:
        if self._video is not None:
            self._video.release()
            self._video = None
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def record_of(prediction: Any, class_names: Any, scale: tuple[float, float] = (1.0, 1.0)) -> dict[str, Any] | None:
    """What a line of JSON says of an image beside its files' names; None for a kind that is not written.

    ``scale`` brings x and y from the pixels of what the model saw to those of the image on disk.
    """
    if is_detections(prediction):
        if "keypoints" in prediction:
            return add_joints(detections_record(prediction, PEOPLE, scale), prediction, class_names, scale)
        return detections_record(prediction, class_names, scale)
    if is_segmentation(prediction):
        return segmentation_record(prediction, class_names)
    if is_orientation(prediction):
        return orientation_record(prediction)
    if is_stylized(prediction):
        return style_record(prediction)
    if is_pose(prediction):
        return pose_record(prediction, class_names)
    if is_attributes(prediction):
        return attributes_record(prediction, class_names)
    if is_faces(prediction):
        return faces_record(prediction, class_names)
    if isinstance(prediction, dict) and "probabilities" in prediction:
        return {"predictions": classification_record(prediction["probabilities"], class_names)}
    return None


def annotate(
    picture: Image.Image, image: Tensor, prediction: Any, class_names: Any, scale: tuple[float, float] = (1.0, 1.0)
) -> Image.Image:
    """The image as it is on disk with what was predicted of ``image``, the tensor (3,H,W) that the model saw.

    One person's joints are in the pixels of the file, which is ``scale`` times as wide and high as the tensor.
    """
    if is_pose(prediction):
        size = round(image.shape[-1] * scale[0]), round(image.shape[-2] * scale[1])
        return draw_pose(picture, prediction, {}, class_names, size)
    if is_detections(prediction):
        if "keypoints" in prediction:
            seen = (image.shape[-1], image.shape[-2])
            return draw_detections(draw_people(picture, prediction, class_names, seen), prediction, {}, PEOPLE, seen)
        return draw_detections(picture, prediction, {}, class_names, (image.shape[-1], image.shape[-2]))
    if is_stylized(prediction):
        return to_picture(prediction["stylized"])
    if is_segmentation(prediction):
        return draw_segmentation(picture, prediction, {}, class_names)
    if is_faces(prediction):
        return draw_faces(picture, prediction, class_names, image.shape[-1])
    if is_attributes(prediction):
        return draw_attributes(picture, prediction, {}, class_names)
    if is_orientation(prediction):
        return draw_orientation(picture, prediction, {})
    return draw_classification(picture, prediction, {}, class_names)


def part_path(run: Path, rank: int) -> Path:
    """Where one rank streams its lines to."""
    return run / f"predictions.rank{rank}.jsonl"


def table_rows(record: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The columns of predictions.csv, the file's name left out, and an image's rows under them."""
    if "attributes" in record:
        columns, row = attribute_row(record)
        return columns, [row]
    if "detections" in record:
        return DETECTION_COLUMNS, detection_rows(record)
    if "keypoints" in record:
        return KEYPOINT_COLUMNS, pose_rows(record)
    if "orientation" in record:
        return ORIENTATION_COLUMNS, [orientation_row(record)]
    if "stylized" in record:
        return ["width", "height", "random_features"], [[*record["stylized"], record["random_features"]]]
    if "classes" in record:
        return ["class", "share"], [[item["class"], repr(item["share"])] for item in record["classes"]]
    faces = "faces" in record
    columns = [f"{key}{k}" for k in range(1, TOP + 1) for key in ("class", "probability")]
    rows = []
    for first, items in face_rows(record) if faces else [([], record["predictions"])]:
        cells = [cell for item in items for cell in (item["class"], repr(item["probability"]))]
        rows.append([*first, *cells, *[""] * (len(columns) - len(cells))])
    return [*(FACE_COLUMNS if faces else []), *columns], rows


def merge_parts(run: Path, world_size: int) -> tuple[int, Counter[str]]:
    """Joins the ranks' parts into predictions.json and predictions.csv, and removes them.

    Returns:
        How many images there are, and of how many of them there is which remark.
    """
    count, remarks = 0, Counter[str]()
    with (
        open(run / "predictions.json", "w", encoding="utf-8") as as_json,
        # A file name may hold bytes that are no UTF-8; they are written as they are.
        open(run / "predictions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as as_csv,
    ):
        table = csv.writer(as_csv, lineterminator="\n")
        as_json.write("[")
        for line in _interleaved(run, world_size):
            as_json.write((",\n" if count else "\n") + line)
            record = json.loads(line)
            columns, rows = table_rows(record)
            if not count:
                table.writerow(["file", *columns])
            table.writerows([record["file"], *row] for row in rows)
            remarks.update([record["remark"]] if "remark" in record else [])
            count += 1
        as_json.write("\n]\n")
    for rank in range(world_size):
        part_path(run, rank).unlink()
    return count, remarks


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


def scale_of(source: str, image: Tensor, truth: dict[str, Any]) -> tuple[float, float]:
    """What x and y of ``image`` (3,H,W) are multiplied by to come to the pixels of the image on disk, upright."""
    from datamodules.images import EncodedImage
    from errors import BrokenImageError

    if "original" in truth:
        height, width = truth["original"].shape[-2:]
    else:
        try:
            original = EncodedImage(source, exif_orientation=True)
        except BrokenImageError:  # a dataset may make its images
            return 1.0, 1.0
        height, width = original.height, original.width
    return width / image.shape[-1], height / image.shape[-2]


def annotated_name(source: str, folder: str | None, suffix: str = ".jpg") -> Path:
    """The relative path of the annotated copy; two images never get the same one."""
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
    # An image that is itself called a.png.jpg keeps that name.
    while path.with_name(path.name + added).exists():
        added += suffix
    return relative.with_name(relative.name + added)


def read_original(source: str, crop: Tensor) -> Image.Image:
    """The image on disk, upright, RGB, long side at most 1280 pixels; the network's crop where it cannot be read."""
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
