"""What datasets of one class an image share, and the plainest of them: root/{train,val,test}/<class>/<image>."""

from __future__ import annotations

import os
from typing import Any

from datamodules.base import Split
from datamodules.classification.base import ClassificationData, Listing, list_classes
from datamodules.folders import some


class ImageFolder(ClassificationData):
    """Any tree ``root/{train,val,test}/<class>/<image>``; classes are labeled in the order of their sorted names.

    Folders below a class's folder are read too. Where there is no test folder, testing uses val. A tree may lack train
    if it is only evaluated.

    Args:
        root: the dataset's folder. Only prediction can do without.
        train_dir, val_dir, test_dir: names of the splits' folders.
        **kwargs: see `ClassificationData`.
    """

    def __init__(
        self,
        root: str | None = None,
        train_dir: str = "train",
        val_dir: str = "val",
        test_dir: str = "test",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.folders: dict[Split, str] = {"train": train_dir, "val": val_dir, "test": test_dir}

    def read_classes(self) -> list[str]:
        """Names of the class folders, sorted: those of train, or of val where there is no train."""
        for split, folder in self.folders.items():
            path = os.path.join(self.root or "", folder)
            if os.path.isdir(path):
                with os.scandir(path) as scan:
                    names = sorted(e.name for e in scan if not e.name.startswith(".") and e.is_dir())
                if not names:
                    raise self.refusal(f"{folder}/ holds no class folders", split)
                return names
        raise self.refusal("none of the splits' folders is there")

    def split_folder(self, split: Split) -> str:
        """Name of the split's folder; test's is val's where there is none."""
        name = self.folders[split]
        if split == "test" and not os.path.isdir(os.path.join(self.root or "", name)):
            return self.folders["val"]
        return name

    def title(self, split: Split) -> str:
        return f"{self.split_folder(split)}/"

    def absent(self, split: Split) -> str:
        there = os.path.isdir(os.path.join(self.root or "", self.split_folder(split)))
        return "" if there else f"there is no {self.title(split)}"

    def read_listing(self, split: Split) -> Listing:
        return list_classes(self.root or "", self.split_folder(split))

    def problems(self, split: Split) -> list[str]:
        """As ever, and empty or unknown classes."""
        title, listing = self.title(split), self.listing(split)
        if not self.absent(split) and not listing.classes:
            return [f"{title} holds no class folders"]
        lines = super().problems(split)
        if lines:
            return lines
        unknown = sorted(set(listing.classes) - set(self.classes or ()))
        if unknown:
            lines.append(f"{title} has {some(unknown, 'class', 'classes')} that {self.folders['train']}/ lacks")
        empty = [name for name, count in zip(listing.classes, listing.counts, strict=True) if not count]
        if empty and split == "train":
            lines.append(f"{title} has {some(empty, 'class folder', 'class folders')} without images")
        return lines

    def expected(self) -> str:
        train, val = self.folders["train"], self.folders["val"]
        return f"  {self.root}/\n    {train}/<class>/<image>.jpg\n    {val}/<class>/<image>.jpg"

    def advice(self, split: Split | None) -> str:
        root = self.root or ""
        if split is None and os.path.isdir(root):
            for name in sorted(os.listdir(root)):
                if os.path.isdir(os.path.join(root, name, self.folders["train"])):
                    return f"Did you mean --data.root {os.path.join(root, name)}?"
        return ""
