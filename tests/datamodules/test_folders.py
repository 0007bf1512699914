"""Listings of folders, and their descriptions in error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.folders import (
    compare_to_list,
    draw_tree,
    list_images,
    list_prediction_images,
    match_ids,
    printable_name,
    summarize_names,
)
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


def test_prediction_counts_what_it_ignores(tmp_path: Path) -> None:
    for name in ("a.jpg", "b/c.png", "film.mp4", "b/film.AVI", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="ignored 2 videos") as caught:
        assert len(list_prediction_images(str(tmp_path))) == 2
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path}: predicting 2 images, ignored 2 videos (b/film.AVI, film.mp4) and 1 other file (notes.txt); "
        "detection, segmentation and style predict a video with --data.images VIDEO"
    ]


# --- ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("p000", "p000"),
        ("p000 (1)", "p000 (1)"),
        ("  p000 (1)\t", "p000 (1)"),
        ("p000 (2)", "p000 (2)"),  # does not exist, and p000 is another image
        ("p000 -1", "p000"),
        ("p000  1", "p000"),
        ("p000\t0", "p000"),
        ("p000 (1) -1", "p000 (1)"),
        ("p000 2", "p000 2"),  # neither an id nor the column of a class
        ("p001 1", "p001 1"),  # an id
        ("img.v2", "img.v2"),
        ("img.v2.jpg", "img.v2"),
        ("p000.JPG", "p000"),
        ("p000.png", "p000.png"),  # no such file
        (" blank", " blank"),
        ("img", "img"),
        ("x.jpg", "x.jpg"),
    ],
)
def test_a_line_names_an_id(line: str, expected: str) -> None:
    names = ["p000.JPG", "p000 (1).jpg", "p001 1.jpg", "img.v2.jpg", " blank.jpg", "x.jpg.png", "x.png"]
    files = {name.rpartition(".")[0]: [f"JPEGImages/{name}"] for name in names}
    assert match_ids([line, "", "  "], files) == [expected]


def test_a_name_that_is_not_utf8_becomes_text() -> None:
    assert printable_name("Katz\udce9") == "Katz\\xe9"
    assert printable_name("Kätzchen 猫") == "Kätzchen 猫"
