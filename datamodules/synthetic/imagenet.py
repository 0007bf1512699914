"""Synthetic dataset in the layout of ImageNet: textured shapes in front of clutter."""

from __future__ import annotations

import os

import numpy as np

from datamodules.synthetic.drawing import TEXTURED_SHAPES, check_arguments, draw_shape_image, save_jpeg

GRAY_EVERY = 20  # 5 % of the images are gray: more than ImageNet's 2 %, so that small datasets contain some


def write_imagenet(
    folder: str, classes: int = 4, train: int = 64, val: int = 16, size: int = 64, seed: int = 0
) -> list[str]:
    """Write ``folder/{train,val}/<class>/<image>.JPEG``.

    A class is a shape with a texture and a preferred range of hues, which overlaps with that of other classes.
    Position, scale, rotation, colors, background and clutter vary. One image in twenty is gray. The images depend only
    on the arguments.

    Args:
        folder: output folder, created if missing; existing files stay.
        classes: number of classes, 2 to 32.
        train: training images per class.
        val: validation images per class.
        size: shorter side of the images in pixels, at least 16; the longer one is up to 1.5 times as long.
        seed: another seed draws other images of the same classes.

    Returns:
        Class names, sorted, in label order.

    Raises:
        UserError: an argument is out of range.
    """
    check_arguments(classes, len(TEXTURED_SHAPES), train, val, size)
    names = TEXTURED_SHAPES[:classes]
    for split_index, (split, count) in enumerate((("train", train), ("val", val))):
        for label, name in enumerate(names):
            directory = os.path.join(folder, split, name)
            os.makedirs(directory, exist_ok=True)
            for i in range(count):
                rng = np.random.default_rng((seed, split_index, label, i))
                image = draw_shape_image(name, label / classes, size, rng)
                gray = (label * count + i) % GRAY_EVERY == GRAY_EVERY // 2
                save_jpeg(os.path.join(directory, f"{name}_{i:05d}.JPEG"), image, gray)
    return sorted(names)
