"""Selective Search's boxes of a dataset on disk: ``python -m tools.proposals --root VOCdevkit --out DIR``.

Each image has a file of its own, ``DIR/VOC2007/JPEGImages/000005.jpg.boxes``: `HEADER`, then little-endian float32
(N,4) xyxy in the image's pixels, best first. A file is there whole or not at all, and its checksum tells whether it
is still what was written, so that the same command goes on where it was stopped and repairs what is damaged.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from datamodules.folders import some
from errors import DatasetError

if TYPE_CHECKING:
    pass

# What it is, how many boxes were asked for at most, how many there are, CRC-32 of these two numbers and the boxes.
HEADER = struct.Struct("<8sIII")
MAGIC = b"boxes 1\n"

# --- the files --------------------------------------------------------------------------------------------------------


def path_of(folder: str, name: str) -> str:
    """Where the boxes of an image lie, whose path relative to the devkit is ``name``; SBD lies beside the devkit."""
    return os.path.join(folder, f"{name.replace('../', '')}.boxes")


def write_boxes(path: str, boxes: np.ndarray, top: int) -> None:
    """Writes float32 (N,4) so that the file is there whole or not at all.

    Args:
        path: the file; its folder is made if missing.
        boxes: best first.
        top: how many were asked for at most.
    """
    data = np.ascontiguousarray(boxes, "<f4").tobytes()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(HEADER.pack(MAGIC, top, len(boxes), _checksum(top, len(boxes), data)) + data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


def read_boxes(path: str) -> tuple[np.ndarray, int]:
    """The boxes, float32 (N,4), and how many were asked for at most.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: it is not what was written.
    """
    with open(path, "rb") as file:
        data = file.read()
    reason = f"{len(data)} bytes"
    if len(data) >= HEADER.size:
        magic, top, count, checksum = HEADER.unpack_from(data)
        boxes = data[HEADER.size :]
        if magic != MAGIC:
            reason = f"a file that begins with {magic!r}"
        elif len(boxes) != 16 * count:
            reason = f"{len(boxes)} bytes where there should be {16 * count}"
        elif checksum != _checksum(top, count, boxes):
            reason = "another checksum"
        else:
            return np.frombuffer(bytearray(boxes), "<f4").astype(np.float32, copy=False).reshape(-1, 4), top
    raise DatasetError(
        f"{path}: expected an image's boxes, found {reason}: the command python -m tools.proposals that "
        "wrote it writes it anew"
    )


def _checksum(top: int, count: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(struct.pack("<II", top, count)))


def read_proposals(folder: str, name: str) -> np.ndarray:
    """The boxes of one image, float32 (N,4) xyxy in its pixels, best first; see `read_boxes` for what it raises."""
    return read_boxes(path_of(folder, name))[0]


def check_proposals(folder: str, names: Sequence[str], options: str) -> None:
    """Whether all these images have a file.

    Args:
        folder: the proposals.
        names: of the images, relative to the devkit.
        options: of the command that computes them, but for ``--out``.

    Raises:
        DatasetError: some have none; the message is the command.
    """
    missing = [name for name in names if not os.path.isfile(path_of(folder, name))]
    if missing:
        raise DatasetError(
            f"proposals: expected boxes of {len(names)} images, {folder} lacks {some(missing, 'picture')}: "
            f"python -m tools.proposals {options} --out {folder}"
        )


# --- the command ------------------------------------------------------------------------------------------------------
