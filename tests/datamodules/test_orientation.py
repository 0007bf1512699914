"""Every reader turns an image of a turned camera as its annotation was made; Pillow's exif_transpose is the oracle."""

from __future__ import annotations

import glob
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from scipy.io import savemat

from datamodules.base import VisionDataModule
from datamodules.classification.fer2013 import FER2013
from datamodules.classification.image_folder import ImageFolder
from datamodules.detection.voc import VOCDetection
from datamodules.images import EncodedImage, read_header, read_image, to_rgb
from datamodules.orientation import ImageHeader, jpeg_may_have_exif
from datamodules.pose.lsp import LSP
from datamodules.segmentation.instance_crops import VOCInstanceCrops
from datamodules.segmentation.masks import save_ids
from datamodules.segmentation.voc_instance import VOCInstance
from datamodules.segmentation.voc_semantic import VOCSegmentation
from datamodules.style.style_images import ImagePair, StyleImages
from errors import BrokenImageError, DatasetError
from tests.datamodules.pose.test_lsp import write as write_lsp
from tools.anchors import training_sizes
from tools.check import check

SHARED = Path(__file__).parents[3] / "shared" / "data"
TAG = 0x0112
# The transposition that a camera applies to the upright image when it stores the orientation.
STORE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
ROTATED = [5, 6, 7, 8]
UPRIGHT, BOX = (64, 48), (10, 40, 16, 56)  # height and width; a white patch, xyxy


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[TAG] = orientation
    return exif


def store(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Return the pixels that a camera stores, of a color image or a mask."""
    image, method = Image.fromarray(upright), STORE[orientation]
    return np.asarray(image if method is None else image.transpose(method))


def patch(size: tuple[int, int] = UPRIGHT, box: tuple[int, int, int, int] = BOX) -> np.ndarray:
    """Draw a white patch on black, uint8 (H, W, 3)."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels


def photograph(path: Path, upright: np.ndarray, orientation: int, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95, "subsampling": 0, **options} if path.suffix == ".jpg" else options
    Image.fromarray(store(upright, orientation)).save(path, exif=exif_of(orientation), **options)
    return str(path)


# --- files ------------------------------------------------------------------------------------------------------------

FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("x.jpg", {}),
    ("x.jpg", {"progressive": True}),
    ("x.png", {}),
    ("x.webp", {"lossless": True}),
    ("x.tif", {}),
    ("x.tif", {"compression": "tiff_lzw"}),
]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_all_formats(tmp_path: Path, name: str, options: dict[str, Any], orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    upright = np.kron(rng.integers(0, 256, (5, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    path = photograph(tmp_path / name, upright, orientation, **options)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.abs(expected.astype(int) - upright).max() <= (10 if name == "x.jpg" else 0)
    stored = store(expected, orientation)
    np.testing.assert_array_equal(read_image(path), expected)
    np.testing.assert_array_equal(read_image(path, exif_orientation=False), stored)
    for size, exif_orientation in ((expected.shape[:2], False), (stored.shape[:2], True)):
        if orientation >= 5:  # the annotation overrules the option
            pixels = read_image(path, exif_orientation, annotated_size=size)
            np.testing.assert_array_equal(pixels, expected if size == expected.shape[:2] else stored)
    assert read_header(path) == EncodedImage(path).header == (*stored.shape[:2], orientation)
    image = EncodedImage(path)
    np.testing.assert_array_equal(image.crop((4, 6, 20, 16), (20, 16)), expected[4:24, 6:22])


@pytest.mark.parametrize("orientation", [2, 5, 6, 8])
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *[(mode, f"x.{ending}") for mode in ("1", "L", "P", "RGBA") for ending in ("png", "tif")],
        *[("L", "x.jpg"), ("CMYK", "x.jpg"), ("CMYK", "x.tif"), ("RGBA", "x.webp")],
    ],
)
def test_all_pixel_formats(tmp_path: Path, mode: str, name: str, orientation: int) -> None:
    path = tmp_path / name
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (5, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, exif=exif_of(orientation))
    # From memory: Pillow 13.0 misreads some TIFFs that it opens by name.
    expected = to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes()))))
    np.testing.assert_allclose(read_image(str(path)), expected, atol=1)
    np.testing.assert_allclose(read_image(str(path), exif_orientation=False), store(expected, orientation), atol=1)
    assert read_header(str(path)) == (40, 64, orientation)


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def move_exif_behind_the_pixels(data: bytes) -> bytes:
    chunks, position = [], 8
    while position < len(data):
        length = 12 + struct.unpack(">I", data[position : position + 4])[0]
        chunks.append(data[position : position + length])
        position += length
    chunks.insert(-1, chunks.pop(next(i for i, chunk in enumerate(chunks) if chunk[4:8] == b"eXIf")))
    return data[:8] + b"".join(chunks)


