"""The command ``python -m datamodules.synthetic``."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.synthetic.__main__ import main

SMALL = ["--classes", "2", "--train", "2", "--val", "1", "--size", "16"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "drawn"
    assert main(["imagenet", str(folder), *SMALL]) == 0
    assert f"wrote {folder}/train: 4 files" in capsys.readouterr().out
    first = contents(folder)
    assert main(["imagenet", str(folder), *SMALL, "--seed", "1"]) == 0, "replaces a previous dataset"
    assert contents(folder).keys() == first.keys()
    assert contents(folder) != first
    assert main(["imagenet", str(folder), "--classes", "1"]) == 2
    assert contents(folder).keys() == first.keys(), "a rejected command changes nothing"
    assert list(tmp_path.glob("**/.synthetic-*")) == []


def test_options_of_mpii(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--train", "2", "--val", "1", "--size", "32"]
    assert main(["mpii", str(tmp_path / "x"), *small]) == 0
    assert "images: 5 files" in capsys.readouterr().out
    assert main(["mpii", str(tmp_path / "x"), "--size", "8"]) == 2
    assert "size: expected 32 to 1024, found 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "option", "options"),
    [
        ("mpii", "--classes", "--train, --val, --size, --seed, --difficulty"),
        ("style_images", "--train", "--contents, --styles, --size, --seed"),
        ("places365_easy", "--contents", "--classes, --train, --val, --size, --seed"),
    ],
)
def test_option_of_another_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, option: str, options: str
) -> None:
    assert main([layout, str(tmp_path / "x"), option, "2"]) == 2
    expected = f"error: {option}: expected an option of {layout} ({options}), found {option}; omit it\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("option", ["contents", "styles"])
def test_style_images_name_their_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(["style_images", str(tmp_path / "x"), f"--{option}", "0"]) == 2
    assert capsys.readouterr().err == f"error: {option}: expected 1 to 100000, found 0\n"


@pytest.mark.parametrize("layout", ["food101", "imagenet", "places365", "places365_easy"])
def test_a_dataset_replaces_the_previous_one(tmp_path: Path, layout: str) -> None:
    """Files beside the folders too: the same arguments write the same files, others leave nothing of the previous."""
    written = []
    for classes, seed in (("3", "0"), ("2", "1"), ("2", "1")):
        assert main([layout, str(tmp_path / "x"), *SMALL, "--classes", classes, "--seed", seed]) == 0
        files = {path.relative_to(tmp_path): path for path in sorted((tmp_path / "x").rglob("*")) if path.is_file()}
        written.append({str(name): path.read_bytes() for name, path in files.items()})
    assert written[1] == written[2]
    assert written[1].keys() < written[0].keys()
    same = {name for name in written[1] if written[0][name] == written[1][name]}
    assert not any(name.endswith((".jpg", ".JPEG")) for name in same)


def test_the_command_keeps_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.txt").write_text("mine")
    assert main(["imagenet", str(tmp_path), *SMALL]) == 2
    assert "expected an empty folder, found train" in capsys.readouterr().err
    for _ in range(2):
        assert main(["imagenet", str(tmp_path), *SMALL, "--force"]) == 0
        assert (tmp_path / "train" / "mine.txt").read_text() == "mine"
    (tmp_path / "file").touch()
    for folder in ("file", "file/inside"):
        assert main(["imagenet", str(tmp_path / folder), *SMALL]) == 2
        assert f"{tmp_path / folder}: expected a folder" in capsys.readouterr().err
