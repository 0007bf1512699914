"""Draws a small dataset in the layout of a real one: ``python -m datamodules.synthetic imagenet DIR``."""

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
from datamodules.synthetic.segmentation import write_voc_segmentation
from datamodules.synthetic.style_images import write_style_images
from datamodules.synthetic.voc import write_voc
from datamodules.synthetic.yummly import write_yummly
from errors import UserError

WRITERS: dict[str, Callable[..., object]] = {
    "fer2013": write_fer2013,
    "food101": write_food101,
    "imagenet": write_imagenet,
    "mpii": write_mpii,
    "style_images": write_style_images,
    "voc": write_voc,
    "voc_segmentation": write_voc_segmentation,
    "yummly": write_yummly,
    "places365": write_places365,
    "places365_easy": partial(write_places365, easy=True),
}

# Tells a folder that was written here, and may be written anew, from anyone else's.
MARKER = ".synthetic"


def write(layout: str, folder: str, force: bool = False, **arguments: float) -> list[str]:
    """Draws a dataset, in place of one that was written there before.

    It is drawn beside and then moved, so that a failure or an interruption leaves the folder as it was.

    Args:
        layout: one of `WRITERS`.
        folder: where; it is made if missing.
        force: write among other files too; those of the same name are replaced, no other is removed.
        **arguments: the writer's.

    Returns:
        Names of the files and folders that were written in ``folder``.

    Raises:
        FileExistsError: the folder holds what was not written here, and ``force`` is not set.
        NotADirectoryError: it is a file.
        ValueError: an argument is out of its range.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder}: expected a folder or nothing, found a file")
    written = _written(folder)
    others = sorted(set(os.listdir(folder)) - {MARKER, *written}) if os.path.isdir(folder) else []
    if others and not force:
        raise UserError(
            f"{folder}: expected an empty folder, found {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}: "
            "give another folder, or --force to write among them"
        )
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".synthetic-", dir=parent) as drawn:
        WRITERS[layout](drawn, **arguments)
        names = sorted(os.listdir(drawn))
        for name in written:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                os.remove(path)
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(drawn, folder, dirs_exist_ok=True)
    own = [name for name in names if name not in others]
    with open(os.path.join(folder, MARKER), "w") as file:
        json.dump({"layout": layout, "arguments": arguments, "entries": own}, file)
    return names


def _written(folder: str) -> list[str]:
    path = os.path.join(folder, MARKER)
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return json.load(file)["entries"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.synthetic", description=__doc__, allow_abbrev=False)
    parser.add_argument("layout", choices=sorted(WRITERS), help="the dataset whose layout is written")
    parser.add_argument("folder", metavar="DIR", help="where to write it")
    own = argparse.SUPPRESS  # the writer's default
    parser.add_argument("--classes", type=int, default=own, help="number of classes")
    parser.add_argument("--train", type=int, default=own, help="training images a class; of mpii in all")
    parser.add_argument("--val", type=int, default=own, help="validation images a class; of mpii in all")
    parser.add_argument("--contents", type=int, default=own, help="of style_images: scenes")
    parser.add_argument("--styles", type=int, default=own, help="of style_images: textures")
    parser.add_argument("--size", type=int, default=own, help="shorter side of the images in pixels")
    parser.add_argument("--difficulty", type=float, default=own, help="of mpii, 0 to 1: how much people hide and turn")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other images")
    parser.add_argument("--force", action="store_true", help="write among other files too")
    options = vars(parser.parse_args(arguments))
    layout, folder, force = options.pop("layout"), options.pop("folder"), options.pop("force")
    strange = [name for name in options if name not in inspect.signature(WRITERS[layout]).parameters]
    if strange:
        parser.error(f"{layout} has no --{strange[0]}")
    try:
        entries = write(layout, folder, force, **options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for entry in entries:
        path = os.path.join(folder, entry)
        count = sum(len(files) for _, _, files in os.walk(path))
        print(f"wrote {path}: {count} files" if os.path.isdir(path) else f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
