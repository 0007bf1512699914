"""EmotionClassifier: mini-Xception, loss, normalization, and predictions for photographs."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from errors import UserError
from lightning_modules.classification import emotion
from lightning_modules.classification.emotion import EmotionClassifier, MiniXception, XceptionModule, max_pool_same
from lightning_modules.classification.faces import align_face
from tests.lightning_modules.classification.conftest import draw_faces

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
    """Keras pads max((ceil(n/2) - 1) 2 + 3 - n, 0) in total, the smaller half of it in front."""
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
    nn.init.zeros_(module.body[4].weight)  # the body returns the bias of its last normalization, 0
    x = torch.randn(1, 2, 9, 6)
    weight = module.residual[0].weight[:, :, 0, 0]
    expected = torch.einsum("oc,nchw->nohw", weight, x[:, :, ::2, ::2]) / (1 + 1e-3) ** 0.5
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected)
    # A strided convolution gives the same.
    strided = nn.functional.conv2d(x, module.residual[0].weight, stride=2) / (1 + 1e-3) ** 0.5
    torch.testing.assert_close(expected, strided)


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_do_not_depend_on_the_memory_format(channels_last: bool) -> None:
    """Compare with float64: in NHWC memory oneDNN's strided convolution of few channels overran memory."""
    torch.manual_seed(0)
    network, reference = MiniXception(), MiniXception().double()
    reference.load_state_dict(network.state_dict())
    images = EmotionClassifier().preprocess(draw_faces(4))
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
    terms = module.losses({"image": draw_faces(2), "label": torch.tensor([1, 2])})
    squares = (module.network.conv1.weight.detach() ** 2).sum() + (module.network.conv2.weight.detach() ** 2).sum()
    assert terms["l2"].item() == pytest.approx(0.01 * squares.item(), rel=1e-5)
    gradients = torch.autograd.grad(terms["l2"], module.parameters(), allow_unused=True)
    named = [name for (name, _), g in zip(module.named_parameters(), gradients, strict=True) if g is not None]
    assert named == ["network.conv1.weight", "network.conv2.weight"]
    batch = {"image": draw_faces(2), "label": torch.tensor([1, 2])}
    assert set(EmotionClassifier(l2=0).losses(batch)) == {"cross_entropy"}


@pytest.mark.parametrize("l2", [0.01, 0.5, 0.0])
def test_the_loss_of_an_evaluation_includes_l2(l2: float) -> None:
    """Keras adds regularization to ``val_loss``, which the authors' plateau and early stopping monitor."""
    module = EmotionClassifier(l2=l2).eval()
    metrics, labels = module.build_metrics(), torch.tensor([1, 6, 0, 3, 3])
    images = draw_faces(5)
    with torch.no_grad():
        for part in (slice(0, 4), slice(4, 5)):  # unequal batches: the penalty counts once, not once per batch
            batch = {"image": images[part], "label": labels[part]}
            module.update_metrics(metrics, module.predict_batch(batch), batch)
        p = module.predict(images)["probabilities"].numpy()  # type: ignore[call-overload]
    squares = sum(float((w.detach() ** 2).sum()) for w in (module.network.conv1.weight, module.network.conv2.weight))
    expected = -np.log(p[np.arange(5), labels]).mean() + l2 * squares
    assert metrics.compute()["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_class_weights_enter_the_loss() -> None:
    weights = [1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 2.0]
    module = EmotionClassifier(class_weights=weights).eval()
    labels = torch.tensor([1, 6, 0])
    loss = module.losses({"image": draw_faces(3), "label": labels})["cross_entropy"].item()
    p = module.predict(draw_faces(3))["probabilities"].detach().numpy()  # type: ignore[call-overload]
    w = np.array(weights)[labels]
    assert loss == pytest.approx(-(w * np.log(p[np.arange(3), labels])).sum() / w.sum(), rel=1e-5)


def test_what_is_refused() -> None:
    for options, expected in (
        ({"num_classes": 0}, "num_classes: expected 1 or more"),
        ({"class_weights": [1.0, 2.0]}, "class_weights: expected 7, one per class, found 2"),
        ({"l2": -1.0}, "l2: expected 0 or more"),
    ):
        with pytest.raises(UserError, match=expected):
            EmotionClassifier(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected gray faces uint8 \(B,1,H,W\), found torch.uint8 \(1, 3, 48, 48\)"):
        EmotionClassifier().preprocess(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    with pytest.raises(UserError, match="label: expected 0..6"):
        EmotionClassifier().on_before_batch_transfer({"label": torch.tensor([7])}, 0)


# --- normalization ------------------------------------------------------------------------------------------------


def test_faces_are_scaled_and_enlarged_as_opencv_does() -> None:
    images = draw_faces(3)
    expected = np.stack([cv2.resize(image[0].numpy().astype(np.float32), (64, 64)) for image in images])[:, None]
    found = EmotionClassifier().preprocess(images)
    darker = images // 2 + 40
    changed = (EmotionClassifier().preprocess(darker) - found).abs().mean()
    np.testing.assert_allclose(found.numpy(), expected / 127.5 - 1, atol=1e-4)
    for normalization in ("equalize", "standardize"):
        other = EmotionClassifier(normalization=normalization).preprocess(images)  # type: ignore[arg-type]
        assert other.shape == (3, 1, 64, 64)
        # Half the contrast and another brightness change little.
        again = EmotionClassifier(normalization=normalization).preprocess(darker)  # type: ignore[arg-type]
        assert (again - other).abs().mean() < 0.25 * changed


# --- photographs --------------------------------------------------------------------------------------------------


def test_photographs_with_and_without_faces(photographs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    module = EmotionClassifier().eval()
    image, eyes_drawn = photographs[1]
    blank = torch.full((3, 200, 260), 90, dtype=torch.uint8)
    with torch.inference_mode():
        with_faces, without = module.predict([torch.from_numpy(image).permute(2, 0, 1), blank])  # type: ignore[misc]
    assert with_faces["boxes"].shape == (len(eyes_drawn), 4)
    assert with_faces["aligned"].all()
    torch.testing.assert_close(with_faces["probabilities"].sum(1), torch.ones(len(eyes_drawn)))
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
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
    image, _ = photographs[0]
    with torch.inference_mode():
        (found,) = module.predict(torch.from_numpy(image).permute(2, 0, 1)[None])  # type: ignore[misc]
    assert not found["aligned"].any()
    x1, y1, x2, y2 = found["boxes"][0].round().int().tolist()
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    cut = align_face(gray, found["eyes"][0].double().numpy()).astype(int)
    plain = cv2.resize(gray[y1:y2, x1:x2], (48, 48), interpolation=cv2.INTER_AREA)
    assert np.abs(cut - plain).mean() < 4
