"""Anchors: k-means on the IoU of shapes, and the command that prints them for a dataset."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from datamodules.detection.voc import VOCDetection
from datamodules.synthetic.voc import write_voc
from tools.anchors import find_anchors, main, mean_iou, shape_iou, training_sizes

CENTERS = np.array([[0.5, 0.6], [1.5, 3.0], [4.0, 1.0], [6.0, 6.0]])


def clusters(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sizes = CENTERS[rng.integers(0, 4, 400)] * rng.uniform(0.9, 1.1, (400, 2))
    return sizes


def test_shape_iou_is_that_of_boxes_with_one_center() -> None:
    found = shape_iou(np.array([[2.0, 2.0], [1.0, 4.0]]), np.array([[2.0, 2.0], [4.0, 1.0]]))
    np.testing.assert_allclose(found, [[1, 2 / 6], [2 / 6, 1 / 7]])


def test_the_clusters_are_found() -> None:
    sizes = clusters()
    anchors = find_anchors(sizes, 4)
    assert anchors.shape == (4, 2)
    assert (np.diff(anchors.prod(1)) > 0).all()
    order = np.argsort(CENTERS.prod(1))
    np.testing.assert_allclose(anchors, CENTERS[order], rtol=0.03)
    assert mean_iou(sizes, anchors) > 0.88


def test_a_pure_function_of_its_arguments() -> None:
    sizes = np.random.default_rng(0).uniform(0.1, 5, (200, 2))
    assert (find_anchors(sizes, 5, 1) == find_anchors(sizes, 5, 1)).all()
    values = [mean_iou(sizes, find_anchors(sizes, k)) for k in range(1, 11)]
    assert all(more > fewer for fewer, more in pairwise(values))


def test_an_end_is_a_fixed_point_of_assignment_and_mean() -> None:
    sizes = clusters(3)
    anchors = find_anchors(sizes, 4)
    nearest = [max(range(4), key=lambda a: shape_iou(sizes[i : i + 1], anchors)[0, a]) for i in range(len(sizes))]
    for a in range(4):
        members = [sizes[i] for i in range(len(sizes)) if nearest[i] == a]
        np.testing.assert_allclose(np.mean(members, axis=0), anchors[a])


def test_as_many_anchors_as_shapes_fit_exactly() -> None:
    sizes = np.repeat(CENTERS, 3, axis=0)
    assert mean_iou(sizes, find_anchors(sizes, 4)) == pytest.approx(1)
    with pytest.raises(ValueError, match="k: expected 1 to 4, the number of different shapes, found 5"):
        find_anchors(sizes, 5)
    with pytest.raises(ValueError, match="found 0"):
        find_anchors(sizes, 0)


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("VOC")
    write_voc(str(folder), classes=2, train=4, val=1, size=64)
    return folder / "VOCdevkit"


def test_sizes_are_in_cells_of_the_warped_image(devkit: Path) -> None:
    sizes = training_sizes(VOCDetection(str(devkit), train=["VOC2007/train"]), 96)
    # Evaluation warps images and boxes and does nothing else.
    warped = VOCDetection(str(devkit), val=["VOC2007/train"], image_size=96).dataset("val")
    boxes = np.concatenate([warped[i]["target"]["boxes"].numpy() for i in range(8)])
    np.testing.assert_allclose(sizes, (boxes[:, 2:] - boxes[:, :2]) / 32, rtol=1e-4)


def test_difficult_objects_count_only_if_they_are_trained_on(devkit: Path) -> None:
    options = {"root": str(devkit), "train": ["VOC2007/train"]}
    data = VOCDetection(**options, train_difficult=False)  # type: ignore[arg-type]
    difficult = data.annotations("train").difficult
    assert 0 < difficult.sum() < len(difficult)
    every = training_sizes(VOCDetection(**options), 96)  # type: ignore[arg-type]
    np.testing.assert_array_equal(training_sizes(data, 96), every[~difficult])


def test_the_command_prints_yaml_for_a_config(devkit: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--root", str(devkit), "--train", "VOC2007/train", "--image_size", "96", "--k", "3"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    anchors = yaml.safe_load(lines[-1])["anchors"]
    data = VOCDetection(str(devkit), train=["VOC2007/train"], train_difficult=False)
    np.testing.assert_allclose(anchors, find_anchors(training_sizes(data, 96), 3), rtol=1e-3)
    assert sum(" anchors  0." in line for line in lines) == 10
    assert main(arguments) == 0
    assert capsys.readouterr().out == out


def test_an_error_is_one_line(devkit: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--root", str(devkit), "--train", "VOC2007/train", "--k", "1000"]) == 2
    assert capsys.readouterr().err.startswith("error: k: expected 1 to ")
    assert main(["--root", str(devkit), "--train", "VOC2007/nothing"]) == 2
    assert "expected the list nothing.txt" in capsys.readouterr().err
    assert main(["--root", str(devkit), "--train", "VOC2007/train", "--classes", "cat"]) == 2
    assert "to be one of cat" in capsys.readouterr().err
