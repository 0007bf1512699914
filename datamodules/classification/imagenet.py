"""ImageNet (ILSVRC 2012) as plain folders: root/train/<wnid>/*.JPEG and root/val/<wnid>/*.JPEG, no devkit."""

from __future__ import annotations

import os
import re
from collections import Counter

from torchvision.models import ResNet50_Weights

from datamodules.base import Split
from datamodules.classification.image_folder import ImageFolder

# A thousand of ImageNet's 22,000 wnids may be some other thousand: these are at known places among the ILSVRC's.
LANDMARKS = {
    0: "n01440764",  # tench
    130: "n02007558",  # flamingo
    207: "n02099601",  # golden retriever
    281: "n02123045",  # tabby
    388: "n02510455",  # giant panda
    404: "n02690373",  # airliner
    620: "n03642806",  # laptop
    779: "n04146614",  # school bus
    817: "n04285008",  # sports car
    954: "n07753592",  # banana
    985: "n11939491",  # daisy
    999: "n15075141",  # toilet tissue
}


def imagenet_class_names() -> list[str]:
    """The 1000 class names in the order of their sorted wnids, as torchvision's weights have them.

    A name that stands for two classes (crane, the bird and the machine) carries its label: ``crane (134)``.
    """
    return distinct(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def distinct(names: list[str]) -> list[str]:
    """The same names, where those that occur more than once carry their index."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def is_ilsvrc(folders: list[str]) -> bool:
    """Whether sorted folder names are the 1000 wnids of ILSVRC 2012."""
    wnids = all(re.fullmatch(r"n\d{8}", name) for name in folders)
    return len(folders) == 1000 and wnids and all(folders[i] == wnid for i, wnid in LANDMARKS.items())


class ImageNet(ImageFolder):
    """ImageNet, or a part of it, in plain folders named by wnid. Arguments are those of `ImageFolder`.

    Labels are indices among the sorted wnids, as of torchvision's weights; ILSVRC's own ids are in another order.
    Class names are in words where all 1000 classes are there, otherwise the folders' names. Prediction without a root
    has the 1000 names.
    """

    @property
    def class_names(self) -> list[str]:
        folders = self.classes
        return imagenet_class_names() if folders is None or is_ilsvrc(folders) else folders

    def advice(self, split: Split | None) -> str:
        folder = "" if split is None else self.split_folder(split)
        path = os.path.join(self.root or "", folder)
        names = sorted(os.listdir(path))[:100] if folder and os.path.isdir(path) else []
        if any(re.match(r"ILSVRC2012_val_\d{8}\.", name) for name in names):
            return (
                f"{folder}/ is as the archive unpacks it. Move each image into the folder of its wnid, for example\n"
                f"with the well-known script valprep.sh, run inside of {path}. The devkit's ground truth\n"
                "numbers classes by ILSVRC id, which is not the index among sorted wnids."
            )
        if any(name.endswith(".tar") for name in names):
            loop = 'for f in *.tar; do mkdir "${f%.tar}" && tar xf "$f" -C "${f%.tar}"; done'
            return f"Unpack the archives of the classes first: cd {path} && {loop}"
        return super().advice(split)
