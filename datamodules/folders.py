"""Folders of images: listings, a dataset over them, and descriptions for error messages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from datamodules.images import is_image, walk_files
from datamodules.transforms import EvalTransform, TrainTransform


class PackedStrings:
    """An immutable list of strings in two arrays.

    A list of a million str objects is copied into every loader process, page by page, as reference counts are
    touched; an array has one count for all.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


class FolderDataset(Dataset):
    """Images with their class: ``{"image": uint8 (3,H,W), "label": int, "id": path relative to the root}``.

    Args:
        root: folder that the names are relative to.
        names: the images.
        labels: one an image; None leaves ``label`` out.
        transform: path to tensor.

    Raises:
        BrokenImageError: when indexed, the image cannot be read.
    """

    def __init__(
        self,
        root: str,
        names: PackedStrings,
        labels: np.ndarray | None,
        transform: TrainTransform | EvalTransform,
    ) -> None:
        self.root, self.names, self.labels, self.transform = root, names, labels, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        sample: dict[str, Any] = {"image": self.transform(os.path.join(self.root, name)), "id": name}
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        return sample


def compare_to_list(root: str, folder: str, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(names that are not there, images below ``root/folder`` that are not named), sorted, relative to ``root``."""
    missing, unlisted = set(names), []
    if os.path.isdir(os.path.join(root, folder)):
        for name in walk_files(os.path.join(root, folder), folder):
            if name in missing:
                missing.remove(name)
            elif is_image(name):
                unlisted.append(name)
    return sorted(missing), unlisted


def some(names: list[str], one: str, many: str = "") -> str:
    """How many there are, and the first of them."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {one if len(names) == 1 else many or one + 's'} ({shown})"


def tree(root: str) -> str:
    """Two levels of a folder, a few entries each."""
    if not os.path.isdir(root):
        there = "a file, not a folder" if os.path.exists(root) else "no such folder"
        return f"  {root}: {there}"
    lines = [f"  {root}/"]
    names = _visible(root)
    for name in names[:8]:
        path = os.path.join(root, name)
        if not os.path.isdir(path):
            lines.append(f"    {name}")
            continue
        inner = _visible(path)
        shown = [x + "/" if os.path.isdir(os.path.join(path, x)) else x for x in inner[:3]]
        more = f", ... ({len(inner)} in all)" if len(inner) > 3 else ""
        lines.append(f"    {name}/  {', '.join(shown) or '(empty)'}{more}")
    if len(names) > 8:
        lines.append(f"    ... ({len(names)} in all)")
    return "\n".join(lines if names else [*lines, "    (empty)"])


def _visible(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
