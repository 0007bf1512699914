"""MPII: irregularities of the release, conversions, held-out people and invalid files."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from datamodules.pose.crops import apply_affine
from datamodules.pose.joints import MPII_JOINTS, flip_indices
from datamodules.pose.mpii import MPII
from datamodules.pose.mpii_annotations import read_head_sizes, read_release
from datamodules.synthetic.mpii import write_mpii
from errors import DatasetError

SHARED = Path(__file__).parents[4] / "shared" / "data"
EMPTY = np.zeros((0, 0))


def structs(rows: list[dict[str, Any]]) -> np.ndarray:
    """A MATLAB struct array."""
    array = np.zeros(len(rows), [(name, object) for name in rows[0]])
    for place, row in zip(array, rows, strict=True):
        for name, value in row.items():
            place[name] = value
    return array


def point(joint: int, x: float, y: float, **more: Any) -> dict[str, Any]:
    return {"x": x, "y": y, "id": joint, **more}


def rect(points: Any = None, **changes: Any) -> dict[str, Any]:
    if points is None:
        points = [point(9, 51, 21, is_visible=EMPTY), point(0, 41, 101, is_visible=1)]
    full = {
        "x1": 45, "y1": 20, "x2": 57, "y2": 36, "annopoints": {"point": structs(points)} if points else EMPTY,
        "scale": 0.5, "objpos": {"x": 50, "y": 60},
    }  # fmt: skip
    return {name: value for name, value in {**full, **changes}.items() if value is not None}


def release(folder: Path, annorects: list[Any], training: list[int] | None = None, name: str = "RELEASE") -> Path:
    """Write the release and one image per annorect; "absent" omits the field."""
    (folder / "images").mkdir(exist_ok=True)
    pictures = [{"image": {"name": f"{i:03d}.jpg"}, "annorect": rects} for i, rects in enumerate(annorects)]
    for picture in pictures:
        cv2.imwrite(str(folder / "images" / picture["image"]["name"]), np.zeros((8, 9), np.uint8))
    if isinstance(annorects[0], str):
        pictures = [{"image": {"name": "000.jpg"}}]
    path = folder / "mpii_human_pose_v1_u12_1.mat"
    img_train = np.array(training or [1] * len(pictures), np.uint8)
    savemat(path, {name: {"annolist": structs(pictures), "img_train": img_train, "version": "12"}})
    return path


def only(folder: Path, annorect: Any) -> list[Any]:
    """Read a release with one image and this annorect."""
    return read_release(str(release(folder, [annorect])))[0]


def module(root: Any, **options: Any) -> MPII:
    return MPII(str(root), **{"image_size": 64, "num_workers": 0, "batch_size": 4, **options})


# --- the release's irregularities -------------------------------------------------------------------------------------


def test_files_count_from_one_and_we_from_zero(tmp_path: Path) -> None:
    (person, missing), *_ = only(tmp_path, structs([rect()]))
    assert missing == ""
    assert person.image == "images/000.jpg"
    assert person.keypoints[9].tolist() == [50, 20]
    assert person.keypoints[0].tolist() == [40, 100]
    assert np.flatnonzero(person.labeled).tolist() == [0, 9]
    assert person.center == (49, 59 + 15 * 0.5), "the authors' crop lies 15 * scale lower"
    assert person.side == 200 * 0.5 * 1.25
    assert person.head_size == pytest.approx(0.6 * 20)


@pytest.mark.parametrize("mark", [1, 0, "1", "0", EMPTY, "absent"])
def test_a_joint_is_labeled_whatever_its_mark(tmp_path: Path, mark: Any) -> None:
    """Hidden joints are annotated and evaluated."""
    more = {} if isinstance(mark, str) and mark == "absent" else {"is_visible": mark}
    (person, missing), *_ = only(tmp_path, structs([rect([point(5, 3, 4, **more), point(2, 7.5, 8, **more)])]))
    assert missing == ""
    assert np.flatnonzero(person.labeled).tolist() == [2, 5]
    assert person.keypoints[2].tolist() == [6.5, 7]


def test_ids_come_in_any_order_and_any_number(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(16).tolist()
    (person, _), *_ = only(tmp_path, structs([rect([point(j, 10 + j, 30 + j, is_visible=1) for j in order])]))
    assert person.labeled.all()
    np.testing.assert_array_equal(person.keypoints, np.stack([9 + np.arange(16.0), 29 + np.arange(16.0)], 1))
    (person, _), *_ = only(tmp_path, structs([rect([point(7, 0.25, 1, is_visible=1)])]))
    assert np.flatnonzero(person.labeled).tolist() == [7], "one point is a bare struct; and x <= 1 is annotated"
    assert person.keypoints[7].tolist() == [-0.75, 0]


@pytest.mark.parametrize(("annorect", "people"), [(EMPTY, 0), ("absent", 0), (rect(), 1), (structs([rect()] * 3), 3)])
def test_annorect_is_absent_empty_scalar_or_an_array(tmp_path: Path, annorect: Any, people: int) -> None:
    assert len(only(tmp_path, annorect)) == people


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"annopoints": EMPTY}, "joints"),
        ({"annopoints": None}, "joints"),
        ({"annopoints": {"point": EMPTY}}, "joints"),
        ({"objpos": EMPTY}, "objpos or scale"),
        ({"objpos": None}, "objpos or scale"),
        ({"scale": EMPTY}, "objpos or scale"),
        ({"scale": None}, "objpos or scale"),
        ({"scale": 0}, "objpos or scale"),
        ({"scale": None, "objpos": None, "annopoints": None}, "objpos or scale"),
    ],
)
def test_a_person_without_an_annotation_is_skipped_for_it(
    tmp_path: Path, changes: dict[str, Any], missing: str
) -> None:
    # Alone, and next to a person with all fields, so that the field exists and is empty.
    assert only(tmp_path, structs([rect(**changes)]))[0].missing == missing
    if all(value is not None for value in changes.values()):
        found = only(tmp_path, structs([rect(), rect(**changes)]))
        assert [item.missing for item in found] == ["", missing]
        assert [item.person.number for item in found] == [0, 1]


@pytest.mark.parametrize("changes", [{"x1": None}, {"x2": EMPTY, "y2": EMPTY}, {"x2": 45, "y2": 20}])
def test_a_person_without_head_box_is_trained_on_but_not_measured(tmp_path: Path, changes: dict[str, Any]) -> None:
    release(tmp_path, [structs([rect()]), structs([rect(**changes)]), structs([rect()]), structs([rect(**changes)])])
    (tmp_path / "val.txt").write_text("000.jpg\n001.jpg\n")
    data = module(tmp_path)
    assert len(data.people("train")) == 2
    assert np.isnan(data.people("train").head_size).tolist() == [False, True]
    with pytest.warns(UserWarning, match="^val: 1 people; skipped 1: 1 without a head box$"):
        assert len(data.dataset("val")) == 1  # type: ignore[arg-type]


def test_other_sets_of_fields(tmp_path: Path) -> None:
    extra = {"part_occ1": EMPTY, "head_r11": "0.98", "torso_r33": "1"}
    assert only(tmp_path, structs([rect(**extra)]))[0].missing == ""
    test = [structs([{"scale": 1.0, "objpos": {"x": 3, "y": 4}}]), structs([rect()])]
    assert list(read_release(str(release(tmp_path, test, [0, 1])))) == [1], "test images have no joints"


def test_skipped_people_are_counted_in_one_line(tmp_path: Path) -> None:
    people = [rect(), rect(annopoints=EMPTY), rect(scale=EMPTY), rect(objpos=EMPTY), rect(annopoints=EMPTY)]
    release(tmp_path, [structs(people), structs([rect()])])
    (tmp_path / "val.txt").write_text("images/001.jpg\n")
    expected = "^train: 1 people; skipped 4: 2 without joints, 2 without objpos or scale$"
    with pytest.warns(UserWarning, match=expected):
        assert len(module(tmp_path).dataset("train")) == 1  # type: ignore[arg-type]


def test_no_people_at_all(tmp_path: Path) -> None:
    release(tmp_path, [structs([rect(scale=EMPTY)]), structs([rect()])])
    (tmp_path / "val.txt").write_text("001.jpg\n")
    with (
        pytest.warns(UserWarning, match="skipped 1"),
        pytest.raises(
            DatasetError, match=r"MPII: expected people in train, found none; skipped 1 without objpos or scale$"
        ),
    ):
        module(tmp_path).dataset("train")


def test_the_origin_holds_at_a_tenth_of_the_head(tmp_path: Path) -> None:
    """With a head of 9 px, a shift of 1 px in x and y exceeds a tenth of it."""
    write_mpii(str(tmp_path), train=6, val=4, size=96)
    data = module(tmp_path, image_size=48)
    content = loadmat(str(tmp_path / "mpii_human_pose_v1_u12_1.mat"), squeeze_me=True, struct_as_record=False)
    errors, shifted = [], []
    dataset = data.dataset("train")
    flipped = flip_indices(MPII_JOINTS)
    for i in range(len(dataset)):  # type: ignore[arg-type]
        one = dataset[i]
        name, number = one["id"].split("#")
        picture = next(a for a in content["RELEASE"].annolist if f"images/{a.image.name}" == name)
        found = np.atleast_1d(picture.annorect)[int(number)]
        matrix = one["to_original"].double().numpy()
        order = flipped if np.linalg.det(matrix[:, :2]) < 0 else np.arange(16)
        back = apply_affine(one["keypoints"].numpy(), matrix)[order]
        for p in np.atleast_1d(found.annopoints.point):
            errors.append(np.hypot(*(back[p.id] - [p.x - 1, p.y - 1])) / 9)
            shifted.append(np.hypot(*(back[p.id] - [p.x, p.y])) / 9)
    assert len(errors) > 80
    assert max(errors) < 1e-3 / 9
    assert min(shifted) > 0.1


# --- real annotations -------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
@pytest.mark.skipif(not (SHARED / "pckh").is_dir(), reason="needs ../shared/data/pckh")
def test_real_annotations(tmp_path: Path) -> None:
    """Compare 2,958 people of the release to the ground truth published with the benchmark's predictions."""
    content = loadmat(str(SHARED / "pckh" / "detections.mat"))
    published = np.load(SHARED / "pckh" / "ground_truth.npz")
    annorects = [entry["annorect"] for entry in content["annolist"].ravel()]
    pictures = structs([{"image": {"name": f"{i}.jpg"}, "annorect": rects} for i, rects in enumerate(annorects)])
    path = tmp_path / "real.mat"
    savemat(path, {"RELEASE": {"annolist": pictures, "img_train": np.ones(len(pictures), np.uint8)}})
    found = read_release(str(path))
    people = [found[i][0] for i in range(len(annorects))]
    assert not any(item.missing for item in people)
    labeled = np.stack([item.person.labeled for item in people])
    np.testing.assert_array_equal(labeled, ~published["missing"])
    joints = np.stack([item.person.keypoints for item in people])
    # The published file has 0 for 17 coordinates of 13 joints that the release contains.
    known = labeled[..., None] & (published["joints"] != 0)
    assert (labeled[..., None] & ~known).sum() == 17
    np.testing.assert_allclose((joints + 1)[known], published["joints"][known], atol=1e-3)
    heads = 0.6 * np.linalg.norm(published["headboxes"][:, 1] - published["headboxes"][:, 0], axis=1)
    np.testing.assert_allclose([item.person.head_size for item in people], heads, atol=1e-3)
    np.testing.assert_allclose(read_head_sizes(str(SHARED / "pckh" / "ground_truth.npz")), heads)


