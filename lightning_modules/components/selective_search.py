"""Selective Search (Uijlings et al. 2013): regions of a segmentation are merged until one is left; each gives a box.

`selective_search` is the "fast" mode as R-CNN used it (Girshick et al. 2014, the authors' selective_search_boxes.m):
the image 500 pixels wide, in the color spaces HSV and Lab, each segmented by Felzenszwalb and Huttenlocher's method
with k = 50 and 100, each merged by two measures of similarity: eight hierarchies.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import find_objects
from skimage.segmentation import felzenszwalb

from errors import UserError

WIDTH = 500  # of the image that is segmented, in pixels
COLOR_SPACES = (cv2.COLOR_RGB2HSV_FULL, cv2.COLOR_RGB2LAB)  # all channels 0..255
SCALES = (50, 100)  # k of the segmentation, and the least pixels of a segment
SIGMA = 0.8  # of the blur before the segmentation
LEAST_SIDE = 20  # of a box, in pixels of the image that is segmented
COLOR_BINS, TEXTURE_BINS, ORIENTATIONS = 25, 10, 8

# --- segments and what is known of them -------------------------------------------------------------------------------


def segment(image: np.ndarray, k: int) -> np.ndarray:
    """Felzenszwalb and Huttenlocher 2004: int64 (H,W), the number of each pixel's segment, 0..n-1.

    scikit-image takes pixels as 0..1 and divides the scale by 255, so that it is the paper's k for pixels of 0..255.

    Args:
        image: uint8 (H,W,3).
        k: the scale, and the least size of a segment in pixels.
    """
    return felzenszwalb(image, scale=k, sigma=SIGMA, min_size=k)


def feature_bins(image: np.ndarray) -> np.ndarray:
    """Which bins of its region's histogram each pixel falls in: uint16 (3 + 24,H*W), a row for each part of it.

    Color: 25 bins over 0..255 a channel. Texture: 10 bins for each of the 8 orientations of each channel, over what a
    Gaussian derivative with sigma 1 responds to a rise in that direction, 0 to its greatest response in this image.

    Args:
        image: uint8 (H,W,3).
    """
    at = np.arange(-3, 4, dtype=np.float64)
    gaussian = np.exp(-(at**2) / 2)
    gaussian /= gaussian.sum()
    dx = cv2.sepFilter2D(image, cv2.CV_32F, at * gaussian, gaussian)
    dy = cv2.sepFilter2D(image, cv2.CV_32F, gaussian, at * gaussian)
    slopes = np.stack([dx, dx + dy, dy, dy - dx]).transpose(0, 3, 1, 2).reshape(ORIENTATIONS // 2 * 3, -1)
    responses = np.concatenate([slopes, -slopes]).clip(0)
    step = responses.max(1, keepdims=True).clip(1e-6) / TEXTURE_BINS
    texture = np.minimum(responses / step, TEXTURE_BINS - 1).astype(np.uint16)
    color = image.reshape(-1, 3).T.astype(np.uint16) * COLOR_BINS // 256
    first = np.r_[COLOR_BINS * np.arange(3), COLOR_BINS * 3 + TEXTURE_BINS * np.arange(len(texture))]
    return np.concatenate([color, texture]) + first[:, None].astype(np.uint16)


def histograms(bins: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """float32 (count,75 + 240): each segment's colors, which add up to 1, and textures, which do too.

    Args:
        bins: see `feature_bins`.
        labels: int (H,W), 0..count-1.
        count: number of segments.
    """
    colors, size = 3 * COLOR_BINS, 3 * COLOR_BINS + 3 * ORIENTATIONS * TEXTURE_BINS
    at = labels.ravel() * size
    counts = np.zeros(count * size, np.int64)
    for row in bins:
        counts += np.bincount(at + row, minlength=count * size)
    result = counts.reshape(count, size).astype(np.float32)
    result[:, :colors] /= result[:, :colors].sum(1, keepdims=True)
    result[:, colors:] /= result[:, colors:].sum(1, keepdims=True)
    return result


def touching(labels: np.ndarray) -> np.ndarray:
    """Pairs of segments of which a pixel touches a pixel, by a side or a corner: int64 (M,2), the lesser first."""
    count = int(labels.max()) + 1
    found = []
    for one, other in (
        (labels[:, 1:], labels[:, :-1]),
        (labels[1:], labels[:-1]),
        (labels[1:, 1:], labels[:-1, :-1]),
        (labels[1:, :-1], labels[:-1, 1:]),
    ):
        apart = one != other
        one, other = one[apart], other[apart]
        found.append(np.minimum(one, other) * count + np.maximum(one, other))
    return np.stack(np.divmod(np.unique(np.concatenate(found)), count), axis=1)


# --- grouping ---------------------------------------------------------------------------------------------------------


class Hierarchy(NamedTuple):
    """n segments and the regions that they were merged to, 2n - 1 in the order in which they came to be.

    Attributes:
        labels: int (H,W), the segment of each pixel.
        boxes: int64 (2n-1,4) xyxy in pixels, right and lower sides excluded.
        parts: int64 (n-1,2): region n + i was merged from these two.
    """

    labels: np.ndarray
    boxes: np.ndarray
    parts: np.ndarray


def group(labels: np.ndarray, features: np.ndarray) -> Hierarchy:
    """Merges the two most similar regions that touch, again and again, until one is left (algorithm 1 of the paper).

    The similarity is the sum of (paper, section 3.2) the histogram intersections, of the size measure
    1 - (size(i) + size(j)) / size(image) and of the fill measure 1 - (size(box of both) - size(i) - size(j)) /
    size(image). In the sum of the last two the regions' sizes cancel: 2 - size(box of both) / size(image).
    A region's features are those of its two parts, weighted by their sizes; only the similarities of a new region with
    its neighbors are computed.

    Args:
        labels: int (H,W), 0..n-1.
        features: float32 (n,F), the histograms.
    """
    n, area = len(features), labels.size
    size = np.bincount(labels.ravel(), minlength=n).tolist() + [0] * (n - 1)
    known = np.concatenate([features, np.empty((n - 1, features.shape[1]), np.float32)])
    # With its left and upper sides negated the box of two regions is a maximum.
    reach = np.empty((2 * n - 1, 4), np.int64)
    reach[:n] = _reach(labels)
    pairs = touching(labels)
    neighbors: list[set[int]] = [set() for _ in range(2 * n - 1)]
    for i, j in pairs.tolist():
        neighbors[i].add(j)
        neighbors[j].add(i)

    def distances(i: int | np.ndarray, j: np.ndarray) -> list[float]:
        shared = np.minimum(known[i], known[j]).sum(-1)
        box = np.maximum(reach[i], reach[j])
        return ((box[:, 2] + box[:, 0]) * (box[:, 3] + box[:, 1]) / area - shared).tolist()

    # The heap keeps pairs with regions that are gone; they are passed over. Equally similar pairs: the older first.
    heap = [(d, i, j) for d, (i, j) in zip(distances(pairs[:, 0], pairs[:, 1]), pairs.tolist(), strict=True)]
    heapq.heapify(heap)
    gone = bytearray(2 * n - 1)
    parts = np.empty((n - 1, 2), np.int64)
    for new in range(n, 2 * n - 1):
        _, i, j = heapq.heappop(heap)
        while gone[i] or gone[j]:
            _, i, j = heapq.heappop(heap)
        gone[i] = gone[j] = True
        parts[new - n] = i, j
        size[new] = size[i] + size[j]
        known[new] = (size[i] * known[i] + size[j] * known[j]) / size[new]
        reach[new] = np.maximum(reach[i], reach[j])
        around = sorted((neighbors[i] | neighbors[j]) - {i, j})
        neighbors[new] = set(around)
        for other in around:
            neighbors[other] -= {i, j}
            neighbors[other].add(new)
        if around:
            for d, other in zip(distances(new, np.array(around)), around, strict=True):
                heapq.heappush(heap, (d, other, new))
    return Hierarchy(labels, reach * (-1, -1, 1, 1), parts)


def _reach(labels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Boxes of the segments with left and upper sides negated."""
    return [(-x.start, -y.start, x.stop, y.stop) for y, x in find_objects(labels + 1)]


