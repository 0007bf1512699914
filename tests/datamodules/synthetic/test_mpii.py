"""The drawn people: MPII's layout, joints on the bodies, left and right by what is seen, and not easy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat

from datamodules.images import read_image
from datamodules.pose.joints import MPII_JOINTS
from datamodules.pose.mpii import MPII
from datamodules.synthetic.__main__ import main
from datamodules.synthetic.drawing import background
from datamodules.synthetic.mpii import (
    HIP,
    LEFT,
    NECK,
    PARTS_AT,
    RIGHT,
    SHOULDER,
    TOP,
    Canvas,
    draw_person,
    draw_scene,
    pose,
    turn,
    write_mpii,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mpii")
    assert write_mpii(str(folder), train=60, val=20, size=64) == MPII_JOINTS
    return folder


def test_the_release_is_read_as_the_real_one_is(root: Path) -> None:
    content = loadmat(str(root / "mpii_human_pose_v1_u12_1.mat"), squeeze_me=True, struct_as_record=False)
    release = content["RELEASE"]
    assert len(release.annolist) == len(release.img_train) == len(release.single_person) == 82
    assert release.img_train.tolist() == [1] * 80 + [0] * 2
    marks, lengths, objpos, order = set(), set(), set(), set()
    for annotation in release.annolist[:80]:
        height, width = read_image(str(root / "images" / annotation.image.name)).shape[:2]
        for rect in np.atleast_1d(annotation.annorect):
            objpos.add(type(rect.objpos).__name__)
            found = np.atleast_1d(rect.annopoints.point)
            lengths.add(len(found))
            order.add([p.id for p in found] == sorted(p.id for p in found))
            for p in found:
                marks.add(type(p.is_visible).__name__ + (str(p.is_visible) if p.id not in (NECK, TOP) else ""))
                assert 0.5 <= p.x <= width + 0.5
                assert 0.5 <= p.y <= height + 0.5
    assert marks == {"int0", "int1", "str0", "str1", "ndarray"}
    assert {"ndarray", "mat_struct"} == objpos
    assert False in order
    assert max(lengths) == 16
    assert min(lengths) < 14, "borders and objects take joints away"
    assert not hasattr(np.atleast_1d(release.annolist[80].annorect)[0], "annopoints")


def test_it_is_data_to_train_on(root: Path) -> None:
    data = MPII(str(root), image_size=64, num_workers=0, batch_size=8)
    train, val = data.people("train"), data.people("val")
    assert 80 < len(train) < 180
    assert 20 <= len(val) < 70
    assert len(train.images) >= 57
    assert np.isfinite(train.head_size).all()
    stature = train.side / 1.25
    assert 0.09 < np.median(train.head_size / stature) < 0.15, "MPII's heads are about an eighth of a person"
    inside = np.abs(train.keypoints - train.center[:, None]).max(-1) < train.side[:, None] / 2
    assert inside[train.labeled].mean() > 0.97
    assert next(iter(data.train_dataloader()))["image"].shape == (8, 3, 64, 64)


def test_joints_lie_on_their_bodies() -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        canvas, body = Canvas(np.zeros((200, 200, 3))), pose(rng)
        at = np.array([100.0, 100])
        draw_person(canvas, body, at, 100, 1, rng)
        points = np.rint(at + 100 * body.joints[:, :2]).astype(int)
        for joint, (x, y) in enumerate(points):
            # Where another part hides it, it is still this person that is seen.
            assert canvas.owner[y, x] // 100 == 1 or joint == TOP, (seed, MPII_JOINTS[joint])
        parts = [canvas.owner[y, x] % 100 in PARTS_AT[j] for j, (x, y) in enumerate(points)]
        assert np.mean(parts) > 0.3


def test_left_and_right_are_the_persons_own() -> None:
    """Whoever faces the viewer has the right shoulder on the left of the image; from behind it is the other way."""
    sides, both = [], []
    for seed in range(300):
        body = pose(np.random.default_rng(seed))
        up = body.joints[NECK] - (body.joints[HIP[RIGHT]] + body.joints[HIP[LEFT]]) / 2
        if abs(body.front[2]) < 0.3 or up[1] > -0.15:
            continue
        right = body.joints[SHOULDER[RIGHT], 0] < body.joints[SHOULDER[LEFT], 0]
        sides.append(right == (body.front[2] > 0))
        both.append(body.front[2] > 0)
    assert len(sides) > 80
    assert np.mean(sides) > 0.97
    assert 0.3 < np.mean(both) < 0.7


def test_limbs_keep_their_lengths_and_turns_are_rotations() -> None:
    for axis in "xyz":
        matrix = turn(axis, 33)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1)
    np.testing.assert_allclose(turn("z", 90) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    for seed in range(20):
        joints = pose(np.random.default_rng(seed)).joints
        lengths = [
            np.linalg.norm(joints[a] - joints[b]) for a, b in ((0, 1), (5, 4), (1, 2), (10, 11), (14, 13), (8, 9))
        ]
        np.testing.assert_allclose(lengths, [0.24, 0.24, 0.24, 0.15, 0.17, 0.15])


def test_the_mean_pose_is_far_from_right(root: Path) -> None:
    """What a method reaches that does not look at the images: PCKh at 0.5 of the training set's mean."""
    data = MPII(str(root))
    train, val = data.people("train"), data.people("val")

    def normalized(people: object) -> np.ndarray:
        return (people.keypoints - people.center[:, None]) / people.side[:, None, None]  # type: ignore[attr-defined]

    mean = np.stack([normalized(train)[train.labeled[:, j], j].mean(0) for j in range(16)])
    error = np.linalg.norm((normalized(val) - mean) * val.side[:, None, None], axis=-1) / val.head_size[:, None]
    right = (error <= 0.5)[val.labeled]
    assert right.mean() < 0.3
    limbs = [j for j, name in enumerate(MPII_JOINTS) if "wrist" in name or "ankle" in name]
    assert (error <= 0.5)[:, limbs][val.labeled[:, limbs]].mean() < 0.15


