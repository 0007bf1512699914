"""Figure of Selective Search."""

from __future__ import annotations

import numpy as np

from datamodules.synthetic.voc import draw_voc_scene
from lightning_modules.components.selective_search import resize_to_width
from visualization.region_hierarchy import draw_region_hierarchy


def test_each_column_has_one_color_per_region() -> None:
    image, _, _ = draw_voc_scene(4, 200, np.random.default_rng(4))
    drawn = draw_region_hierarchy(image, counts=(40, 5))
    rows = resize_to_width(image).shape[0]
    assert drawn.dtype == np.uint8
    assert drawn.shape == (36 + 2 * rows, 2 * 500 + 8, 3)
    many, few = (
        len(np.unique(part.reshape(-1, 3), axis=0))
        for part in (drawn[36 : 36 + rows, :500], drawn[36 : 36 + rows, 508:])
    )
    assert few <= 5 + 1 < many <= 40 + 1  # one color per region, and white between them
