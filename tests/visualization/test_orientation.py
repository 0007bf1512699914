"""Axes on images: direction and order; records of rotations."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import cli.parser
from lightning_modules.pose.rotations import euler_to_matrix
from visualization.drawing import BLUE, GREEN, RED
from visualization.orientation import OrientationView

GRAY = Image.new("RGB", (240, 240), (128, 128, 128))
VIEW = OrientationView()


def turned(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> dict[str, Tensor]:
    return {"rotation": euler_to_matrix(torch.tensor([yaw, pitch, roll]).deg2rad())}


def at(figure: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return figure.getpixel((x, y))  # type: ignore[return-value]


def test_rotations_are_recognized() -> None:
    assert VIEW.matches(turned())
    assert not VIEW.matches({"probabilities": torch.rand(3)})
    assert not VIEW.matches(torch.eye(3))


def test_axes_point_where_the_columns_say() -> None:
    drawn = VIEW.draw(GRAY, turned(), {}, None)
    assert at(drawn, 120 + 60, 120) == RED
    assert at(drawn, 120, 120 + 60) == GREEN
    assert at(drawn, 120 - 60, 120) == at(drawn, 120, 120 - 60) == (128, 128, 128)
    quarter = VIEW.draw(GRAY, turned(yaw=90), {}, None)
    assert at(quarter, 120, 120 + 60) == RED
    assert at(quarter, 120 - 60, 120) == GREEN
    # With its nose up at the camera z points to the right, and x, which is in front, is a dot.
    nose = VIEW.draw(GRAY, turned(pitch=90), {}, None)
    assert at(nose, 120 + 60, 120) == BLUE


def test_the_error_is_said_and_colored() -> None:
    near = VIEW.draw(GRAY, turned(yaw=9), turned(), None)
    far = VIEW.draw(GRAY, turned(yaw=11), turned(), None)
    assert at(near, 2, 242) == GREEN
    assert at(far, 2, 242) == RED
    # The ground truth is pale, below the prediction.
    assert at(far, 120 + 80, 120)[0] > 200
    assert at(far, 120 + 80, 120) != RED


@pytest.mark.parametrize("size", [(16, 16), (64, 40), (1200, 800)])
def test_images_of_any_size_have_their_axes(size: tuple[int, int]) -> None:
    drawn = np.asarray(VIEW.tile(Image.new("RGB", size, (128, 128, 128)), turned(30, 20, 10), turned(), None))
    for color in (RED, GREEN, BLUE):
        assert (drawn == color).all(-1).any()


def test_a_record_has_quaternion_and_degrees() -> None:
    record = VIEW.record(turned(90, 0, 0), None, (1.0, 1.0))["orientation"]
    assert record["quaternion"] == pytest.approx([0.5**0.5, 0, 0, 0.5**0.5], abs=1e-5)
    assert record["degrees"] == pytest.approx({"yaw": 90, "pitch": 0, "roll": 0}, abs=1e-3)


def test_predict_writes_what_it_found_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for i in range(3):
        Image.new("RGB", (90, 50 + i), (80 * i, 100, 200)).save(tmp_path / "mine" / f"{i}.png")
    cli.parser.run([
        "predict", "--model", "OrientationRegressor", "--model.backbone", "resnet20_cifar", "--data", "RenderedSolids",
        "--data.images", "mine", "--data.num_workers", "0", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--experiment", "p",
    ])  # fmt: skip
    (run,) = Path("runs/p").iterdir()
    lines = json.loads((run / "predictions.json").read_text())
    assert [line["file"] for line in lines] == [f"mine/{i}.png" for i in range(3)]
    assert set(lines[0]["orientation"]) == {"quaternion", "degrees"}
    assert float(np.linalg.norm(lines[0]["orientation"]["quaternion"])) == pytest.approx(1, abs=1e-4)
    with open(run / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "w", "x", "y", "z", "yaw", "pitch", "roll"]
    assert float(rows[1]["yaw"]) == lines[1]["orientation"]["degrees"]["yaw"]
    assert Image.open(run / lines[0]["annotated"]).width == 224
