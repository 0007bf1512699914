"""List folders of images, compare them to lists, and describe them in error messages."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from datamodules.video import is_video
from errors import DatasetError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")


def is_image(name: str) -> bool:
    """Return whether a file name has the extension of an image, in any letter case."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def walk_files(folder: str, base: str = "") -> Iterator[str]:
    """Yield all files below a folder, sorted within each folder, without hidden files.

    Symbolic links are followed, but no folder is entered below itself.

    Args:
        folder: where to start.
        base: prefix of the yielded paths, which are relative to ``folder``.
    """
    yield from _walk(folder, base, (os.path.realpath(folder),))


def _walk(folder: str, base: str, ancestors: tuple[str, ...]) -> Iterator[str]:
    with os.scandir(folder) as scan:
        entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        name = f"{base}/{entry.name}" if base else entry.name
        if not entry.is_dir():
            yield name
        elif (real := os.path.realpath(entry.path)) not in ancestors:
            yield from _walk(entry.path, name, (*ancestors, real))


def list_images(folder: str) -> list[str]:
    """List the paths of all images below a folder, sorted; each path begins with ``folder``.

    Raises:
        DatasetError: the folder does not exist or contains no image.
    """
    return _list_files(folder)[0]


def _list_files(folder: str) -> tuple[list[str], list[str]]:
    """Return the images below a folder, see `list_images`, and the names of the other files."""
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "nothing there"
        raise DatasetError(f"{folder}: expected a folder of images, found {found}; check the path")
    images, others = [], []
    for name in walk_files(folder):
        if is_image(name):
            images.append(os.path.join(folder, name))
        else:
            others.append(name)
    if not images:
        found = f"{len(others)} other files such as {others[0]}" if others else "an empty folder"
        raise DatasetError(f"{folder}: expected images ({', '.join(IMAGE_EXTENSIONS)}), found {found}")
    return sorted(images), others


def list_prediction_images(images: str | None) -> list[str]:
    """List the images to predict: one file, or all images below a folder.

    Args:
        images: the option ``--data.images``.

    Raises:
        DatasetError: the option is not set, or the folder does not exist or contains no image.
    """
    if images is None:
        raise DatasetError("images: expected an image or a folder to predict, found none; set --data.images FOLDER")
    if os.path.isfile(images):
        return [images]
    found, others = _list_files(images)
    videos = [name for name in others if is_video(name)]
    files = [name for name in others if not is_video(name)]
    if others:
        counts = [summarize_names(names, noun) for names, noun in ((videos, "video"), (files, "other file")) if names]
        advice = "; detection, segmentation and style predict a video with --data.images VIDEO" if videos else ""
        rank_zero_warn(f"{images}: predicting {len(found)} images, ignored {' and '.join(counts)}{advice}")
    return found


def match_ids(lines: Iterable[str], files: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the id that each line of a list names, without blank lines.

    An id may contain anything but a line break. A line is, in this order:

    - an id, with or without the blanks around it;
    - a file name: an id with the ending of one of its files;
    - an id with the second column of a list for one class (``aeroplane_train.txt``): -1, 0 or 1.

    Args:
        lines: the lines of the list.
        files: {id: paths of its files}.

    Returns:
        Ids; a line that names none is returned without the blanks around it.
    """
    id_of = {os.path.basename(path): name for name, paths in files.items() for path in paths}
    ids = []
    for line in lines:
        stripped = line.strip()
        first, *second = stripped.rsplit(maxsplit=1) or [""]
        if line in files:
            ids.append(line)
        elif stripped in files:
            ids.append(stripped)
        elif line in id_of or stripped in id_of:
            ids.append(id_of.get(line) or id_of[stripped])
        elif first in files and second in (["-1"], ["0"], ["1"]):
            ids.append(first)
        elif stripped:
            ids.append(stripped)
    return ids


def compare_to_list(root: str, folder: str, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Compare the images below ``root/folder`` to a list.

    Args:
        root: folder that all names are relative to.
        folder: the part of it to compare, relative to ``root``.
        names: the list.

    Returns:
        The listed names that do not exist and the images that are not listed, both sorted.
    """
    missing, unlisted = set(names), []
    if os.path.isdir(os.path.join(root, folder)):
        for name in walk_files(os.path.join(root, folder), folder):
            if name in missing:
                missing.remove(name)
            elif is_image(name):
                unlisted.append(name)
    return sorted(missing), unlisted


def printable_name(name: str) -> str:
    """Return a file name as text: a byte that is not UTF-8 becomes ``\\xe9``, which figures, YAML and W&B can show."""
    return os.fsencode(name).decode(errors="backslashreplace")


def summarize_names(names: list[str], singular: str, plural: str = "") -> str:
    """Count names and give the first five: ``7 images (a.jpg, b.jpg, c.jpg, d.jpg, e.jpg, ...)``.

    Args:
        names: at least one.
        singular: noun for one of them.
        plural: noun for several; empty appends an "s".
    """
    first = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {singular if len(names) == 1 else plural or singular + 's'} ({first})"


def require_different_names(option: str, names: Sequence[str], where: str = "") -> None:
    """Require names of classes that are different and not empty.

    Args:
        option: the option, for the error message.
        names: the names.
        where: end of the error message: the file that lists them.

    Raises:
        DatasetError: there are no names, or one is empty or listed twice.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        found = summarize_names(repeated, "name")
        raise DatasetError(f"{option}: expected different names, found {found} more than once{where}")
    if not names or not all(str(name).strip() for name in names):
        raise DatasetError(f"{option}: expected names of classes, found {'an empty one' if names else 'none'}{where}")


def draw_tree(root: str) -> str:
    """Draw two levels of a folder, a few entries each, as indented lines for an error message."""
    if not os.path.isdir(root):
        return f"  {root}: {'a file, not a folder' if os.path.exists(root) else 'no such folder'}"
    names = _visible_names(root)
    lines = [f"  {root}/"]
    for name in names[:8]:
        path = os.path.join(root, name)
        if not os.path.isdir(path):
            lines.append(f"    {name}")
            continue
        inner = _visible_names(path)
        first = [x + "/" if os.path.isdir(os.path.join(path, x)) else x for x in inner[:3]]
        more = f", ... ({len(inner)} in total)" if len(inner) > 3 else ""
        lines.append(f"    {name}/  {', '.join(first) or '(empty)'}{more}")
    if len(names) > 8:
        lines.append(f"    ... ({len(names)} in total)")
    return "\n".join(lines if names else [*lines, "    (empty)"])


def _visible_names(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
