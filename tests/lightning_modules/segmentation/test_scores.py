"""The loss of pixels against a loop, and maps at an image's own size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_modules.segmentation.scores import cross_entropy, resize, sizes_of, to_maps


@pytest.mark.parametrize("summed", [False, True])
def test_cross_entropy_leaves_void_out(summed: bool) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(2, 4, 3, 5, generator=generator) * 3
        mask = torch.randint(0, 5, (2, 3, 5), generator=generator)
        mask = torch.where(mask == 4, 255, mask)
        total, known = 0.0, 0
        for b, y, x in np.ndindex(2, 3, 5):
            if (label := int(mask[b, y, x])) != 255:
                values = scores[b, :, y, x].double()
                total += math.log(values.exp().sum()) - float(values[label])
                known += 1
        expected = total if summed else total / known
        assert cross_entropy(scores, mask, summed).item() == pytest.approx(expected, rel=1e-5)


def test_all_void_gives_no_gradient() -> None:
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(scores, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss == 0
    assert scores.grad is not None
    assert (scores.grad == 0).all()


def test_scores_are_resized_not_classes() -> None:
    """Between class 0 and class 2 lies no class 1."""
    scores = torch.zeros(3, 1, 2)
    scores[0, 0, 0], scores[2, 0, 1] = 4, 4
    (small,) = to_maps([scores])
    assert small.tolist() == [[0, 2]]
    (large,) = to_maps([scores], [(2, 8)])
    assert large.tolist() == [[0, 0, 0, 0, 2, 2, 2, 2]] * 2
    assert resize(scores, (1, 2)).equal(scores)
    batch = {"original_mask": [torch.zeros(4, 6), torch.zeros(7, 5)]}
    assert sizes_of(batch) == [(4, 6), (7, 5)]
    assert sizes_of({"image": scores}) is None
