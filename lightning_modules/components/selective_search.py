"""Selective Search: object proposals from the hierarchical grouping of image regions.

Uijlings, van de Sande, Gevers and Smeulders, "Selective Search for Object Recognition", IJCV 2013.

`selective_search` is the "fast" mode in the variant of R-CNN (Girshick et al. 2014, the authors'
selective_search_boxes.m). It groups regions in eight hierarchies, for two color spaces (HSV, Lab), two scales of the
initial segmentation (Felzenszwalb and Huttenlocher 2004, k = 50 and 100) and two similarity measures. The notation of
the shapes is:

    H x W pixels, n initial regions (2n - 1 regions in a hierarchy), M pairs of adjacent regions, N boxes
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import cv2
import numpy as np
from scipy.ndimage import find_objects
from skimage.segmentation import felzenszwalb

from errors import UserError

IMAGE_WIDTH = 500  # images are segmented at this width in pixels
COLOR_SPACES = (cv2.COLOR_RGB2HSV_FULL, cv2.COLOR_RGB2LAB)  # all channels in 0..255
SCALES = (50, 100)  # k of the initial segmentation, and the minimum size of its regions in pixels
SIGMA = 0.8  # Gaussian blur before the segmentation
MIN_BOX_SIDE = 20  # in pixels at `IMAGE_WIDTH`
COLOR_BINS, TEXTURE_BINS, ORIENTATIONS = 25, 10, 8
COLOR_FEATURES = 3 * COLOR_BINS

# --- initial regions and their features -------------------------------------------------------------------------------


def segment(image: np.ndarray, scale: int) -> np.ndarray:
    """Segment an image (Felzenszwalb and Huttenlocher 2004): region ids 0..n-1, int64 (H, W).

    Args:
        image: uint8 (H, W, 3).
        scale: k of the paper for pixels in 0..255 (scikit-image rescales both), and the minimum size in pixels.
    """
    return felzenszwalb(image, scale=scale, sigma=SIGMA, min_size=scale)


def histogram_bins(image: np.ndarray) -> np.ndarray:
    """Return the histogram bins that each pixel belongs to, one row per part of the histogram: uint16 (3 + 24, H*W).

    Color has 25 bins over 0..255 per channel. Texture has 10 bins for each of 8 orientations per channel, over the
    response of a Gaussian derivative (sigma 1), from 0 to its maximum in this image.

    Args:
        image: uint8 (H, W, 3).
    """
    x = np.arange(-3, 4, dtype=np.float64)
    gaussian = np.exp(-(x**2) / 2)
    gaussian /= gaussian.sum()
    dx = cv2.sepFilter2D(image, cv2.CV_32F, x * gaussian, gaussian)
    dy = cv2.sepFilter2D(image, cv2.CV_32F, gaussian, x * gaussian)
    slopes = np.stack([dx, dx + dy, dy, dy - dx]).transpose(0, 3, 1, 2).reshape(ORIENTATIONS // 2 * 3, -1)
    responses = np.concatenate([slopes, -slopes]).clip(0)
    bin_width = responses.max(1, keepdims=True).clip(1e-6) / TEXTURE_BINS
    texture = np.minimum(responses / bin_width, TEXTURE_BINS - 1).astype(np.uint16)
    color = image.reshape(-1, 3).T.astype(np.uint16) * COLOR_BINS // 256
    first = np.r_[COLOR_BINS * np.arange(3), COLOR_FEATURES + TEXTURE_BINS * np.arange(len(texture))]
    return np.concatenate([color, texture]) + first[:, None].astype(np.uint16)


def region_histograms(bins: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Compute color and texture histograms of each region, float32 (n, 75 + 240); either part sums to 1.

    Args:
        bins: see `histogram_bins`.
        labels: region ids 0..n-1, int (H, W).
        count: number of regions, n.
    """
    size = COLOR_FEATURES + 3 * ORIENTATIONS * TEXTURE_BINS
    offsets = labels.ravel() * size
    counts = np.zeros(count * size, np.int64)
    for row in bins:
        counts += np.bincount(offsets + row, minlength=count * size)
    result = counts.reshape(count, size).astype(np.float32)
    for part in (result[:, :COLOR_FEATURES], result[:, COLOR_FEATURES:]):
        part /= part.sum(1, keepdims=True)
    return result


def adjacent_regions(labels: np.ndarray) -> np.ndarray:
    """Return all pairs of regions that touch by a side or a corner of a pixel: int64 (M, 2), lower id first."""
    count = int(labels.max()) + 1
    pairs = []
    for one, other in (
        (labels[:, 1:], labels[:, :-1]),
        (labels[1:], labels[:-1]),
        (labels[1:, 1:], labels[:-1, :-1]),
        (labels[1:, :-1], labels[:-1, 1:]),
    ):
        differs = one != other
        one, other = one[differs], other[differs]
        pairs.append(np.minimum(one, other) * count + np.maximum(one, other))
    return np.stack(np.divmod(np.unique(np.concatenate(pairs)), count), axis=1)


# --- hierarchical grouping --------------------------------------------------------------------------------------------


class Hierarchy(NamedTuple):
    """The n initial regions and the n - 1 regions that result from merging, in the order of their creation.

    Attributes:
        labels: initial region of each pixel, int (H, W).
        boxes: bounding boxes, int64 (2n - 1, 4), xyxy in pixels; right and bottom sides are exclusive.
        children: int64 (n - 1, 2); region n + i was merged from these two.
    """

    labels: np.ndarray
    boxes: np.ndarray
    children: np.ndarray


