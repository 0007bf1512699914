"""Decode only the upper rows of a JPEG: the fast path of `EncodedImage.crop`.

A crop needs no row below its bottom edge. With a smaller height in the frame header, libjpeg decodes the upper rows and
stops. The rows equal those of the full decoder (tests/datamodules/test_jpeg.py), and training reads 1.1 times as many
images per second: ``python -m benchmarks.input_pipeline``, 200 ImageNet photos, median of paired passes.
"""

from __future__ import annotations

import math
import re

import numpy as np
import simplejpeg

# libjpeg's warning when it skips entropy-coded bytes up to the next restart marker or the end of the image.
_SKIPPED_ROWS = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd[0-79]")


def decode_jpeg(
    data: bytes | bytearray, height: int, width: int, factor: int = 1, buffer: np.ndarray | None = None
) -> np.ndarray:
    """Decode a JPEG at full size or reduced by the DCT scaling of libjpeg.

    Args:
        data: the file.
        height: height of the full image in pixels.
        width: width of the full image in pixels.
        factor: reduction, 1, 2, 4 or 8. libjpeg rounds the reduced size up.
        buffer: uint8 memory for the result; None allocates it.

    Returns:
        RGB, uint8 (ceil(height / factor), ceil(width / factor), 3).

    Raises:
        ValueError: libjpeg warned about the file or could not decode it.
    """
    min_height, min_width = -(-height // factor), -(-width // factor)
    return simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width, min_factor=factor, buffer=buffer)


def decode_jpeg_rows(data: bytes, rows: int, height: int, width: int, factor: int = 1) -> np.ndarray | None:
    """Decode at least the upper ``rows`` of a JPEG.

    libjpeg reports its first warning only. The warning about the skipped rows therefore proves that the decoded rows
    are intact.

    Args:
        data: the file.
        rows: rows needed, in pixels of the full image.
        height: height of the full image in pixels.
        width: width of the full image in pixels.
        factor: see `decode_jpeg`.

    Returns:
        RGB, uint8 (H, ceil(width / factor), 3), H at least rows / factor. None if no row can be skipped, if the JPEG is
        progressive, or if the file has any other irregularity.
    """
    header = _frame_header(data)
    if header is None:
        return None
    offset, block_height = header
    # One more row of blocks: chroma upsampling interpolates across the boundary.
    upper = (-(-rows // block_height) + 1) * block_height
    if upper >= height:
        return None
    shortened = bytearray(data)
    shortened[offset : offset + 2] = upper.to_bytes(2, "big")
    shape = -(-upper // factor), -(-width // factor), 3
    buffer = np.empty(math.prod(shape), np.uint8)
    try:
        decode_jpeg(shortened, upper, width, factor, buffer)
    except ValueError as error:
        if _SKIPPED_ROWS.fullmatch(str(error)):
            return buffer.reshape(shape)
    return None


def _frame_header(data: bytes) -> tuple[int, int] | None:
    """Return the offset of the image height and the height of a row of blocks in pixels.

    None unless the JPEG is sequential: each scan of a progressive JPEG covers the whole image.
    """
    at = 2
    while at + 10 < len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] in (0xC0, 0xC1):
            sampling = data[at + 11 : at + 11 + 3 * data[at + 9] : 3]
            return at + 5, 8 * max(factors & 15 for factors in sampling)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
