"""Heatmaps: encode and decode are inverse, equal to loops; a heatmap keeps two modes that regression averages."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.pose.keypoint_codec import cells_to_pixels, decode, encode, inside_heatmap, pixels_to_cells


def some_joints(seed: int, size: tuple[int, int], stride: float, margin: float = 0.0) -> torch.Tensor:
    """Return random joints inside of heatmaps, ``margin`` cells from the border, float32 (20, 5, 2)."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([size[1], size[0]])
    cells = torch.rand(20, 5, 2, generator=generator) * (limit - 2 * margin - 1e-3) + margin - 0.5
    return cells_to_pixels(cells, stride)


def every(keypoints: torch.Tensor) -> torch.Tensor:
    return torch.ones(keypoints.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("stride", [1, 4, 5.5])
@pytest.mark.parametrize("sigma", [1.0, 1.75])
def test_decode_inverts_encode(seed: int, stride: float, sigma: float) -> None:
    """The tolerances are those of the docstring: half a cell, a quarter with the shift."""
    size = (12, 17)
    keypoints = some_joints(seed, size, stride)
    found, scores = decode(encode(keypoints, every(keypoints), size, stride, sigma), stride, quarter_shift=False)
    assert (found - keypoints).abs().max() <= 0.5 * stride * (1 + 1e-4)
    assert scores.min() >= math.exp(-0.25 / sigma**2) - 1e-5
    inner = some_joints(seed, size, stride, margin=1.0)
    heatmaps = encode(inner, every(inner), size, stride, sigma)
    found, _ = decode(heatmaps, stride)
    assert (found - inner).abs().max() <= 0.25 * stride * (1 + 1e-4)
    # The mean error is 0; an offset of a pixel or half a cell would show.
    assert (found - inner).mean((0, 1)).abs().max() < 0.06 * stride


def test_the_middle_of_a_cell_comes_back_exactly() -> None:
    cells = torch.tensor([[[0.0, 0.0], [3.0, 7.0], [9.0, 9.0]]])
    keypoints = cells_to_pixels(cells, 4)
    assert keypoints[0, 1].tolist() == [13.5, 29.5]
    torch.testing.assert_close(pixels_to_cells(keypoints, 4), cells)
    found, scores = decode(encode(keypoints, every(keypoints), (10, 10), 4, 1.0), 4)
    torch.testing.assert_close(found, keypoints)
    torch.testing.assert_close(scores, torch.ones(1, 3))


def test_encode_equals_loops() -> None:
    keypoints = some_joints(3, (6, 7), 4)[:2]
    heatmaps = encode(keypoints, every(keypoints), (6, 7), 4, 1.75)
    assert heatmaps.dtype == torch.float32
    for b in range(2):
        for k in range(5):
            x, y = keypoints[b, k].tolist()
            for i in range(6):
                for j in range(7):
                    distance = math.hypot(4 * j + 1.5 - x, 4 * i + 1.5 - y) / 4
                    assert heatmaps[b, k, i, j] == pytest.approx(math.exp(-(distance**2) / 2 / 1.75**2), abs=1e-5)


def test_decode_equals_loops() -> None:
    """On noise, where peaks lie on borders too."""
    heatmaps = torch.rand(40, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    found, scores = decode(heatmaps, 4)
    borders = 0
    for b in range(40):
        for k in range(3):
            m = heatmaps[b, k]
            best = max((float(m[i, j]), i, j) for i in range(5) for j in range(4))
            _, i, j = best
            x, y = float(j), float(i)
            if 0 < i < 4 and 0 < j < 3:
                x += 0.25 if m[i, j + 1] > m[i, j - 1] else -0.25
                y += 0.25 if m[i + 1, j] > m[i - 1, j] else -0.25
            else:
                borders += 1
            assert found[b, k].tolist() == pytest.approx([4 * x + 1.5, 4 * y + 1.5])
            assert scores[b, k] == best[0]
    assert 20 < borders < 100


def test_what_is_not_there_has_no_peak() -> None:
    """Unlabeled joints, and those outside: to the left, right, above, below, far away."""
    keypoints = torch.tensor(
        [[[8.0, 8.0], [-0.6, 8.0], [39.5, 8.0], [8.0, -0.6], [8.0, 31.5], [1e6, -1e6], [8.0, 8.0]]]
    )
    labeled = torch.ones(1, 7, dtype=torch.bool)
    labeled[0, 6] = False
    heatmaps = encode(keypoints, labeled, (8, 10), 4, 1.0)
    assert heatmaps.amax((2, 3)).gt(0).tolist() == [[True, *[False] * 6]]
    assert inside_heatmap(keypoints, labeled, (8, 10), 4).tolist() == [[True, *[False] * 6]]
    assert heatmaps.isfinite().all()
    assert inside_heatmap(torch.tensor([[[-0.5, 31.4]]]), torch.ones(1, 1, dtype=torch.bool), (8, 10), 4).all()


def test_regression_averages_two_modes_and_a_heatmap_keeps_them() -> None:
    """Fit an arm that is up in three of five equal images and down in two, by least squares."""
    up, down = torch.tensor([60.0, 20.0]), torch.tensor([60.0, 100.0])
    joints = torch.stack([up, up, up, down, down])[:, None]
    targets = encode(joints, every(joints), (32, 32), 4, 1.75)
    point = torch.zeros(2, requires_grad=True)
    heatmap = torch.zeros(32, 32, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": point}, {"params": heatmap}], lr=0.2)
    for _ in range(60):
        loss = (joints - point).square().sum(-1).mean() + (targets - heatmap).square().sum((2, 3)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The mean is 32 pixels from the nearer of the two positions.
    torch.testing.assert_close(point.detach(), torch.tensor([60.0, 52.0]), atol=1e-2, rtol=0)
    found, score = decode(heatmap.detach()[None, None], 4)
    assert (found[0, 0] - up).abs().max() <= 1
    assert score.item() == pytest.approx(0.6, abs=0.03)
    # The other mode has a height of 2/5.
    lower, score = decode(heatmap.detach()[None, None, 16:], 4)
    assert (lower[0, 0] + torch.tensor([0.0, 64.0]) - down).abs().max() <= 1
    assert score.item() == pytest.approx(0.4, abs=0.03)


def test_a_flipped_image_has_the_flipped_heatmap() -> None:
    keypoints = some_joints(5, (8, 12), 4)
    flipped = torch.stack([12 * 4 - 1 - keypoints[..., 0], keypoints[..., 1]], -1)
    maps = encode(keypoints, every(keypoints), (8, 12), 4, 1.0)
    torch.testing.assert_close(encode(flipped, every(flipped), (8, 12), 4, 1.0).flip(3), maps, atol=1e-5, rtol=0)
