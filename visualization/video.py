"""MP4 files from PIL images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from errors import UserError


class VideoFile:
    """An MP4 file that is written frame by frame; frames are cut to even sides, which the codec requires.

    Args:
        path: the file.
        fps: frames per second.
        size: (width, height) of the frames in pixels.

    Raises:
        UserError: OpenCV cannot write this video.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        self._width, self._height = (side // 2 * 2 for side in size)
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(path), codec, fps, (self._width, self._height))
        if not self._writer.isOpened():
            raise UserError(f"{path}: expected a video that OpenCV can write, found no mp4v encoder or no access")

    def append(self, frame: Image.Image) -> None:
        pixels = np.asarray(frame.convert("RGB"))[: self._height, : self._width, ::-1]
        self._writer.write(np.ascontiguousarray(pixels))

    def close(self) -> None:
        self._writer.release()
