"""Color masks: VOC's colors, custom colors and errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.segmentation.voc_semantic import VOCSegmentation
from datamodules.synthetic.voc_segmentation import write_voc_segmentation
from datamodules.voc import voc_palette
from errors import DatasetError
from tools.color_masks import main, read_colors, to_ids


def test_a_mask_in_colors_says_how_to_convert_it_and_the_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_voc_segmentation(str(tmp_path), classes=3, train=2, val=1, size=48)
    data = VOCSegmentation(str(tmp_path), crop_size=40)
    path = tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2012_000001.png"
    ids = np.array(Image.open(path))
    colored_masks = tmp_path / "colored"
    colored_masks.mkdir()
    Image.open(path).convert("RGB").save(colored_masks / path.name)
    shutil.copy(colored_masks / path.name, path)
    with pytest.raises(DatasetError, match=r"found RGB; convert color masks with python -m tools.color_masks"):
        data.dataset("train")[0]
    assert main([str(colored_masks), str(path.parent)]) == 0
    assert (np.array(Image.open(path)) == ids).all()
    assert data.dataset("train")[0]["mask"].shape == (40, 40)
    capsys.readouterr()
    assert main([str(colored_masks), str(colored_masks)]) == 2
    assert "expected another folder" in capsys.readouterr().err


def test_colors_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "colors.txt", tmp_path / "in"
    folder.mkdir()
    file.write_text("0 128 128 128\n1 128 0 0\n255 0 0 0\n")
    pixels = np.array([[[128, 128, 128], [0, 0, 0], [128, 0, 0]]], np.uint8)
    assert to_ids(pixels, read_colors(str(file)), "a.png").tolist() == [[0, 255, 1]]
    pixels[0, 1] = 9
    Image.fromarray(pixels).save(folder / "a.png")
    assert main([str(folder), str(tmp_path / "out"), "--colors", str(file)]) == 2
    assert "a.png: expected a color with an id, found [9, 9, 9] at x 1, y 0" in capsys.readouterr().err
    file.write_text("0 128 128 128\n1 300 0 0\n")
    with pytest.raises(DatasetError, match="expected id red green blue, 0 to 255, in line 2, found 1 300 0 0"):
        read_colors(str(file))
    assert main([str(folder), str(tmp_path / "out"), "--colors", str(tmp_path / "none.txt")]) == 2
    assert capsys.readouterr().err.startswith("error: colors: expected a file of colors, found ")
    assert main([str(folder), str(file / "out")]) == 2
    assert "FOLDER: expected a folder that can be created" in capsys.readouterr().err


def convert(tmp_path: Path, masks: dict[str, Image.Image], *options: str) -> dict[str, list]:
    """Write masks, run the command, and return {relative path: ids} of all files that it wrote."""
    for name, mask in masks.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        mask.save(tmp_path / "in" / name)
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 0
    found = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    images = {str(path.relative_to(tmp_path / "out")): Image.open(path) for path in found}
    assert all(image.mode == "P" for image in images.values())
    return {name: np.array(image).tolist() for name, image in images.items()}


IDS = np.array([[0, 1, 2], [19, 254, 255]], np.uint8)


def with_palette(palette: np.ndarray) -> Image.Image:
    image = Image.fromarray(IDS)
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("a.png", Image.fromarray(IDS)),
        ("a.png", Image.fromarray(IDS.astype(np.uint16))),
        ("a.tif", Image.fromarray(IDS.astype(np.int32))),
        ("a.tif", Image.fromarray(IDS.astype(np.float32))),
        ("a.png", with_palette(voc_palette())),
        ("a.png", with_palette(np.repeat(np.arange(256)[:, None], 3, 1))),
        ("a.png", Image.fromarray(voc_palette()[IDS])),
        ("a.bmp", Image.fromarray(voc_palette()[IDS])),
    ],
    ids=["gray", "16 bits", "32 bits", "float", "VOC's palette", "gray palette", "color", "bmp"],
)
def test_ids_are_kept_whatever_the_format(tmp_path: Path, name: str, mask: Image.Image) -> None:
    assert convert(tmp_path, {name: mask}) == {"a.png": IDS.tolist()}


def test_an_optimized_palette_is_read_by_its_colors(tmp_path: Path) -> None:
    mask = Image.fromarray(voc_palette()[IDS]).quantize(6)
    assert mask.mode == "P"
    assert np.array(mask).max() < 6
    assert convert(tmp_path, {"a.png": mask}) == {"a.png": IDS.tolist()}


def test_binary_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits = np.array([[True, False]])
    assert convert(tmp_path / "bit", {"a.png": Image.fromarray(bits)}) == {"a.png": [[1, 0]]}
    assert "void" not in capsys.readouterr().out
    gray = Image.fromarray(bits.astype(np.uint8) * 255)
    assert convert(tmp_path / "gray", {"a.png": gray}) == {"a.png": [[255, 0]]}
    assert "the only ids are 0 and 255 (void): there is nothing to train on; convert binary" in capsys.readouterr().out
    (tmp_path / "colors.txt").write_text("0 0 0 0\n1 255 255 255\n")
    assert convert(tmp_path / "c", {"a.png": gray}, "--colors", str(tmp_path / "colors.txt")) == {"a.png": [[1, 0]]}


@pytest.mark.parametrize("value", [256, 65535, -1])
def test_ids_beyond_a_byte_are_refused(tmp_path: Path, value: int, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.array([[0, value]], np.int32)).save(tmp_path / "in" / "a.tif")
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/in/a.tif: expected ids 0 to 255, found {value} at x 1, y 0; renumber the classes\n"
    )


def test_sub_folders_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two masks of one name in different folders stay two, and the printed count is that of the files."""
    masks = {f"{folder}/0001.png": Image.fromarray(IDS[:1] * 0 + i) for i, folder in enumerate(("train", "val", "x/y"))}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    assert convert(tmp_path, masks) == {name: [[i] * 3] for i, name in enumerate(masks)}
    assert capsys.readouterr().out == (
        f"ignored 1 file (notes.txt) without an image extension\nwrote 3 masks of ids to {tmp_path}/out\n"
    )


def test_collisions_are_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "b.png", "b.bmp"):
        Image.fromarray(IDS).save(source / name)
    assert main([str(source), str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: {source}: expected one mask per name, found several for 1 name (b.bmp and b.png); rename all but one\n"
    )
    assert not out.exists()
    (source / "b.bmp").unlink()
    assert main([str(source), str(source / "ids")]) == 2
    assert "expected another folder than that of the masks" in capsys.readouterr().err
    assert sorted(path.name for path in source.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "colors.txt: expected one line 'id red green blue' per color, found none"),
        (b"\n \n", "found none"),
        (b"0 0 0 0\n\n1 2 3\n", "colors.txt: expected id red green blue, 0 to 255, in line 3, found 1 2 3"),
        (b"0 0 0 0 # sky\n", "in line 1, found 0 0 0 0 # sky"),
        (b"0 5 5 5\n1 5 5 5\n", r"colors.txt: expected one id per color, found 0 and 1 for \[5, 5, 5\] in line 2"),
        (b"0 0 0 \xff\n", "colors.txt: expected UTF-8 text, found byte 0xff in line 1"),
    ],
)
def test_files_of_colors_that_are_not_right(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "colors.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_colors(str(tmp_path / "colors.txt"))
    (tmp_path / "colors.txt").write_bytes("0 1 2 3\r\n".encode("utf-8-sig"))
    assert read_colors(str(tmp_path / "colors.txt")).tolist() == [[0, 1, 2, 3]]
