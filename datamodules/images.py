"""Reading images from disk: every file becomes uint8 RGB with the right values, or one clear line says why not."""

from __future__ import annotations

import io
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from errors import BrokenImageError, DatasetError, UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")

# Pillow knows more, of which some run other programs (PostScript): a file may not choose those by its content.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")

# Half a gigabyte once decoded; a file that claims more is damaged or meant to exhaust the memory.
MAX_PIXELS = 178_956_970

# A buffer for decoding is kept a thread; for the rare image beyond this one is made and given back.
LARGEST_BUFFER = 64 * 2**20

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

_EXIF_ORIENTATION = 0x0112
_ORIENT = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}


def walk_files(folder: str, base: str = "") -> Iterator[str]:
    """Paths of all files below a folder, relative to it, sorted within each folder; hidden files are left out.

    Links are followed, but no folder is entered inside of itself.
    """
    yield from _walk(folder, base, (os.path.realpath(folder),))


def _walk(folder: str, base: str, above: tuple[str, ...]) -> Iterator[str]:
    with os.scandir(folder) as scan:
        entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        name = f"{base}/{entry.name}" if base else entry.name
        if not entry.is_dir():
            yield name
        elif (real := os.path.realpath(entry.path)) not in above:
            yield from _walk(entry.path, name, (*above, real))


