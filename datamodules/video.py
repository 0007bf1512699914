"""Frames of a video, for prediction."""

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
    """Whether a file's name ends like a video's, in any case of letters."""
    return name is not None and name.lower().endswith(VIDEO_EXTENSIONS)


class Transform(Protocol):
    """What makes a frame, uint8 (H,W,3), and its boxes (N,4) what the model takes."""

    def apply(self, pixels: np.ndarray, boxes: np.ndarray) -> tuple[Any, ...]: ...


class VideoDataset(Dataset):
    """All frames of a video in turn. A sample: ``image``, ``id`` (path#frame), ``original``, ``fps``.

    ``original`` is the frame at its full size, uint8 (3,H,W) RGB. The length is what the file's header says; where the
    file ends before, the frames that it lacks are broken images.

    Args:
        path: of the video.
        transform: makes a frame what the model takes.

    Raises:
        DatasetError: OpenCV cannot read it, or its header names no number of frames.
        BrokenImageError: a frame cannot be read.
    """

    def __init__(self, path: str, transform: Transform) -> None:
        self.path, self.transform = path, transform
        if not os.path.isfile(path):
            raise DatasetError(f"{path}: expected a video, found nothing there")
        capture = cv2.VideoCapture(path)
        self.frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        self.fps = float(capture.get(cv2.CAP_PROP_FPS)) or 25.0
        capture.release()
        if self.frames < 1:
            raise DatasetError(f"{path}: expected a video that OpenCV reads, found no frame in it")
        self._capture: cv2.VideoCapture | None = None
        self._next = 0

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Loader workers take frames in rising order: reading on is exact, where seeking depends on the codec.
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
        return {"image": image, "id": f"{self.path}#{index}", "original": original, "fps": self.fps}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_capture": None, "_next": 0}