def group_regions(labels: np.ndarray, features: np.ndarray) -> Hierarchy:
    """Merge the two most similar adjacent regions until one region is left (algorithm 1).

    The similarity of section 3.2 is the sum of three terms: the histogram intersection, 1 - (size(i) + size(j)) /
    size(image), and 1 - (size(box of both) - size(i) - size(j)) / size(image). The last two add up to 2 - size(box of
    both) / size(image); the constant is omitted. The features of a merged region are the mean of its children's,
    weighted by size.

    Args:
        labels: region ids 0..n-1, int (H, W).
        features: histograms, float32 (n, F).
    """
    n, area = len(features), labels.size
    size = np.bincount(labels.ravel(), minlength=n).tolist() + [0] * (n - 1)
    features = np.concatenate([features, np.empty((n - 1, features.shape[1]), np.float32)])
    # Left and top are negated, so that the union of two boxes is one maximum.
    extent = np.empty((2 * n - 1, 4), np.int64)
    extent[:n] = [(-x.start, -y.start, x.stop, y.stop) for y, x in find_objects(labels + 1)]
    pairs = adjacent_regions(labels)
    neighbors: list[set[int]] = [set() for _ in range(2 * n - 1)]
    for i, j in pairs.tolist():
        neighbors[i].add(j)
        neighbors[j].add(i)

    def similarities(i: int | np.ndarray, j: np.ndarray) -> list[float]:
        intersection = np.minimum(features[i], features[j]).sum(-1)
        box = np.maximum(extent[i], extent[j])
        return (intersection - (box[:, 2] + box[:, 0]) * (box[:, 3] + box[:, 1]) / area).tolist()

    # heapq pops the smallest entry, so similarities are negated; the older of two equally similar pairs comes first.
    heap = [(-s, i, j) for s, (i, j) in zip(similarities(pairs[:, 0], pairs[:, 1]), pairs.tolist(), strict=True)]
    heapq.heapify(heap)
    merged = bytearray(2 * n - 1)
    children = np.empty((n - 1, 2), np.int64)
    for new in range(n, 2 * n - 1):
        _, i, j = heapq.heappop(heap)
        while merged[i] or merged[j]:  # pairs of merged regions stay in the heap and are skipped
            _, i, j = heapq.heappop(heap)
        merged[i] = merged[j] = True
        children[new - n] = i, j
        size[new] = size[i] + size[j]
        features[new] = (size[i] * features[i] + size[j] * features[j]) / size[new]
        extent[new] = np.maximum(extent[i], extent[j])
        adjacent = sorted((neighbors[i] | neighbors[j]) - {i, j})
        neighbors[new] = set(adjacent)
        for other in adjacent:
            neighbors[other] -= {i, j}
            neighbors[other].add(new)
        if adjacent:
            for s, other in zip(similarities(new, np.array(adjacent)), adjacent, strict=True):
                heapq.heappush(heap, (-s, other, new))
    return Hierarchy(labels, extent * (-1, -1, 1, 1), children)


def build_hierarchies(image: np.ndarray) -> list[Hierarchy]:
    """Group the regions of an image, uint8 (H, W, 3) RGB, in eight hierarchies.

    Each combination of color space and scale has two: with all features, and without color.
    """
    hierarchies = []
    for space in COLOR_SPACES:
        converted = cv2.cvtColor(image, space)
        bins = histogram_bins(converted)
        for scale in SCALES:
            labels = segment(converted, scale)
            features = region_histograms(bins, labels, int(labels.max()) + 1)
            hierarchies += [group_regions(labels, features), group_regions(labels, features[:, COLOR_FEATURES:])]
    return hierarchies


# --- proposals --------------------------------------------------------------------------------------------------------


def resize_to_width(image: np.ndarray) -> np.ndarray:
    """Resize an image to a width of 500 pixels, keeping its aspect ratio: uint8 (h, 500, 3)."""
    height, width = image.shape[:2]
    size = IMAGE_WIDTH, max(1, round(height * IMAGE_WIDTH / width))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if width > IMAGE_WIDTH else cv2.INTER_LINEAR)


def selective_search(image: np.ndarray, top: int | None = None) -> np.ndarray:
    """Propose boxes that may contain objects; an image of 500x375 pixels gets about 2,100.

    The order follows section 4.3: boxes are sorted by their rank in the hierarchy, of which the whole image is the
    first, times a random number. The random numbers are the same for every image, so the result depends on the image
    alone. Of duplicate boxes the first is kept. Boxes narrower or lower than 20 pixels at a width of 500 are dropped.

    Args:
        image: uint8 (H, W, 3) RGB.
        top: maximum number of boxes; None for all.

    Returns:
        Boxes, float32 (N, 4), xyxy in pixels, best first.

    Raises:
        UserError: the image has another type or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"image: expected uint8 (H, W, 3), found {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    hierarchies = build_hierarchies(resize_to_width(image))
    random = np.random.default_rng(0)
    rank = np.concatenate([np.arange(len(h.boxes), 0, -1) * random.random(len(h.boxes)) for h in hierarchies])
    boxes = np.concatenate([h.boxes for h in hierarchies])[np.argsort(rank, kind="stable")]
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(1)]
    _, first = np.unique(boxes, axis=0, return_index=True)
    boxes = boxes[np.sort(first)[:top]]
    rows, columns = hierarchies[0].labels.shape
    return (boxes * np.array([width / columns, height / rows] * 2)).astype(np.float32)
