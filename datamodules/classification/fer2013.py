"""FER2013: 35,887 gray faces of 48x48 pixels with one of seven emotions each, in one CSV file.

Goodfellow et al., "Challenges in Representation Learning: A Report on Three Machine Learning Contests", ICONIP 2013.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.folders import draw_tree, list_prediction_images, summarize_names
from datamodules.image_dataset import ImageDataset
from datamodules.images import read_image
from datamodules.text import marked_encoding
from datamodules.transforms import FaceTransform, to_tensor
from errors import DatasetError

EMOTIONS = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
USAGES = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
FILES = ("fer2013.csv", "icml_face_data.csv")  # the header of the second, another public copy, has spaces
SIDE = 48

_EMOTION_IDS = {str(i).encode(): i for i in range(len(EMOTIONS))}
_USAGE_IDS = {usage.encode(): i for i, usage in enumerate(USAGES.values())}


class Faces(NamedTuple):
    """All faces of a CSV file, in its order.

    Attributes:
        pixels: uint8 (N, 48, 48). A tensor, because loader processes share its memory however they are started.
        labels: int64 (N,), indices in `EMOTIONS`.
        usages: uint8 (N,), indices in `USAGES`.
        lines: int64 (N,), each face's line in the file, counted from 1.
    """

    pixels: Tensor
    labels: np.ndarray
    usages: np.ndarray
    lines: np.ndarray


def read_fer2013(path: str) -> Faces:
    """Read and check the CSV file: columns emotion, pixels (2304 numbers of 0 to 255) and Usage, in any order.

    Raises:
        DatasetError: the file has another format; the message names the line and the problem.
    """
    name = os.path.basename(path)
    pixels, labels, usages, lines = [], [], [], []
    with open(path, "rb") as file:
        start = file.readline()
        if encoding := marked_encoding(start):  # two or four bytes per character: its lines cannot be read one by one
            raise DatasetError(f"{path}: expected UTF-8 text, found {encoding}; save it as UTF-8")
        header = start.decode("utf-8-sig", errors="replace")
        columns = [column.strip(' "\r\n').lower() for column in header.split(",")]
        if sorted(columns) != ["emotion", "pixels", "usage"]:
            raise DatasetError(f"{path}: expected the columns emotion,pixels,Usage, found {header.strip()[:80]!r}")
        order = [columns.index(column) for column in ("emotion", "pixels", "usage")]
        for line, row in enumerate(file, start=2):
            if not row.strip():
                continue
            fields = row.split(b",")
            if len(fields) != 3:
                found = f"{len(fields)}; is the file complete?"
                raise DatasetError(f"{name}, line {line}: expected 3 fields, found {found}")
            emotion, text, usage = (fields[column].strip(b' "\r\n') for column in order)
            if emotion not in _EMOTION_IDS:
                known = ", ".join(f"{i} {emotion}" for i, emotion in enumerate(EMOTIONS))
                raise DatasetError(f"{name}, line {line}: expected an emotion of {known}, found {_excerpt(emotion)}")
            if usage not in _USAGE_IDS:
                known = " or ".join(USAGES.values())
                raise DatasetError(f"{name}, line {line}: expected Usage {known}, found {_excerpt(usage)}")
            try:
                pixels.append(parse_pixels(text))
            except ValueError as error:
                raise DatasetError(f"{name}, line {line}: {error}") from None
            labels.append(_EMOTION_IDS[emotion])
            usages.append(_USAGE_IDS[usage])
            lines.append(line)
    if not lines:
        raise DatasetError(f"{path}: expected faces below the header, found none")
    faces = torch.from_numpy(np.concatenate(pixels)).view(-1, SIDE, SIDE)
    return Faces(faces, np.array(labels, np.int64), np.array(usages, np.uint8), np.array(lines, np.int64))


def parse_pixels(text: bytes) -> np.ndarray:
    """Parse 2304 decimal numbers of 0 to 255, separated by spaces: uint8 (2304,).

    Raises:
        ValueError: the text is anything else; the message describes the first problem.
    """
    if text.translate(None, b"0123456789 "):
        invalid = next(number for number in text.split(b" ") if number and not number.isdigit())
        raise ValueError(f"expected pixels of 0 to 255 with spaces between them, found {_excerpt(invalid)}")
    values = np.fromstring(text, np.int64, sep=" ") if text.strip() else np.zeros(0, np.int64)
    if len(values) != SIDE * SIDE:
        found = f"{len(values)}; is the file complete?"
        raise ValueError(f"expected {SIDE * SIDE} pixels ({SIDE}x{SIDE}), found {found}")
    if values.max() > 255:
        raise ValueError(f"expected pixels of 0 to 255, found {_excerpt(max(text.split(), key=int))}")
    return values.astype(np.uint8)


def _excerpt(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace"))


class FaceDataset(Dataset):
    """Faces of one usage: ``image`` uint8 (1, 48, 48), ``label`` int, ``id`` "<file>:<line>".

    Args:
        faces: all faces of a file.
        indices: int64 (N,), the faces of the usage.
        name: name of the file.
        transform: from uint8 (48, 48) to uint8 (48, 48); None changes nothing.
    """

    def __init__(self, faces: Faces, indices: np.ndarray, name: str, transform: FaceTransform | None) -> None:
        self.faces, self.indices, self.name, self.transform = faces, indices, name, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = self.indices[index]
        face = self.faces.pixels[i]
        if self.transform is not None:
            face = torch.from_numpy(self.transform(face.numpy()))
        return {"image": face[None], "label": int(self.faces.labels[i]), "id": f"{self.name}:{self.faces.lines[i]}"}


def read_photo(path: str, exif_orientation: bool = True) -> Tensor:
    """Read a photo at full size, with EXIF orientation applied by default: uint8 (3, H, W)."""
    return to_tensor(read_image(path, exif_orientation))


class FER2013(VisionDataModule):
    """FER2013's CSV file: Training is train, PublicTest is val, PrivateTest is test. The usages are never mixed.

    Published accuracies refer to PrivateTest. Some refer to both test sets after model selection on them, which is not
    comparable.

    Args:
        root: folder of ``fer2013.csv`` (or of the copy ``icml_face_data.csv``), or the file. Optional for prediction.
        rotation: maximum rotation of training faces to either side, in degrees.
        shift: maximum translation of training faces in each direction, relative to their side.
        zoom: height and width of training faces are scaled by independent factors of 1 +- this.
        hflip: probability of a horizontal flip in training.
        images: for prediction, a photo or a folder of photos.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: the file is missing or has another format.
        UserError: an argument is out of range.
    """

    predict_batch_size = 1  # photos have any size, and the face detector takes one

    def __init__(
        self,
        root: str | None = None,
        rotation: float = 10.0,
        shift: float = 0.1,
        zoom: float = 0.1,
        hflip: float = 0.5,
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.images = root, images
        self.transform = FaceTransform(rotation, shift, zoom, hflip)

    @property
    def class_names(self) -> list[str]:
        return EMOTIONS

    @cached_property
    def path(self) -> str:
        """The CSV file."""
        if self.root is None:
            raise self.no_root_error()
        if os.path.isfile(self.root):
            return self.root
        for name in FILES:
            path = os.path.join(self.root, name)
            if os.path.isfile(path):
                return path
        expected = f"expected\n  {self.root}/\n    fer2013.csv  (columns emotion,pixels,Usage)"
        raise DatasetError(f"FER2013: there is no {' or '.join(FILES)}\n{expected}\nfound\n{draw_tree(self.root)}")

    @cached_property
    def faces(self) -> Faces:
        """All faces, read once."""
        return read_fer2013(self.path)

    def indices(self, split: Split) -> np.ndarray:
        """Return the indices of a split's faces, int64 (N,)."""
        return np.flatnonzero(self.faces.usages == list(USAGES).index(split))

    def source_name(self, split: Split) -> str | None:
        return USAGES.get(split)

    def labels(self, split: Split) -> np.ndarray | None:
        return None if split == "predict" else self.faces.labels[self.indices(split)]

    def dataset(self, split: Split) -> Dataset:
        """Return the faces of a split; for ``predict``, the photos.

        Raises:
            DatasetError: the file has no faces of the split, or there are no photos.
        """
        if split == "predict":
            read = partial(read_photo, exif_orientation=self.exif_orientation)
            return ImageDataset(list_prediction_images(self.images), read)
        indices = self.indices(split)
        if not len(indices):
            advice = "; use the complete file" + (", or run validate on PublicTest" if split == "test" else "")
            found = ", ".join(self._count_usages())
            raise DatasetError(f"{self.path}: expected {USAGES[split]} rows for {split}, found {found}{advice}")
        missing = [name for i, name in enumerate(EMOTIONS) if not (self.faces.labels[indices] == i).any()]
        if missing:
            rank_zero_warn(f"{USAGES[split]} has no faces of {summarize_names(missing, 'emotion')}")
        transform = self.transform if split == "train" else None
        return FaceDataset(self.faces, indices, os.path.basename(self.path), transform)

    def _count_usages(self) -> Iterator[str]:
        for i, usage in enumerate(USAGES.values()):
            if count := int((self.faces.usages == i).sum()):
                yield f"{count} {usage}"
