"""Cross entropy against a loop, and class maps at the original size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_modules.segmentation.base import class_maps, cross_entropy, original_sizes, resize_logits


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_ignores_void(reduction: Any) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, 4, 3, 5, generator=generator) * 3
        mask = torch.randint(0, 5, (2, 3, 5), generator=generator)
        mask = torch.where(mask == 4, 255, mask)
        total, known = 0.0, 0
        for b, y, x in np.ndindex(2, 3, 5):
            if (label := int(mask[b, y, x])) != 255:
                values = logits[b, :, y, x].double()
                total += math.log(values.exp().sum()) - float(values[label])
                known += 1
        expected = total if reduction == "sum" else total / known
        assert cross_entropy(logits, mask, reduction).item() == pytest.approx(expected, rel=1e-5)


def test_all_void_gives_no_gradient() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_logits_are_resized_not_classes() -> None:
    """There is no class 1 between class 0 and class 2."""
    logits = torch.zeros(3, 1, 2)
    logits[0, 0, 0], logits[2, 0, 1] = 4, 4
    (small,) = class_maps([logits])
    assert small.tolist() == [[0, 2]]
    (large,) = class_maps([logits], [(2, 8)])
    assert large.tolist() == [[0, 0, 0, 0, 2, 2, 2, 2]] * 2
    assert resize_logits(logits, (1, 2)).equal(logits)
    batch = {"original_mask": [torch.zeros(4, 6), torch.zeros(7, 5)]}
    assert original_sizes(batch) == [(4, 6), (7, 5)]
    assert original_sizes({"image": logits}) is None
