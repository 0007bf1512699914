"""Read and write region proposals on disk; ``python -m tools.proposals`` computes them.

Each image has one file, ``FOLDER/VOC2007/JPEGImages/000005.jpg.boxes``: a header, then boxes as little-endian float32
(N, 4), xyxy in pixels of the image, best first. Files are written atomically and carry a checksum, so that an
interrupted command can continue and repair damaged files.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torchvision.ops import box_iou

from datamodules.folders import summarize_names
from errors import DatasetError

# Magic, requested maximum number of boxes, number of boxes, CRC-32 of these two numbers and the boxes.
_HEADER = struct.Struct("<8sIII")
_MAGIC = b"boxes 1\n"


def proposal_path(folder: str, image: str) -> str:
    """Return the path of an image's proposals.

    Args:
        folder: folder of all proposals.
        image: path of the image relative to the devkit; an image of SBD begins with ``../``.
    """
    return os.path.join(folder, f"{image.replace('../', '')}.boxes")


def write_proposals(path: str, boxes: np.ndarray, top_n: int) -> None:
    """Write the proposals of one image atomically.

    Args:
        path: the file; its folder is created.
        boxes: float (N, 4), xyxy in pixels, best first.
        top_n: requested maximum number of boxes.
    """
    data = np.ascontiguousarray(boxes, "<f4").tobytes()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.part"
    try:
        with open(temporary, "wb") as file:
            file.write(_HEADER.pack(_MAGIC, top_n, len(boxes), _checksum(top_n, len(boxes), data)) + data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def read_proposals(path: str) -> tuple[np.ndarray, int]:
    """Read the proposals of one image.

    Returns:
        The boxes, float32 (N, 4), xyxy in pixels, best first, and the requested maximum number of boxes.

    Raises:
        FileNotFoundError: the file does not exist.
        DatasetError: the file is damaged.
    """
    with open(path, "rb") as file:
        data = file.read()
    found = f"{len(data)} bytes"
    if len(data) >= _HEADER.size:
        magic, top_n, count, checksum = _HEADER.unpack_from(data)
        boxes = data[_HEADER.size :]
        if magic != _MAGIC:
            found = f"a file that begins with {magic!r}"
        elif len(boxes) != 16 * count:
            found = f"{len(boxes)} bytes of boxes instead of {16 * count}"
        elif checksum != _checksum(top_n, count, boxes):
            found = "a wrong checksum"
        else:
            return np.frombuffer(bytearray(boxes), "<f4").astype(np.float32, copy=False).reshape(-1, 4), top_n
    raise DatasetError(
        f"{path}: expected the proposals of an image, found {found}; "
        "run the python -m tools.proposals command that wrote it again"
    )


def _checksum(top_n: int, count: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(struct.pack("<II", top_n, count)))


def read_image_proposals(folder: str, image: str) -> np.ndarray:
    """Read the boxes of an image, float32 (N, 4), like `read_proposals`, from the path of `proposal_path`."""
    return read_proposals(proposal_path(folder, image))[0]


def require_proposals(folder: str, images: Sequence[str], options: str) -> None:
    """Check that every image has a file of proposals.

    Args:
        folder: folder of all proposals.
        images: paths relative to the devkit.
        options: options of the command that computes the proposals, without ``--out``.

    Raises:
        DatasetError: files are missing; the message ends with the command.
    """
    missing = [image for image in images if not os.path.isfile(proposal_path(folder, image))]
    if missing:
        raise DatasetError(
            f"proposals: expected a file for each of {len(images)} images, {folder} has none for "
            f"{summarize_names(missing, 'image')}; run: python -m tools.proposals {options} --out {folder}"
        )


def overlaps_any(boxes: np.ndarray, others: np.ndarray, iou_threshold: float = 0.5) -> np.ndarray:
    """Return whether the IoU of each box with any other box reaches a threshold, bool (M,).

    Args:
        boxes: float32 (M, 4), xyxy.
        others: float32 (N, 4), xyxy.
        iou_threshold: smallest IoU.
    """
    return (box_iou(torch.from_numpy(boxes), torch.from_numpy(others)) >= iou_threshold).any(1).numpy()
