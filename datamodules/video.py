"""Video frames for prediction."""

from __future__ import annotations

import os
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from errors import BrokenImageError, DatasetError

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


def is_video(name: str | None) -> bool:
    """Return whether a file name has the extension of a video, in any letter case."""
    return name is not None and name.lower().endswith(VIDEO_EXTENSIONS)


class FrameTransform(Protocol):
    """A transform of a frame, uint8 (H, W, 3), and its boxes (N, 4). Its first result is the image for the model."""

    def apply(self, pixels: np.ndarray, boxes: np.ndarray) -> tuple[Any, ...]: ...


class VideoDataset(Dataset):
    """All frames of a video: ``image``, ``id`` (path#frame), ``original``, ``original_size``, ``fps``.

    ``original`` is the frame at full size, RGB uint8 (3, H, W), and ``original_size`` its (height, width). The length
    comes from the file header. If the file contains fewer frames, the missing ones are broken images.

    Args:
        path: the video.
        transform: makes the model's input from a frame.

    Raises:
        DatasetError: OpenCV cannot read the file, its path is not UTF-8, or its header has no frame count.
        BrokenImageError: when indexed, the frame cannot be read.
    """

    def __init__(self, path: str, transform: FrameTransform) -> None:
        self.path, self.transform = path, transform
        if not os.path.isfile(path):
            raise DatasetError(f"{path}: expected a video, found nothing there; check the path")
        if not path.isascii() and os.fsencode(path).decode(errors="replace") != path:  # OpenCV would crash
            raise DatasetError(f"{path}: expected a path in UTF-8, found other bytes; rename the video")
        capture = cv2.VideoCapture(path)
        self.frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        self.fps = float(capture.get(cv2.CAP_PROP_FPS)) or 25.0
        capture.release()
        if self.frames < 1:
            raise DatasetError(f"{path}: expected a video that OpenCV can read, found no frame; convert it to MP4")
        self._capture: cv2.VideoCapture | None = None
        self._next = 0

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Loader workers request frames in ascending order. Reading on is exact; seeking depends on the codec.
        if self._capture is None or index < self._next:
            self._capture, self._next = cv2.VideoCapture(self.path), 0
        while self._next < index and self._capture.grab():
            self._next += 1
        read, pixels = self._capture.read() if self._next == index else (False, None)
        if not read or pixels is None:
            raise BrokenImageError(f"{self.path}#{index}", f"the video ends after {self._next} of {self.frames} frames")
        self._next += 1
        pixels = np.ascontiguousarray(pixels[..., ::-1])
        original = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        image = self.transform.apply(pixels, np.zeros((0, 4), np.float32))[0]
        size = torch.tensor(original.shape[1:])
        name = f"{self.path}#{index}"
        return {"image": image, "id": name, "original": original, "original_size": size, "fps": self.fps}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_capture": None, "_next": 0}