def test_other_places_in_a_file(tmp_path: Path) -> None:
    """XMP instead of EXIF; EXIF behind the pixels or in a text chunk of a PNG."""
    pixels = store(patch(), 6)
    for name in ("xmp.jpg", "xmp.webp"):
        Image.fromarray(pixels).save(tmp_path / name, xmp=xmp(6))
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(6).decode(), zip=True)
    Image.fromarray(pixels).save(tmp_path / "xmp.png", pnginfo=info)
    data = exif_of(6).tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "camera")
    info.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    Image.fromarray(pixels).save(tmp_path / "text.png", pnginfo=info)
    path = Path(photograph(tmp_path / "behind.png", patch(), 6))
    path.write_bytes(move_exif_behind_the_pixels(path.read_bytes()))
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).size[::-1]
        assert upright == (64, 48) or path.suffix != ".png", path  # Pillow 11.0 ignores XMP of JPEG and WebP
        assert read_image(str(path)).shape == (*upright, 3), path
        assert read_header(str(path)).size(True) == upright, path


@pytest.mark.parametrize("value", [0, 1, 9, 255])
def test_invalid_values_change_nothing(tmp_path: Path, value: int) -> None:
    exif = exif_of(value)
    for name in ("x.jpg", "x.png", "x.webp"):
        Image.fromarray(patch()).save(tmp_path / name, exif=exif)
        assert read_image(str(tmp_path / name)).shape == (64, 48, 3)
        assert read_header(str(tmp_path / name)) == (64, 48, 1)


def test_damaged_exif_data_is_noted_and_the_pixels_are_read(tmp_path: Path) -> None:
    data = exif_of(6).tobytes()
    for name in ("x.jpg", "x.png", "x.webp"):
        path = str(tmp_path / name)
        for exif in (b"Exif\0\0no TIFF header", data[:-8], data[:12], b"Exif\0\0"):
            Image.fromarray(patch()).save(path, exif=exif)
            assert EncodedImage(path).decode().shape == (64, 48, 3)
            assert read_header(path) == (64, 48, 1)
    Image.fromarray(patch()).save(path, exif=b"Exif\0\0no TIFF header")
    assert str(EncodedImage(path).warning).startswith("EXIF: ")


