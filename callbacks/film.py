"""Film of an image while it is optimized (feature inversion, texture synthesis, neural style)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image

from errors import UserError
from visualization.drawing import to_pil
from visualization.video import VideoFile

FPS = 8
LAST_FRAME_SECONDS = 2.0


class Film(pl.Callback):
    """Save the image after each validation, and join the frames to a film at the end of the training.

    Writes ``<run>/frames/step=<global step, 8 digits>.png`` and ``<run>/film.mp4`` for modules with ``film = True``,
    whose prediction is ``{"stylized": uint8 (1, 3, H, W)}``.
    """

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        if not getattr(pl_module, "film", False) or trainer.sanity_checking or not trainer.is_global_zero:
            return
        if trainer.state.fn == "fit":
            folder = Path(trainer.default_root_dir) / "frames"
            folder.mkdir(parents=True, exist_ok=True)
            to_pil(outputs["stylized"][0]).save(folder / f"step={trainer.global_step:08d}.png")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if getattr(pl_module, "film", False) and trainer.is_global_zero:
            try:
                write_film(Path(trainer.default_root_dir))
            except (OSError, UserError) as error:
                print(f"film: skipped ({error})", file=sys.stderr, flush=True)


def write_film(run: Path) -> None:
    """Join ``run/frames`` to ``run/film.mp4``; nothing is written for fewer than two frames.

    Raises:
        OSError: a frame cannot be read.
        UserError: OpenCV cannot write the film.
    """
    frames = sorted((run / "frames").glob("step=*.png"))
    if len(frames) < 2:
        return
    with Image.open(frames[-1]) as image:
        size = image.size
    if min(size) < 2:
        return
    video = VideoFile(run / "film.mp4", FPS, size)
    for frame in [*frames, *[frames[-1]] * round(FPS * LAST_FRAME_SECONDS)]:
        with Image.open(frame) as image:
            video.append(image)
    video.close()
    print(f"film: {run / 'film.mp4'}, {len(frames)} images", flush=True)
