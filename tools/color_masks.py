"""Convert masks to masks of class ids: ``python -m tools.color_masks MASKS SegmentationClass``.

Each image below the first folder becomes a PNG with VOC's palette and the same relative path in the second folder:

- a color mask is converted by its colors: VOC's, including void, or those of ``--colors FILE`` with one line
  ``id red green blue`` per color; id 255 is void;
- a mask of ids with one channel (gray with 1, 8, 16 or 32 bits, or a palette of grays) keeps its ids, which are 0 to
  255. With ``--colors``, gray masks of 8 bits and palettes are converted by their colors.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from cli.command import command, make_folder
from datamodules.folders import is_image, list_images, summarize_names, walk_files
from datamodules.images import EncodedImage, read_image
from datamodules.segmentation.masks import save_ids
from datamodules.text import read_lines
from datamodules.transforms import VOID
from datamodules.voc import voc_palette
from errors import BrokenImageError, DatasetError


def read_colors(path: str | None) -> np.ndarray:
    """Read a file of colors.

    Args:
        path: the file; None selects VOC's 256 colors.

    Returns:
        Rows of (id, red, green, blue), int64 (N, 4).

    Raises:
        DatasetError: the file cannot be read or has no color, a line is not four numbers from 0 to 255, or a color has
            two ids.
    """
    if path is None:
        return np.column_stack([np.arange(256), voc_palette()])
    if not os.path.isfile(path):
        raise DatasetError(f"colors: expected a file of colors, found no file {path}")
    id_of: dict[tuple[int, ...], int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        words = line.split()
        if not words:
            continue
        if not (len(words) == 4 and all(word.isdecimal() and int(word) < 256 for word in words)):
            raise DatasetError(
                f"{path}: expected id red green blue, 0 to 255, in line {number}, found {line.strip()[:80]}"
            )
        class_id, *color = map(int, words)
        if id_of.setdefault(tuple(color), class_id) != class_id:
            twice = f"{id_of[tuple(color)]} and {class_id}"
            raise DatasetError(f"{path}: expected one id per color, found {twice} for {color} in line {number}")
    if not id_of:
        raise DatasetError(f"{path}: expected one line 'id red green blue' per color, found none")
    return np.array([[class_id, *color] for color, class_id in id_of.items()], np.int64)


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


def read_numbers(path: str) -> np.ndarray:
    """Read the ids of a mask with one channel: gray values, or the indices of a palette.

    Returns:
        Class ids, uint8 (H, W).

    Raises:
        BrokenImageError: the file cannot be read.
        DatasetError: a value is not an id from 0 to 255.
    """
    try:
        with Image.open(path) as image:
            values = np.array(image)
    except Exception as error:  # Pillow raises SyntaxError, struct.error and more on damaged files
        raise BrokenImageError(path, f"expected a mask, found no readable image ({error})") from None
    invalid = ~((values >= 0) & (values <= 255) & (values == np.floor(values)))
    if invalid.any():
        y, x = np.argwhere(invalid)[0]
        raise DatasetError(f"{path}: expected ids 0 to 255, found {values[y, x]} at x {x}, y {y}; renumber the classes")
    return values.astype(np.uint8)


def convert(path: str, colors: np.ndarray, given: bool) -> np.ndarray:
    """Convert a mask to ids by its colors, or keep its ids.

    Args:
        path: the mask.
        colors: rows of (id, red, green, blue), int64 (N, 4).
        given: whether the user gave the colors. They are VOC's otherwise, and an 8-bit gray mask is a mask of ids.

    Returns:
        Class ids, uint8 (H, W).

    Raises:
        BrokenImageError: the file cannot be read.
        DatasetError: a color has no id, or an id is out of range.
    """
    mode = EncodedImage(path).mode
    if mode.startswith(("I", "F")) or (mode in ("1", "L") and not given):
        return read_numbers(path)
    pixels = read_image(path, exif_orientation=False)
    if mode == "P" and not given:
        ids = read_numbers(path)
        if (pixels == ids[..., None]).all():  # the palette only shows the ids as grays
            return ids
    return to_ids(pixels, colors, path)


def plan(paths: Sequence[str], source: str, folder: str) -> dict[str, str]:
    """Choose the output file of each mask.

    Args:
        paths: the masks.
        source: the folder that they are in.
        folder: the output folder.

    Returns:
        {mask: output file}, different for all masks.

    Raises:
        DatasetError: the output folder is in the other one, an output file is one of the masks, or several masks have
            the same output file.
    """
    if os.path.commonpath([os.path.realpath(source), os.path.realpath(folder)]) == os.path.realpath(source):
        raise DatasetError(f"{folder}: expected another folder than that of the masks, found it in {source}")
    targets = {path: f"{os.path.splitext(os.path.relpath(path, source))[0]}.png" for path in paths}
    sources = defaultdict(list)
    for path, target in targets.items():
        sources[target].append(os.path.relpath(path, source))
    several = [" and ".join(names) for names in sources.values() if len(names) > 1]
    if several:
        found = summarize_names(several, "name")
        raise DatasetError(f"{source}: expected one mask per name, found several for {found}; rename all but one")
    targets = {path: os.path.join(folder, target) for path, target in targets.items()}
    masks = {os.path.realpath(path) for path in paths}
    for target in targets.values():
        if os.path.realpath(target) in masks:
            raise DatasetError(f"{target}: expected another folder than that of the masks, found one of them")
    return targets


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Convert all masks of a folder; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.color_masks",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("masks", metavar="MASKS", help="folder of masks")
    parser.add_argument("folder", metavar="FOLDER", help="output folder for the masks of ids")
    parser.add_argument("--colors", help="file with one line 'id red green blue' per color; default: VOC's colors")
    options = parser.parse_args(arguments)
    colors, paths = read_colors(options.colors), list_images(options.masks)
    targets = plan(paths, options.masks, options.folder)
    make_folder("FOLDER", options.folder)
    written: set[int] = set()
    for path, target in targets.items():
        ids = convert(path, colors, options.colors is not None)
        written.update(np.unique(ids).tolist())
        make_folder("FOLDER", os.path.dirname(target))
        save_ids(target, ids)
    others = [name for name in walk_files(options.masks) if not is_image(name)]
    if others:
        print(f"ignored {summarize_names(others, 'file')} without an image extension")
    if VOID in written <= {0, VOID}:
        advice = "convert binary masks with --colors FILE of the lines '0 0 0 0' and '1 255 255 255'"
        print(f"the only ids are 0 and {VOID} (void): there is nothing to train on; {advice}")
    print(f"wrote {len(targets)} masks of ids to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
