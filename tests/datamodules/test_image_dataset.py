"""Images by name, with and without labels."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.image_dataset import ImageDataset, PackedStrings
from datamodules.transforms import EvalTransform


def test_packed_strings() -> None:
    names = ["a", "", "b/ä ö.jpg", "c" * 300]
    packed = PackedStrings(names)
    assert len(packed) == 4
    assert [packed[i] for i in range(4)] == names
    assert packed[-1] == names[-1]
    with pytest.raises(IndexError):
        packed[4]
    assert len(PackedStrings([])) == 0


def test_samples(tmp_path: Path) -> None:
    Image.new("RGB", (20, 24)).save(tmp_path / "x.png")
    labeled = ImageDataset(["x.png"], EvalTransform(16, 16), str(tmp_path), np.array([3]))
    sample = pickle.loads(pickle.dumps(labeled))[0]
    assert (sample["id"], sample["label"], sample["image"].shape) == ("x.png", 3, (3, 16, 16))
    path = str(tmp_path / "x.png")
    sample = ImageDataset([path], EvalTransform(16, 16))[0]
    assert sample.keys() == {"image", "id"}
    assert sample["id"] == path
