"""Turns masks in colors into masks of ids: ``python -m tools.color_masks COLOURED SegmentationClass``.

Each image of the first folder becomes a PNG with a palette, of the same name, in the second. Colors are VOC's, void
included, or those of ``--colors FILE``: a line ``id red green blue`` a color, 255 for what is void.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

from datamodules.images import list_images, read_image
from datamodules.segmentation.masks import save_ids
from datamodules.voc import voc_palette
from errors import BrokenImageError, DatasetError, UserError


def read_colors(path: str | None) -> np.ndarray:
    """(id, red, green, blue) a row, int64 (N,4); VOC's 256 where there is no file.

    Raises:
        DatasetError: a line is not four numbers of 0 to 255.
    """
    if path is None:
        return np.column_stack([np.arange(256), voc_palette()])
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            words = line.split()
            if words and not (len(words) == 4 and all(word.isdecimal() and int(word) < 256 for word in words)):
                raise DatasetError(f"{path}: line {number}: expected id red green blue, 0 to 255, found {line.strip()}")
            rows += [[int(word) for word in words]] if words else []
    return np.array(rows, np.int64).reshape(-1, 4)


def to_ids(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """The ids of colors: uint8 (H,W) of uint8 (H,W,3) RGB.

    Args:
        pixels: the colored mask.
        colors: see `read_colors`.

    Raises:
        ValueError: a pixel has another color.
    """
    weights = np.array([1 << 16, 1 << 8, 1])
    known, order = np.unique(colors[:, 1:] @ weights, return_index=True)
    codes = pixels.astype(np.int64) @ weights
    place = np.searchsorted(known, codes).clip(max=len(known) - 1)
    wrong = known[place] != codes
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise UserError(f"the pixel at x {x}, y {y} has the color {pixels[y, x].tolist()}, which has no id")
    return colors[order[place], 0].astype(np.uint8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.color_masks", description=__doc__, allow_abbrev=False)
    parser.add_argument("colored", metavar="COLOURED", help="folder of masks in colors")
    parser.add_argument("folder", metavar="FOLDER", help="where the masks of ids are written")
    parser.add_argument("--colors", help="file with a line 'id red green blue' a color; VOC's colors without")
    options = parser.parse_args(arguments)
    try:
        colors, paths = read_colors(options.colors), list_images(options.colored)
        os.makedirs(options.folder, exist_ok=True)
        for path in paths:
            target = os.path.join(options.folder, os.path.splitext(os.path.basename(path))[0] + ".png")
            if os.path.exists(target) and os.path.samefile(path, target):
                raise DatasetError(f"{target}: expected another folder than the colored masks', found the same")
            try:
                save_ids(target, to_ids(read_image(path), colors))
            except ValueError as error:
                raise DatasetError(f"{path}: {error}: give all colors by --colors FILE") from None
    except (DatasetError, BrokenImageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(paths)} masks of ids to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
