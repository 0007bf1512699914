"""EXIF orientation: one rule for all readers decides whether it is applied.

A camera that is turned stores its pixels unturned and writes into EXIF how to turn them. Some annotation tools show and
measure the upright image, others the pixels as stored. `ImageHeader.is_upright` compares the size in the annotation
with the file. Where sizes cannot tell, the option ``exif_orientation`` of the datamodules decides.
"""

from __future__ import annotations

from typing import IO, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

Size = tuple[int, int]  # height, width in pixels

_TAG = 0x0112
_TURN = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}

# The notes of the images that this process read since `take_notes`, {kind: line}.
_notes: dict[str, str] = {}


class ImageHeader(NamedTuple):
    """Size and EXIF orientation of an image file.

    Attributes:
        height: in pixels, as stored.
        width: in pixels, as stored.
        orientation: of EXIF, 1 to 8; 1 if there is none.
    """

    height: int
    width: int
    orientation: int = 1

    def size(self, upright: bool) -> Size:
        """Return (height, width), with the EXIF orientation applied or as stored."""
        turned = upright and self.orientation >= 5
        return (self.width, self.height) if turned else (self.height, self.width)

    def fits(self, annotated_size: Size | None) -> bool:
        """Return whether the annotated size is that of the upright image or of the stored one; True if not given."""
        return annotated_size is None or annotated_size in (self.size(True), self.size(False))

    def is_upright(self, annotated_size: Size | None, exif_orientation: bool) -> bool:
        """Decide whether the EXIF orientation is applied.

        The annotation decides if its size equals either the size of the upright image or that of the stored one. It
        cannot for flips, rotations by 180 degrees and squares, without a size, and if its size differs from both.

        Args:
            annotated_size: (height, width) that the annotation gives for the image; None if it gives none.
            exif_orientation: the decision if the annotation cannot tell.
        """
        return exif_orientation if self._leaves_open(annotated_size) else annotated_size == self.size(True)

    def note(self, annotated_size: Size | None, exif_orientation: bool, path: str) -> None:
        """Note for `take_notes` that the option decides about an image, or that its annotation overrules the option."""
        if self.orientation == 1:
            return
        other = str(not exif_orientation).lower()
        name = f"{path} (orientation {self.orientation})"
        if self._leaves_open(annotated_size):
            done, instead = ("applied", "read them as stored") if exif_orientation else ("ignored", "apply it")
            _notes["option"] = (
                f"EXIF orientation: {done} where no annotated size decides, first in {name}; "
                f"set --data.exif_orientation {other} to {instead}"
            )
        elif self.is_upright(annotated_size, exif_orientation) != exif_orientation:
            found, instead = ("as stored", "applies") if exif_orientation else ("upright", "ignores")
            _notes["annotation"] = (
                f"EXIF orientation: sizes show that images were annotated {found}, first {name}; they are read so, but "
                f"prediction {instead} it; set --data.exif_orientation {other} to predict as in training"
            )

    def _leaves_open(self, annotated_size: Size | None) -> bool:
        return self.size(True) == self.size(False) or annotated_size is None or not self.fits(annotated_size)


def take_notes() -> dict[str, str]:
    """Return and forget the notes of the images that this process read since the last call, {kind: line}."""
    notes = dict(_notes)
    _notes.clear()
    return notes


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to pixels, (H, W, C)."""
    function = _TURN.get(orientation)
    return np.ascontiguousarray(function(pixels)) if function else pixels


def inverse(orientation: int) -> int:
    """Return the orientation that undoes another one."""
    return {6: 8, 8: 6}.get(orientation, orientation)


def read_orientation(image: Image.Image) -> int:
    """Read the EXIF orientation of an opened image, 1 to 8; 1 if there is none or its value is invalid.

    Raises:
        Exception: of many types, from Pillow, for damaged EXIF data.
    """
    if isinstance(image, PngImageFile) and not _png_has_exif(image.fp):
        return 1
    orientation = image.getexif().get(_TAG, 1)
    return int(orientation) if orientation in _TURN else 1


def jpeg_may_have_exif(data: bytes) -> bool:
    """Return False if a JPEG has no APP1 segment, which EXIF and XMP are stored in, before its pixels.

    The answer takes 2 us; opening the image with Pillow takes 25 to 100 us.
    """
    position = 2
    while data[position : position + 1] == b"\xff" and len(data) > position + 4:
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan
            return False
        if marker == 0xE1 or not 0xC0 <= marker <= 0xFE:  # APP1, or an irregular file
            return True
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True


def _png_has_exif(file: IO[bytes] | None) -> bool:
    """Return whether a PNG has EXIF or XMP data. Pillow would decode the pixels to look behind them."""
    if file is None:
        return True
    before = file.tell()
    try:
        position = file.seek(8)
        while len(head := file.read(8)) == 8:
            if head[4:] == b"eXIf":
                return True
            keyword = file.read(21) if head[4:] in (b"tEXt", b"zTXt", b"iTXt") else b""
            if keyword.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp")):
                return True
            position = file.seek(position + 12 + int.from_bytes(head[:4], "big"))
        return False
    finally:
        file.seek(before)