@pytest.mark.shared_data
@pytest.mark.skipif(not (SHARED / "mpii_sample").is_dir(), reason="needs ../shared/data/mpii_sample")
def test_a_real_conversion() -> None:
    file = "annotations/mpii_sample.json"
    data = module(SHARED / "mpii_sample", train=file, val=file)
    with pytest.warns(UserWarning, match="--data.headboxes FILE for PCKh|5 images .* in both train and val"):
        dataset = data.dataset("val")
    one = dataset[0]
    assert one["keypoints"].shape == (16, 2)
    assert one["labeled"].all()
    assert np.isnan(one["head_size"])


# --- held-out people --------------------------------------------------------------------------------------------------


def names(data: MPII, split: Any) -> set[str]:
    people = data.people(split)
    return {people.images[i] for i in range(len(people.images))}


def test_a_list_holds_images_out(tmp_path: Path) -> None:
    release(tmp_path, [structs([rect()] * (1 + i % 2)) for i in range(6)])
    (tmp_path / "mine.txt").write_text("003.jpg\n\n005.jpg\n")
    data = module(tmp_path, val="mine.txt")
    assert names(data, "val") == names(data, "test") == {"images/003.jpg", "images/005.jpg"}
    assert len(data.people("val")) == 4
    assert len(names(data, "train")) == 4
    assert module(tmp_path, val=str(tmp_path / "mine.txt")).people("val").number.tolist() == [0, 1, 0, 1]
    (tmp_path / "mine.txt").write_bytes("images/003.jpg\r\n005\r\n".encode("utf-8-sig"))
    assert names(module(tmp_path, val="mine.txt"), "val") == {"images/003.jpg", "images/005.jpg"}
    (tmp_path / "mine.txt").write_text("003.jpg\nnone.jpg\n")
    with pytest.raises(
        DatasetError, match=r"mine.txt: expected training images with people, found 1 name \(none.jpg\)"
    ):
        module(tmp_path, val="mine.txt").people("train")
    with pytest.raises(DatasetError, match="val: expected a list of images, found .*No such file"):
        module(tmp_path, val="gone.txt").people("train")


