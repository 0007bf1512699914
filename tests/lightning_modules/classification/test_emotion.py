"""mini-Xception to the letter, and the way from a photograph to a label, each step computed in another way too."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from datamodules.classification.fer2013 import EMOTIONS, FER2013
from datamodules.synthetic.fer2013 import EYE_CENTRES, draw_face, draw_photograph
from lightning_modules.classification import emotion
from lightning_modules.classification.emotion import (
    EYES,
    EmotionClassifier,
    MiniXception,
    XceptionModule,
    align_face,
    detect_faces,
    equalize,
    eyes_to_template,
    find_eyes,
    load_cascade,
    max_pool_same,
    standardize,
)

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "fer2013_sample"


def faces(count: int = 6) -> torch.Tensor:
    drawn = [draw_face(EMOTIONS[i % 7], np.random.default_rng(i)) for i in range(count)]
    return torch.from_numpy(np.stack(drawn))[:, None]


# --- network ------------------------------------------------------------------------------------------------------


def test_parameters_as_keras_counts_them() -> None:
    network = MiniXception()
    trainable = sum(p.numel() for p in network.parameters())
    statistics = sum(b.numel() for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var")))
    assert (trainable, statistics, trainable + statistics) == (56_951, 1_472, 58_423)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    biased = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert biased == ["classifier"]


def test_shapes_on_the_way() -> None:
    network, seen = MiniXception().eval(), []
    for module in [network.conv1, network.conv2, *network.modules_1_to_4, network.classifier]:
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape[1:])))
    with torch.inference_mode():
        assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 7)
    assert seen == [(8, 62, 62), (8, 60, 60), (16, 30, 30), (32, 15, 15), (64, 8, 8), (128, 4, 4), (7, 4, 4)]


@pytest.mark.parametrize(("height", "width"), [(60, 60), (15, 15), (8, 15), (7, 4)])
def test_pooling_is_keras_same(height: int, width: int) -> None:
    """Keras pads max((ceil(n/2) - 1) 2 + 3 - n, 0) in all, the smaller half of it in front; padding is never seen."""
    x = np.random.default_rng(0).normal(-5, 1, (2, 3, height, width))
    starts = []
    for n in (height, width):
        total = max((-(-n // 2) - 1) * 2 + 3 - n, 0)
        starts.append([2 * i - total // 2 for i in range(-(-n // 2))])
    expected = np.array(
        [[x[:, :, max(0, i) : i + 3, max(0, j) : j + 3].max((2, 3)) for j in starts[1]] for i in starts[0]]
    )
    np.testing.assert_allclose(max_pool_same(torch.from_numpy(x)).numpy(), expected.transpose(2, 3, 0, 1))


def test_the_residual_sees_even_rows_and_columns() -> None:
    module = XceptionModule(2, 4).eval()
    nn.init.zeros_(module.body[4].weight)  # the body gives its last normalization's shift: nothing
    x = torch.randn(1, 2, 9, 6)
    weight = module.residual[0].weight[:, :, 0, 0]
    expected = torch.einsum("oc,nchw->nohw", weight, x[:, :, ::2, ::2]) / (1 + 1e-3) ** 0.5
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected)
    # The same by a convolution's own stride.
    strided = nn.functional.conv2d(x, module.residual[0].weight, stride=2) / (1 + 1e-3) ** 0.5
    torch.testing.assert_close(expected, strided)


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_do_not_depend_on_the_memory_format(channels_last: bool) -> None:
    """In NHWC memory too they are those of float64: oneDNN's strided convolution of few channels overran memory."""
    torch.manual_seed(0)
    network, reference = MiniXception(), MiniXception().double()
    reference.load_state_dict(network.state_dict())
    images = EmotionClassifier().preprocess(faces(4))
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    for net, x in ((network, images), (reference, images.double())):
        nn.functional.cross_entropy(net(x), torch.tensor([0, 1, 2, 3])).backward()
    for mine, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        difference = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-3)
        assert difference < 1e-2


