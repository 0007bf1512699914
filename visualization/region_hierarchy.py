"""Figure of Selective Search: the regions of an image while they are merged."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw

from lightning_modules.components.selective_search import (
    COLOR_SPACES,
    IMAGE_WIDTH,
    SCALES,
    group_regions,
    histogram_bins,
    region_histograms,
    resize_to_width,
    segment,
)
from visualization.drawing import INK, PAPER, load_font


def draw_region_hierarchy(image: np.ndarray, counts: Sequence[int] = (400, 150, 60, 25, 10)) -> np.ndarray:
    """Draw the first hierarchy of `selective_search`, one column per number of regions: uint8 (h, w, 3) RGB.

    The upper row shows the regions in their mean colors, the lower row the image with their bounding boxes.

    Args:
        image: uint8 (H, W, 3) RGB.
        counts: numbers of regions, descending; images with fewer initial regions show those.
    """
    resized = resize_to_width(image)
    converted = cv2.cvtColor(resized, COLOR_SPACES[0])
    labels = segment(converted, SCALES[0])
    n = int(labels.max()) + 1
    hierarchy = group_regions(labels, region_histograms(histogram_bins(converted), labels, n))
    columns = []
    for count in counts:
        count = min(count, n)
        ancestor = np.arange(2 * n - count)
        # Parents before children: regions are visited from the newest to the oldest.
        for i in range(n - count - 1, -1, -1):
            ancestor[hierarchy.children[i]] = ancestor[n + i]
        region = ancestor[labels]
        size = np.bincount(region.ravel(), minlength=len(ancestor)).clip(1)
        mean = np.stack(
            [np.bincount(region.ravel(), c.ravel(), len(ancestor)) / size for c in np.moveaxis(resized, 2, 0)], 1
        )
        upper = mean[region].astype(np.uint8)
        edge = np.zeros(region.shape, bool)
        edge[:, 1:] |= region[:, 1:] != region[:, :-1]
        edge[1:] |= region[1:] != region[:-1]
        upper[edge] = 255
        lower = resized // 5 * 3
        for index in np.unique(ancestor):
            hue = np.array([[[index * 67 % 256, 200, 255]]], np.uint8)  # successive indices differ in hue
            left, top, right, bottom = hierarchy.boxes[index].tolist()
            color = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB_FULL)[0, 0].tolist()
            cv2.rectangle(lower, (left, top), (right - 1, bottom - 1), color, 2 if count <= 60 else 1)
        title = Image.new("RGB", (IMAGE_WIDTH, 36), PAPER)
        plural = "region" if count == 1 else "regions"
        ImageDraw.Draw(title).text((6, 6), f"{count} {plural}", INK, load_font(22))
        columns.append(np.concatenate([np.asarray(title), upper, lower]))
    gap = np.full((len(columns[0]), 8, 3), 255, np.uint8)
    return np.concatenate([part for column in columns for part in (column, gap)][:-1], axis=1)
