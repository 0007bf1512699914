"""The synthetic dataset in the layout of MPII."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat

from datamodules.images import read_image
from datamodules.pose.joints import MPII_JOINTS
from datamodules.pose.mpii import MPII
from datamodules.synthetic.mpii import write_mpii
from datamodules.synthetic.people import HEAD_TOP, UPPER_NECK


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mpii")
    assert write_mpii(str(folder), train=60, val=20, size=64) == MPII_JOINTS
    return folder


def test_the_release_file_has_the_quirks_of_the_real_one(root: Path) -> None:
    content = loadmat(str(root / "mpii_human_pose_v1_u12_1.mat"), squeeze_me=True, struct_as_record=False)
    release = content["RELEASE"]
    assert len(release.annolist) == len(release.img_train) == len(release.single_person) == 82
    assert release.img_train.tolist() == [1] * 80 + [0] * 2
    flags, counts, objpos, is_sorted = set(), set(), set(), set()
    for annotation in release.annolist[:80]:
        height, width = read_image(str(root / "images" / annotation.image.name)).shape[:2]
        for rect in np.atleast_1d(annotation.annorect):
            objpos.add(type(rect.objpos).__name__)
            points = np.atleast_1d(rect.annopoints.point)
            counts.add(len(points))
            is_sorted.add([p.id for p in points] == sorted(p.id for p in points))
            for p in points:
                flag = str(p.is_visible) if p.id not in (UPPER_NECK, HEAD_TOP) else ""
                flags.add(type(p.is_visible).__name__ + flag)
                assert 0.5 <= p.x <= width + 0.5
                assert 0.5 <= p.y <= height + 0.5
    assert flags == {"int0", "int1", "str0", "str1", "ndarray"}
    assert {"ndarray", "mat_struct"} == objpos
    assert False in is_sorted
    assert max(counts) == 16
    assert min(counts) < 14, "joints outside the image and some occluded ones are not annotated"
    assert not hasattr(np.atleast_1d(release.annolist[80].annorect)[0], "annopoints")


def test_the_datamodule_reads_it(root: Path) -> None:
    data = MPII(str(root), image_size=64, num_workers=0, batch_size=8)
    train, val = data.people("train"), data.people("val")
    assert 80 < len(train) < 180
    assert 20 <= len(val) < 70
    assert len(train.images) >= 57
    assert np.isfinite(train.head_size).all()
    height = train.side / 1.25
    assert 0.09 < np.median(train.head_size / height) < 0.15, "a head of MPII is about an eighth of the height"
    inside = np.abs(train.keypoints - train.center[:, None]).max(-1) < train.side[:, None] / 2
    assert inside[train.labeled].mean() > 0.97
    assert next(iter(data.train_dataloader()))["image"].shape == (8, 3, 64, 64)


def test_the_mean_pose_is_a_weak_baseline(root: Path) -> None:
    """PCKh at 0.5 of the mean training pose, the best prediction without the image, is low."""
    data = MPII(str(root))
    train, val = data.people("train"), data.people("val")

    def normalized(people: object) -> np.ndarray:
        return (people.keypoints - people.center[:, None]) / people.side[:, None, None]  # type: ignore[attr-defined]

    mean = np.stack([normalized(train)[train.labeled[:, j], j].mean(0) for j in range(16)])
    error = np.linalg.norm((normalized(val) - mean) * val.side[:, None, None], axis=-1) / val.head_size[:, None]
    correct = (error <= 0.5)[val.labeled]
    assert correct.mean() < 0.3
    limbs = [j for j, name in enumerate(MPII_JOINTS) if "wrist" in name or "ankle" in name]
    assert (error <= 0.5)[:, limbs][val.labeled[:, limbs]].mean() < 0.15


def test_images_depend_only_on_the_arguments(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_mpii(str(tmp_path / name), train=3, val=2, size=48, seed=seed)
    files = {name: [path.read_bytes() for path in sorted((tmp_path / name / "images").iterdir())] for name in "abc"}
    assert files["a"] == files["b"]
    assert not set(files["a"]) & set(files["c"])
    a, b = (MPII(str(tmp_path / name)).people("train") for name in "ab")
    np.testing.assert_array_equal(a.keypoints, b.keypoints)
    assert len({path.read_bytes() for path in (tmp_path / "a" / "images").iterdir()}) == 7
