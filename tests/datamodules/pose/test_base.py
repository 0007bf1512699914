"""Pose samples: keypoints and pixels stay aligned in crops and full images, and map back to the original."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.base import Split
from datamodules.pose.base import PoseData, PoseDataset, joint_boxes
from datamodules.pose.crops import FullImage, PersonCrop, apply_affine, crop_matrix
from datamodules.pose.people import People, Person
from errors import DatasetError, UserError
from tests.datamodules.pose.spots import center_of_mass, spots

NAMES = ["right_wrist", "head_top", "left_wrist", "left_eye"]


class Spots(PoseData):
    """Images with a white spot at each joint."""

    joint_names = NAMES

    def __init__(self, root: str | None, people: list[Person] | None = None, **options: Any) -> None:
        super().__init__(root, **{"image_size": 64, "num_workers": 0, "batch_size": 4, "seed": 0, **options})
        self.given = people or []

    def people(self, split: Split) -> People:
        return People.pack(self.given, len(NAMES), Counter())


def person(image: str, points: np.ndarray, center: tuple[float, float], side: float, number: int = 0) -> Person:
    return Person(image, number, center, side, points, np.isfinite(points).all(1), 10.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    people = []
    for i in range(6):
        points = np.array([[60, 40], [100, 30], [70, 90], [110, 85]]) + rng.uniform(-8, 8, (4, 2))
        spots(tmp_path / f"{i}.jpg", points, (130, 170), 5)
        people.append(person(f"{i}.jpg", points, (84 + i, 62), 110 + 3 * i))
    Spots.sample = people  # type: ignore[attr-defined]
    return tmp_path


def sample() -> list[Person]:
    return Spots.sample  # type: ignore[attr-defined]


# --- samples ----------------------------------------------------------------------------------------------------------


def test_joints_come_back_to_where_they_were(root: Path) -> None:
    """Scale, rotation and flip are inverted to 0.001 px in float32; flips exchange left and right."""
    data = Spots(str(root), sample(), scale=0.25, rotation=30, hflip=0.5)
    loader = data.train_dataloader()
    flips, angles, scales = [], [], []
    for epoch in range(30):
        loader.sampler.epoch = epoch  # type: ignore[attr-defined]
        for batch in torch.utils.data.DataLoader(
            loader.dataset, batch_size=3, sampler=loader.sampler, collate_fn=loader.collate_fn
        ):
            matrix = batch["to_original"]
            back = (batch["keypoints"] @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]).numpy()
            for i, name in enumerate(batch["id"]):
                expected = sample()[int(name[0])].keypoints
                linear = matrix[i, :, :2].double()
                flip = bool(torch.det(linear) < 0)
                np.testing.assert_allclose(back[i], expected[[2, 1, 0, 3] if flip else [0, 1, 2, 3]], atol=1e-3)
                flips.append(flip)
                scales.append(float(torch.det(linear).abs().sqrt() * 64 / sample()[int(name[0])].side))
                angles.append(float(torch.atan2(linear[0, 1], linear[1, 1]).rad2deg()))
    assert 0.35 < np.mean(flips) < 0.65
    assert 0.45 < np.mean(np.abs(angles) < 1e-3) < 0.75, "60% are not rotated"
    assert 40 < np.abs(angles).max() < 60.01
    assert 0.7 < min(scales) < 0.8 < 1.25 < max(scales) < 1.42


def test_random_translation_is_uniform_and_of_the_crop_only(root: Path) -> None:
    """Offsets along x and y are independent, up to 0.2 of a crop of 64 px; another epoch draws others."""
    data = Spots(str(root), sample(), scale=0.0, rotation=0.0, hflip=0.0, translation=0.2)
    loader, shifts = data.train_dataloader(), []
    for epoch in range(60):
        loader.sampler.epoch = epoch  # type: ignore[attr-defined]
        for batch in torch.utils.data.DataLoader(
            loader.dataset, batch_size=3, sampler=loader.sampler, collate_fn=loader.collate_fn
        ):
            for i, name in enumerate(batch["id"]):
                person = sample()[int(name[0])]
                middle = batch["to_original"][i] @ torch.tensor([31.5, 31.5, 1.0])
                shifts.append((middle.numpy() - person.center) / person.side)
    found = np.array(shifts)
    assert np.abs(found).max() <= 0.2
    np.testing.assert_allclose(found.min(0), -0.2, atol=0.01)
    np.testing.assert_allclose(found.std(0), 0.2 / 3**0.5, rtol=0.1)
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.2
    evaluation = next(iter(data.val_dataloader()))["to_original"] @ torch.tensor([31.5, 31.5, 1.0])
    np.testing.assert_allclose(evaluation.numpy(), [person.center for person in sample()[:4]], atol=1e-3)
    with pytest.raises(UserError, match="translation: expected 0 with crop image, found 0.2"):
        Spots(str(root), sample(), crop="image", translation=0.2)
    with pytest.raises(UserError, match="translation: expected 0 to 0.5"):
        Spots(str(root), sample(), translation=0.7)


def test_the_spots_are_under_the_joints(root: Path) -> None:
    data = Spots(str(root), sample(), image_size=128, color_jitter=0.2)
    batch = next(iter(data.train_dataloader()))
    seen = 0
    for image, keypoints in zip(batch["image"], batch["keypoints"], strict=True):
        for at in keypoints:
            if at.min() > 9 and at.max() < 118:
                np.testing.assert_allclose(center_of_mass(image, at, 8), at.numpy(), atol=0.25)
                seen += 1
    assert seen > 8


def test_a_batch_follows_the_contract(root: Path) -> None:
    people = sample()
    people[0] = people[0]._replace(keypoints=np.vstack([people[0].keypoints[:3], [[np.nan, 5]]]))
    people[1] = people[1]._replace(labeled=np.array([True, False, True, True]), head_size=float("nan"))
    batch = next(iter(Spots(str(root), people).val_dataloader()))
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].shape == (4, 3, 64, 64)
    assert batch["keypoints"].dtype == batch["head_size"].dtype == batch["to_original"].dtype == torch.float32
    assert batch["keypoints"].shape == (4, 4, 2)
    assert batch["to_original"].shape == (4, 2, 3)
    assert batch["id"] == ["0.jpg#0", "1.jpg#0", "2.jpg#0", "3.jpg#0"]
    assert batch["labeled"].tolist() == [[True] * 3 + [False], [True, False, True, True], [True] * 4, [True] * 4]
    assert (batch["keypoints"][~batch["labeled"]] == 0).all(), "also where the file has no number"
    assert batch["head_size"].isnan().tolist() == [False, True, False, False]


def test_samples_are_a_function_of_seed_epoch_and_index(root: Path) -> None:
    def batches(seed: int, workers: int, epoch: int) -> list[dict[str, Any]]:
        loader = Spots(str(root), sample(), seed=seed, num_workers=workers).train_dataloader()
        loader.sampler.epoch = epoch  # type: ignore[attr-defined]
        return sorted(
            ({k: v[i] for k, v in batch.items()} for batch in loader for i in range(len(batch["id"]))),
            key=lambda one: one["id"],
        )

    first, same = batches(0, 0, 1), batches(0, 2, 1)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, same, strict=True))
    assert all(torch.equal(a["to_original"], b["to_original"]) for a, b in zip(first, same, strict=True))
    for other in (batches(0, 0, 2), batches(1, 0, 1)):
        assert not any(torch.equal(a["to_original"], b["to_original"]) for a, b in zip(first, other, strict=True))


def test_evaluation_is_not_random(root: Path) -> None:
    dataset = Spots(str(root), sample()).dataset("val")
    random.seed(1)
    a = dataset[2]
    random.seed(2)
    b = dataset[2]
    assert torch.equal(a["image"], b["image"])
    expected = crop_matrix(sample()[2].center, sample()[2].side, 64)
    np.testing.assert_allclose(a["keypoints"], apply_affine(sample()[2].keypoints, expected), atol=1e-4)


# --- full images ----------------------------------------------------------------------------------------------------


def test_full_images_have_all_their_people(root: Path) -> None:
    people = [
        sample()[0],
        sample()[0]._replace(number=1, keypoints=sample()[0].keypoints + np.array([3, 4])),
        sample()[1],
    ]
    data = Spots(str(root), people, crop="image", image_size=None, color_jitter=0)
    dataset = data.dataset("val")
    assert len(dataset) == 2  # type: ignore[arg-type]
    batch = next(iter(data.val_dataloader()))
    assert [len(target["boxes"]) for target in batch["target"]] == [2, 1]
    target = batch["target"][0]
    assert target["labels"].tolist() == [0, 0]
    assert target["labels"].dtype == torch.int64
    assert target["boxes"].dtype == target["keypoints"].dtype == target["head_size"].dtype == torch.float32
    assert target["labeled"].dtype == torch.bool
    np.testing.assert_allclose(target["keypoints"][0], sample()[0].keypoints, atol=1e-4)
    assert batch["to_original"].shape == (2, 2, 3)
    assert batch["id"] == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("size", [100, (90, 400), None])
def test_resized_and_flipped_images(root: Path, flip: float, size: Any) -> None:
    data = Spots(str(root), sample(), crop="image", image_size=size, hflip=flip, color_jitter=0)
    one = data.dataset("train")[3]
    assert tuple(one["image"].shape[1:]) == {100: (76, 100), (90, 400): (90, 118), None: (130, 170)}[size]
    keypoints = one["target"]["keypoints"][0]
    for at in keypoints:
        np.testing.assert_allclose(center_of_mass(one["image"], at, 6), at.numpy(), atol=0.15)
    back = apply_affine(keypoints.numpy(), one["to_original"].numpy())
    np.testing.assert_allclose(back, sample()[3].keypoints[[2, 1, 0, 3] if flip else [0, 1, 2, 3]], atol=1e-3)


def test_boxes_of_joints() -> None:
    points = np.array([[[10.0, 20], [50, 40], [999, 999]], [[-8.0, 5], [4, 45], [0, 0]]])
    labeled = np.array([[True, True, False], [True, True, False]])
    boxes = joint_boxes(points, labeled, 50, 100)
    # The margin is 0.15 of the longer side plus half a pixel.
    np.testing.assert_allclose(boxes[0], [10 - 6, 20 - 6, 51 + 6, 41 + 6], atol=1e-4)
    np.testing.assert_allclose(boxes[1], [0, 0, 4 + 1 + 6, 50], atol=1e-4)
    assert joint_boxes(np.zeros((0, 3, 2)), np.zeros((0, 3), bool), 5, 5).shape == (0, 4)


def test_people_outside_the_image_are_not_trained_on(root: Path) -> None:
    people = [sample()[0], sample()[0]._replace(number=1, keypoints=sample()[0].keypoints + 400)]
    data = Spots(str(root), people, crop="image", image_size=None)
    assert len(data.dataset("train")[0]["target"]["boxes"]) == 1
    assert len(data.dataset("val")[0]["target"]["boxes"]) == 2


# --- prediction and errors --------------------------------------------------------------------------------------------


def test_prediction_takes_each_image_as_a_person(root: Path) -> None:
    batch = next(iter(Spots(None, images=str(root)).predict_dataloader()))
    assert batch["image"].shape == (4, 3, 64, 64)
    corners = apply_affine(np.array([[-0.5, 31.5], [63.5, 31.5]]), batch["to_original"][0].numpy())
    np.testing.assert_allclose(corners, [[-0.5, 64.5], [169.5, 64.5]], atol=1e-3)
    full = next(iter(Spots(None, images=str(root), crop="image", image_size=None).predict_dataloader()))
    assert full["image"].shape == (4, 3, 130, 170)
    assert set(full) == {"image", "to_original", "id"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size: expected one side of at least 1 px for person crops, found 0"),
        ({"image_size": None}, "image_size: expected one side of at least 1 px for person crops, found None"),
        ({"scale": -1}, "scale: expected 0 to 2"),
        ({"rotation": 100}, "rotation: expected 0 to 90 degrees, found 100"),
        ({"hflip": 2}, "hflip: expected a probability, found 2"),
        ({"color_jitter": 3, "crop": "image"}, "color_jitter: expected 0 to 1, found 3"),
        ({"image_size": (0, 5), "crop": "image"}, "image_size: expected at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spots("x", **options)


def test_a_missing_image_or_root_is_one_line(root: Path) -> None:
    (root / "3.jpg").unlink()
    for build in (
        lambda: Spots(str(root), sample()).dataset("val"),
        lambda: Spots(str(root)).dataset("val"),
        lambda: Spots(None, sample()).dataset("train"),
    ):
        with pytest.raises(
            DatasetError, match=r"found none of 1 image \(3.jpg\)|expected people in val|expected a dataset"
        ) as e:
            build()
        assert "\n" not in str(e.value)


def test_a_joint_far_away_is_counted_and_kept(root: Path) -> None:
    people = sample()
    people[2] = people[2]._replace(keypoints=people[2].keypoints + np.array([[0, 0], [900, 0], [0, 0], [0, 0]]))
    data = Spots(str(root), people)
    with pytest.warns(
        UserWarning, match=r"val: kept 1 person \(2.jpg#0\) with a joint more than 2 crop sides from the center"
    ):
        dataset = data.dataset("val")
    one = dataset[2]
    assert one["labeled"].all()
    assert one["keypoints"][1, 0] > 300


def test_the_dataset_is_usable_alone(root: Path) -> None:
    people = People.pack(sample(), len(NAMES), Counter())
    assert len(PoseDataset(str(root), people, NAMES, PersonCrop(32))) == 6
    assert PoseDataset(str(root), people, NAMES, FullImage(40))[5]["image"].shape == (3, 31, 40)
