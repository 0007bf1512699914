"""Files of VOC and SBD: image sets, the union of both, downloads and missing files."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import datamodules.segmentation.base as base
from datamodules.archives import Archive
from datamodules.segmentation.voc_instance import VOCInstance
from datamodules.segmentation.voc_semantic import VOCSegmentation
from errors import DatasetError
from tests.datamodules.segmentation.conftest import ids_of, mask_path


def semantic(root: Any, **options: Any) -> VOCSegmentation:
    return VOCSegmentation(str(root), **{"crop_size": 40, "num_workers": 0, "batch_size": 4, **options})


@pytest.mark.parametrize("option", ["", "VOCdevkit"])
def test_sbd_lies_beside_the_devkit_or_is_named(root: Path, option: str, tmp_path: Path) -> None:
    def names(data: VOCSegmentation) -> set[str]:
        return {Path(data.dataset("train")[i]["id"]).stem for i in range(len(data.dataset("train")))}  # type: ignore[arg-type]

    listed = set((root / "benchmark_RELEASE/dataset/train.txt").read_text().split())
    assert names(semantic(root / option, train=["SBD/train"])) == listed
    moved = shutil.move(root / "benchmark_RELEASE", tmp_path / "elsewhere")
    assert names(semantic(root / option, train=["SBD/train"], sbd=str(moved))) == listed


def test_sbds_masks_are_vocs_without_the_border(drawn: Path) -> None:
    own, sbd = semantic(drawn).dataset("val"), semantic(drawn, val=["SBD/val"]).dataset("val")
    by_name = {Path(sbd[i]["id"]).stem: sbd[i] for i in range(len(sbd))}  # type: ignore[arg-type]
    compared = 0
    for i in range(len(own)):  # type: ignore[arg-type]
        other = by_name.get(Path(own[i]["id"]).stem)
        if other is not None:
            a, b = own[i]["original_mask"], other["original_mask"]
            assert (b != 255).all()
            assert torch.equal(a[a != 255], b[a != 255])
            compared += 1
    assert compared == 3


def test_trainaug_is_the_union_without_val_and_prefers_vocs_masks(
    drawn: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = semantic(drawn, train=["SBD/trainaug"], crop_size=None, scale=(1.0, 1.0), hflip=0.0)
    with caplog.at_level("INFO"):
        files = data.files("train")
    listed = {
        name: set((drawn / f"benchmark_RELEASE/dataset/{name}.txt").read_text().split()) for name in ("train", "val")
    }
    train, val = set(ids_of(drawn, "train")), set(ids_of(drawn, "val"))
    stems = [Path(files[i].image).stem for i in range(len(files))]
    assert len(set(stems)) == len(stems)
    assert set(stems) == (listed["train"] | listed["val"] | train) - val
    assert listed["val"] & val
    assert all((Path(files[i].class_mask).suffix == ".png") == (stems[i] in train) for i in range(len(files)))
    others = len(stems) - len(train)
    assert f"{len(stems)} images, {len(train)} with VOC's masks and {others} with SBD's" in caplog.text
    dataset = data.dataset("train")
    assert (dataset[0]["mask"] == 255).any()
    assert (dataset[len(stems) - 1]["mask"] != 255).all()


def test_trainaug_of_the_release_must_have_10582_images(root: Path) -> None:
    """Lists of the released lengths, one without its last line."""
    lists = root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    names = [f"{i:06d}" for i in range(13000)]
    (lists / "train.txt").write_text("\n".join(names[:1464]))
    (lists / "val.txt").write_text("\n".join(names[1464 : 1464 + 1449]))
    # 1,349 of VOC's train, 888 of its val and 9,118 others are the 11,355 of SBD.
    everything = [*names[:1349], *names[1464 : 1464 + 888], *names[3000 : 3000 + 9118]]
    assert len(everything) == 8498 + 2857
    sbd = root / "benchmark_RELEASE" / "dataset"
    (sbd / "train.txt").write_text("\n".join(everything[:8498]))
    (sbd / "val.txt").write_text("\n".join(everything[8498:]))
    data = semantic(root, train=["SBD/trainaug"])
    with pytest.raises(DatasetError, match="for each id an image in JPEGImages"):
        data.files("train")  # the count is right, the images are not there
    (sbd / "val.txt").write_text("\n".join(everything[8498:-1]))
    with pytest.raises(DatasetError, match="expected 10,582 images, found 10,581 images, 1,464 with VOC"):
        data.files("train")


def test_what_is_missing_is_named(root: Path) -> None:
    first, second = ids_of(root, "train")[:2]
    mask_path(root, first, "Object").unlink()
    with pytest.raises(DatasetError, match=rf"train: .* a mask in SegmentationObject, found none for 1 id \({first}\)"):
        VOCInstance(str(root)).dataset("train")
    mask_path(root, first).unlink()
    with pytest.raises(DatasetError, match=rf"train: .* a mask in SegmentationClass, found none for 1 id \({first}\)"):
        semantic(root).dataset("train")
    (root / "VOCdevkit/VOC2012/JPEGImages" / f"{second}.jpg").unlink()
    with pytest.raises(DatasetError, match=rf"train: .* an image in JPEGImages, found none for 1 id \({second}\)"):
        semantic(root).dataset("train")
    with pytest.raises(DatasetError, match=r"Segmentation: expected the list dev.txt, found train, trainval, val"):
        semantic(root, val=["VOC2012/dev"]).dataset("val")
    with pytest.raises(DatasetError, match=r"dataset: expected the list dev.txt, found train, val, trainaug"):
        semantic(root, val=["SBD/dev"]).dataset("val")
    stem = (root / "benchmark_RELEASE/dataset/train.txt").read_text().split()[0]
    (root / f"benchmark_RELEASE/dataset/cls/{stem}.mat").unlink()
    with pytest.raises(DatasetError, match=rf"SBD/train: .* a file in .*cls, found none for 1 id \({stem}\)"):
        semantic(root, train=["SBD/train"]).dataset("train")


def test_a_missing_tree_says_what_to_fetch(tmp_path: Path, root: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        semantic(tmp_path / "nowhere").dataset("train")
    text = str(caught.value)
    for part in (
        "SegmentationClass/<id>.png",
        "ImageSets/Segmentation/train.txt",
        "VOCtrainval_11-May-2012.tar",
        "MD5",
    ):
        assert part in text
    shutil.rmtree(root / "benchmark_RELEASE")
    with pytest.raises(DatasetError) as caught:
        semantic(root, train=["SBD/trainaug"]).dataset("train")
    text = str(caught.value)
    for part in ("cls/<id>.mat", "no such folder", "benchmark.tgz", "MD5 82b4d87ceb2ed10f6038a1cba92111cb"):
        assert part in text
    assert f"unpack it in {root}: tar -xf benchmark.tgz -C {root}" in text


def test_sbd_is_downloaded_where_it_is_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "host" / "benchmark.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root / "benchmark_RELEASE", "benchmark_RELEASE")
    hosts = f"file://{tmp_path}/none", f"file://{tmp_path}/host"
    archive = Archive(hosts, "benchmark.tgz", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(base, "SBD_ARCHIVE", archive)
    shutil.rmtree(root / "benchmark_RELEASE")
    data = semantic(root, train=["SBD/train"], download=True)
    data.prepare_data()
    assert len(data.dataset("train")) == 6  # type: ignore[arg-type]
    fetched = []
    monkeypatch.setattr(Archive, "download", lambda archive, folder: fetched.append(archive.path))
    shutil.rmtree(root / "VOCdevkit")
    sets = {"train": ["SBD/trainaug"], "val": ["SBD/val"], "test": ["SBD/val"]}
    semantic(root, **sets, download=True).prepare_data()
    assert fetched == ["voc2012/VOCtrainval_11-May-2012.tar"]


def test_two_masks_of_one_id_are_refused(root: Path) -> None:
    name = ids_of(root, "train")[0]
    path = mask_path(root, name)
    shutil.copy(path, path.with_suffix(".txt"))
    data = semantic(root)
    with pytest.warns(
        UserWarning, match=rf"SegmentationClass: expected files that end in .*, ignored 1 file \({name}.txt\)"
    ):
        before = data.dataset("train")[0]["id"]
    shutil.copy(path, path.with_suffix(".bmp"))
    assert before.endswith(f"{name}.jpg")
    with pytest.raises(DatasetError, match=rf"a mask in SegmentationClass, found several for 1 id \({name}.bmp and"):
        semantic(root).dataset("train")


def test_a_list_of_sbd_with_a_mark_and_file_names(root: Path) -> None:
    path = root / "benchmark_RELEASE/dataset/train.txt"
    names = path.read_text().split()
    path.write_bytes("\r\n".join(f"{name}.jpg" for name in names).encode("utf-8-sig"))
    dataset = semantic(root, train=["SBD/train"]).dataset("train")
    assert [Path(dataset[i]["id"]).stem for i in range(len(names))] == names


def test_a_class_listed_twice_is_refused(root: Path) -> None:
    with pytest.raises(DatasetError, match=r"classes: expected different names, found 1 name \(a\) more than once"):
        semantic(root, classes=["a", "b", "a"])
