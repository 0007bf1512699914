"""Stacked Hourglass: parameter counts, loss against loops, coordinates, flip test, bad arguments, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from datamodules.pose.crops import PersonCrop
from datamodules.pose.mpii import MPII
from datamodules.synthetic.mpii import write_mpii
from lightning_modules.pose.joints import MPII_JOINTS
from lightning_modules.pose.keypoint_codec import encode
from lightning_modules.pose.stacked_hourglass import (
    STRIDE,
    Hourglass,
    PreActBottleneck,
    StackedHourglass,
    StackedHourglassNetwork,
    heatmap_losses,
)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def some_batch(seed: int = 0, people: int = 3, side: int = 64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (people, 3, side, side), dtype=torch.uint8, generator=generator),
        "keypoints": torch.rand(people, 16, 2, generator=generator) * (side - 1),
        "labeled": torch.rand(people, 16, generator=generator) < 0.7,
        "head_size": torch.full((people,), 10.0),
        "to_original": torch.eye(2, 3).repeat(people, 1, 1),
        "id": [f"{i}.jpg#0" for i in range(people)],
    }


def narrow(**options: Any) -> StackedHourglass:
    torch.manual_seed(0)
    return StackedHourglass(**{"num_stacks": 2, "channels": 8, "depth": 2, **options})


class Fixed(torch.nn.Module):
    """A network that returns the given heatmaps for any image."""

    def __init__(self, heatmaps: Tensor) -> None:
        super().__init__()
        self.heatmaps = heatmaps

    def forward(self, x: Tensor) -> Tensor:
        return self.heatmaps


# --- network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_stacks", "parameters"), [(1, 3_426_448), (2, 6_570_400), (8, 25_434_112)])
def test_the_authors_number_of_parameters(num_stacks: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(StackedHourglassNetwork(16, num_stacks)) == parameters


def test_a_skip_has_a_convolution_only_where_channels_change() -> None:
    assert isinstance(PreActBottleneck(16, 16).skip, torch.nn.Identity)
    assert isinstance(PreActBottleneck(8, 16).skip, torch.nn.Conv2d)


def test_a_residual_adds_to_its_input() -> None:
    """The skip connection is not normalized."""
    block, x = PreActBottleneck(8, 8), torch.randn(2, 8, 6, 6)
    torch.nn.init.zeros_(block.layers[-1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(block.layers[-1].bias)  # type: ignore[arg-type]
    torch.testing.assert_close(block(x), x)


def test_an_hourglass_sees_everything() -> None:
    """The center of the output depends on every corner of the input if the hourglass is deep enough."""
    x = torch.randn(1, 8, 32, 32)
    for depth, expected in ((4, True), (1, False)):
        hourglass = Hourglass(depth, 8).eval()
        for row, column in ((0, 0), (0, 31), (31, 0), (31, 31)):
            other = x.clone()
            other[:, :, row, column] += 100
            with torch.no_grad():
                middles = [hourglass(maps)[0, :, 16, 16] for maps in (x, other)]
            assert bool((middles[0] != middles[1]).any()) is expected


def test_heatmaps_are_a_quarter_of_the_image() -> None:
    found = StackedHourglassNetwork(5, 3, 8, 2)(torch.randn(2, 3, 32, 48))
    assert found.shape == (3, 2, 5, 8, 12)
    assert found.dtype == torch.float32


def test_each_stack_sees_the_heatmaps_of_the_one_before() -> None:
    network = StackedHourglassNetwork(5, 2, 8, 2).eval()
    x = torch.randn(1, 3, 32, 32)
    before = network(x)
    network.heatmaps[0].bias.data += 1  # type: ignore[operator, union-attr]
    after = network(x)
    torch.testing.assert_close(after[0], before[0] + 1)
    assert not torch.allclose(after[1], before[1])


# --- loss -----------------------------------------------------------------------------------------------------------


def losses_by_loops(found: np.ndarray, target: np.ndarray, counted: np.ndarray) -> list[float]:
    results = []
    for stack in found:
        squares = []
        for b in range(len(target)):
            for k in range(target.shape[1]):
                if counted[b, k]:
                    squares += [(stack[b, k, i, j] - target[b, k, i, j]) ** 2 for i in range(4) for j in range(3)]
        results.append(float(np.mean(squares)) if squares else 0.0)
    return results


@pytest.mark.parametrize("seed", range(200))
def test_the_loss_equals_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, target = rng.normal(0, 1, (2, 3, 4, 4, 3)), rng.random((3, 4, 4, 3))
    counted = rng.random((3, 4)) < rng.choice([0, 0.2, 0.8, 1])
    losses = heatmap_losses(torch.from_numpy(found), torch.from_numpy(target).float(), torch.from_numpy(counted))
    np.testing.assert_allclose(losses.tolist(), losses_by_loops(found, target, counted), rtol=1e-5, atol=1e-7)


def test_each_stack_has_its_term_and_its_gradient() -> None:
    module, batch = narrow(num_stacks=3), some_batch()
    terms = module.losses(batch)
    assert list(terms) == ["stack_1", "stack_2", "stack_3"]
    terms["stack_1"].backward()
    assert module.network.heatmaps[0].weight.grad.any()  # type: ignore[union-attr]
    later = module.network.heatmaps[1].weight.grad
    assert later is None or not later.any()


def test_right_heatmaps_cost_nothing() -> None:
    module, batch = narrow(), some_batch()
    target = encode(batch["keypoints"], batch["labeled"], (16, 16), STRIDE, module.sigma)
    module.network = Fixed(target.expand(2, -1, -1, -1, -1))  # type: ignore[assignment]
    assert [float(term) for term in module.losses(batch).values()] == [0, 0]
    module.network = Fixed(target.roll(1, 3).expand(2, -1, -1, -1, -1))  # type: ignore[assignment]
    assert all(float(term) > 1e-3 for term in module.losses(batch).values())


@pytest.mark.parametrize(("missing", "moved"), [("empty", True), ("ignore", False)])
def test_missing_joints_count_or_not(missing: Any, moved: bool) -> None:
    """Predict peaks for a joint that is not labeled and for one outside of the crop."""
    module, batch = narrow(missing=missing), some_batch(people=2)
    batch["labeled"] = torch.ones(2, 16, dtype=torch.bool)
    batch["labeled"][0, 3] = False
    batch["keypoints"][1, 4] = torch.tensor([-9.0, 20.0])
    right = encode(batch["keypoints"], batch["labeled"], (16, 16), STRIDE, module.sigma)
    right[0, 3, 5, 5] = right[1, 4, 5, 5] = 1.0
    module.network = Fixed(right[None])  # type: ignore[assignment]
    assert (float(module.losses(batch)["stack_1"]) > 0) is moved


@pytest.mark.parametrize("missing", ["empty", "ignore"])
def test_a_batch_without_a_label_is_finite(missing: Any) -> None:
    module, batch = narrow(missing=missing), some_batch()
    batch["labeled"][:] = False
    loss = torch.stack(list(module.losses(batch).values())).sum()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_the_loss_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        terms = narrow().losses(some_batch())
    assert {term.dtype for term in terms.values()} == {torch.float32}


# --- prediction -----------------------------------------------------------------------------------------------------


def test_predictions_are_the_peaks_of_the_last_stack() -> None:
    module, batch = narrow(flip_test=False), some_batch()
    target = encode(batch["keypoints"], torch.ones(3, 16, dtype=torch.bool), (16, 16), STRIDE, 1.0)
    module.network = Fixed(torch.stack([target.roll(3, 3), target]))  # type: ignore[assignment]
    found = module.predict(batch["image"])
    assert found["heatmaps"].shape == (3, 2, 16, 16, 16)
    # Half a cell in the outermost cells.
    error = (found["keypoints"] - batch["keypoints"]).abs()
    assert error.max() <= 2.001
    assert error.mean() < 0.8
    assert found["scores"].shape == (3, 16)
    assert found["scores"].min() > 0.7


def test_the_flip_test_is_the_same_for_a_flipped_person() -> None:
    """The prediction for the flipped image is the flipped prediction, with left and right exchanged."""
    module, batch = narrow().eval(), some_batch()
    with torch.no_grad():
        found, flipped = module.predict(batch["image"]), module.predict(batch["image"].flip(3))
    back = flipped["heatmaps"].flip(4)[:, :, module.flip_indices]
    torch.testing.assert_close(back, found["heatmaps"], atol=1e-5, rtol=1e-4)
    plain = narrow(flip_test=False).eval()
    with torch.no_grad():
        assert not torch.allclose(plain.predict(batch["image"])["heatmaps"], found["heatmaps"], atol=1e-4)


def test_the_flip_test_is_exact() -> None:
    """A network that finds the bright pixel of each side: both views agree exactly."""

    class Sides(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            light = torch.nn.functional.avg_pool2d((x[:, 0] > x[:, 0].mean()).float(), STRIDE)
            width = light.shape[-1]
            left, right = light.clone(), light.clone()
            # From the front the right wrist is on the left.
            right[..., width // 2 :], left[..., : width // 2] = 0, 0
            return torch.stack([right, left], 1)[None]

    module = narrow(joint_names=["right_wrist", "left_wrist"])
    module.network = Sides()  # type: ignore[assignment]
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[..., 8:12, 4:8] = 255
    image[..., 40:44, 52:56] = 255
    found = module.predict(image)
    assert found["keypoints"][0].tolist() == [[5.5, 9.5], [53.5, 41.5]]
    torch.testing.assert_close(found["scores"], torch.ones(1, 2))


def test_it_is_measured_in_the_pixels_of_the_image() -> None:
    module, batch = narrow(), some_batch()
    batch["to_original"] = torch.tensor([[[3.0, 0, 7], [0, 3.0, -2]]]).repeat(3, 1, 1)
    batch["labeled"][:] = True
    for pixels, expected in ((1.6, 1.0), (1.7, 0.0)):  # 3 * 5/3 = 5 is half a head
        metrics = module.build_metrics()
        module.update_metrics(metrics, {"keypoints": batch["keypoints"] + torch.tensor([pixels, 0.0])}, batch)
        assert metrics.compute()["pckh/total"] == expected


# --- arguments ------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"sides that are multiples of 64, found 96x100; set --data.image_size"):
        StackedHourglassNetwork(16, 1, 8)(torch.zeros(1, 3, 96, 100))
    with pytest.raises(ValueError, match="channels: expected a multiple of 4, found 30"):
        narrow(channels=30)
    with pytest.raises(ValueError, match="num_stacks: expected 1 or more, found 0"):
        narrow(num_stacks=0)
    with pytest.raises(ValueError, match="sigma: expected more than 0, found 0"):
        narrow(sigma=0)
    with pytest.raises(ValueError, match="missing: expected empty or ignore, found no"):
        narrow(missing="no")
    with pytest.raises(ValueError, match="found full images; set --data.crop person"):
        narrow().predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])


def test_the_metric_chooses_the_best_checkpoint() -> None:
    assert narrow().monitor == ("val/pckh/total", "max")
    assert narrow(metric="pck").monitor == ("val/pck/total", "max")
    assert narrow().joint_names == MPII_JOINTS


# --- learning -------------------------------------------------------------------------------------------------------


def test_it_learns_people_by_heart(tmp_path: Path) -> None:
    """Overfit a few people, from MPII's files to PCKh."""
    write_mpii(str(tmp_path), train=4, val=1, size=96)
    people = MPII(str(tmp_path), image_size=64).dataset("train")
    people.transform = PersonCrop(64)  # type: ignore[attr-defined]
    batch = default_collate([people[i] for i in range(3)])
    module = narrow(num_stacks=1, channels=32, depth=3, sigma=1.0)
    module.setup("fit")
    optimizer = torch.optim.AdamW(module.parameters(), 5e-3)
    for _ in range(200):
        loss = torch.stack(list(module.losses(batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.eval()
    module.flip_test = False  # training has no flips
    metrics = module.build_metrics()
    with torch.no_grad():
        module.update_metrics(metrics, module.predict(batch["image"]), batch)
    assert metrics.compute()["pckh/total"] > 0.8
