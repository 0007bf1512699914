"""Samples of a batch."""

from __future__ import annotations

import torch

from visualization.samples import samples_of
from visualization.views import view_of


def test_samples_of_lists_dicts_and_strangers() -> None:
    images = [torch.zeros(3, 4, 5, dtype=torch.uint8), torch.zeros(3, 6, 2, dtype=torch.uint8)]
    batch = {"image": images, "id": ["a", "b"], "target": [{"labels": torch.ones(1)}, {"labels": torch.ones(2)}]}
    (first, second) = samples_of([{"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(2, 4)}], batch, 5)
    assert (first[0].shape, second[1]["boxes"].shape, second[2]["id"]) == ((3, 4, 5), (2, 4), "b")
    assert view_of(second.prediction) is None
    assert samples_of(None, batch, 5) == []
    assert samples_of({}, [1, 2], 5) == []
