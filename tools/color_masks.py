"""Convert color masks to masks of class ids: ``python -m tools.color_masks COLOR_MASKS SegmentationClass``.

Each image of the first folder becomes a PNG with VOC's palette and the same name in the second folder. The colors are
VOC's, including void, or those of ``--colors FILE`` with one line ``id red green blue`` per color; id 255 is void.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

from cli.command import command, make_folder
from datamodules.folders import list_images
from datamodules.images import read_image
from datamodules.segmentation.masks import save_ids
from datamodules.voc import voc_palette
from errors import DatasetError


def read_colors(path: str | None) -> np.ndarray:
    """Read a file of colors.

    Args:
        path: the file; None selects VOC's 256 colors.

    Returns:
        Rows of (id, red, green, blue), int64 (N, 4).

    Raises:
        DatasetError: the file cannot be read, or a line is not four numbers from 0 to 255.
    """
    if path is None:
        return np.column_stack([np.arange(256), voc_palette()])
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise DatasetError(f"colors: expected a file of colors, found {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if words and not (len(words) == 4 and all(word.isdecimal() and int(word) < 256 for word in words)):
            raise DatasetError(f"{path}: expected id red green blue, 0 to 255, in line {number}, found {line.strip()}")
        rows += [[int(word) for word in words]] if words else []
    return np.array(rows, np.int64).reshape(-1, 4)


def to_ids(pixels: np.ndarray, colors: np.ndarray, path: str) -> np.ndarray:
    """Convert the colors of a mask to ids.

    Args:
        pixels: the color mask, RGB, uint8 (H, W, 3).
        colors: rows of (id, red, green, blue), int64 (N, 4).
        path: of the color mask, for the error message.

    Returns:
        Class ids, uint8 (H, W).

    Raises:
        DatasetError: a pixel has a color without an id.
    """
    weights = np.array([1 << 16, 1 << 8, 1])
    known, order = np.unique(colors[:, 1:] @ weights, return_index=True)
    codes = pixels.astype(np.int64) @ weights
    indices = np.searchsorted(known, codes).clip(max=len(known) - 1)
    unknown = known[indices] != codes
    if unknown.any():
        y, x = np.argwhere(unknown)[0]
        raise DatasetError(
            f"{path}: expected a color with an id, found {pixels[y, x].tolist()} at x {x}, y {y}; "
            "list all colors with --colors FILE"
        )
    return colors[order[indices], 0].astype(np.uint8)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Convert all masks of a folder; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.color_masks", description=__doc__, allow_abbrev=False)
    parser.add_argument("color_masks", metavar="COLOR_MASKS", help="folder of color masks")
    parser.add_argument("folder", metavar="FOLDER", help="output folder for the masks of ids")
    parser.add_argument("--colors", help="file with one line 'id red green blue' per color; default: VOC's colors")
    options = parser.parse_args(arguments)
    colors, paths = read_colors(options.colors), list_images(options.color_masks)
    make_folder("FOLDER", options.folder)
    for path in paths:
        target = os.path.join(options.folder, os.path.splitext(os.path.basename(path))[0] + ".png")
        if os.path.exists(target) and os.path.samefile(path, target):
            raise DatasetError(f"{target}: expected another folder than that of the color masks, found the same")
        save_ids(target, to_ids(read_image(path, exif_orientation=False), colors, path))
    print(f"wrote {len(paths)} masks of ids to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
