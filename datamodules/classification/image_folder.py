"""Class folders: root/{train,val,test}/<class>/<image>."""

from __future__ import annotations

import os
from typing import Any

from datamodules.base import Split
from datamodules.classification.base import ClassificationData, Listing, list_classes
from datamodules.folders import summarize_names


class ImageFolder(ClassificationData):
    """Images in class folders, ``root/{train,val,test}/<class>/<image>``; labels follow the sorted class names.

    Subfolders of a class folder are read too. Without a test folder, testing uses val. The train folder may be missing
    for evaluation.

    Args:
        root: folder of the dataset. Optional for prediction.
        train_dir: name of the training folder.
        val_dir: name of the validation folder.
        test_dir: name of the test folder.
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
        """Read the sorted names of the class folders of train, or of val if there is no train folder."""
        for split, folder in self.folders.items():
            path = os.path.join(self.root or "", folder)
            if os.path.isdir(path):
                with os.scandir(path) as scan:
                    names = sorted(e.name for e in scan if not e.name.startswith(".") and e.is_dir())
                if not names:
                    raise self.layout_error(f"{folder}/ contains no class folders", split)
                return names
        raise self.layout_error("there is no folder of any split")

    def split_folder(self, split: Split) -> str:
        """Return the name of the split's folder; val's for test if there is no test folder."""
        name = self.folders[split]
        if split == "test" and not os.path.isdir(os.path.join(self.root or "", name)):
            return self.folders["val"]
        return name

    def source_name(self, split: Split) -> str:
        return f"{self.split_folder(split)}/"

    def missing_source(self, split: Split) -> str:
        exists = os.path.isdir(os.path.join(self.root or "", self.split_folder(split)))
        return "" if exists else f"there is no {self.source_name(split)}"

    def read_listing(self, split: Split) -> Listing:
        return list_classes(self.root or "", self.split_folder(split))

    def problems(self, split: Split) -> list[str]:
        """See `ClassificationData`; also empty and unknown classes."""
        source, listing = self.source_name(split), self.listing(split)
        if not self.missing_source(split) and not listing.classes:
            return [f"{source} contains no class folders"]
        lines = super().problems(split)
        if lines:
            return lines
        unknown = sorted(set(listing.classes) - set(self.classes or ()))
        if unknown:
            classes = summarize_names(unknown, "class", "classes")
            lines.append(f"{source} has {classes} that {self.folders['train']}/ lacks")
        empty = [name for name, count in zip(listing.classes, listing.counts, strict=True) if not count]
        if empty and split == "train":
            lines.append(f"{source} has {summarize_names(empty, 'class folder')} without images")
        return lines

    def expected_layout(self) -> str:
        train, val = self.folders["train"], self.folders["val"]
        return f"  {self.root}/\n    {train}/<class>/<image>.jpg\n    {val}/<class>/<image>.jpg"

    def hint(self, split: Split | None) -> str:
        root = self.root or ""
        if split is None and os.path.isdir(root):
            for name in sorted(os.listdir(root)):
                if os.path.isdir(os.path.join(root, name, self.folders["train"])):
                    return f"Did you mean --data.root {os.path.join(root, name)}?"
        return ""