def test_the_published_indices_hold_people_out(tmp_path: Path) -> None:
    release(tmp_path, [structs([rect()] * 2) for _ in range(4)], [1, 1, 1, 0])
    savemat(tmp_path / "chosen.mat", {"RELEASE_img_index": [[1, 3]], "RELEASE_person_index": [[2, 1]]})
    data = module(tmp_path, val="chosen.mat")
    people = data.people("val")
    assert [people.person_id(i) for i in range(len(people))] == ["images/000.jpg#1", "images/002.jpg#0"]
    assert names(data, "train") == {"images/001.jpg"}, "the other people of held-out images are not trained on"
    savemat(tmp_path / "chosen.mat", {"RELEASE_img_index": [[1, 4]], "RELEASE_person_index": [[3, 1]]})
    with pytest.raises(DatasetError, match=r"expected people of .*, found 2 image/persons \(1/3, 4/1\)"):
        module(tmp_path, val="chosen.mat").people("val")


def test_without_a_list_a_tenth_of_the_images_is_held_out(tmp_path: Path) -> None:
    release(tmp_path, [structs([rect()] * 2) for _ in range(60)])
    data = module(tmp_path)
    val, train = names(data, "val"), names(data, "train")
    assert val == {f"images/{i:03d}.jpg" for i in range(60) if zlib.crc32(b"%03d.jpg" % i) % 10 == 0}
    assert 2 <= len(val) <= 12
    assert len(train) == 60 - len(val)
    assert not val & train


