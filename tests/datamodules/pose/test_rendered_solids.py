"""Rendered solids: projection, shading, sampling of rotations and batches."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from datamodules.base import Split
from datamodules.pose.rendered_solids import (
    CAMERA_DISTANCE,
    FILL_FRACTION,
    SOLIDS,
    RenderedSolids,
    Solid,
    render_solid,
)
from errors import DatasetError
from lightning_modules.pose.rotations import euler_to_matrix, geodesic_distance

WHITE, BLACK = np.full((6, 3), 255.0), np.zeros((96, 96, 3))
TO_CAMERA = np.array([0.0, 0.0, -1.0])


def turned(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """Return the rotation by angles in degrees."""
    return euler_to_matrix(torch.tensor([yaw, pitch, roll], dtype=torch.float64).deg2rad()).numpy()


def lit(rotation: np.ndarray, solid: Solid = "aeroplane", light: np.ndarray = TO_CAMERA) -> np.ndarray:
    return render_solid(rotation, solid, BLACK, WHITE, light)[..., 0]


def data(split: Split = "train", seed: int = 0, **options: int) -> torch.utils.data.DataLoader:
    return getattr(RenderedSolids(num_workers=0, seed=seed, batch_size=8, **options), f"{split}_dataloader")()  # type: ignore[arg-type]


def test_not_turned_an_aeroplane_is_seen_from_above_with_its_nose_to_the_right() -> None:
    seen = lit(turned()) > 0
    columns = np.flatnonzero(seen.any(0))
    assert columns[0] + columns[-1] == pytest.approx(95, abs=6)  # the fin is nearer
    wings, tail = seen[:, 48:58].any(1).sum(), seen[:, columns[0] + 3 : 25].any(1).sum()
    assert wings > 1.5 * tail > 1.5 * 10
    # To its right is down, and a quarter turn of yaw brings the nose there.
    assert (lit(turned(yaw=90)) > 0)[columns[-1] - 2, 46:50].any()
    assert not seen[columns[-1] - 2, 46:50].any()


@pytest.mark.parametrize("solid", SOLIDS)
def test_corners_of_boxes_are_where_the_camera_projects_them(solid: Solid) -> None:
    boxes = np.array(SOLIDS[solid]).reshape(-1, 3, 2)
    radius = np.linalg.norm(np.abs(boxes).max(-1), axis=-1).max()
    half = math.tan(math.asin(1 / CAMERA_DISTANCE)) / FILL_FRACTION
    for angles in ((30, 20, 10), (200, -60, 100), (-70, 45, 250)):
        rotation = turned(*angles)
        corners = np.stack(np.meshgrid(*np.eye(2), indexing="ij"), -1)
        corners = np.concatenate(
            [[[b[0, i], b[1, j], b[2, k]] for i in (0, 1) for j in (0, 1) for k in (0, 1)] for b in boxes]
        )
        camera = corners @ rotation.T / radius + [0, 0, CAMERA_DISTANCE]
        pixels = (camera[:, :2] / camera[:, 2:] / half + 1) / 2 * 96 - 0.5
        rows, columns = np.nonzero(lit(rotation, solid) > 0)
        for axis, found in ((0, columns), (1, rows)):
            assert found.min() == pytest.approx(pixels[:, axis].min(), abs=1)
            assert found.max() == pytest.approx(pixels[:, axis].max(), abs=1)


def test_each_direction_has_its_color() -> None:
    """The most frequent color is that of the face that points to the camera."""
    colors = np.eye(6, 3) * 150 + 20 * np.arange(6)[:, None]
    for i, (axis, sign) in enumerate(itertools.product(range(3), (-1, 1))):
        toward = Rotation.align_vectors([TO_CAMERA], [sign * np.eye(3)[axis]])[0].as_matrix()
        seen = render_solid(toward, "chair", BLACK, colors, TO_CAMERA)
        values, counts = np.unique(seen[seen.sum(-1) > 0].round(3), axis=0, return_counts=True)
        np.testing.assert_allclose(values[counts.argmax()], colors[i], atol=0.01)


def test_every_rotation_lies_within_the_image() -> None:
    loader = data("val", val_size=90)
    for solid in SOLIDS:
        for batch in list(loader)[:5]:
            for rotation in batch["rotation"].numpy():
                seen = lit(rotation, solid)
                assert seen[1:-1, 1:-1].sum() == seen.sum() > 0


def test_faces_are_shaded_by_lamberts_law() -> None:
    for angle in (0, 30, 60, 80):
        light = np.array([math.sin(math.radians(angle)), 0.0, -math.cos(math.radians(angle))])
        # The middle of the seat of a chair that is seen from above looks into the camera.
        seen = lit(turned(), "chair", light)[48, 48]
        assert seen == pytest.approx(255 * (0.35 + 0.65 * math.cos(math.radians(angle))), abs=0.5)
    assert lit(turned(), "chair", -TO_CAMERA)[48, 48] == pytest.approx(255 * 0.35, abs=0.5)


def seen_by_one_ray(rotation: np.ndarray, solid: Solid, x: float, y: float, light: np.ndarray) -> float:
    """Return the brightness of the nearest face on the ray (x, y, 1), face by face in camera axes."""
    boxes = np.array(SOLIDS[solid]).reshape(-1, 3, 2)
    radius = np.linalg.norm(np.abs(boxes).max(-1), axis=-1).max()
    middle, ray = np.array([0, 0, CAMERA_DISTANCE * radius]), np.array([x, y, 1.0])
    nearest, bright = math.inf, 0.0
    for box in boxes:
        for axis in range(3):
            for end, sign in ((0, -1), (1, 1)):
                normal = sign * rotation[:, axis]
                if normal @ ray >= 0:
                    continue
                depth = (normal @ middle + sign * box[axis, end]) / (normal @ ray)
                at = (depth * ray - middle) @ rotation
                inside = all(box[k, 0] <= at[k] <= box[k, 1] for k in range(3) if k != axis)
                if inside and depth < nearest:
                    nearest, bright = depth, 255 * (0.35 + 0.65 * max(0.0, normal @ light))
    return bright


@pytest.mark.parametrize("solid", SOLIDS)
def test_against_one_ray_after_the_other(solid: Solid) -> None:
    rng = np.random.default_rng(0)
    light = np.array([0.5, -0.7, -0.6]) / np.linalg.norm([0.5, -0.7, -0.6])
    half = math.tan(math.asin(1 / CAMERA_DISTANCE)) / FILL_FRACTION
    for _ in range(4):
        rotation = turned(*rng.uniform(-180, 180, 3))
        drawn = lit(rotation, solid, light)
        for row, column in rng.integers(20, 76, (40, 2)):
            rays = [((column + i) / 48 - 1, (row + j) / 48 - 1) for i in (0.25, 0.75) for j in (0.25, 0.75)]
            expected = np.mean([seen_by_one_ray(rotation, solid, x * half, y * half, light) for x, y in rays])
            assert drawn[row, column] == pytest.approx(expected, abs=0.05)


def test_no_two_rotations_look_alike() -> None:
    turns = Rotation.create_group("O").as_matrix()
    assert len(turns) == 24
    for solid in SOLIDS:
        looks = [lit(turn, solid, np.array([0.3, -0.8, -0.5])) for turn in turns]
        apart = [np.abs(a - b).mean() for i, a in enumerate(looks) for b in looks[:i]]
        assert min(apart) > 1, solid


def test_training_images_are_new_in_every_epoch_and_evaluation_images_are_fixed() -> None:
    dataset = data(train_size=16).dataset
    first, again, later = dataset[0, 3, 0], dataset[0, 3, 0], dataset[1, 3, 0]  # type: ignore[index]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["rotation"], again["rotation"])
    assert float(geodesic_distance(first["rotation"], later["rotation"])) > 1e-3
    for split in ("val", "test"):
        one, other = data(split, seed=0).dataset[0, 5, 0], data(split, seed=1).dataset[0, 5, 0]  # type: ignore[index, arg-type]
        assert torch.equal(one["image"], other["image"])
        assert float(geodesic_distance(one["rotation"], dataset[0, 5, 0]["rotation"])) > 1e-3  # type: ignore[index]
    assert not torch.equal(data("val").dataset[0, 5, 0]["image"], data("test").dataset[0, 5, 0]["image"])  # type: ignore[index]


def test_batches_follow_the_contract() -> None:
    batch = next(iter(data("val", image_size=40)))
    assert batch["image"].shape == (8, 3, 40, 40)
    assert batch["image"].dtype == torch.uint8
    assert batch["rotation"].shape == (8, 3, 3)
    assert batch["rotation"].dtype == torch.float32
    torch.testing.assert_close(batch["rotation"].mT @ batch["rotation"], torch.eye(3).expand(8, 3, 3))
    assert batch["id"][:3] == ["val/0, aeroplane", "val/1, chair", "val/2, corner"]


def test_rotations_prefer_no_direction() -> None:
    dataset = data("train", train_size=3000, image_size=16).dataset
    drawn = torch.stack([dataset[0, i, 0]["rotation"] for i in range(1500)])  # type: ignore[index]
    torch.testing.assert_close(drawn.mean(0), torch.zeros(3, 3), atol=0.06, rtol=0)
    # Evenly drawn angles have the density (1 - cos t) / pi, of mean pi / 2 + 2 / pi.
    angles = geodesic_distance(torch.eye(3).expand_as(drawn), drawn)
    assert float(angles.mean()) == pytest.approx(math.pi / 2 + 2 / math.pi, abs=0.06)


def test_prediction_uses_the_center_square(tmp_path: Path) -> None:
    Image.new("RGB", (90, 50), (200, 0, 0)).save(tmp_path / "a.png")
    module = RenderedSolids(images=str(tmp_path), num_workers=0)
    (batch,) = module.predict_dataloader()
    assert batch["image"].shape == (1, 3, 64, 64)
    with pytest.raises(DatasetError, match="expected an image or a folder to predict"):
        RenderedSolids().dataset("predict")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solids": []}, "solids: expected some of aeroplane, chair, corner, each once, found \\[\\]"),
        ({"solids": ["cube"]}, "found \\['cube'\\]"),
        ({"solids": ["chair", "chair"]}, "each once"),
        ({"coloring": "stripes"}, "coloring: expected per_face or uniform, found stripes"),
        ({"image_size": 8}, "image_size: expected at least 16, found 8"),
        ({"val_size": 0}, "val_size: expected at least 1, found 0"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RenderedSolids(**options)