def test_the_scan_of_a_jpeg_misses_no_exif_data(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(patch()).save(buffer, "JPEG")
    plain = buffer.getvalue()
    exif = exif_of(6).tobytes()
    app1, other = (
        b"\xff" + m + struct.pack(">H", len(d) + 2) + d for m, d in ((b"\xe1", exif), (b"\xe2", b"\xff\xda" * 9))
    )
    assert not jpeg_may_have_exif(plain)
    assert not jpeg_may_have_exif(plain[:2] + other + plain[2:])
    for data in (plain[:2] + app1 + plain[2:], plain[:2] + other + app1 + plain[2:], plain[:20] + app1 + plain[20:]):
        assert jpeg_may_have_exif(data)
        path = tmp_path / "x.jpg"
        path.write_bytes(data)
        assert read_header(str(path)) == (64, 48, 6)
        assert read_image(str(path)).shape == (48, 64, 3)
    for cut in range(2, 40):  # no end of the header: Pillow decides
        assert jpeg_may_have_exif(plain[:cut])


def test_the_header_of_an_unreadable_file_is_refused_as_when_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.raises(BrokenImageError, match=r"x.jpg: not an image"):
        read_header(str(tmp_path / "x.jpg"))
    with pytest.raises(BrokenImageError, match=r"y.jpg: No such file"):
        read_header(str(tmp_path / "y.jpg"))


@pytest.mark.shared_data
@pytest.mark.skipif(not (SHARED / "imagenet_sample").is_dir(), reason="needs ../shared/data/imagenet_sample")
def test_real_photographs() -> None:
    paths = glob.glob(str(SHARED / "imagenet_sample" / "**" / "*.JPEG"), recursive=True)
    assert len(paths) >= 100
    for path in paths:
        with Image.open(path) as image:
            expected = image.height, image.width, image.getexif().get(TAG, 1)
        assert read_header(path) == EncodedImage(path).header == expected


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [True, False])
def test_the_rule(option: bool) -> None:
    rotated, mirrored, square = ImageHeader(48, 64, 6), ImageHeader(48, 64, 2), ImageHeader(48, 48, 8)
    assert rotated.is_upright((64, 48), option)
    assert not rotated.is_upright((48, 64), option)
    for header, size in (
        (rotated, None),
        (rotated, (96, 128)),
        (mirrored, (48, 64)),
        (square, (48, 48)),
        (square, None),
    ):
        assert header.is_upright(size, option) == option
    assert [rotated.fits(size) for size in ((64, 48), (48, 64), (96, 128), None)] == [True, True, False, True]
    assert not mirrored.fits((64, 48))


# --- VOC --------------------------------------------------------------------------------------------------------------


