"""Skeletons and heatmaps; records of joints in the pixels of the file."""

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
from datamodules.pose.joints import LSP_JOINTS, MPII_JOINTS
from datamodules.synthetic.mpii import write_mpii
from visualization.drawing import to_pil
from visualization.poses import (
    HEATMAP_TILE,
    LEFT,
    MIDDLE,
    RIGHT,
    PoseView,
    draw_heatmaps,
    limbs,
    side_color,
)

GRAY = Image.new("RGB", (200, 160), (128, 128, 128))
VIEW = PoseView()


def spread(count: int = 16, width: float = 200, height: float = 160) -> dict[str, Tensor]:
    """Random joints at least 10 px from the border."""
    places = torch.rand(count, 2, generator=torch.Generator().manual_seed(1))
    return {"keypoints": places * torch.tensor([width - 20, height - 20]) + 10, "scores": torch.ones(count)}


def at(figure: Image.Image, point: Tensor) -> tuple[int, ...]:
    x, y = point.round().int().tolist()
    return figure.getpixel((x, y))  # type: ignore[return-value]


def test_poses_are_recognized() -> None:
    assert VIEW.matches(spread())
    assert not VIEW.matches({**spread(), "boxes": torch.zeros(16, 4), "labels": torch.zeros(16)})
    assert not VIEW.matches({"probabilities": torch.rand(3)})
    assert not VIEW.matches(torch.zeros(4, 4, dtype=torch.int64))


def test_limbs_join_a_side_with_itself() -> None:
    for names, count in ((MPII_JOINTS, 15), (LSP_JOINTS, 13)):
        pairs = [(names[a], names[b]) for a, b in limbs(names)]
        assert len(pairs) == count
        assert not any({a.split("_")[0], b.split("_")[0]} == {"right", "left"} for a, b in pairs)
        assert {name for pair in pairs for name in pair} == set(names)
    assert limbs(["nose", "left_eye"]) == []


def test_joints_have_the_color_of_their_side() -> None:
    assert [side_color(name) for name in ("right_hip", "left_hip", "pelvis")] == [RIGHT, LEFT, MIDDLE]
    joints = {"keypoints": torch.tensor([[20.0, 30.0], [150.0, 30.0], [90.0, 120.0]]), "scores": torch.ones(3)}
    drawn = VIEW.draw(GRAY, joints, {}, ["right_knee", "left_knee", "pelvis"])
    assert [at(drawn, point) for point in joints["keypoints"]] == [RIGHT, LEFT, MIDDLE]
    assert at(GRAY, joints["keypoints"][0]) == (128, 128, 128)  # the input image is unchanged


def test_a_limb_lies_between_its_joints() -> None:
    joints = {"keypoints": torch.tensor([[20.0, 30.0], [120.0, 30.0]]), "scores": torch.ones(2)}
    drawn = VIEW.draw(GRAY, joints, {}, ["left_knee", "left_ankle"])
    assert at(drawn, torch.tensor([70.0, 30.0])) == LEFT
    drawn = VIEW.draw(GRAY, joints, {}, ["left_knee", "right_ankle"])
    assert at(drawn, torch.tensor([70.0, 30.0])) == (128, 128, 128)


def test_places_are_those_of_the_tensor() -> None:
    """The image is four times as large as the network's input: the center of pixel 10 is at 41.5."""
    joints = {"keypoints": torch.tensor([[10.0, 20.0]]), "scores": torch.ones(1)}
    drawn = np.asarray(VIEW.draw(GRAY, joints, {}, ["left_knee"], (50, 40)))
    rows, columns = np.nonzero((drawn == LEFT).all(-1))
    assert columns.mean() == pytest.approx(41.5, abs=0.6)
    assert rows.mean() == pytest.approx(81.5, abs=0.6)


def test_the_ground_truth_stands_beside_without_what_is_not_labeled() -> None:
    joints = {"keypoints": torch.tensor([[20.0, 30.0], [150.0, 30.0]]), "scores": torch.ones(2)}
    ground_truth = {"keypoints": torch.tensor([[60.0, 50.0], [90.0, 90.0]]), "labeled": torch.tensor([True, False])}
    drawn = VIEW.draw(GRAY, joints, ground_truth, ["right_knee", "left_knee"])
    left, right = np.asarray(drawn)[:, :200], np.asarray(drawn)[:, 204:]
    assert (left == RIGHT).all(-1).any()
    assert (left == LEFT).all(-1).any()
    assert (right == RIGHT).all(-1).any()
    assert not (right == LEFT).all(-1).any()


