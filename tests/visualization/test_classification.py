"""Bars of classified images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.callbacks.tiny import NAMES
from visualization.classification import ClassificationView, top_classes
from visualization.drawing import GREEN, RED
from visualization.plots import plot_confusion_matrix


def has(figure: Image.Image, color: tuple[int, int, int]) -> bool:
    return bool((np.asarray(figure) == color).all(axis=-1).sum() > 100)


def test_right_is_green_and_wrong_is_red() -> None:
    image, prediction = Image.new("RGB", (256, 256), (9, 9, 9)), {"probabilities": torch.tensor([0.7, 0.2, 0.1])}
    right = ClassificationView().draw(image, prediction, {"label": torch.tensor(0)}, NAMES)
    wrong = ClassificationView().draw(image, prediction, {"label": torch.tensor(1)}, NAMES)
    unknown = ClassificationView().draw(image, prediction, {}, NAMES)
    assert (has(right, GREEN), has(right, RED)) == (True, False)
    assert (has(wrong, GREEN), has(wrong, RED)) == (False, True)
    assert (has(unknown, GREEN), has(unknown, RED)) == (False, False)
    # The image itself stays as it is, above the text.
    assert np.asarray(right)[:256].tolist() == np.asarray(image).tolist()


def test_bars_are_as_long_as_the_probabilities() -> None:
    figure = ClassificationView().draw(
        Image.new("RGB", (400, 100)), {"probabilities": torch.tensor([0.75, 0.25])}, {}, ["", ""]
    )
    pixels = np.asarray(figure)[100:]
    long = [int((row == (158, 182, 222)).all(axis=-1).sum()) for row in pixels]
    assert max(long) == pytest.approx(0.75 * 384, abs=8)
    assert sorted(set(long))[1] < 0.3 * 400


@pytest.mark.parametrize("name", ["größer", "日本 🐕", "two\nlines", "x" * 500, "", "$a_{", "\x00"])
def test_no_class_name_breaks_the_drawing(name: str) -> None:
    counts = torch.tensor([[2, 1], [0, 3]])
    ClassificationView().draw(
        Image.new("RGB", (30, 500)), {"probabilities": torch.tensor([0.5, 0.5])}, {"label": 1}, [name, name]
    )
    assert plot_confusion_matrix(counts, [name, name], name).width > 100


def test_top_classes_with_fewer_than_five_and_without_names() -> None:
    assert [(i, name) for i, name, _ in top_classes(torch.tensor([0.1, 0.6, 0.3]), None)] == [
        (1, "class 1"),
        (2, "class 2"),
        (0, "class 0"),
    ]