def write_voc(
    root: Path,
    orientation: int,
    size: tuple[int, int] | None = UPRIGHT,
    box: Any = BOX,
    upright: np.ndarray | None = None,
) -> VOCDetection:
    """Write a photograph and its XML with a (height, width) and a box, xyxy continuous; return the datamodule."""
    base = root / "VOCdevkit" / "VOC2007"
    photograph(base / "JPEGImages" / "p.jpg", patch() if upright is None else upright, orientation)
    sides = zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3]), strict=True)
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in sides)
    given = "" if size is None else f"<size><width>{size[1]}</width><height>{size[0]}</height></size>"
    for name, text in (
        (
            "Annotations/p.xml",
            f"<annotation>{given}<object><name>nut</name><bndbox>{corners}</bndbox></object></annotation>",
        ),
        ("ImageSets/Main/train.txt", "p\n"),
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    return module(root)


def module(root: Path, **options: Any) -> VOCDetection:
    sets = {split: ["VOC2007/train"] for split in ("train", "val", "test")}
    defaults = {"classes": ["nut"], "image_size": (64, 64), "num_workers": 0, "batch_size": 1, "hflip": 0.0}
    return VOCDetection(str(root), **{**sets, **defaults, **options})  # type: ignore[arg-type]


def brightness(data: VOCDetection, split: Any = "train") -> float:
    """Return the mean within the box of the only image, whose sides may have been scaled."""
    (batch,) = data.loader(split)
    left, top, right, bottom = (batch["target"][0]["boxes"][0]).round().int().tolist()
    return float(batch["image"][0, :, top:bottom, left:right].float().mean())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_box_on_the_upright_image_covers_its_patch(tmp_path: Path, orientation: int, split: str) -> None:
    data = write_voc(tmp_path, orientation)
    assert brightness(data, split) > 250
    annotations = data.annotations("train")
    assert annotations.sizes.tolist() == [list(UPRIGHT)]
    assert annotations.warnings() == []
    assert check(data).problems == []


def stored_box(orientation: int) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(store(patch(), orientation)[..., 0])
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


@pytest.mark.parametrize("orientation", ROTATED)
def test_a_box_on_the_stored_image_covers_its_patch(
    tmp_path: Path, orientation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_voc(tmp_path, orientation, UPRIGHT[::-1], stored_box(orientation))
    assert brightness(data) > 250
    assert data.annotations("train").sizes.tolist() == [[48, 64]]
    assert check(data).problems == []
    (line,) = capsys.readouterr().err.splitlines()
    assert f"annotated as stored, first {tmp_path}" in line
    assert f"(orientation {orientation})" in line
    assert line.endswith("prediction applies it; set --data.exif_orientation false to predict as in training")


@pytest.mark.parametrize("orientation", [2, 3, 4, 6])
@pytest.mark.parametrize("size", [None, (0, 0), UPRIGHT])
@pytest.mark.parametrize("option", [True, False])
def test_where_sizes_do_not_tell_the_option_does(
    tmp_path: Path, orientation: int, size: tuple[int, int] | None, option: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flips, 180 degrees, squares and files without a size."""
    square = orientation == 6 and size == UPRIGHT
    upright = patch((64, 64)) if square else patch()
    size = (64, 64) if square else size
    stored = store(upright, orientation)
    rows, columns = np.nonzero((upright if option else stored)[..., 0])
    box = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
    write_voc(tmp_path, orientation, size, box, upright)
    data = module(tmp_path, exif_orientation=option)
    assert brightness(data) > 250
    assert brightness(data, "val") > 250
    (line,) = capsys.readouterr().err.splitlines()  # of both splits
    done, other = ("applied", "false") if option else ("ignored", "true")
    assert line.startswith(f"EXIF orientation: {done} where no annotated size decides, first in {tmp_path}")
    assert f"set --data.exif_orientation {other} " in line
    assert data.annotations("train").warnings() == []


def test_the_size_of_the_file_clips_boxes(tmp_path: Path) -> None:
    data = write_voc(tmp_path, 6, UPRIGHT, (10, 40, 48, 64))  # fits the upright image only
    assert data.annotations("train").warnings() == []
    data = write_voc(tmp_path, 6, UPRIGHT[::-1], (10, 40, 48, 64))  # the stored image is 48 high
    annotations = data.annotations("train")
    assert annotations.boxes.tolist() == [[10, 40, 48, 48]]
    assert annotations.warnings() == ["clipped the box of 1 object (VOC2007/Annotations/p.xml) to the image"]


@pytest.mark.parametrize("size", [(288, 384), (48, 64), (64, 47)])
def test_a_size_of_neither_is_a_problem(tmp_path: Path, size: tuple[int, int]) -> None:
    """An image that was shrunk after its annotation, and a swapped width and height without EXIF orientation."""
    data = write_voc(tmp_path, 1, size)
    line = (
        f"expected the size of the image in 1 annotation (VOC2007/Annotations/p.xml: {size[1]}x{size[0]}, image 48x64)"
        ", found another; restore the annotated images: boxes are not rescaled"
    )
    assert data.annotations("train").warnings() == [line]
    assert check(data).problems == [f"VOC2007/train: {line}"]
    with pytest.warns(UserWarning, match="expected the size of the image in 1 annotation"):
        data.dataset("train")


def test_boxes_of_a_shrunk_image_are_ignored_by_its_real_size(tmp_path: Path) -> None:
    annotations = write_voc(tmp_path, 1, (288, 384), (240, 120, 360, 240)).annotations("train")
    assert (annotations.outside, annotations.clipped) == (["VOC2007/Annotations/p.xml"], [])
    assert len(annotations.boxes) == 0


@pytest.mark.parametrize("text", ["inf", "nan", "-5", "1e400", "many"])
def test_a_size_that_is_no_size_is_none(tmp_path: Path, text: str) -> None:
    data = write_voc(tmp_path, 1, (text, text))  # type: ignore[arg-type]
    assert data.annotations("train").annotated_size(0) is None
    assert data.annotations("train").warnings() == []


def test_an_unreadable_image_is_reported_when_it_is_read(tmp_path: Path) -> None:
    data = write_voc(tmp_path, 1)
    (tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages" / "p.jpg").write_bytes(b"no image")
    assert data.annotations("train").sizes.tolist() == [[0, 0]]
    (line,) = check(data).problems
    assert line.startswith("VOC2007/JPEGImages/p.jpg: not an image")
    with pytest.raises(BrokenImageError, match=r"p.jpg: not an image"):
        training_sizes(data, 96)


def test_anchors_use_the_oriented_size(tmp_path: Path) -> None:
    # The box of 6x16 in an image of 48x64, warped to 96x96 with cells of 32.
    np.testing.assert_allclose(training_sizes(write_voc(tmp_path, 6), 96), [[6 / 48 * 3, 16 / 64 * 3]])


# --- masks ------------------------------------------------------------------------------------------------------------


def write_masks(root: Path, orientation: int, as_stored: bool, upright: np.ndarray | None = None) -> None:
    upright = patch() if upright is None else upright
    base = root / "VOCdevkit" / "VOC2012"
    photograph(base / "JPEGImages" / "p.jpg", upright, orientation)
    ids = (upright[..., 0] > 0).astype(np.uint8)
    for kind in ("Class", "Object"):
        (base / f"Segmentation{kind}").mkdir(parents=True, exist_ok=True)
        save_ids(str(base / f"Segmentation{kind}" / "p.png"), store(ids, orientation) if as_stored else ids)
    (base / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    (base / "ImageSets" / "Segmentation" / "train.txt").write_text("p\n")


def mask_module(kind: type, root: Path, **options: Any) -> Any:
    sets = {split: ["VOC2012/train"] for split in ("train", "val", "test")}
    classes = ["nut"] if kind is VOCInstance else ["background", "nut"]
    return kind(str(root), **{**sets, "classes": classes, "hflip": 0.0, "num_workers": 0, "batch_size": 1, **options})


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("as_stored", [False, True])
def test_masks_lie_on_their_patch(tmp_path: Path, orientation: int, as_stored: bool) -> None:
    write_masks(tmp_path, orientation, as_stored)
    # Flips and rotations by 180 degrees need the option.
    option = not as_stored
    semantic = mask_module(VOCSegmentation, tmp_path, crop_size=None, scale=(1.0, 1.0), exif_orientation=option)
    for split, key in (("train", "mask"), ("val", "original_mask")):
        sample = semantic.dataset(split)[0]
        assert ((sample["image"][0] > 128) == (sample[key] == 1)).all()
    sample = mask_module(VOCInstance, tmp_path, exif_orientation=option).dataset("train")[0]
    assert ((sample["image"][0] > 128) == (sample["target"]["masks"][0] == 1)).all()
    crops = mask_module(VOCInstanceCrops, tmp_path, image_size=40, crop_size=40, exif_orientation=option)
    sample = crops.dataset("train")[0]
    inside = sample["mask"] != 255
    assert (((sample["image"][0] > 128) == (sample["mask"] == 1)) | ~inside).float().mean() > 0.95
    if orientation >= 5:  # the size decides against the option
        sample = mask_module(VOCSegmentation, tmp_path, exif_orientation=not option).dataset("val")[0]
        assert ((sample["image"][0] > 128) == (sample["original_mask"] == 1)).all()
    assert check(semantic).problems == []


def test_masks_of_sbd(tmp_path: Path) -> None:
    """GTcls and GTinst are matrices, without a header of their own."""
    base = tmp_path / "benchmark_RELEASE" / "dataset"
    photograph(base / "img" / "p.jpg", patch(), 8)
    ids = store((patch()[..., 0] > 0).astype(np.uint8), 8)
    for folder, name, fields in (
        ("cls", "GTcls", {"Segmentation": ids}),
        ("inst", "GTinst", {"Segmentation": ids, "Categories": np.array([[1]], np.uint8)}),
    ):
        (base / folder).mkdir()
        savemat(base / folder / "p.mat", {name: fields})
    for name in ("train", "val"):
        (base / f"{name}.txt").write_text("p\n")
    (tmp_path / "VOCdevkit").mkdir()
    options = {"train": ["SBD/train"], "val": ["SBD/val"], "test": ["SBD/val"]}
    for kind in (VOCSegmentation, VOCInstance):
        sample = mask_module(kind, tmp_path, **options).dataset("val")[0]
        mask = sample["original_mask"] if kind is VOCSegmentation else sample["target"]["masks"][0]
        assert sample["image"].shape == (3, 48, 64)
        assert ((sample["image"][0] > 128) == (mask == 1)).all()


@pytest.mark.parametrize("kind", [VOCSegmentation, VOCInstance, VOCInstanceCrops])
def test_a_mask_of_another_size_is_refused(tmp_path: Path, kind: type) -> None:
    write_masks(tmp_path, 6, as_stored=False)
    for name in ("Class", "Object"):
        save_ids(str(tmp_path / f"VOCdevkit/VOC2012/Segmentation{name}/p.png"), np.ones((60, 48), np.uint8))
    data = mask_module(kind, tmp_path)
    with pytest.raises(DatasetError, match=r"p.png: expected a mask of its image's size 64x48 or 48x64, found 48x60"):
        data.dataset("train")[0]
    (line,) = check(data).problems
    assert "expected a mask of its image's size 64x48 or 48x64, found 48x60" in line


def test_two_masks_of_different_sizes_are_refused(tmp_path: Path) -> None:
    write_masks(tmp_path, 6, as_stored=False)
    save_ids(str(tmp_path / "VOCdevkit/VOC2012/SegmentationClass/p.png"), np.ones((48, 64), np.uint8))
    for kind in (VOCInstance, VOCInstanceCrops):
        with pytest.raises(DatasetError, match=r"Object/p.png: expected the size 64x48 of .*Class/p.png, found 48x64"):
            mask_module(kind, tmp_path).dataset("train")[0]


# --- readers without annotated sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [True, False])
@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_classification(tmp_path: Path, orientation: int, option: bool) -> None:
    upright = patch((64, 64), (0, 0, 32, 16))
    for split in ("train", "val"):
        photograph(tmp_path / split / "cat" / "p.jpg", upright, orientation)
    expected = upright if option else store(upright, orientation)
    options = {"train_crop": "pad", "padding": 0, "hflip": 0.0, "image_size": 64, "exif_orientation": option}
    data = ImageFolder(str(tmp_path), images=str(tmp_path / "val"), **options)  # type: ignore[arg-type]
    for split in ("train", "val", "predict"):
        pixels = data.dataset(split)[0]["image"].permute(1, 2, 0).numpy()  # type: ignore[arg-type]
        assert np.abs(pixels.astype(int) - expected).mean() < 4
    crops = ImageFolder(str(tmp_path), image_size=64, crop_scale=(1.0, 1.0), hflip=0.0, exif_orientation=option)
    pixels = crops.dataset("train")[0]["image"].permute(1, 2, 0).numpy()
    assert np.abs(pixels.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("option", [True, False])
def test_people(tmp_path: Path, option: bool) -> None:
    """The joints of a person lie on the patch, in full images and in crops."""
    pixels = patch() if option else store(patch(), 6)
    rows, columns = np.nonzero(pixels[..., 0])
    spread = np.array([[x, y] for x in (columns.min(), columns.max()) for y in (rows.min(), rows.max())])
    joints = np.concatenate([np.resize(spread + 1, (14, 2)), np.ones((14, 1))], 1)[None]
    write_lsp(tmp_path / "lsp_dataset", joints, extended=False)
    photograph(tmp_path / "lsp_dataset" / "images" / "im0001.jpg", patch(), 6)
    sets = {split: ["lsp_dataset"] for split in ("train", "val", "test")}
    options: dict[str, Any] = {**sets, "exif_orientation": option, "images": str(tmp_path / "lsp_dataset" / "images")}
    for crop, size in (("image", None), ("person", 32)):
        data = LSP(str(tmp_path), crop=crop, image_size=size, **options)  # type: ignore[arg-type]
        sample = data.dataset("val")[0]
        points = sample["target"]["keypoints"][0] if crop == "image" else sample["keypoints"]
        x, y = points.round().long().T
        assert (sample["image"][:, y, x] > 128).all()
        assert crop == "person" or sample["image"].shape == (3, *pixels.shape[:2])
    data = LSP(str(tmp_path), crop="image", image_size=None, **options)
    assert data.dataset("predict")[0]["image"].shape == (3, *pixels.shape[:2])
    person = LSP(str(tmp_path), image_size=64, **options).dataset("predict")[0]
    center = person["to_original"] @ torch.tensor([31.5, 31.5, 1.0])
    assert center.tolist() == pytest.approx([(pixels.shape[1] - 1) / 2, (pixels.shape[0] - 1) / 2], abs=1e-3)


@pytest.mark.parametrize("option", [True, False])
def test_photographs_of_other_datamodules(tmp_path: Path, option: bool) -> None:
    for folder in ("content", "style"):
        photograph(tmp_path / folder / "p.jpg", patch(), 6)
    size = (3, 64, 48) if option else (3, 48, 64)
    path = str(tmp_path / "content" / "p.jpg")
    data: VisionDataModule = FER2013(images=path, exif_orientation=option)
    assert data.dataset("predict")[0]["image"].shape == size
    data = ImagePair(path, path, image_size=None, exif_orientation=option)
    assert data.dataset("train")[0]["image"].shape == data.dataset("train")[0]["style"].shape == size
    style = StyleImages(str(tmp_path), image_size=32, resize=32, images=path, exif_orientation=option)
    assert style.dataset("predict")[0]["image"].shape == size
    square = StyleImages(str(tmp_path), image_size=48, resize=48, exif_orientation=option)
    for split, key in (("val", "image"), ("val", "style")):
        found = square.dataset(split)[0][key]  # type: ignore[arg-type]
        assert (found.float() - central_square(read_image(path, option))).abs().mean() < 2


def central_square(pixels: np.ndarray) -> torch.Tensor:
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return torch.from_numpy(pixels[top : top + side, left : left + side].transpose(2, 0, 1).astype(np.float32))


# --- notes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_decision_is_printed_once_per_run(tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for i in range(6):
            photograph(tmp_path / split / "cat" / f"{i}.jpg", patch(), 6 if i % 2 else 1)
    data = ImageFolder(str(tmp_path), image_size=32, batch_size=2, num_workers=workers)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert set(batch) == {"image", "id", "label"}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "EXIF" in line]
    assert line.startswith("EXIF orientation: applied where no annotated size decides, first in ")
    assert line.endswith(" (orientation 6); set --data.exif_orientation false to read them as stored")


def test_check_counts_the_images(tmp_path: Path) -> None:
    for i in range(5):
        photograph(tmp_path / "train" / "cat" / f"{i}.jpg", patch((40 + i, 30)), 6 if i % 2 else 1)
    for option, applied in ((True, 2), (False, 0)):
        notes = check(ImageFolder(str(tmp_path), exif_orientation=option)).notes
        assert f"  EXIF orientation: applied to {applied} of 2 images that have one" in notes
