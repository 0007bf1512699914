"""The synthetic dataset in the layouts of VOC segmentation and SBD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from datamodules.synthetic.voc_segmentation import write_voc_segmentation
from tests.datamodules.segmentation.conftest import ids_of, mask_path


def test_the_layout(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        write_voc_segmentation(str(folder), classes=3, train=4, val=4, size=48)
    name = ids_of(first, "train")[0]
    with Image.open(mask_path(first, name)) as mask:
        assert mask.mode == "P"
        assert mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]  # type: ignore[index]
        classes = np.array(mask)
    objects = np.array(Image.open(mask_path(first, name, "Object")))
    assert ((classes == 255) == (objects == 255)).all()
    assert ((classes == 0) == (objects == 0)).all()
    assert (classes == 255).any()
    instances = loadmat(first / f"benchmark_RELEASE/dataset/inst/{name}.mat")["GTinst"][0]
    assert instances["Categories"][0].shape == (objects[objects < 255].max(), 1)
    assert mask_path(second, name).read_bytes() == mask_path(first, name).read_bytes()
