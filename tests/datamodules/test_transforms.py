"""Crops, flips and colors against torchvision's distributions and the formulas of the papers."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms as reference

from datamodules.folders import list_images
from datamodules.synthetic.fer2013 import draw_face
from datamodules.transforms import (
    PCA_DIRECTIONS,
    PCA_STD,
    EvalTransform,
    FaceTransform,
    TrainTransform,
    pca_color_jitter,
    random_resized_box,
    scale_jitter_box,
    to_tensor,
)

SHARED = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def draw_image(folder: Path, height: int, width: int) -> str:
    noise = np.random.default_rng(height * width).uniform(0, 255, (height // 8 + 2, width // 8 + 2, 3))
    pixels = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    path = folder / f"{height}x{width}.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def test_to_tensor() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    tensor = to_tensor(pixels[:, ::-1])
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.numpy(), pixels[:, ::-1].transpose(2, 0, 1))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(375, 500), (500, 200)])
def test_random_resized_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    scale, ratio, n = (0.08, 1.0), (3 / 4, 4 / 3), 1500
    ours = np.array([random_resized_box(*size, scale, ratio) for _ in range(n)])
    blank = torch.empty(3, *size)
    theirs = np.array([reference.RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(n)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.01
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 0.01


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 5)])
def test_where_no_draw_fits_the_box_is_torchvisions_central_one(size: tuple[int, int]) -> None:
    scale, ratio = (0.9, 1.0), (3 / 4, 4 / 3)
    theirs = reference.RandomResizedCrop.get_params(torch.empty(3, *size), list(scale), list(ratio))
    assert random_resized_box(*size, scale, ratio) == tuple(theirs)


def test_scale_jitter_boxes() -> None:
    for shorter, side in ((260, 258), (480, 140)):  # 300 * 224 / shorter
        boxes = np.array([scale_jitter_box(300, 400, 224, shorter) for _ in range(300)])
        assert (boxes[:, 2:] == side).all()
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 0].max(), boxes[:, 1].max()) <= (300 - side, 400 - side)
        assert boxes[:, 1].max() - boxes[:, 1].min() > 0.9 * (400 - side)


def test_scale_jitter_reads_what_resizing_first_would(tmp_path: Path) -> None:
    path = draw_image(tmp_path, 300, 400)
    pixels = TrainTransform(224, "scale_jitter", resize_range=(256, 256), hflip=0)(path).numpy().transpose(1, 2, 0)
    resized = cv2.resize(cv2.imread(path)[..., ::-1], (341, 256), interpolation=cv2.INTER_AREA)
    best = cv2.matchTemplate(np.ascontiguousarray(resized), np.ascontiguousarray(pixels), cv2.TM_CCOEFF_NORMED).max()
    assert best > 0.99


def test_pad_is_a_crop_of_the_zero_padded_draw_image(tmp_path: Path) -> None:
    path = draw_image(tmp_path, 32, 32)
    padded = np.pad(cv2.imread(path)[..., ::-1], ((4, 4), (4, 4), (0, 0)))
    transform, seen = TrainTransform(32, "pad", padding=4, hflip=0), set()
    for _ in range(300):
        crop = transform(path).numpy().transpose(1, 2, 0)
        places = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if np.array_equal(padded[top : top + 32, left : left + 32], crop)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 60


def test_flip(tmp_path: Path) -> None:
    path = draw_image(tmp_path, 32, 32)
    plain = TrainTransform(32, "pad", padding=0, hflip=0)(path)
    assert torch.equal(TrainTransform(32, "pad", padding=0, hflip=1)(path), plain.flip(-1))
    flips = sum(not torch.equal(TrainTransform(32, "pad", padding=0)(path), plain) for _ in range(200))
    assert 70 < flips < 130


def test_pca_jitter_shifts_along_the_principal_components() -> None:
    gray = np.full((4, 4, 3), 128, np.uint8)
    shifts = np.array([pca_color_jitter(gray, 0.1)[0, 0].astype(float) - 128 for _ in range(4000)])
    expected = 255**2 * PCA_DIRECTIONS @ np.diag((0.1 * PCA_STD) ** 2) @ PCA_DIRECTIONS.T
    np.testing.assert_allclose(np.cov(shifts.T), expected, atol=2)  # rounding to uint8 adds 1/12
    assert np.abs(shifts.mean(0)).max() < 0.5
    np.testing.assert_allclose(PCA_DIRECTIONS.T @ PCA_DIRECTIONS, np.eye(3), atol=1e-3)


def test_pca_jitter_saturates() -> None:
    pixels = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    for _ in range(50):
        dark, light = pca_color_jitter(pixels, 1.0)[0].astype(int)
        assert dark.max() < 128 or light.min() > 128


def test_color_jitter_draws_from_the_generators_it_is_given(tmp_path: Path) -> None:
    path = draw_image(tmp_path, 32, 32)
    transform = TrainTransform(32, "pad", padding=0, hflip=0, color_jitter=0.4)

    def sample(seed: int) -> torch.Tensor:
        transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return transform(path)

    first = sample(1)
    assert not torch.equal(first, sample(2))
    assert torch.equal(first, sample(1))
    assert not torch.equal(first, TrainTransform(32, "pad", padding=0, hflip=0)(path))


def test_bad_arguments_and_small_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crop_scale: expected 0 < smallest"):
        TrainTransform(32, crop_scale=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"resize_range: expected image_size \(224\)"):
        TrainTransform(224, "scale_jitter", resize_range=(200, 300))
    with pytest.raises(ValueError, match="hflip"):
        TrainTransform(32, hflip=1.5)
    with pytest.raises(ValueError, match=r"eval_crop_size: expected 1 to resize \(256\), found 299"):
        EvalTransform(299, 256)
    with pytest.raises(ValueError, match=r"expected 32x32 pixels or more after padding by 4, found 24x24"):
        TrainTransform(32, "pad", padding=4)(draw_image(tmp_path, 16, 16))
    with pytest.raises(ValueError, match="expected 32x32 pixels or more, found 16x16; set resize"):
        EvalTransform(32, None)(draw_image(tmp_path, 16, 16))


def test_face_transform() -> None:
    """A dot at the center shows the shift, a dot beside it rotation and zoom; the border is repeated."""
    transform = FaceTransform(rotation=10, shift=0.1, zoom=0.1, hflip=0.5)
    face = np.zeros((96, 96), np.uint8)
    cv2.circle(face, (48, 48), 3, 255, -1)
    marks = []
    for i in range(200):
        transform.set_random_state(np.random.default_rng(i), random.Random(i))
        y, x = np.nonzero(transform(face) > 100)
        marks.append((x.mean() - 48, y.mean() - 48))
    shifts = np.abs(marks)
    assert shifts.max() < 11.5
    assert (shifts.max(0) > 8.5).all(), "shifts of up to 0.1 in both directions"
    spot = np.zeros((96, 96), np.uint8)
    cv2.circle(spot, (48 + 30, 48), 3, 255, -1)
    pure = FaceTransform(rotation=10, shift=0.0, zoom=0.1, hflip=0.5)
    angles, lengths, sides = [], [], []
    for i in range(200):
        pure.set_random_state(np.random.default_rng(i), random.Random(i))
        y, x = np.nonzero(pure(spot) > 100)
        dx, dy = x.mean() - 47.5, y.mean() - 47.5
        sides.append(dx > 0)
        angles.append(np.degrees(np.arctan2(dy, abs(dx))))
        lengths.append(np.hypot(dx, dy) / 30)
    assert 8 < np.abs(angles).max() < 12.5
    assert 0.87 < min(lengths) < 0.94
    assert 1.06 < max(lengths) < 1.13
    assert 0.35 < np.mean(sides) < 0.65
    assert (FaceTransform()(np.full((48, 48), 90, np.uint8)) == 90).all()
    still = FaceTransform(0, 0, 0, 0)(draw_face("happy", np.random.default_rng(0)))
    assert (still == draw_face("happy", np.random.default_rng(0))).all()
    with pytest.raises(ValueError, match="rotation: expected 0 to 180 degrees, found 200"):
        FaceTransform(rotation=200)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (300, 300), (100, 333), (257, 256)])
@pytest.mark.parametrize("resize", [256, (256, 256)])
def test_evaluation_is_torchvisions(tmp_path: Path, size: tuple[int, int], resize: int | tuple[int, int]) -> None:
    path = draw_image(tmp_path, *size)
    chain = reference.Compose([reference.Resize(resize), reference.CenterCrop(224), reference.PILToTensor()])
    ours, theirs = EvalTransform(224, resize)(path).int(), chain(Image.open(path)).int()
    assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize("size", [(33, 32), (40, 51)])
def test_evaluation_as_is(tmp_path: Path, size: tuple[int, int]) -> None:
    path = draw_image(tmp_path, *size)
    theirs = reference.Compose([reference.CenterCrop(32), reference.PILToTensor()])(Image.open(path))
    assert torch.equal(EvalTransform(32, None)(path), theirs)


def test_evaluation_of_a_large_photograph_is_close_to_torchvisions(tmp_path: Path) -> None:
    small = cv2.imread(draw_image(tmp_path, 90, 120))
    path = str(tmp_path / "large.jpg")
    cv2.imwrite(path, cv2.resize(small, (2000, 1500), interpolation=cv2.INTER_CUBIC))
    chain = reference.Compose([reference.Resize(64), reference.CenterCrop(56), reference.PILToTensor()])
    ours, theirs = EvalTransform(56, 64)(path).int(), chain(Image.open(path)).int()
    assert (ours - theirs).abs().float().mean() < 2


def test_evaluation_of_a_thread_of_a_draw_image(tmp_path: Path) -> None:
    assert EvalTransform(224, 256)(draw_image(tmp_path, 1, 9000)).shape == (3, 224, 224)


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/imagenet_sample is not there")
def test_evaluation_of_photographs_is_torchvisions() -> None:
    chain = reference.Compose([reference.Resize(256), reference.CenterCrop(224), reference.PILToTensor()])
    transform = EvalTransform(224, 256)
    for path in list_images(str(SHARED))[::10]:
        image = Image.open(path)
        if min(image.size) < 512:  # beyond, it is first decoded at half its size
            assert (transform(path).int() - chain(image.convert("RGB")).int()).abs().max() <= 1
