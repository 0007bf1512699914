"""Draws a small dataset in ImageNet's layout, whose classes a network can learn: textured shapes among clutter."""

from __future__ import annotations

import os

import numpy as np

from datamodules.synthetic.drawing import CLASSES, check_arguments, draw_picture, save

GREY_EVERY = 20  # ImageNet's share of gray images is about 2 %; here it is 5 %, so that small sets have some


def write_imagenet(
    folder: str, classes: int = 4, train: int = 64, val: int = 16, size: int = 64, seed: int = 0
) -> list[str]:
    """Writes ``folder/{train,val}/<class>/<image>.JPEG``.

    A class is a shape with a texture and a preferred, overlapping range of hues. Position, scale, turn, colors,
    background and clutter vary. The images are a function of the arguments alone. Their sides are ``size`` to 1.5
    times that, one in twenty is gray.

    Args:
        folder: where; it is made if missing, and what was written there before stays.
        classes: number of classes, 2 to 32.
        train, val: images a class.
        size: shorter side of the images in pixels, at least 16.
        seed: another seed draws other images of the same classes.

    Returns:
        Names of the classes, sorted: label order.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(classes, len(CLASSES), train, val, size)
    names = CLASSES[:classes]
    for split_index, (split, count) in enumerate((("train", train), ("val", val))):
        for label, name in enumerate(names):
            directory = os.path.join(folder, split, name)
            os.makedirs(directory, exist_ok=True)
            for i in range(count):
                rng = np.random.default_rng((seed, split_index, label, i))
                picture = draw_picture(name, label / classes, size, rng)
                gray = (label * count + i) % GREY_EVERY == GREY_EVERY // 2
                save(os.path.join(directory, f"{name}_{i:05d}.JPEG"), picture, gray)
    return sorted(names)
