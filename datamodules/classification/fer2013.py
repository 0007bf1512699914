"""FER2013 (Goodfellow et al. 2013): one csv of 35,887 gray faces of 48x48 pixels with one of seven emotions each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.folders import PackedStrings, some, tree
from datamodules.images import predicted_images, read_image
from datamodules.transforms import FaceTransform, to_tensor
from errors import DatasetError

EMOTIONS = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
USAGES = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
FILES = ("fer2013.csv", "icml_face_data.csv")  # the second is the other public copy's, whose headers have spaces
SIDE = 48
CHUNK = 256  # rows parsed at a time: 2 MB of text, which stay in the cache


class Faces(NamedTuple):
    """What a csv holds, in its order.

    Attributes:
        pixels: uint8 (N,48,48). A tensor, since loader processes share its memory however they are started.
        labels: int64 (N,), indices in `EMOTIONS`.
        usages: uint8 (N,), indices in `USAGES`.
        lines: int64 (N,), each face's line in the file, counted from 1.
    """

    pixels: Tensor
    labels: np.ndarray
    usages: np.ndarray
    lines: np.ndarray


def read_fer2013(path: str) -> Faces:
    """Reads and checks the csv: columns emotion, pixels (2304 numbers of 0..255) and Usage, in any order.

    Raises:
        DatasetError: the file is not of this form; one line names the file, the line and what is wrong with it.
    """
    name = os.path.basename(path)
    pixels, labels, usages, lines = [], [], [], []
    with open(path, "rb") as file:
        header = file.readline().decode("utf-8-sig", errors="replace")
        columns = [column.strip(' "\r\n').lower() for column in header.split(",")]
        if sorted(columns) != ["emotion", "pixels", "usage"]:
            raise DatasetError(f"{path}: expected the columns emotion,pixels,Usage, found {header.strip()[:80]!r}")
        places = [columns.index(column) for column in ("emotion", "pixels", "usage")]
        rows = enumerate(file, start=2)
        while chunk := list(islice(rows, CHUNK)):
            texts = []
            for line, row in chunk:
                if not row.strip():
                    continue
                fields = row.split(b",")
                if len(fields) != 3:
                    raise DatasetError(f"{name}, line {line}: expected 3 fields, found {len(fields)}{_CUT_OFF}")
                emotion, text, usage = (fields[place].strip(b' "\r\n') for place in places)
                if emotion not in _EMOTION_IDS:
                    known = ", ".join(f"{i} {emotion}" for i, emotion in enumerate(EMOTIONS))
                    raise DatasetError(f"{name}, line {line}: expected an emotion of {known}, found {_shown(emotion)}")
                if usage not in _USAGE_IDS:
                    known = " or ".join(USAGES.values())
                    raise DatasetError(f"{name}, line {line}: expected Usage {known}, found {_shown(usage)}")
                labels.append(_EMOTION_IDS[emotion])
                usages.append(_USAGE_IDS[usage])
                lines.append(line)
                texts.append(text)
            parsed = parse_pixels(texts)
            if parsed is None:
                first, wrong = next((i, p) for i, text in enumerate(texts) if (p := _problem(text)))
                raise DatasetError(f"{name}, line {lines[first - len(texts)]}: {wrong}")
            pixels.append(parsed)
    if not lines:
        raise DatasetError(f"{path}: expected faces below the header, found none")
    faces = torch.from_numpy(np.concatenate(pixels)).view(-1, SIDE, SIDE)
    return Faces(faces, np.array(labels, np.int64), np.array(usages, np.uint8), np.array(lines, np.int64))


_EMOTION_IDS = {str(i).encode(): i for i in range(len(EMOTIONS))}
_USAGE_IDS = {usage.encode(): i for i, usage in enumerate(USAGES.values())}
_CUT_OFF = ": is the file complete?"


def _shown(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace"))


def parse_pixels(texts: Sequence[bytes]) -> np.ndarray | None:
    """Rows of 2304 numbers between spaces, all at once: uint8 (N,2304). None where a row is anything else."""
    joined = np.frombuffer(b" ".join(texts) + b" ", np.uint8)
    digits = joined - ord("0")  # unsigned: what lies before "0" becomes large
    digit = digits < 10
    if not (digit | (joined == ord(" "))).all():
        return None
    # A number's last digit is one that no digit follows. What lies before the first byte is the last one, a space.
    last = np.flatnonzero(digit[:-1] & ~digit[1:])
    if len(last) != len(texts) * SIDE * SIDE:
        return None
    bounds = np.cumsum([len(text) + 1 for text in texts])
    by_row = last.reshape(len(texts), SIDE * SIDE)
    if (by_row[:, -1] >= bounds).any() or (by_row[1:, 0] < bounds[:-1]).any():
        return None
    has_tens = digit[last - 1]
    has_hundreds = has_tens & digit[last - 2]
    if (has_hundreds & digit[last - 3]).any():
        return None
    values = digits[last].astype(np.uint16)
    values += np.where(has_tens, digits[last - 1], 0) * np.uint16(10)
    values += np.where(has_hundreds, digits[last - 2], 0) * np.uint16(100)
    return values.astype(np.uint8).reshape(by_row.shape) if values.max(initial=0) <= 255 else None


def _problem(text: bytes) -> str:
    """What is wrong with a row of pixels, or nothing."""
    numbers = text.split()
    odd = next((number for number in numbers if not number.isdigit()), None)
    if odd is not None:
        return f"expected pixels of 0 to 255 with spaces between them, found {_shown(odd)}"
    if len(numbers) != SIDE * SIDE:
        return f"expected {SIDE * SIDE} pixels ({SIDE}x{SIDE}), found {len(numbers)}{_CUT_OFF}"
    largest = max(numbers, key=int)
    if len(largest) > 3 or int(largest) > 255:
        return f"expected pixels of 0 to 255, found {_shown(largest)}"
    return "" if parse_pixels([text]) is not None else "expected pixels with one space between them"


class FaceDataset(Dataset):
    """Faces of one usage: ``{"image": uint8 (1,48,48), "label": int, "id": "<file>:<line>"}``.

    Args:
        faces: all faces of a file.
        indices: int64 (N,), those of the usage.
        name: the file's.
        transform: uint8 (48,48) to the same; None leaves faces as they are.
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


