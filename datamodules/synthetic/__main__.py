"""Draws a small dataset in the layout of a real one: ``python -m datamodules.synthetic imagenet DIR``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence

from datamodules.synthetic.imagenet import write_imagenet

WRITERS: dict[str, Callable[..., object]] = {
    "imagenet": write_imagenet,
}

# Tells a folder that was written here, and may be written anew, from anyone else's.
MARKER = ".synthetic.json"


def prepare(folder: str, force: bool) -> None:
    """Makes an empty folder, or empties one that was written here before.

    Args:
        folder: where the dataset goes.
        force: write into a folder with other content too; nothing of it is removed.

    Raises:
        FileExistsError: the folder holds what was not written here, and ``force`` is not set.
        NotADirectoryError: it is a file.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder}: expected a folder or nothing, found a file")
    found = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if MARKER in found:
        with open(os.path.join(folder, MARKER)) as file:
            written = json.load(file)["entries"]
        for name in written:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
        found = [name for name in found if name not in (*written, MARKER)]
    if found and not force:
        raise FileExistsError(
            f"{folder}: expected an empty folder, found {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}: "
            "give another folder, or --force to write among them"
        )
    os.makedirs(folder, exist_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.synthetic", description=__doc__, allow_abbrev=False)
    parser.add_argument("layout", choices=sorted(WRITERS), help="the dataset whose layout is written")
    parser.add_argument("folder", metavar="DIR", help="where to write it")
    parser.add_argument("--classes", type=int, default=4, help="number of classes")
    parser.add_argument("--train", type=int, default=64, help="training pictures a class")
    parser.add_argument("--val", type=int, default=16, help="validation pictures a class")
    parser.add_argument("--size", type=int, default=64, help="shorter side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures")
    parser.add_argument("--force", action="store_true", help="write among other files too")
    options = vars(parser.parse_args(arguments))
    layout, folder, force = options.pop("layout"), options.pop("folder"), options.pop("force")
    try:
        prepare(folder, force)
        before = set(os.listdir(folder))
        WRITERS[layout](folder, **options)
        entries = sorted(set(os.listdir(folder)) - before - {MARKER})
        with open(os.path.join(folder, MARKER), "w") as file:
            json.dump({"layout": layout, "arguments": options, "entries": entries}, file)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for entry in entries:
        count = sum(len(files) for _, _, files in os.walk(os.path.join(folder, entry)))
        print(f"wrote {os.path.join(folder, entry)}: {count} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