# --- conversions ------------------------------------------------------------------------------------------------------


def entry(**changes: Any) -> dict[str, Any]:
    joints = [[10.0 + k, 20.0 + k] for k in range(16)]
    full = {"image": "a.jpg", "center": [50.0, 60.0], "scale": 0.5, "joints": joints, "joints_vis": [1] * 15 + [0]}
    return {key: value for key, value in {**full, **changes}.items() if value is not None}


def conversion(folder: Path, train: Any, val: Any) -> Path:
    for name in ("annot", "images"):
        (folder / name).mkdir(exist_ok=True)
    for name in "abc":
        cv2.imwrite(str(folder / "images" / f"{name}.jpg"), np.zeros((8, 9), np.uint8))
    for name, entries in (("train", train), ("valid", val)):
        text = entries if isinstance(entries, str) else json.dumps(entries)
        (folder / "annot" / f"{name}.json").write_text(text)
    return folder


def test_conversions(tmp_path: Path) -> None:
    train = [entry(), entry(), entry(center=[-1.0, -1.0], scale=-1.0), entry(joints_vis=[0] * 16)]
    data = module(conversion(tmp_path, train, [entry(image="b.jpg", joints_vis=[0, 1] + [0] * 14)]))
    with pytest.warns(UserWarning, match="no head boxes; set --data.headboxes FILE for PCKh"):
        people = data.people("train")
    assert [people.person_id(i) for i in range(len(people))] == ["images/a.jpg#0", "images/a.jpg#1"]
    assert people.skipped == {"objpos or scale": 1, "joints": 1}
    assert people.center[0].tolist() == [49, 59 + 7.5]
    assert people.side[0] == 125
    assert people.keypoints[0, 3].tolist() == [12, 22]
    assert people.labeled[0].tolist() == [True] * 15 + [False], "joints_vis means labeled"
    assert np.isnan(data.people("val").head_size).all()
    assert len(data.people("val")) == 1, "people are kept if there are no head boxes at all"


