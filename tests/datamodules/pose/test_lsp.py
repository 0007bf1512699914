"""LSP and LSPET: both arrays, sets, crops and invalid files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from datamodules.pose.lsp import LSP, read_lsp
from errors import DatasetError

SHARED = Path(__file__).parents[4] / "shared" / "data"


def write(folder: Path, people: np.ndarray, extended: bool) -> None:
    """Write people, float (N, 14, 3), in the layout of LSP or LSPET."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    joints = people.transpose(1, 2, 0) if extended else people.transpose(2, 1, 0)
    savemat(folder / "joints.mat", {"joints": joints})
    for i in range(len(people)):
        name = f"im{i + 1:0{5 if extended else 4}d}.jpg"
        cv2.imwrite(str(folder / "images" / name), np.full((40, 50, 3), i % 256, np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, extended, count in (("lsp_dataset", False, 8), ("lspet_dataset", True, 6)):
        people = rng.uniform(1, 40, (count, 14, 3))
        people[..., 2] = rng.random((count, 14)) < 0.7
        people[0, 3] = [-5.5, 60, 1]  # outside of the image
        write(tmp_path / name, people, extended)
    return tmp_path


def module(root: Any, **options: Any) -> LSP:
    return LSP(str(root), **{"image_size": 32, "num_workers": 0, "batch_size": 2, **options})


def test_the_third_number_means_hidden_in_lsp_and_labeled_in_lspet(tmp_path: Path) -> None:
    people = np.random.default_rng(1).uniform(0, 90, (5, 14, 3))
    people[..., 2] = np.random.default_rng(2).random((5, 14)) < 0.5
    for extended in (False, True):
        write(tmp_path, people, extended)
        points, labeled = read_lsp(str(tmp_path / "joints.mat"))
        np.testing.assert_allclose(points, people[..., :2] - 1)
        np.testing.assert_array_equal(labeled, people[..., 2] > 0 if extended else np.ones((5, 14), bool))
    write(tmp_path, people[:1], True)
    assert read_lsp(str(tmp_path / "joints.mat"))[0].shape == (1, 14, 2)


def test_sets(root: Path) -> None:
    data = module(root, train=["lspet_dataset", "lsp_dataset:1-3"], val=["lsp_dataset:4-8"], test=["lsp_dataset:8-8"])
    train = data.people("train")
    assert [train.person_id(i) for i in range(len(train))] == [
        *(f"lspet_dataset/images/im{i:05d}.jpg#0" for i in range(1, 7)),
        *(f"lsp_dataset/images/im{i:04d}.jpg#0" for i in range(1, 4)),
    ]
    assert len(data.people("val")) == 5
    assert len(data.dataset("test")) == 1  # type: ignore[arg-type]
    assert int(data.dataset("test")[0]["image"].max()) == 7, "the eighth image is the eighth person's"
    assert module(root).sets["train"] == ("lspet_dataset", "lsp_dataset:1-1000")


def test_the_square_is_about_the_joints(root: Path) -> None:
    data = module(root, val=["lspet_dataset"])
    people = data.people("val")
    points, labeled = read_lsp(str(root / "lspet_dataset" / "joints.mat"))
    for i in range(6):
        low, high = points[i][labeled[i]].min(0), points[i][labeled[i]].max(0)
        np.testing.assert_allclose(people.center[i], (low + high) / 2)
        assert people.side[i] == pytest.approx(1.25 * (high - low).max())
    assert people.keypoints[0, 3].tolist() == [-6.5, 59], "joints outside of the image are kept"
    one = data.dataset("val")[0]
    inside = one["keypoints"][one["labeled"]]
    assert ((inside > 0) & (inside < 31)).all()
    assert np.isnan(one["head_size"])


def test_people_without_two_joints_are_left_out(tmp_path: Path) -> None:
    people = np.ones((3, 14, 3))
    people[..., :2] = np.random.default_rng(0).uniform(1, 30, (3, 14, 2))
    people[0, :, 2] = 0
    people[1, 1:, 2] = 0
    write(tmp_path / "mine", people, True)
    with pytest.warns(UserWarning, match="train: 1 people; skipped 2: 2 without two labeled joints"):
        dataset = module(tmp_path, train=["mine"]).dataset("train")
    assert dataset[0]["id"] == "mine/images/im00003.jpg#0"


def test_what_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="train: expected sets like lsp_dataset or lsp_dataset:1-1000, found lsp:5"):
        module(root, train=["lsp:5"])
    for options, message in (
        ({"train": ["lsp_dataset:5-9"]}, "joints.mat: expected a range of the people 1 to 8, found lsp_dataset:5-9"),
        ({"train": ["lsp_dataset:4-3"]}, "the people 1 to 8, found lsp_dataset:4-3"),
        ({"train": ["none"]}, r"(?s)LSP: no .*none/joints.mat\nexpected.*found"),
    ):
        with pytest.raises(DatasetError, match=message):
            module(root, **options).dataset("train")
    path = root / "lsp_dataset" / "joints.mat"
    savemat(path, {"joints": np.zeros((14, 2, 5))})
    with pytest.raises(
        DatasetError, match=r"expected joints of shape \(3, 14, N\) or \(14, 3, N\), found \(14, 2, 5\)"
    ):
        module(root, train=["lsp_dataset"]).dataset("train")
    savemat(path, {"other": 1})
    with pytest.raises(DatasetError, match="expected LSP's array joints, found other"):
        module(root, train=["lsp_dataset"]).dataset("train")
    (root / "lspet_dataset" / "images" / "im00002.jpg").unlink()
    with pytest.raises(
        DatasetError, match=r"expected all images of train, found none of 1 image \(lspet_dataset/images/im00002.jpg\)"
    ):
        module(root, train=["lspet_dataset"]).dataset("train")


@pytest.mark.shared_data
@pytest.mark.skipif(not (SHARED / "lsp").is_dir(), reason="needs ../shared/data/lsp")
def test_the_real_sample() -> None:
    data = module(SHARED, train=["lsp:1-240"], val=["lsp:241-300"], test=["lsp:241-300"])
    assert len(data.dataset("train")) == 240  # type: ignore[arg-type]
    assert len(data.dataset("test")) == 60  # type: ignore[arg-type]
    assert 0.7 < data.people("train").labeled.mean() < 0.95
    assert data.people("train").skipped == {}