# --- loss ---------------------------------------------------------------------------------------------------------


def test_l2_is_of_two_kernels_and_not_halved() -> None:
    module = EmotionClassifier()
    terms = module.losses({"image": faces(2), "label": torch.tensor([1, 2])})
    squares = (module.network.conv1.weight.detach() ** 2).sum() + (module.network.conv2.weight.detach() ** 2).sum()
    assert terms["l2"].item() == pytest.approx(0.01 * squares.item(), rel=1e-5)
    gradients = torch.autograd.grad(terms["l2"], module.parameters(), allow_unused=True)
    named = [name for (name, _), g in zip(module.named_parameters(), gradients, strict=True) if g is not None]
    assert named == ["network.conv1.weight", "network.conv2.weight"]
    assert set(EmotionClassifier(l2=0).losses({"image": faces(2), "label": torch.tensor([1, 2])})) == {"cross_entropy"}


def test_class_weights_enter_the_loss() -> None:
    weights = [1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 2.0]
    module = EmotionClassifier(class_weights=weights).eval()
    labels = torch.tensor([1, 6, 0])
    loss = module.losses({"image": faces(3), "label": labels})["cross_entropy"].item()
    p = module.predict(faces(3))["probabilities"].detach().numpy()  # type: ignore[call-overload]
    w = np.array(weights)[labels]
    assert loss == pytest.approx(-(w * np.log(p[np.arange(3), labels])).sum() / w.sum(), rel=1e-5)


def test_what_is_refused() -> None:
    for options, expected in (
        ({"num_classes": 0}, "num_classes: expected 1 or more"),
        ({"class_weights": [1.0, 2.0]}, "class_weights: expected 7, one a class, found 2"),
        ({"l2": -1.0}, "l2: expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=expected):
            EmotionClassifier(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected gray faces uint8 \(B,1,H,W\), found torch.uint8 \(1, 3, 48, 48\)"):
        EmotionClassifier().preprocess(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    with pytest.raises(ValueError, match="label: expected 0..6"):
        EmotionClassifier().on_before_batch_transfer({"label": torch.tensor([7])}, 0)


# --- normalization ------------------------------------------------------------------------------------------------


def test_equalization_is_opencvs() -> None:
    images = torch.cat([faces(5), torch.full((1, 1, 48, 48), 77, dtype=torch.uint8)])
    expected = np.stack([cv2.equalizeHist(image[0].numpy()) for image in images])[:, None]
    assert np.abs(equalize(images).numpy().astype(int) - expected).max() <= 1  # a half is rounded either way
    assert (equalize(images) == torch.from_numpy(expected)).float().mean() > 0.99


def test_standardized_faces_have_mean_0_and_deviation_1() -> None:
    images = torch.cat([faces(3), torch.full((1, 1, 48, 48), 77, dtype=torch.uint8)])
    found = standardize(images)
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:3].square().mean((1, 2, 3)), torch.ones(3))
    assert not found[3].any()


def test_faces_are_scaled_and_enlarged_as_opencv_does() -> None:
    images = faces(3)
    expected = np.stack([cv2.resize(image[0].numpy().astype(np.float32), (64, 64)) for image in images])[:, None]
    found = EmotionClassifier().preprocess(images)
    darker = images // 2 + 40
    changed = (EmotionClassifier().preprocess(darker) - found).abs().mean()
    np.testing.assert_allclose(found.numpy(), expected / 127.5 - 1, atol=1e-4)
    for normalization in ("equalize", "standardize"):
        other = EmotionClassifier(normalization=normalization).preprocess(images)  # type: ignore[arg-type]
        assert other.shape == (3, 1, 64, 64)
        # Half the contrast and another brightness are the same face.
        again = EmotionClassifier(normalization=normalization).preprocess(darker)  # type: ignore[arg-type]
        assert (again - other).abs().mean() < 0.25 * changed


# --- photographs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [-20.0, 0.0, 13.0])
@pytest.mark.parametrize("scale", [0.7, 3.3])
def test_eyes_land_on_the_template(angle: float, scale: float) -> None:
    turn = np.radians(angle)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    eyes = 48 * scale * EYES @ rotation.T + (31.4, 17.9)
    matrix = eyes_to_template(eyes, 48)
    np.testing.assert_allclose(eyes @ matrix[:, :2].T + matrix[:, 2], 48 * EYES, atol=1e-9)
    np.testing.assert_allclose(matrix[:, :2] @ matrix[:, :2].T, np.eye(2) / scale**2, atol=1e-12)
    assert np.linalg.det(matrix[:, :2]) > 0, "turned, never reflected"


@pytest.mark.parametrize(("angle", "scale"), [(0, 1.0), (12, 1.0), (-17, 2.6), (8, 5.0)])
def test_a_turned_face_comes_out_upright(angle: float, scale: float) -> None:
    """Two spots where the eyes are, in an image turned and scaled: their centers of mass, to a fraction of a pixel."""
    turn = np.radians(angle)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    eyes = 48 * scale * (EYES - 0.5) @ rotation.T + (163.3, 158.8)
    y, x = np.mgrid[0:320, 0:320] + 0.5
    spots = sum(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * (2.2 * scale) ** 2)) for cx, cy in eyes)
    face = align_face((spots * 250).astype(np.uint8), eyes).astype(float)
    yy, xx = np.mgrid[0:48, 0:48] + 0.5
    for half, (cx, cy) in ((xx < 24, 48 * EYES[0]), (xx >= 24, 48 * EYES[1])):
        mass = face * half
        assert (mass * xx).sum() / mass.sum() == pytest.approx(cx, abs=0.15)
        assert (mass * yy).sum() / mass.sum() == pytest.approx(cy, abs=0.15)