@pytest.mark.parametrize("kind", ["npz", "mat"])
def test_head_boxes_of_conversions(tmp_path: Path, kind: str) -> None:
    conversion(tmp_path, [entry()], [entry(image="b.jpg"), entry(image="c.jpg")])
    boxes = np.array([[[1.0, 2], [4, 6]], [[5, 5], [5, 5]]])
    if kind == "npz":
        np.savez(tmp_path / "heads.npz", headboxes=boxes)
    else:
        savemat(tmp_path / "heads.mat", {"headboxes_src": boxes.transpose(1, 2, 0)})
    people = module(tmp_path, headboxes=f"heads.{kind}").people("val")
    assert people.head_size.tolist() == [3.0]
    assert people.skipped == {"a head box": 1}
    assert np.isnan(module(tmp_path, headboxes=f"heads.{kind}").people("train").head_size).all()
    conversion(tmp_path, [entry()], [entry(image="b.jpg")])
    with pytest.raises(DatasetError, match="expected a head box for each of its 1 people, found 2"):
        module(tmp_path, headboxes=f"heads.{kind}").people("val")


def test_an_image_in_both_splits_is_reported(tmp_path: Path) -> None:
    data = module(conversion(tmp_path, [entry(), entry(image="c.jpg")], [entry()]))
    with pytest.warns(UserWarning, match=r"1 image \(images/a.jpg\) in both train and val"):
        data.people("train")


# --- errors -----------------------------------------------------------------------------------------------------------


def refused(data: MPII, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        data.dataset("train")
    assert "\n" not in str(caught.value)


def test_a_mat_that_is_not_mpiis(tmp_path: Path) -> None:
    path = release(tmp_path, [structs([rect()])], name="ANNOTATIONS")
    refused(module(tmp_path), "expected the struct RELEASE of MPII's mpii_human_pose_v1_u12_1.mat, found ANNOTATIONS$")
    savemat(path, {"RELEASE": {"something": 1}})
    refused(module(tmp_path), "expected RELEASE.annolist and RELEASE.img_train .* found 0 and ")
    savemat(path, {"RELEASE": 5})
    refused(module(tmp_path), "expected RELEASE.annolist and RELEASE.img_train")
    path.write_bytes(b"no MATLAB file at all" * 20)
    refused(module(tmp_path), r"u12_1.mat: expected the struct RELEASE .*, found ")
    path.write_bytes(b"")
    refused(module(tmp_path), r"u12_1.mat: expected the struct RELEASE .*, found ")
    release(tmp_path, [structs([rect([point(16, 1, 1), point(1, 1, 1)])])])
    refused(module(tmp_path), r"expected joint ids 0 to 15, found 16.0 \(person 1, images/000.jpg\)")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([entry(), entry(scale=None)], r"train.json: expected \{image, center, scale.*, found person 2 without scale$"),
        ([entry(joints=[[1, 2]] * 14)], "train.json: expected .*, found an invalid person 1"),
        ([entry(center=["x", 2])], "train.json: expected .*, found an invalid person 1"),
        ([entry(joints_vis=[1, 0])], "train.json: expected .*, found an invalid person 1"),
        ([5], "train.json: expected .*, found person 1 without image, center"),
        ({"images": []}, "train.json: expected a list of"),
        ([], "train.json: expected a list of"),
        ("{", "train.json: expected a JSON conversion of MPII, found"),
    ],
)
@pytest.mark.filterwarnings("ignore:MPII. the JSON conversions have no head boxes")
def test_a_wrong_conversion(tmp_path: Path, train: Any, message: str) -> None:
    refused(module(conversion(tmp_path, train, [entry(image="b.jpg")])), message)


@pytest.mark.filterwarnings("ignore:MPII. the JSON conversions have no head boxes")
def test_missing_pieces(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"(?s)MPII: no annotations\nexpected.*u12_1.mat, or annot/train.json.*found"
    ):
        module(tmp_path).dataset("train")
    conversion(tmp_path, [entry(), entry(image="gone.jpg")], [entry(image="b.jpg")])
    refused(module(tmp_path), r"expected all images of train, found none of 1 image \(images/gone.jpg\)")
    refused(module(tmp_path, train="annot/train.json"), "val: expected a .json of the people held out")
    os.unlink(tmp_path / "annot" / "valid.json")
    refused(module(tmp_path), "valid.json: expected a JSON conversion of MPII, found .*No such file")
    np.savez(tmp_path / "heads.npz", boxes=np.zeros(3))
    refused(module(tmp_path, headboxes="heads.npz"), "heads.npz: expected headboxes")
    with pytest.raises(DatasetError, match="expected a dataset, found none; set --data.root"):
        MPII().dataset("train")
