"""Frames of a video, in turn and out of turn, whole and cut short."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from datamodules.box_transforms import BoxTransform
from datamodules.detection.voc import VOCDetection
from datamodules.loading import SeededDataset
from datamodules.video import VideoDataset, is_video
from errors import BrokenImageError, DatasetError


def write_video(path: Path, frames: int = 12) -> Path:
    """A video of 48x32 pixels whose frame k is gray of the value 10 + 15k, and its upper half red."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (48, 32))
    for k in range(frames):
        pixels = np.full((32, 48, 3), 10 + 15 * k, np.uint8)
        pixels[:16] = (0, 0, 255)
        writer.write(pixels)
    writer.release()
    return path


def gray_of(sample: dict) -> float:
    return float(sample["original"][:, 24:].float().mean())


@pytest.mark.parametrize("order", [range(12), (3, 4, 9, 1, 0, 11)])
def test_each_index_is_its_frame(tmp_path: Path, order: range | tuple[int, ...]) -> None:
    video = VideoDataset(str(write_video(tmp_path / "a.avi")), BoxTransform(24))
    assert len(video) == 12
    for k in order:
        sample = video[k]
        assert gray_of(sample) == pytest.approx(10 + 15 * k, abs=3)
        assert sample["id"] == f"{tmp_path / 'a.avi'}#{k}"
        assert sample["fps"] == 10
        assert sample["image"].shape == (3, 24, 24)
        assert sample["original"].shape == (3, 32, 48)
        assert sample["original"][0, :8].float().mean() > 200  # RGB, not BGR
        assert sample["original"][2, :8].float().mean() < 60


def test_workers_give_the_same_frames(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "a.avi"))
    data = VOCDetection(images=path, image_size=24, batch_size=4, num_workers=2)
    frames = [id for batch in data.predict_dataloader() for id in batch["id"]]
    assert frames == [f"{path}#{k}" for k in range(12)]
    grays = [float(image[:, 24:].float().mean()) for b in data.predict_dataloader() for image in b["original"]]
    assert grays == pytest.approx([10 + 15 * k for k in range(12)], abs=3)


def test_a_missing_a_foreign_and_a_short_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="found nothing there"):
        VideoDataset(str(tmp_path / "nowhere.mp4"), BoxTransform(24))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DatasetError, match="found no frame"):
        VideoDataset(str(tmp_path / "text.mp4"), BoxTransform(24))
    video = VideoDataset(str(write_video(tmp_path / "a.avi")), BoxTransform(24))
    video.frames = 14  # what a header may say of a file that was cut
    with pytest.raises(BrokenImageError, match="ends after 12 of 14"):
        video[13]
    assert "skipped" in SeededDataset(video, 0, replace=False)[(0, 13, 0)]


def test_names_of_videos() -> None:
    assert is_video("a.MP4")
    assert not is_video("a.jpg")
    assert not is_video(None)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """OpenCV crashes on it."""
    write_video(tmp_path / "film.avi", frames=1)
    path = os.fsdecode(os.fsencode(tmp_path) + b"/film\xe9.avi")
    os.rename(tmp_path / "film.avi", path)
    with pytest.raises(DatasetError, match="expected a path in UTF-8, found other bytes; rename the video"):
        VideoDataset(path, None)  # type: ignore[arg-type]
    write_video(tmp_path / "filmé.avi", frames=1)
    assert len(VideoDataset(str(tmp_path / "filmé.avi"), None)) == 1  # type: ignore[arg-type]
