"""Color masks: VOC's colors, custom colors and errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.segmentation.voc_semantic import VOCSegmentation
from datamodules.synthetic.voc_segmentation import write_voc_segmentation
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
