"""Read images as uint8 RGB, or raise one line that names the file and the reason."""

from __future__ import annotations

import io
import os
import re
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from datamodules.jpeg import decode_jpeg, decode_jpeg_rows
from datamodules.orientation import ImageHeader, Size, inverse, jpeg_may_have_exif, read_orientation, turn
from errors import BrokenImageError, UserError

# The formats that Pillow may try. Others run external programs (PostScript), and the file content selects the format.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")

MAX_PIXELS = 178_956_970  # 0.5 GB of RGB: a file that claims more is damaged or a decompression bomb

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class EncodedImage:
    """An image file in memory whose header has been read and whose pixels are not decoded yet.

    Args:
        path: the file.
        exif_orientation: apply the EXIF orientation, unless ``annotated_size`` shows that the image was annotated as
            stored; False: leave it as stored, unless the size shows that it was annotated upright.
        annotated_size: (height, width) that the annotation gives for the image; None if it gives none.

    Attributes:
        header: size and orientation as stored.
        height: in pixels, after orientation.
        width: in pixels, after orientation.
        upright: whether the EXIF orientation, if there is one, is applied.
        mode: Pillow's name of the pixel format (``RGB``, ``L``, ``CMYK``, ``P``, ``I;16``, ...).
        warning: after decoding, the irregularity of a file that could still be read; otherwise None.

    Raises:
        BrokenImageError: the file is missing, empty, too large, not an image, or has a damaged header.
    """

    def __init__(self, path: str, exif_orientation: bool = True, annotated_size: Size | None = None) -> None:
        self.path = os.fspath(path)
        self.warning: str | None = None
        try:
            with open(self.path, "rb") as file:
                self.data = file.read()
        except OSError as error:
            raise BrokenImageError(self.path, error.strerror or str(error)) from None
        if not self.data:
            raise BrokenImageError(self.path, "empty file (0 bytes)")
        self.header = self._read_header()
        if self.header.height * self.header.width > MAX_PIXELS:
            raise BrokenImageError(self.path, _too_large(f"{self.header.width}x{self.header.height}"))
        self.header.note(annotated_size, exif_orientation, self.path)
        self.upright = self.header.is_upright(annotated_size, exif_orientation)
        self.height, self.width = self.header.size(self.upright)
        self._turn = self.header.orientation if self.upright else 1

    def _read_header(self) -> ImageHeader:
        # Pillow decodes CMYK and YCCK JPEGs, which libjpeg does not convert to RGB, and all other formats.
        self._use_libjpeg = False
        if self.data[:3] == b"\xff\xd8\xff":
            try:
                height, width, colors, _ = simplejpeg.decode_jpeg_header(self.data)
                self._use_libjpeg = colors in ("YCbCr", "RGB", "Gray")
                self.mode = "L" if colors == "Gray" else "RGB"
            except ValueError as error:
                self.warning = str(error)
        if self._use_libjpeg and not jpeg_may_have_exif(self.data):
            return ImageHeader(height, width)
        try:
            image = self._open()
            header = self._header_of(image)
        except BrokenImageError:
            if self._use_libjpeg:  # Pillow refuses irregular segments that libjpeg skips
                return ImageHeader(height, width)
            raise
        if not self._use_libjpeg:
            self.mode = image.mode
        return header

    def _header_of(self, image: Image.Image) -> ImageHeader:
        width, height = stored_size(image)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ImageHeader(height, width, read_orientation(image))
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many types for damaged EXIF data; the pixels may be readable
            self.warning = f"EXIF: {error}"
            return ImageHeader(height, width)

    def decode(self, min_size: tuple[int, int] | None = None) -> np.ndarray:
        """Decode the whole image.

        Args:
            min_size: (height, width) that the result must reach. A JPEG is then decoded at the smallest of 1/1, 1/2,
                1/4 and 1/8 of its size that reaches it, which is faster and needs less memory. None: full size.

        Returns:
            RGB, uint8 (H, W, 3).

        Raises:
            BrokenImageError: the file is truncated or damaged.
        """
        return self._decode(_reduction(self.height, self.width, *min_size) if min_size else 1)[0]

    def crop(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Decode a part of the image and resize it.

        If the part is at least twice as large as ``size``, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size: libjpeg
        drops high DCT frequencies, an exact low-pass filter. The remaining reduction is below two.

        Args:
            box: top, left, height, width in pixels.
            size: (height, width) of the result.

        Returns:
            RGB, uint8 (height, width, 3).

        Raises:
            BrokenImageError: the file is truncated or damaged.
        """
        top, left, height, width = box
        pixels, factor = self._decode(_reduction(height, width, *size), rows=top + height)
        if factor == 1:
            return resize(pixels[top : top + height, left : left + width], size)
        # The edges of the box may lie within a pixel of the reduced image.
        step_y, step_x = height / factor / size[0], width / factor / size[1]
        if max(step_y, step_x) > 2:
            rows = slice(round(top / factor), round((top + height) / factor))
            return resize(pixels[rows, round(left / factor) : round((left + width) / factor)], size)
        shift_y, shift_x = top / factor + (step_y - 1) / 2, left / factor + (step_x - 1) / 2
        matrix = np.array([[step_x, 0, shift_x], [0, step_y, shift_y]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(pixels, matrix, (size[1], size[0]), flags=flags, borderMode=cv2.BORDER_REPLICATE)

    def _decode(self, factor: int, rows: int | None = None) -> tuple[np.ndarray, int]:
        """Return the pixels (with ``rows``, at least the upper rows) and the factor that they are reduced by."""
        if self._use_libjpeg:
            if rows is not None and self._turn == 1:
                upper = decode_jpeg_rows(self.data, rows, self.height, self.width, factor)
                if upper is not None:
                    return upper, factor
            try:
                pixels = decode_jpeg(self.data, self.header.height, self.header.width, factor)
                return turn(pixels, self._turn), factor
            except ValueError as error:
                # Many files merely lack the end marker or have bytes between segments. Pillow decides.
                self.warning = str(error)
        image = self._open()
        try:
            pixels = to_rgb(image)
        except MemoryError:
            raise
        except UserError as error:
            raise BrokenImageError(self.path, str(error)) from None
        except Exception as error:
            raise BrokenImageError(self.path, self._reason(error)) from None
        if image.format == "TIFF":  # Pillow has applied the orientation
            return (pixels if self._turn != 1 else turn(pixels, inverse(self.header.orientation))), 1
        return turn(pixels, self._turn), 1

    def _open(self) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large images and of damaged EXIF data
                return Image.open(io.BytesIO(self.data), formats=_FORMATS)
        except UnidentifiedImageError:
            reason = f"not an image, or its header is damaged (first bytes: {bytes(self.data[:12])!r})"
            raise BrokenImageError(self.path, reason) from None
        except Image.DecompressionBombError as error:
            found = re.search(r"(\d+) pixels", str(error))
            raise BrokenImageError(self.path, _too_large(found[1] if found else str(error))) from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow's parsers raise many types for a damaged header
            raise BrokenImageError(self.path, self._reason(error)) from None

    def _reason(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
        text = f"{text}; {self.warning}" if self.warning else text
        kind = "truncated" if any(word in text.lower() for word in ("truncated", "premature end")) else "damaged"
        return f"{kind} image ({text})"


def _too_large(found: str) -> str:
    return f"image too large: expected at most {MAX_PIXELS} pixels, found {found}"


def _reduction(height: int, width: int, target_height: int, target_width: int) -> int:
    # libjpeg has fast code for these factors only: decoding at 7/8 takes longer than at full size.
    for factor in (8, 4, 2):
        if height >= factor * target_height and width >= factor * target_width:
            return factor
    return 1


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image; return it unchanged if it has the size already.

    Bilinear up to a reduction of 2.25, where at most one source row or column in nine has no weight. Beyond, the mean
    over the area of each pixel, which does not alias but takes eight times as long.

    Args:
        pixels: uint8 (H, W, 3).
        size: (height, width) of the result.

    Returns:
        uint8 (height, width, 3).
    """
    if pixels.shape[:2] == tuple(size):
        return pixels
    steep = pixels.shape[0] > 2.25 * size[0] or pixels.shape[1] > 2.25 * size[1]
    return cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_AREA if steep else cv2.INTER_LINEAR)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to RGB.

    - Gray is repeated.
    - Alpha is composited on white.
    - 16-bit pixels are scaled by the range of their type (65535 becomes 255); Pillow's own ``convert`` clips them.
    - CMYK is inverted, as Adobe writes it, and converted without a color profile.
    - Float pixels have the range 0 to 1.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UserError: the pixels exceed these ranges, so their white value is unknown.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        top = 1.0 if image.mode == "F" else 65535.0
        if not (values.min() >= 0 and values.max() <= top):
            found = f"{values.min():g}..{values.max():g}"
            raise UserError(f"pixels of mode {image.mode}: expected 0..{top:g}, found {found}; save it with 8 bits")
        return np.repeat(np.rint(values * (255 / top)).astype(np.uint8)[..., None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        # Pillow converts premultiplied alpha (La) to RGBA only via LA.
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def read_header(path: str) -> ImageHeader:
    """Read the size and the EXIF orientation of an image, usually from the first kilobytes of the file.

    Raises:
        BrokenImageError: see `EncodedImage`.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=_FORMATS)
            width, height = stored_size(image)
            return ImageHeader(height, width, read_orientation(image))
    except MemoryError:
        raise
    except Exception:  # Pillow raises many types. Read it as training does: slower, but tolerant and with a reason
        return EncodedImage(path).header


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of an opened image as stored; Pillow's ``size`` of a TIFF is that of the upright image."""
    return (image.tag_v2[256], image.tag_v2[257]) if isinstance(image, TiffImageFile) else image.size


def image_size(path: str, exif_orientation: bool = True) -> Size:
    """Read (height, width) of an image from its header.

    Args:
        path: the file.
        exif_orientation: the size after the EXIF orientation is applied, not that of the stored image.

    Raises:
        BrokenImageError: see `EncodedImage`.
    """
    return read_header(path).size(exif_orientation)


def read_image(path: str, exif_orientation: bool = True, annotated_size: Size | None = None) -> np.ndarray:
    """Read an image as RGB. See `to_rgb` for the conversion of other pixel formats.

    Args:
        path: the file.
        exif_orientation: see `EncodedImage`.
        annotated_size: see `EncodedImage`.

    Returns:
        uint8 (H, W, 3).

    Raises:
        BrokenImageError: see `EncodedImage`; also for truncated and damaged files.
    """
    return EncodedImage(path, exif_orientation, annotated_size).decode()
