"""Sliding window: dense logits against the loop, the loss, box coordinates, and learning."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.detection.voc import VOCDetection
from datamodules.synthetic.voc import write_voc
from lightning_modules.detection.sliding_window import (
    STRIDE,
    SlidingWindow,
    WindowNetwork,
    classify_each_window,
    window_loss,
)
from lightning_modules.detection.windows import IGNORE_LABEL


def with_random_statistics(network: torch.nn.Module) -> torch.nn.Module:
    """Randomize the batch statistics: at their initial values normalization is the identity."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return network.eval()


def parameters(classes: int, window: int, width: float, hidden_units: int) -> int:
    channels = [3, *(round(c * width) for c in (32, 64, 128))]
    convolutions = sum(k * k * i * o + 2 * o for k, i, o in zip((5, 3, 3), channels[:-1], channels[1:], strict=True))
    side, hidden = window // 8 - 2, round(hidden_units * width)
    return convolutions + (channels[-1] * side**2 + 1) * hidden + (hidden + 1) * (classes + 1)


@pytest.mark.parametrize(
    ("classes", "window", "width", "hidden_units", "count"),
    [(20, 64, 1.0, 256, 1_280_309), (3, 48, 0.5, 256, 156_180)],
)
def test_parameters(classes: int, window: int, width: float, hidden_units: int, count: int) -> None:
    with torch.device("meta"):
        network = WindowNetwork(classes, window, width, hidden_units)
    assert sum(p.numel() for p in network.parameters()) == count == parameters(classes, window, width, hidden_units)


@pytest.mark.parametrize("window", [24, 40, 64])
@pytest.mark.parametrize("extra", [(0, 0), (3, 5)])
def test_one_pass_gives_what_the_loop_gives(window: int, extra: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = with_random_statistics(WindowNetwork(3, window, width_multiplier=0.25, hidden_units=64))
    image = torch.randn(3, window + 3 * STRIDE + extra[0], window + 4 * STRIDE + extra[1])
    with torch.inference_mode():
        dense = network.dense(image[None])[0]
        plain = classify_each_window(network, image, window, STRIDE)
    assert plain.shape == (4, 4, 5)
    assert plain.std(dim=(1, 2)).min() > 1e-3  # the windows differ
    torch.testing.assert_close(dense, plain, atol=1e-5, rtol=1e-5)


def test_a_window_that_does_not_fit_is_refused() -> None:
    for window in (16, 50):
        with pytest.raises(
            ValueError, match=f"window_size: expected a multiple of 8 pixels, at least 24, found {window}"
        ):
            WindowNetwork(3, window)
    with pytest.raises(ValueError, match="window_sizes: expected numbers above 0"):
        SlidingWindow(window_sizes=[])


def test_the_loss_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        logits = rng.normal(0, 3, (int(rng.integers(1, 12)), 4))
        label = rng.choice([0, 1, 2, 3, IGNORE_LABEL], len(logits))
        terms = [math.log(np.exp(x).sum()) - x[y] for x, y in zip(logits, label, strict=True) if y != IGNORE_LABEL]
        expected = sum(terms) / max(1, len(terms))
        found = window_loss(torch.from_numpy(logits).float(), torch.from_numpy(label))
        assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_an_ignored_window_has_no_gradient() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    window_loss(logits, torch.full((3,), IGNORE_LABEL)).backward()
    assert logits.grad.abs().sum() == 0


# --- module -----------------------------------------------------------------------------------------------------------


def small(**options: Any) -> SlidingWindow:
    settings: dict[str, Any] = {
        "num_classes": 3,
        "window_size": 24,
        "width_multiplier": 0.25,
        "hidden_units": 64,
        "window_sizes": [24],
        "aspect_ratios": [1.0],
    }
    return SlidingWindow(**{**settings, **options})


def test_boxes_lie_where_the_windows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detect one window of 12x48 pixels; neighboring windows are a third of a side apart."""
    module = small(window_sizes=[24], aspect_ratios=[0.25])

    def dense(x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (1, 3, 48, 192)  # 96 pixels, half as high and twice as wide
        logits = torch.zeros(1, 4, 4, 22)
        logits[:, 3] = 20
        logits[0, 1, 2, 5] = 40
        return logits

    monkeypatch.setattr(module.network, "dense", dense)
    (found,) = module.predict(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))
    torch.testing.assert_close(found["boxes"], torch.tensor([[20.0, 32, 32, 80]]))
    assert found["labels"].tolist() == [1]
    assert found["scores"].item() == pytest.approx(1)


def test_a_batch_equals_its_images_one_by_one() -> None:
    torch.manual_seed(0)
    module = small(window_sizes=[20, 40], aspect_ratios=[0.5, 1.0], score_threshold=0.0)
    with_random_statistics(module)
    images = torch.randint(0, 256, (2, 3, 72, 72), dtype=torch.uint8)
    with torch.inference_mode():
        together, apart = module.predict(images), module.predict(list(images))
    for a, b in zip(together, apart, strict=True):
        assert len(a["boxes"]) > 20
        torch.testing.assert_close(a["scores"], b["scores"], atol=1e-5, rtol=1e-5)
        assert a["scores"].sort(descending=True).values.equal(a["scores"])


@pytest.mark.parametrize("as_list", [False, True])
def test_images_without_objects_train_as_background(as_list: bool) -> None:
    module = small()
    images: Any = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    no_objects = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batch = {"image": [images[0], images[1, :, :50]] if as_list else images, "target": [no_objects, no_objects]}
    loss = sum(module.losses(batch).values())
    loss.backward()
    assert torch.isfinite(loss)
    assert module.network.fc2.bias.grad[3] < 0  # more background
    assert (module.network.fc2.bias.grad[:3] > 0).all()


def learn(module: Any, folder: str, steps: int, size: int) -> tuple[float, float]:
    """Return the mean average precision on drawn images before and after some training steps."""
    classes = write_voc(folder, classes=2, train=24, val=10, size=64)
    options: dict[str, Any] = {"train": ["VOC2007/train"], "val": ["VOC2007/val"], "classes": classes, "num_workers": 0}
    data = VOCDetection(folder, image_size=size, batch_size=16, **options)
    module.eval()
    metrics = module.build_metrics()

    def measure() -> float:
        module.eval()
        metrics.reset()
        with torch.inference_mode():
            for batch in data.val_dataloader():
                module.update_metrics(metrics, module.predict(batch["image"]), batch)
        return metrics.compute()["map"].item()

    before = measure()
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.01)
    done = 0
    while done < steps:
        for batch in data.train_dataloader():
            torch.manual_seed(done)
            optimizer.zero_grad()
            sum(module.losses(batch).values()).backward()
            optimizer.step()
            done += 1
    return before, measure()


def test_it_learns(tmp_path: Any) -> None:
    torch.manual_seed(0)
    module = small(
        num_classes=2,
        window_size=32,
        width_multiplier=0.5,
        hidden_units=256,
        window_sizes=[22, 32, 45],
        windows_per_image=16,
        compute_coco_ap=False,
    )
    before, after = learn(module, str(tmp_path), steps=20, size=80)
    assert before < 0.1
    assert after > 0.3