def test_people_hide_and_cut_each_other_off() -> None:
    scenes = [draw_scene(64, np.random.default_rng((1, i))) for i in range(40)]
    counts = [len(people) for _, people in scenes]
    assert set(counts) == {1, 2, 3, 4}
    everyone = [person for _, people in scenes for person in people]
    visible = np.mean([person.visible.mean() for person in everyone])
    assert 0.4 < visible < 0.9
    cut = [
        ((p.points < -0.5) | (p.points > np.array(picture.shape[1::-1]) - 0.5)).any()
        for picture, people in scenes
        for p in people
    ]
    assert 0.05 < np.mean(cut) < 0.6
    assert all(picture.dtype == np.uint8 and min(picture.shape[:2]) == 64 for picture, _ in scenes)


def test_pictures_are_a_function_of_the_arguments(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_mpii(str(tmp_path / name), train=3, val=2, size=48, seed=seed)
    files = {name: [path.read_bytes() for path in sorted((tmp_path / name / "images").iterdir())] for name in "abc"}
    assert files["a"] == files["b"]
    assert not set(files["a"]) & set(files["c"])
    a, b = (MPII(str(tmp_path / name)).people("train") for name in "ab")
    np.testing.assert_array_equal(a.keypoints, b.keypoints)
    assert len({path.read_bytes() for path in (tmp_path / "a" / "images").iterdir()}) == 7


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--train", "2", "--val", "1", "--size", "32"]
    assert main(["mpii", str(tmp_path / "x"), *small]) == 0
    assert "images: 5 files" in capsys.readouterr().out
    assert main(["mpii", str(tmp_path / "x"), "--size", "8"]) == 2
    assert "size: expected 32 to 1024, found 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["mpii", str(tmp_path / "x"), *small, "--classes", "2"])
    assert "mpii has no --classes" in capsys.readouterr().err


def test_a_canvas_clips_what_is_outside() -> None:
    canvas = Canvas(background(20, 30, np.random.default_rng(0)))
    before = canvas.pixels.copy()
    canvas.capsule(np.array([-50.0, 5]), np.array([-40.0, 5]), 3, 3, np.array([255.0, 0, 0]))
    assert (canvas.pixels == before).all()
    canvas.capsule(np.array([-5.0, 10]), np.array([40.0, 10]), 3, 3, np.array([255.0, 0, 0]), owner=107)
    assert (canvas.owner[8:13] == 107).all()
    assert (canvas.owner[:6] == 0).all()