class Photographs(Dataset):
    """A user's photographs, whole and turned as their camera says: ``{"image": uint8 (3,H,W), "id": path}``."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = PackedStrings(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": to_tensor(read_image(path, exif_orientation=True)), "id": path}


class FER2013(VisionDataModule):
    """FER2013's csv: Training is train, PublicTest is val, PrivateTest is test. They are never mixed.

    Published figures are on PrivateTest, or on both test sets after selection on them, which is another thing.

    Args:
        root: folder with ``fer2013.csv`` (or ``icml_face_data.csv``, the other public copy), or such a file. Only
            prediction can do without.
        rotation: training faces are turned by up to this many degrees to either side.
        shift: and moved by up to this part of their side in both directions,
        zoom: and scaled by factors of 1 +- this in both directions, each by its own,
        hflip: and reflected with this probability. The defaults are the reference's; the border is repeated beyond.
        images: for prediction, a folder of photographs or one photograph; they are turned as their camera says.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: there is no such file, or it is not as described.
        ValueError: an argument is out of its range.
    """

    # Photographs are of any size, and faces are looked for in one at a time.
    predict_batch_size = 1

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
        # The frame is given, since Lightning would look for it and leave a cycle of frames, which keeps loaders alive.
        self.root, self.images = root, images
        self.transform = FaceTransform(rotation, shift, zoom, hflip)

    @property
    def class_names(self) -> list[str]:
        return EMOTIONS

    @cached_property
    def path(self) -> str:
        """The csv."""
        if self.root is None:
            raise DatasetError("FER2013: no dataset given: --data.root FOLDER")
        if os.path.isfile(self.root):
            return self.root
        for name in FILES:
            path = os.path.join(self.root, name)
            if os.path.isfile(path):
                return path
        expected = f"expected\n  {self.root}/\n    fer2013.csv  (columns emotion,pixels,Usage)"
        raise DatasetError(f"FER2013: there is no {' or '.join(FILES)}\n{expected}\nfound\n{tree(self.root)}")

    @cached_property
    def faces(self) -> Faces:
        """All faces, read once."""
        return read_fer2013(self.path)

    def indices(self, split: Split) -> np.ndarray:
        """int64 (N,): which of all faces belong to a split."""
        return np.flatnonzero(self.faces.usages == list(USAGES).index(split))

    def labels(self, split: Split) -> np.ndarray | None:
        return None if split == "predict" else self.faces.labels[self.indices(split)]

    def dataset(self, split: Split) -> Dataset:
        """The faces of one split; for ``predict``, the photographs.

        Raises:
            DatasetError: the csv has no faces of that split, or there are no photographs.
        """
        if split == "predict":
            return Photographs(predicted_images(self.images, "photographs"))
        indices = self.indices(split)
        if not len(indices):
            raise DatasetError(
                f"FER2013: {self.path} has no {USAGES[split]} rows, which {split} takes alone "
                f"(found {', '.join(self._found())}): give the whole file{_ADVICE.get(split, '')}"
            )
        without = [name for i, name in enumerate(EMOTIONS) if not (self.faces.labels[indices] == i).any()]
        if without:
            rank_zero_warn(f"{USAGES[split]} has no faces of {some(without, 'emotion')}")
        return FaceDataset(
            self.faces, indices, os.path.basename(self.path), self.transform if split == "train" else None
        )

    def _found(self) -> Iterator[str]:
        for i, usage in enumerate(USAGES.values()):
            if count := int((self.faces.usages == i).sum()):
                yield f"{count} {usage}"


_ADVICE = {"test": ", or measure PublicTest with train.py validate"}
