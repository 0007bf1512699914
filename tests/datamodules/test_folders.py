"""Listings of folders, and their descriptions in error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.folders import compare_to_list, draw_tree, list_images, list_prediction_images, summarize_names
from errors import DatasetError


def test_list_images(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/10.png", "a.Jpeg", ".hidden.jpg", ".git/x.jpg", "note.txt", "b/c/d.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = [str(Path(path).relative_to(tmp_path)) for path in list_images(str(tmp_path))]
    assert found == ["a.Jpeg", "b/10.png", "b/2.JPG", "b/c/d.tiff"]


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected images .*found an empty folder"):
        list_images(str(tmp_path))
    (tmp_path / "note.txt").touch()
    with pytest.raises(DatasetError, match=r"1 other files such as note\.txt"):
        list_images(str(tmp_path))
    with pytest.raises(DatasetError, match="expected a folder of images, found nothing"):
        list_images(str(tmp_path / "missing"))
    with pytest.raises(DatasetError, match="expected a folder of images, found a file"):
        list_images(str(tmp_path / "note.txt"))


def test_list_prediction_images(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert list_prediction_images(str(tmp_path)) == list_prediction_images(f"{tmp_path}/a.jpg") == [f"{tmp_path}/a.jpg"]
    with pytest.raises(DatasetError, match=r"images: expected .*, found none; set --data\.images FOLDER"):
        list_prediction_images(None)


def test_compare_to_list(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg", "note.txt"):
        (tmp_path / "images" / name).touch()
    assert compare_to_list(str(tmp_path), "images", ["images/a.jpg", "images/c.jpg"]) == (
        ["images/c.jpg"],
        ["images/b.jpg"],
    )


def test_summarize_names() -> None:
    assert summarize_names(["a"], "class", "classes") == "1 class (a)"
    assert summarize_names(list("abcdef"), "image") == "6 images (a, b, c, d, e, ...)"


def test_draw_tree(tmp_path: Path) -> None:
    assert draw_tree(str(tmp_path)) == f"  {tmp_path}/\n    (empty)"
    for name in ("x/a", "x/b", "x/c", "x/d"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "y.csv").touch()
    assert draw_tree(str(tmp_path)) == f"  {tmp_path}/\n    x/  a/, b/, c/, ... (4 in total)\n    y.csv"
    assert draw_tree(f"{tmp_path}/y.csv").endswith("y.csv: a file, not a folder")
