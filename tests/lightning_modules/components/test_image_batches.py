"""Batching of images: size checks, padding and resizing, against values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from errors import UserError
from lightning_modules.components.image_batches import (
    pad_images,
    pad_to_multiple,
    require_equal_size,
    require_size,
    require_square,
    stack_images,
)


def image(height: int, width: int, value: int = 7) -> Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def test_require_equal_size() -> None:
    batch = torch.stack([image(2, 3), image(2, 3, 9)])
    assert require_equal_size(batch) is batch
    assert torch.equal(require_equal_size(list(batch)), batch)
    with pytest.raises(UserError, match=r"images of one size, found 3x2, 5x4; set --data.batch_size 1"):
        require_equal_size([image(2, 3), image(4, 5), image(2, 3)])
    with pytest.raises(UserError, match="set --data.image_size 8"):
        require_equal_size([image(2, 3), image(4, 5)], "--data.image_size 8")


def test_require_size() -> None:
    def is_multiple_of_4(height: int, width: int) -> bool:
        return height % 4 == 0 and width % 4 == 0

    found = require_size([image(4, 8)], is_multiple_of_4, "multiples of 4", 16)
    assert found.shape == (1, 3, 4, 8)
    with pytest.raises(UserError, match="expected multiples of 4, found 7x4; set --data.image_size 16"):
        require_size([image(4, 7)], is_multiple_of_4, "multiples of 4", 16)
    with pytest.raises(UserError, match="images of one size"):
        require_size([image(4, 8), image(8, 4)], is_multiple_of_4, "multiples of 4", 16)


def test_require_square() -> None:
    assert require_square([image(4, 4), image(4, 4)], 4).shape == (2, 3, 4, 4)
    for wrong in (image(4, 5), image(5, 5)):
        with pytest.raises(UserError, match=r"expected 4x4 pixels, found 5x\d; set --data.image_size 4"):
            require_square([wrong], 4)


def test_stack_images() -> None:
    batch, sizes = stack_images([image(2, 3), image(1, 4, 9)])
    assert batch.dtype == torch.uint8
    assert batch[0, 0].tolist() == [[7, 7, 7, 0], [7, 7, 7, 0]]
    assert batch[1, 0].tolist() == [[9, 9, 9, 9], [0, 0, 0, 0]]
    assert sizes.dtype == torch.float32
    assert sizes.tolist() == [[3, 2], [4, 1]]
    same, sizes = stack_images(batch)
    assert same is batch
    assert sizes.tolist() == [[4, 2], [4, 2]]


def test_pad_images() -> None:
    """Padding is 0 after normalization, also where a smaller image ends within the batch."""
    batch, sizes = pad_images([image(2, 3), image(1, 4, 9)], lambda x: x.float() - 5, multiple=4)
    assert batch.shape == (2, 3, 4, 4)
    assert batch[0, 0].tolist() == [[2, 2, 2, 0], [2, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch[1, 0].tolist() == [[4, 4, 4, 4], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert sizes.tolist() == [[3, 2], [4, 1]]
    batch, sizes = pad_images(torch.stack([image(2, 3)]), lambda x: x.float() - 5, multiple=2)
    assert batch[0, 0].tolist() == [[2, 2, 2, 0], [2, 2, 2, 0]]
    assert sizes.tolist() == [[3, 2]]


def test_pad_to_multiple() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[None, None]
    assert pad_to_multiple(x, 1).shape == (1, 1, 2, 3)
    assert pad_to_multiple(x, 2)[0, 0].tolist() == [[1, 2, 3, 0], [4, 5, 6, 0]]
    assert pad_to_multiple(x, 2, value=9)[0, 0].tolist() == [[1, 2, 3, 9], [4, 5, 6, 9]]
    assert pad_to_multiple(x, 2, mode="replicate")[0, 0].tolist() == [[1, 2, 3, 3], [4, 5, 6, 6]]
    assert pad_to_multiple(x, 4, mode="constant").shape == (1, 1, 4, 4)
    # Sides of the form 4 k + 1: 2 -> 5, 3 -> 5; a minimum of 9 applies to both.
    assert pad_to_multiple(x, 4, offset=1).shape == (1, 1, 5, 5)
    assert pad_to_multiple(x, 4, offset=1, minimum=9).shape == (1, 1, 9, 9)
    large = torch.zeros(1, 1, 4, 5)
    assert pad_to_multiple(large, 3, mode="reflect").shape == (1, 1, 6, 6)