def test_large_faces_do_not_alias() -> None:
    """A board of one-pixel squares, eight to each pixel of the face, becomes even gray."""
    board = (np.indices((480, 480)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.ptp(align_face(board, 384 * EYES + (48.3, 50.1))[2:-2, 2:-2].astype(int)) < 16


@pytest.fixture(scope="module")
def photographs() -> list[tuple[np.ndarray, np.ndarray]]:
    drawn = []
    for i in range(6):
        drawn.append(draw_photograph([EMOTIONS[(i + j) % 7] for j in range(1 + i % 3)], np.random.default_rng(i)))
    return drawn


def test_faces_and_eyes_are_found_where_they_were_drawn(photographs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for picture, truth in photographs:
        gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        boxes = detect_faces(gray)
        assert len(boxes) == len(truth)
        for box, eyes in zip(boxes, truth, strict=True):
            found = find_eyes(gray, box)
            assert found is not None
            distance = np.linalg.norm(eyes[1] - eyes[0])
            assert np.linalg.norm(found - eyes, axis=1).max() < 0.1 * distance


def test_a_larger_photograph_has_its_faces_at_the_same_places(photographs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    gray = cv2.cvtColor(photographs[1][0], cv2.COLOR_RGB2GRAY)
    large = cv2.resize(gray, None, fx=4, fy=4)
    assert max(large.shape) > emotion.DETECTION_SIDE
    small, boxes = detect_faces(gray), detect_faces(large) / 4
    assert len(boxes) == len(small)
    assert np.abs(boxes - small).max() < 0.1 * (small[0, 2] - small[0, 0])


def test_photographs_with_and_without_faces(photographs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    module = EmotionClassifier().eval()
    picture, truth = photographs[1]
    blank = torch.full((3, 200, 260), 90, dtype=torch.uint8)
    with torch.inference_mode():
        with_faces, without = module.predict([torch.from_numpy(picture).permute(2, 0, 1), blank])  # type: ignore[misc]
    assert with_faces["boxes"].shape == (len(truth), 4)
    assert with_faces["aligned"].all()
    torch.testing.assert_close(with_faces["probabilities"].sum(1), torch.ones(len(truth)))
    # The probabilities are those of the aligned faces.
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    cut = np.stack([align_face(gray, eyes.numpy().astype(float)) for eyes in with_faces["eyes"]])[:, None]
    with torch.inference_mode():
        expected = module.predict(torch.from_numpy(cut))["probabilities"]  # type: ignore[call-overload]
    torch.testing.assert_close(with_faces["probabilities"], expected, atol=1e-3, rtol=1e-2)
    assert {name: tuple(value.shape) for name, value in without.items()} == {
        "boxes": (0, 4),
        "probabilities": (0, 7),
        "aligned": (0,),
        "eyes": (0, 2, 2),
    }


def test_without_eyes_the_box_is_taken_as_it_is(
    photographs: list[tuple[np.ndarray, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emotion, "find_eyes", lambda gray, box: None)
    module = EmotionClassifier().eval()
    picture, _ = photographs[0]
    with torch.inference_mode():
        (found,) = module.predict(torch.from_numpy(picture).permute(2, 0, 1)[None])  # type: ignore[misc]
    assert not found["aligned"].any()
    x1, y1, x2, y2 = found["boxes"][0].round().int().tolist()
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    cut = align_face(gray, found["eyes"][0].double().numpy()).astype(int)
    plain = cv2.resize(gray[y1:y2, x1:x2], (48, 48), interpolation=cv2.INTER_AREA)
    assert np.abs(cut - plain).mean() < 4


@pytest.mark.parametrize("places", [[(80, 40)], [(80, 40), (120, 79)], []])
def test_implausible_eyes_are_no_eyes(places: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One alone, two on a steep line, none."""

    class Cascade:
        def detectMultiScale(self, *args: object, **kwargs: object) -> list[tuple[int, int, int, int]]:
            return [(x - 20, y - 20, 40, 40) for x, y in places]

    monkeypatch.setattr(emotion, "load_cascade", lambda name: Cascade())
    assert find_eyes(np.zeros((300, 300), np.uint8), np.array([50.0, 50.0, 250.0, 250.0])) is None


def test_an_opencv_without_cascades_is_answered_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2.data, "haarcascades", str(tmp_path) + os.sep)
    load_cascade.cache_clear()
    with pytest.raises(RuntimeError, match=r"^OpenCV .* brings no haarcascade_frontalface_default.xml.*<5'$"):
        detect_faces(np.zeros((100, 100), np.uint8))
    load_cascade.cache_clear()


def test_the_drawn_eyes_are_where_the_template_has_them() -> None:
    np.testing.assert_array_equal(EYES, EYE_CENTRES)


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_real_faces_are_found_and_aligned() -> None:
    """Turned and enlarged FER2013 faces in a larger image: most are found, and come out as FER2013 has them."""
    data = FER2013(str(SHARED))
    shown = data.faces.pixels[torch.from_numpy(data.indices("val")[:40])].numpy()
    found = aligned = 0
    upright, tilted = [], []
    for i, face in enumerate(shown):
        large = cv2.copyMakeBorder(cv2.resize(face, None, fx=4, fy=4), 90, 90, 90, 90, cv2.BORDER_REPLICATE)
        angle = (-14, 14)[i % 2]
        matrix = cv2.getRotationMatrix2D((len(large) / 2, len(large) / 2), angle, 1)
        picture = cv2.warpAffine(large, matrix, large.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        boxes = detect_faces(picture)
        found += len(boxes) == 1
        eyes = find_eyes(picture, boxes[0]) if len(boxes) == 1 else None
        if eyes is not None:
            aligned += 1
            cut = align_face(picture, eyes)
            x1, y1, x2, y2 = boxes[0].astype(int)
            for crop, scores in ((cut, upright), (cv2.resize(picture[y1:y2, x1:x2], (48, 48)), tilted)):
                scores.append(np.corrcoef(crop[8:40, 8:40].ravel(), face[8:40, 8:40].ravel())[0, 1])
    assert found >= 28
    assert aligned >= 20
    assert np.mean(upright) > np.mean(tilted) + 0.05
