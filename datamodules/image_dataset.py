"""A dataset of image files, with or without labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset


class PackedStrings:
    """An immutable list of strings in two arrays.

    Reading a list of a million str objects changes their reference counts, so that every loader process ends up with
    a copy of the memory pages. An array has one reference count.
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


class ImageDataset(Dataset):
    """Images by name: ``image``, ``id`` (the name) and, if there are labels, ``label``.

    Args:
        names: paths of the images relative to ``root``.
        transform: from a path to an image, uint8 (C, H, W).
        root: folder of the images.
        labels: int (N,), one class per image; None for prediction.

    Raises:
        BrokenImageError: when indexed, the image cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str] | PackedStrings,
        transform: Callable[[str], Tensor],
        root: str = "",
        labels: np.ndarray | None = None,
    ) -> None:
        self.names = names if isinstance(names, PackedStrings) else PackedStrings(names)
        self.transform, self.root, self.labels = transform, root, labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        sample: dict[str, Any] = {"image": self.transform(os.path.join(self.root, name)), "id": name}
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        return sample
