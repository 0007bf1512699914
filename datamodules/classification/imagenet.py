"""ImageNet (ILSVRC 2012) as class folders: root/train/<wnid>/*.JPEG and root/val/<wnid>/*.JPEG, without the devkit.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
"""

from __future__ import annotations

import os
import re
from collections import Counter

from torchvision.models import ResNet50_Weights

from datamodules.base import Split
from datamodules.classification.image_folder import ImageFolder

# Some wnids at known positions in ILSVRC's sorted 1000. Any other 1000 of ImageNet's 22,000 wnids differ from them.
KNOWN_WNIDS = {
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
    """Return the 1000 class names in the order of their sorted wnids, as torchvision's weights use.

    A name of two classes (crane, the bird and the machine) gets its label: ``crane (134)``.
    """
    return make_unique(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def make_unique(names: list[str]) -> list[str]:
    """Append the index to names that occur more than once."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def is_ilsvrc(folders: list[str]) -> bool:
    """Return whether sorted folder names are the 1000 wnids of ILSVRC 2012."""
    wnids = all(re.fullmatch(r"n\d{8}", name) for name in folders)
    return len(folders) == 1000 and wnids and all(folders[i] == wnid for i, wnid in KNOWN_WNIDS.items())


class ImageNet(ImageFolder):
    """ImageNet, or a subset of it, in class folders named by wnid. See `ImageFolder` for the arguments.

    Labels are indices of the sorted wnids, as in torchvision's weights; ILSVRC's own ids have another order. If all
    1000 classes exist, class names are words, otherwise wnids. Prediction without ``root`` uses the 1000 names.
    """

    @property
    def class_names(self) -> list[str]:
        folders = super().class_names
        return imagenet_class_names() if folders is None or is_ilsvrc(folders) else folders

    def hint(self, split: Split | None) -> str:
        folder = "" if split is None else self.split_folder(split)
        path = os.path.join(self.root or "", folder)
        names = sorted(os.listdir(path))[:100] if folder and os.path.isdir(path) else []
        if any(re.match(r"ILSVRC2012_val_\d{8}\.", name) for name in names):
            return (
                f"{folder}/ is as the archive unpacks it. Move each image into the folder of its wnid, for example\n"
                f"with the script valprep.sh, run in {path}. The devkit's ground truth numbers classes by ILSVRC id,\n"
                "which differs from the index among the sorted wnids."
            )
        if any(name.endswith(".tar") for name in names):
            loop = 'for f in *.tar; do mkdir "${f%.tar}" && tar xf "$f" -C "${f%.tar}"; done'
            return f"Unpack the archives of the classes first: cd {path} && {loop}"
        return super().hint(split)
