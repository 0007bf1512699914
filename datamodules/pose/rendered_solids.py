"""Rendered solids of known orientation: nothing is downloaded, every training image is a new one.

The camera's axes are x to the right, y down, z away from it. A solid's own are x ahead, y to its right, z below it, as
aircraft have them, so that yaw, pitch and roll have their usual signs (see lightning_modules/pose/rotations.py). Not
turned, it is seen from above with its nose to the right. No turn but the identity maps one of them onto itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.folders import FolderDataset, PackedStrings
from datamodules.images import predicted_images
from datamodules.synthetic.drawing import any_color, background, clutter, with_noise
from datamodules.transforms import EvalTransform, to_tensor
from errors import UserError

Solid = Literal["aeroplane", "chair", "corner"]
Paint = Literal["faces", "plain"]

# Boxes that make a solid: x, y and z from .. to.
SOLIDS: dict[Solid, tuple[tuple[float, ...], ...]] = {
    "aeroplane": (
        (-1.0, 1.0, -0.13, 0.13, -0.13, 0.13),  # fuselage
        (-0.1, 0.35, -0.9, 0.9, 0.02, 0.1),  # wings, low
        (-1.0, -0.72, -0.4, 0.4, -0.1, -0.02),
        (-1.0, -0.72, -0.04, 0.04, -0.55, -0.1),  # fin
    ),
    "chair": (
        (-0.5, 0.5, -0.5, 0.5, -0.05, 0.07),  # seat
        (-0.62, -0.5, -0.5, 0.5, -1.0, 0.07),  # back, which shows from below too
        (-0.5, -0.36, -0.5, -0.36, 0.07, 0.75),
        (-0.5, -0.36, 0.36, 0.5, 0.07, 0.75),
        (0.36, 0.5, -0.5, -0.36, 0.07, 0.75),
        (0.36, 0.5, 0.36, 0.5, 0.07, 0.75),
    ),
    "corner": (
        (-0.35, 1.0, -0.35, 0.05, -0.05, 0.35),
        (-0.35, 0.05, -0.35, 0.7, -0.05, 0.35),
        (-0.35, 0.05, -0.35, 0.05, -0.85, 0.35),
    ),
}

# Of the faces that look along -x, x, -y, y, -z and z, where they are painted.
PAINT = np.array(
    [[60, 200, 210], [210, 60, 50], [200, 60, 200], [60, 190, 70], [225, 205, 60], [60, 80, 215]], np.float32
)
DISTANCE = 4.0  # of the camera, in radii of the solid
FILLS = 0.85  # of the image's side, by the sphere around the solid
SHIFT = 0.04  # of the image's side, by which a solid lies off the middle at most
SAMPLES = 2  # rays a pixel and direction: edges without steps
EVALUATION = {"val": 1, "test": 2}


def render(
    rotation: np.ndarray,
    solid: Solid,
    picture: np.ndarray,
    colors: np.ndarray,
    light: np.ndarray,
    shift: tuple[float, float] = (0.0, 0.0),
    ambient: float = 0.35,
) -> np.ndarray:
    """Draws a solid upon an image: a ray a sample, shaded by Lambert's cosine law, in true perspective.

    Args:
        rotation: float (3,3), from the solid's axes to the camera's.
        solid: which.
        image: float (S,S,3), the background, 0..255.
        colors: float (6,3), 0..255, of the faces that look along -x, x, -y, y, -z and z.
        light: float (3,), unit, from the solid to the light, in the camera's axes.
        shift: x and y of the solid's middle off the image's, in radii.
        ambient: what a face that sees no light has of its color.

    Returns:
        float (S,S,3).
    """
    size = len(picture)
    count = size * SAMPLES
    boxes = np.array(SOLIDS[solid], np.float32).reshape(-1, 3, 2)
    radius = np.linalg.norm(np.abs(boxes).max(-1), axis=-1).max()
    turn = rotation.astype(np.float32)
    # The sphere's outline is a cone about the axis whose sine is radius / distance.
    half = math.tan(math.asin(1 / DISTANCE)) / FILLS
    steps = ((np.arange(count, dtype=np.float32) + 0.5) / count * 2 - 1) * half
    # Each ray's direction in the solid's axes, (3, rows, columns).
    rays = turn[0, :, None, None] * steps + turn[1, :, None, None] * steps[:, None] + turn[2, :, None, None]
    rays[np.abs(rays) < 1e-9] = 1e-9
    inverse = 1 / rays
    place = radius * np.array([shift[0], shift[1], DISTANCE], np.float32)
    eye = -place @ turn
    depth = np.full((count, count), np.inf, np.float32)
    axis = np.zeros((count, count), np.intp)
    for box in boxes:
        # Only rays between a box's outermost corners can meet it.
        corners = np.stack(np.meshgrid(*box, indexing="ij"), -1).reshape(-1, 3) @ turn.T + place
        seen = (corners[:, :2] / corners[:, 2:] / half + 1) / 2 * count - 0.5
        (left, top), (right, bottom) = np.floor(seen.min(0)).astype(int), np.ceil(seen.max(0)).astype(int) + 1
        part = slice(max(0, top), max(0, bottom)), slice(max(0, left), max(0, right))
        # Where a ray enters and leaves the slabs between the box's planes (Kay and Kajiya 1986).
        one, other = ((box[:, k] - eye)[:, None, None] * inverse[:, *part] for k in (0, 1))
        near, far = np.minimum(one, other), np.maximum(one, other)
        enters = np.maximum(np.maximum(near[0], near[1]), near[2])
        leaves = np.minimum(np.minimum(far[0], far[1]), far[2])
        first = (enters < leaves) & (enters < depth[part])
        depth[part] = np.where(first, enters, depth[part])
        entered = np.where(near[0] == enters, 0, np.where(near[1] == enters, 1, 2))
        axis[part] = np.where(first, entered, axis[part])
    hit = np.isfinite(depth)
    # The face that is entered looks back along the ray.
    side = -np.sign(np.take_along_axis(rays, axis[None], 0)[0])
    cosine = side * (light.astype(np.float32) @ turn)[axis]
    bright = hit * (ambient + (1 - ambient) * cosine.clip(0))
    shaded = bright[..., None] * colors.astype(np.float32)[2 * axis + (side > 0)]
    samples = np.concatenate([hit[..., None], shaded], -1).astype(np.float32)
    pixels = cv2.resize(samples, (size, size), interpolation=cv2.INTER_AREA)
    return picture * (1 - pixels[..., :1]) + pixels[..., 1:]


class SolidsDataset(Dataset):
    """One rendered solid a sample: ``image`` uint8 (3,S,S), ``rotation`` float32 (3,3), ``id``.

    Args:
        split: training samples are drawn anew each epoch; those of val and test are always the same.
        size: how many.
        solids: which, in turn.
        image_size: S.
        paint: see `RenderedSolids`.
    """

    def __init__(
        self, split: Split, size: int, solids: Sequence[Solid], image_size: int, paint: Paint = "faces"
    ) -> None:
        self.split, self.size, self.solids, self.image_size, self.paint = split, size, solids, image_size, paint

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        # In training by the generator that the loader has seeded for this sample of this epoch.
        drawn = EVALUATION.get(self.split)
        rng = np.random.default_rng(np.random.randint(2**31, size=4) if drawn is None else (drawn, index))
        solid = self.solids[index % len(self.solids)]
        # Four normal numbers have no preferred direction, so that all rotations are as likely.
        rotation = Rotation.from_quat(rng.normal(size=4)[[1, 2, 3, 0]]).as_matrix()
        picture = background(self.image_size, self.image_size, rng)
        for _ in range(rng.integers(0, 4)):
            clutter(picture, rng)
        # Above the camera, to either side of it.
        light = np.array([rng.uniform(-1, 1), rng.uniform(-1.2, -0.4), -1.0])
        shift = rng.uniform(-SHIFT, SHIFT, 2) * 2 / FILLS
        colors = PAINT + rng.uniform(-25, 25, (6, 3)) if self.paint == "faces" else np.tile(any_color(rng), (6, 1))
        light = light / np.linalg.norm(light)
        picture = render(rotation, solid, picture, colors.clip(60, 240), light, (shift[0], shift[1]))
        return {
            "image": to_tensor(with_noise(picture, rng)),
            "rotation": torch.from_numpy(rotation).float(),
            "id": f"{self.split}/{index}, {solid}",
        }


class RenderedSolids(VisionDataModule):
    """Solids of known orientation, drawn when they are asked for; see the module.

    Args:
        solids: which of aeroplane, chair and corner.
        image_size: side of the images in pixels.
        paint: ``faces`` gives each of the six directions its color; ``plain`` draws all of a solid in one, another in
            each image, so that shape and shading alone tell how it is turned. That takes far longer to learn.
        train, val, test: images an epoch. Those of training are new ones in every epoch.
        images: for prediction, a folder of images or one image; of each the middle square is looked at.
        **kwargs: see `VisionDataModule`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        solids: Sequence[Solid] = ("aeroplane", "chair", "corner"),
        image_size: int = 64,
        paint: Paint = "faces",
        train: int = 9600,
        val: int = 600,
        test: int = 600,
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # The frame is given, since Lightning would look for it and leave a cycle of frames, which keeps loaders alive.
        if not solids or len(set(solids)) < len(solids) or not set(solids) <= SOLIDS.keys():
            raise UserError(f"solids: expected some of {', '.join(SOLIDS)}, each once, found {list(solids)}")
        if paint not in ("faces", "plain"):
            raise UserError(f"paint: expected faces or plain, found {paint}")
        if image_size < 16:
            raise UserError(f"image_size: expected 16 or more, found {image_size}")
        if min(train, val, test) < 1:
            raise UserError(f"train, val, test: expected 1 or more, found {train}, {val}, {test}")
        self.solids, self.image_size, self.paint, self.images = list(solids), image_size, paint, images
        self.sizes = {"train": train, "val": val, "test": test}

    def dataset(self, split: Split) -> Dataset:
        """The solids of one split; for ``predict``, images.

        Raises:
            DatasetError: there are no images to predict.
        """
        if split == "predict":
            transform = EvalTransform(self.image_size, self.image_size, exif_orientation=True)
            return FolderDataset("", PackedStrings(predicted_images(self.images)), None, transform)
        return SolidsDataset(split, self.sizes[split], self.solids, self.image_size, self.paint)