# --- boxes ------------------------------------------------------------------------------------------------------------


def selective_search(image: np.ndarray, top: int | None = None) -> np.ndarray:
    """Boxes that may hold objects: float32 (N,4) xyxy in pixels, continuous, about 2,100 of an image of 500x375.

    The order is that of the paper's section 4.3: a region's place in its hierarchy, the whole image being 1, times a
    random number, rising. The numbers are the same for every image, so that the result is a function of the image.
    Of boxes that occur twice the first stays; those narrower or lower than 20 pixels at a width of 500 are left out.

    Args:
        image: uint8 (H,W,3) RGB.
        top: how many to give at most, the best; None for all.

    Raises:
        ValueError: not such an image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"image: expected uint8 (H,W,3), found {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    hierarchies = build_hierarchies(at_width(image))
    random = np.random.default_rng(0)
    rank = np.concatenate([np.arange(len(h.boxes), 0, -1) * random.random(len(h.boxes)) for h in hierarchies])
    boxes = np.concatenate([h.boxes for h in hierarchies])[np.argsort(rank, kind="stable")]
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(1)]
    _, first = np.unique(boxes, axis=0, return_index=True)
    boxes = boxes[np.sort(first)[:top]]
    rows, columns = hierarchies[0].labels.shape
    return (boxes * np.array([width / columns, height / rows] * 2)).astype(np.float32)


def at_width(image: np.ndarray) -> np.ndarray:
    """The image 500 pixels wide, its aspect kept: uint8 (h,500,3)."""
    height, width = image.shape[:2]
    size = WIDTH, max(1, round(height * WIDTH / width))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if width > WIDTH else cv2.INTER_LINEAR)


def build_hierarchies(image: np.ndarray) -> list[Hierarchy]:
    """The eight hierarchies of an image, uint8 (H,W,3) RGB: for each color space and k, by all four measures of
    similarity and by all but color."""
    result = []
    for space in COLOR_SPACES:
        converted = cv2.cvtColor(image, space)
        bins = feature_bins(converted)
        for k in SCALES:
            labels = segment(converted, k)
            features = histograms(bins, labels, int(labels.max()) + 1)
            result += [group(labels, features), group(labels, features[:, 3 * COLOR_BINS :])]
    return result


# --- image ----------------------------------------------------------------------------------------------------------


def draw_growth(image: np.ndarray, counts: Sequence[int] = (400, 150, 60, 25, 10)) -> np.ndarray:
    """The first hierarchy of an image as it grows: uint8 (h,w,3) RGB, a column for each number of regions.

    Above are the regions in their mean colors, below the image with their boxes.

    Args:
        image: uint8 (H,W,3) RGB.
        counts: numbers of regions, falling; an image of fewer segments shows those.
    """
    small = at_width(image)
    converted = cv2.cvtColor(small, COLOR_SPACES[0])
    labels = segment(converted, SCALES[0])
    n = int(labels.max()) + 1
    hierarchy = group(labels, histograms(feature_bins(converted), labels, n))
    columns = []
    for count in counts:
        count = min(count, n)
        owner = np.arange(2 * n - count)
        # From the newest region down, so that a part's owner is known when its own parts are met.
        for i in range(n - count - 1, -1, -1):
            owner[hierarchy.parts[i]] = owner[n + i]
        region = owner[labels]
        size = np.bincount(region.ravel(), minlength=len(owner)).clip(1)
        mean = np.stack(
            [np.bincount(region.ravel(), c.ravel(), len(owner)) / size for c in np.moveaxis(small, 2, 0)], 1
        )
        above = mean[region].astype(np.uint8)
        edge = np.zeros(region.shape, bool)
        edge[:, 1:] |= region[:, 1:] != region[:, :-1]
        edge[1:] |= region[1:] != region[:-1]
        above[edge] = 255
        below = small // 5 * 3
        for number in np.unique(owner):
            hue = np.array([[[number * 67 % 256, 200, 255]]], np.uint8)  # numbers that follow are far apart in hue
            left, top, right, bottom = hierarchy.boxes[number].tolist()
            color = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB_FULL)[0, 0].tolist()
            cv2.rectangle(below, (left, top), (right - 1, bottom - 1), color, 2 if count <= 60 else 1)
        title = Image.new("RGB", (WIDTH, 36), (255, 255, 255))
        plural = "region" if count == 1 else "regions"
        ImageDraw.Draw(title).text((6, 6), f"{count} {plural}", (28, 30, 34), ImageFont.load_default(22))
        columns.append(np.concatenate([np.asarray(title), above, below]))
    gap = np.full((len(columns[0]), 8, 3), 255, np.uint8)
    return np.concatenate([part for column in columns for part in (column, gap)][:-1], axis=1)