def is_image(name: str) -> bool:
    """Whether a file's name ends like an image's, in any case of letters."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def list_images(folder: str) -> list[str]:
    """Paths of all images below a folder, sorted, each beginning with ``folder`` as it was given.

    Raises:
        DatasetError: there is no such folder, or it holds no image.
    """
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "nothing"
        raise DatasetError(f"{folder}: expected a folder of images, found {found} there")
    files = list(walk_files(folder))
    images = [os.path.join(folder, name) for name in files if is_image(name)]
    if not images:
        found = f"{len(files)} other files such as {files[0]}" if files else "an empty folder"
        raise DatasetError(f"{folder}: expected images ({', '.join(IMAGE_EXTENSIONS)}), found {found}")
    return sorted(images)


def predicted_images(images: str | None, kind: str = "pictures") -> list[str]:
    """What ``--data.images`` names: one image, or all of a folder (see `list_images`).

    Raises:
        DatasetError: nothing is named, there is no such folder, or it holds no image.
    """
    if images is None:
        raise DatasetError(f"predict needs {kind}: --data.images FOLDER")
    return [images] if os.path.isfile(images) else list_images(images)


class EncodedImage:
    """An image in memory, its header read and its pixels not yet decoded.

    Args:
        path: the file.
        exif_orientation: turn the image as its camera says. Datasets are annotated on the pixels as stored, so only
            a user's own photographs want this.

    Attributes:
        height, width: in pixels, after turning.
        mode: the kind of pixels in the file, Pillow's name for it (``RGB``, ``L``, ``CMYK``, ``P``, ``I;16``, ...).
        warning: after decoding, what was odd about a file that could be read all the same; otherwise None.

    Raises:
        BrokenImageError: the file is missing, empty, not an image, damaged in its header or absurdly large.
    """

    def __init__(self, path: str, exif_orientation: bool = False) -> None:
        self.path = os.fspath(path)
        self.warning: str | None = None
        try:
            with open(self.path, "rb") as file:
                self.data = file.read()
        except OSError as error:
            raise BrokenImageError(self.path, error.strerror or str(error)) from None
        if not self.data:
            raise BrokenImageError(self.path, "empty file (0 bytes)")
        # libjpeg does not convert CMYK and YCCK to RGB, so these go the slow way.
        self._fast = False
        if self.data[:3] == b"\xff\xd8\xff":
            try:
                self.height, self.width, colors, _ = simplejpeg.decode_jpeg_header(self.data)
                self._fast = colors in ("YCbCr", "RGB", "Gray")
                self.mode = "L" if colors == "Gray" else "RGB"
            except ValueError as error:
                self.warning = str(error)
        if not self._fast:
            image = self._open()
            (self.width, self.height), self.mode = image.size, image.mode
        if self.height * self.width > MAX_PIXELS:
            raise BrokenImageError(self.path, _too_large(f"{self.width}x{self.height} pixels"))
        self._orientation = self._open().getexif().get(_EXIF_ORIENTATION, 1) if exif_orientation else 1
        if self._orientation in (5, 6, 7, 8):
            self.height, self.width = self.width, self.height

    def decode(self, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """All of the image: uint8 (H,W,3), RGB.

        Args:
            at_least: (height, width) below which the result need not be larger. A JPEG is then decoded at the smallest
                of 1/1, 1/2, 1/4, 1/8 that is no smaller, which is quicker and needs less memory.

        Raises:
            BrokenImageError: the file is truncated or damaged.
        """
        return self._decode(_reduction(self.height, self.width, *at_least) if at_least else 1)[0]

    def crop(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """A part of the image, resized: uint8 (height, width, 3), RGB.

        Where the part is at least twice as large as asked for, a JPEG is decoded at 1/2, 1/4 or 1/8 by leaving high
        frequencies out of its DCT, an exact low-pass filter. What is left is a reduction of less than two.

        Args:
            box: top, left, height, width of the part in the image's pixels.
            size: (height, width) of the result.
        """
        top, left, height, width = box
        # The pixels lie in a buffer that the next image overwrites, so what is returned must be a copy of its own.
        pixels, factor = self._decode(_reduction(height, width, *size), reuse=True, rows=top + height)
        if factor == 1:
            part = pixels[top : top + height, left : left + width]
            return part.copy() if part.shape[:2] == tuple(size) else resize(part, size)
        # The part need not begin and end between two of the reduced image's pixels.
        step_y, step_x = height / factor / size[0], width / factor / size[1]
        if max(step_y, step_x) > 2:
            rows = slice(round(top / factor), round((top + height) / factor))
            part = pixels[rows, round(left / factor) : round((left + width) / factor)]
            return part.copy() if part.shape[:2] == tuple(size) else resize(part, size)
        shift_y, shift_x = top / factor + (step_y - 1) / 2, left / factor + (step_x - 1) / 2
        matrix = np.array([[step_x, 0, shift_x], [0, step_y, shift_y]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(pixels, matrix, (size[1], size[0]), flags=flags, borderMode=cv2.BORDER_REPLICATE)

    def _decode(self, factor: int, reuse: bool = False, rows: int | None = None) -> tuple[np.ndarray, int]:
        """The pixels and the factor by which they are reduced; of ``rows``, with ``reuse``, the upper ones at least."""
        if self._fast:
            height, width = (self.width, self.height) if self._orientation >= 5 else (self.height, self.width)
            # A fresh array of this size comes from the system page by page, which costs a fifth of the decoding.
            size = 3 * (height // factor + 1) * (width // factor + 1)
            buffer = _buffer(size) if reuse and size <= LARGEST_BUFFER else None
            if buffer is not None and rows is not None and self._orientation == 1:
                pixels = self._upper_rows(rows, factor, buffer)
                if pixels is not None:
                    return pixels, factor
            try:
                return self._turn(_simplejpeg(self.data, height, width, factor, buffer)), factor
            except ValueError as error:
                # Many a file is merely odd (a missing end marker, bytes between segments): Pillow has the last word.
                self.warning = str(error)
        image = self._open()
        try:
            return self._turn(to_rgb(image)), 1
        except MemoryError:
            raise
        except Exception as error:
            raise BrokenImageError(self.path, self._reason(error)) from None

    def _upper_rows(self, rows: int, factor: int, buffer: np.ndarray) -> np.ndarray | None:
        """The upper ``rows`` and a few more, in the buffer: libjpeg decodes them as an image of that height.

        None where nothing is saved or anything but the rows left out is odd about the file. libjpeg tells of the first
        oddity alone, so that what it steps over is the only one when it tells of that.
        """
        frame = _frame(self.data)
        if frame is None:
            return None
        at, row_of_blocks = frame
        # One more row of blocks than asked for: colors are interpolated across the boundary.
        height = (-(-rows // row_of_blocks) + 1) * row_of_blocks
        if height >= self.height:
            return None
        data = bytearray(self.data)
        data[at : at + 2] = height.to_bytes(2, "big")
        try:
            _simplejpeg(data, height, self.width, factor, buffer)
        except ValueError as error:
            if _STEPPED_OVER.fullmatch(str(error)):
                shape = -(-height // factor), -(-self.width // factor), 3
                return buffer[: math.prod(shape)].reshape(shape)
        return None

    def _open(self) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return Image.open(io.BytesIO(self.data), formats=_FORMATS)
        except UnidentifiedImageError:
            start = bytes(self.data[:12])
            reason = f"not an image, or its header is damaged (it begins with {start!r})"
            raise BrokenImageError(self.path, reason) from None
        except Image.DecompressionBombError as error:
            found = re.search(r"\d+ pixels", str(error))
            raise BrokenImageError(self.path, _too_large(found[0] if found else str(error))) from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow's parsers raise whatever a damaged header leads them to
            raise BrokenImageError(self.path, self._reason(error)) from None

    def _reason(self, error: Exception) -> str:
        told = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
        told = f"{told}; {self.warning}" if self.warning else told
        kind = "truncated" if any(word in told.lower() for word in ("truncated", "premature end")) else "damaged"
        return f"{kind} image ({told})"

    def _turn(self, pixels: np.ndarray) -> np.ndarray:
        turn = _ORIENT.get(self._orientation)
        return np.ascontiguousarray(turn(pixels)) if turn else pixels


# What libjpeg says when it steps over entropy-coded bytes to the next restart marker or the end of the image.
_STEPPED_OVER = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd[0-79]")


def _simplejpeg(data: bytes | bytearray, height: int, width: int, factor: int, buffer: np.ndarray | None) -> np.ndarray:
    return simplejpeg.decode_jpeg(
        data,
        # libjpeg rounds a reduced size up.
        min_height=-(-height // factor),
        min_width=-(-width // factor),
        min_factor=factor,
        buffer=buffer,
    )


def _frame(data: bytes) -> tuple[int, int] | None:
    """Where a JPEG's height is written, and the height of a row of blocks in pixels.

    None for all but sequential JPEGs: the scans of a progressive one each pass over the whole image.
    """
    at = 2
    while at + 10 < len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] in (0xC0, 0xC1):
            sampling = data[at + 11 : at + 11 + 3 * data[at + 9] : 3]
            return at + 5, 8 * max(factors & 15 for factors in sampling)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


_buffers = threading.local()


def _buffer(size: int) -> np.ndarray:
    """This thread's buffer for decoded pixels, at least ``size`` bytes long."""
    if getattr(_buffers, "pixels", None) is None or len(_buffers.pixels) < size:
        _buffers.pixels = np.empty(size, np.uint8)
    return _buffers.pixels


