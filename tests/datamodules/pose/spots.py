"""Images with bright spots at known points."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch


def spots(path: Path, points: np.ndarray, size: tuple[int, int], radius: float, quality: int = 98) -> None:
    """Draw round spots whose centers of mass are the points, which need not be whole numbers."""
    y, x = np.mgrid[: size[0], : size[1]]
    distance = np.hypot(x - points[:, 0, None, None], y - points[:, 1, None, None]).min(0)
    gray = (255 * np.clip(radius - distance + 0.5, 0, 1)).astype(np.uint8)
    assert cv2.imwrite(str(path), np.repeat(gray[..., None], 3, 2), [cv2.IMWRITE_JPEG_QUALITY, quality])


def center_of_mass(image: torch.Tensor, at: torch.Tensor, reach: int) -> np.ndarray:
    """Compute the center of the bright pixels near a point (x, y) of an image, uint8 (3, H, W)."""
    gray = image.float().mean(0).numpy()
    x0, y0 = (max(0, round(float(v)) - reach) for v in at)
    window = gray[y0 : y0 + 2 * reach + 1, x0 : x0 + 2 * reach + 1]
    window = np.where(window > 40, window, 0)
    y, x = np.mgrid[: window.shape[0], : window.shape[1]]
    return np.array([(x * window).sum(), (y * window).sum()]) / window.sum() + [x0, y0]