def test_joints_far_away_are_left_out() -> None:
    joints = {"keypoints": torch.tensor([[1e9, 0.0], [torch.nan, 3.0], [20.0, 20.0]]), "scores": torch.ones(3)}
    drawn = np.asarray(VIEW.draw(GRAY, joints, {}, ["left_hip", "left_knee", "left_ankle"]))
    assert 0 < (drawn == LEFT).all(-1).sum() < 100


def test_a_sheet_has_both_skeletons() -> None:
    ground_truth = {"keypoints": torch.full((16, 2), 30.0), "labeled": torch.ones(16, dtype=torch.bool)}
    drawn = VIEW.tile(Image.new("RGB", (64, 64)), spread(16, 64, 64), ground_truth, MPII_JOINTS)
    assert drawn.width == 2 * 256 + 4


def test_heatmaps_have_a_row_a_stack_and_are_red_at_the_peak() -> None:
    heatmaps = torch.zeros(2, 3, 8, 8)
    heatmaps[1, 2, 2, 5] = 1.0
    heatmaps[1, 2, 1:4, 4:7] = 1.0
    drawn = np.asarray(draw_heatmaps(Image.new("RGB", (64, 64), (90, 90, 90)), heatmaps, ["a", "b", "c"])).astype(int)
    red = (drawn[..., 0] > 100) & (drawn[..., 0] > drawn[..., 2] + 60)
    rows, columns = np.nonzero(red)
    step, cell = HEATMAP_TILE + 3, HEATMAP_TILE / 8
    assert rows.mean() == pytest.approx(18 + step + 2.5 * cell, abs=4)
    assert columns.mean() == pytest.approx(60 + 2 * step + 5.5 * cell, abs=4)


def test_records_are_in_the_pixels_of_the_file() -> None:
    prediction = {"keypoints": torch.tensor([[1.0, 2.0]]), "scores": torch.tensor([0.5])}
    matrix = torch.tensor([[2.0, 0.0, 10.0], [0.0, 2.0, -1.0]])
    moved = VIEW.to_original(prediction, {"to_original": matrix}, (1.0, 1.0))
    record = VIEW.record(moved, ["left_knee"], (1.0, 1.0))
    assert record == {"keypoints": [{"joint": "left_knee", "x": 12.0, "y": 3.0, "score": 0.5}]}
    assert VIEW.columns(record) == ["joint", "x", "y", "score"]
    assert VIEW.rows(record) == [["left_knee", "12.0", "3.0", "0.5"]]


TINY = ["--model", "StackedHourglass", "--model.num_stacks", "2", "--model.channels", "8", "--model.depth", "2"]
QUIET = [
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0",
    "--data.image_size", "64",
]  # fmt: skip


def test_a_run_leaves_skeletons_heatmaps_curves_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mpii(str(tmp_path / "mpii"), train=3, val=2, size=64)
    monkeypatch.chdir(tmp_path)
    cli.parser.run([
        "fit", *TINY, "--data", "MPII", *QUIET, "--data.root", "mpii", "--data.batch_size", "2",
        "--trainer.max_epochs", "1", "--trainer.enable_model_summary", "false", "--wandb.mode", "disabled",
        "--experiment", "r",
    ])  # fmt: skip
    (run,) = Path("runs/r").iterdir()
    names = {path.name.rpartition("_step=")[0] for path in (run / "figures").iterdir()}
    assert names == {"val", "val_heatmaps", "val_pckh"}
    with open(run / "per_joint_pckh_val.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["joint"] for row in rows] == MPII_JOINTS
    assert sum(int(row["instances"]) for row in rows) > 10

    # The checkpoint knows its joints where no dataset says them, and finds them in the file's own pixels.
    (tmp_path / "mine").mkdir()
    to_pil(torch.randint(0, 256, (3, 90, 150), dtype=torch.uint8)).save(tmp_path / "mine" / "wide.png")
    cli.parser.run([
        "predict", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), "--data", "MPII", "--data.images", "mine",
        *QUIET, "--experiment", "p",
    ])  # fmt: skip
    (predicted,) = Path("runs/p").iterdir()
    (line,) = json.loads((predicted / "predictions.json").read_text())
    assert [item["joint"] for item in line["keypoints"]] == MPII_JOINTS
    # The crop is the square of 150 pixels about the middle.
    assert all(-1 <= item["x"] <= 150 and -31 <= item["y"] <= 120 for item in line["keypoints"])
    xs = sorted(item["x"] for item in line["keypoints"])
    assert xs[-1] - xs[0] > 64 / 4  # not all in one place, so that the next line says something
    with open(predicted / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["x"]) for row in rows] == [item["x"] for item in line["keypoints"]]
    assert Image.open(predicted / line["annotated"]).size == (150, 90)