def _too_large(found: str) -> str:
    return f"too large: found {found}, expected at most {MAX_PIXELS} pixels"


def _reduction(height: int, width: int, target_height: int, target_width: int) -> int:
    # libjpeg has fast code for these only: at 7/8 decoding takes longer than at full size.
    for factor in (8, 4, 2):
        if height >= factor * target_height and width >= factor * target_width:
            return factor
    return 1


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes (H,W,3) to ``size`` (height, width).

    Bilinear up to a reduction of 2.25, where at most one source row or column in nine does not contribute; the mean
    over each pixel's area beyond, so that nothing aliases, which takes eight times as long.
    """
    if pixels.shape[:2] == tuple(size):
        return pixels
    steep = pixels.shape[0] > 2.25 * size[0] or pixels.shape[1] > 2.25 * size[1]
    return cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_AREA if steep else cv2.INTER_LINEAR)


def to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image as uint8 (H,W,3) RGB.

    Gray is repeated. Transparent images are composited on white. 16-bit pixels are scaled by their type's range
    (65535 becomes 255), where Pillow's own ``convert`` clips them. CMYK is taken as inverted, as Adobe writes it, and
    converted without a color profile. Float pixels are taken as 0..1.

    Raises:
        ValueError: 32-bit pixels beyond the ranges above: nothing says which value is white.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        top = 1.0 if image.mode == "F" else 65535.0
        if not (values.min() >= 0 and values.max() <= top):
            found = f"{values.min():g}..{values.max():g}"
            raise UserError(f"pixels of mode {image.mode}: expected 0..{top:g}, found {found}; save it with 8 bits")
        return np.repeat(np.rint(values * (255 / top)).astype(np.uint8)[..., None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        # A premultiplied image converts by way of its plain sibling only.
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def image_size(path: str) -> tuple[int, int]:
    """(height, width) of an image, from its header.

    Raises:
        BrokenImageError: see `EncodedImage`.
    """
    image = EncodedImage(path)
    return image.height, image.width


def read_image(path: str, exif_orientation: bool = False) -> np.ndarray:
    """An image as uint8 (H,W,3), RGB. See `to_rgb` for what becomes of other kinds of pixels.

    Args:
        path: the file.
        exif_orientation: turn the image as its camera says.

    Raises:
        BrokenImageError: see `EncodedImage`; also for truncated and damaged files.
    """
    return EncodedImage(path, exif_orientation).decode()
