"""Write a small synthetic dataset in the layout of a real one: ``python -m datamodules.synthetic imagenet DIR``."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial

from datamodules.synthetic.fer2013 import write_fer2013
from datamodules.synthetic.food101 import write_food101
from datamodules.synthetic.imagenet import write_imagenet
from datamodules.synthetic.mpii import write_mpii
from datamodules.synthetic.places365 import write_places365
from datamodules.synthetic.style_images import write_style_images
from datamodules.synthetic.voc import write_voc
from datamodules.synthetic.voc_segmentation import write_voc_segmentation
from datamodules.synthetic.yummly import write_yummly
from errors import UserError

WRITERS: dict[str, Callable[..., object]] = {
    "fer2013": write_fer2013,
    "food101": write_food101,
    "imagenet": write_imagenet,
    "mpii": write_mpii,
    "places365": write_places365,
    "places365_easy": partial(write_places365, easy=True),
    "style_images": write_style_images,
    "voc": write_voc,
    "voc_segmentation": write_voc_segmentation,
    "yummly": write_yummly,
}

# Marks a folder that was written here and may be overwritten.
MARKER = ".synthetic"


def write(layout: str, folder: str, force: bool = False, **arguments: float) -> list[str]:
    """Write a dataset; replace a previous one that was written to the same folder.

    The files are written to a temporary folder and moved at the end, so that a failure or an interruption changes
    nothing.

    Args:
        layout: one of `WRITERS`.
        folder: output folder, created if missing.
        force: write to a folder that has other files; of these, only files of the same name are replaced.
        **arguments: arguments of the writer.

    Returns:
        Names of the files and folders that were written in ``folder``.

    Raises:
        UserError: the folder has other files and ``force`` is not set, the folder is a file or cannot be created, or an
            argument is out of range.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder}: expected a folder, found a file; give another name")
    previous = _previous_entries(folder)
    others = sorted(set(os.listdir(folder)) - {MARKER, *previous}) if os.path.isdir(folder) else []
    if others and not force:
        raise UserError(
            f"{folder}: expected an empty folder, found {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}; "
            "give another folder, or add --force to keep these files"
        )
    parent = os.path.dirname(os.path.abspath(folder))
    try:
        os.makedirs(parent, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".synthetic-", dir=parent)
    except OSError as error:
        raise UserError(f"{folder}: expected a folder that can be created, found {error}") from None
    with temporary as written:
        WRITERS[layout](written, **arguments)
        entries = sorted(os.listdir(written))
        for name in previous:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                os.remove(path)
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(written, folder, dirs_exist_ok=True)
    replaceable = [name for name in entries if name not in others]
    with open(os.path.join(folder, MARKER), "w") as file:
        json.dump({"layout": layout, "arguments": arguments, "entries": replaceable}, file)
    return entries


def _previous_entries(folder: str) -> list[str]:
    """Return the names of the files and folders that an earlier call wrote and may replace."""
    path = os.path.join(folder, MARKER)
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return json.load(file)["entries"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a dataset and print what was written; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.synthetic",
        description="Write a small synthetic dataset in the layout of a real one.",
        epilog="The defaults of numbers and sizes depend on the layout.",
        allow_abbrev=False,
    )
    parser.add_argument("layout", choices=sorted(WRITERS), help="dataset whose layout is written")
    parser.add_argument("folder", metavar="DIR", help="output folder, created if missing")
    per_class = "per class; of mpii, the total number of"
    unset = argparse.SUPPRESS  # leaves the default of the writer
    parser.add_argument("--classes", type=int, default=unset, help="number of classes; not of mpii and style_images")
    parser.add_argument("--train", type=int, default=unset, help=f"training images {per_class} training images")
    parser.add_argument("--val", type=int, default=unset, help=f"validation images {per_class} validation images")
    parser.add_argument("--contents", type=int, default=unset, help="number of content images; only of style_images")
    parser.add_argument("--styles", type=int, default=unset, help="number of style images; only of style_images")
    parser.add_argument("--size", type=int, default=unset, help="shorter side of the images in pixels; 48 for fer2013")
    difficulty = "0 (upright, facing the camera, unoccluded) to 1 (any pose, view and occlusion); only of mpii"
    parser.add_argument("--difficulty", type=float, default=unset, help=difficulty)
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness; the default is 0")
    parser.add_argument("--force", action="store_true", help="write to a folder that has other files")
    options = vars(parser.parse_args(arguments))
    layout, folder, force = options.pop("layout"), options.pop("folder"), options.pop("force")
    try:
        _require_options(layout, options)
        entries = write(layout, folder, force, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for entry in entries:
        path = os.path.join(folder, entry)
        count = sum(len(files) for _, _, files in os.walk(path))
        print(f"wrote {path}: {count} files" if os.path.isdir(path) else f"wrote {path}")
    return 0


def _require_options(layout: str, options: dict[str, float]) -> None:
    """Raise a UserError if the writer of a layout does not have one of the options."""
    parameters = list(inspect.signature(WRITERS[layout]).parameters)
    for option in options:
        if option not in parameters:
            names = ", ".join(f"--{name}" for name in parameters if name not in ("folder", "easy"))
            raise UserError(f"--{option}: expected an option of {layout} ({names}), found --{option}; omit it")


if __name__ == "__main__":
    sys.exit(main())
