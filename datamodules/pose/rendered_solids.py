"""Rendered solids of known orientation; nothing is downloaded, and every training image is new.

Camera axes: x right, y down, z away from the camera. Solid axes: x forward, y right, z down, as in aviation, so that
yaw, pitch and roll have their usual signs (lightning_modules/pose/rotations.py). The identity shows a solid from above
with its nose to the right. No other rotation maps a solid onto itself.
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
from datamodules.folders import list_prediction_images
from datamodules.image_dataset import ImageDataset
from datamodules.synthetic.drawing import add_noise, draw_background, draw_clutter, random_color
from datamodules.transforms import EvalTransform, to_tensor
from errors import UserError

Solid = Literal["aeroplane", "chair", "corner"]
Coloring = Literal["per_face", "uniform"]

# Each solid is a union of boxes: (x min, x max, y min, y max, z min, z max).
SOLIDS: dict[Solid, tuple[tuple[float, ...], ...]] = {
    "aeroplane": (
        (-1.0, 1.0, -0.13, 0.13, -0.13, 0.13),  # fuselage
        (-0.1, 0.35, -0.9, 0.9, 0.02, 0.1),  # wings
        (-1.0, -0.72, -0.4, 0.4, -0.1, -0.02),  # tailplane
        (-1.0, -0.72, -0.04, 0.04, -0.55, -0.1),  # fin
    ),
    "chair": (
        (-0.5, 0.5, -0.5, 0.5, -0.05, 0.07),  # seat
        (-0.62, -0.5, -0.5, 0.5, -1.0, 0.07),  # back, visible from below too
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

# RGB colors of the faces whose normals are -x, x, -y, y, -z and z.
FACE_COLORS = np.array(
    [[60, 200, 210], [210, 60, 50], [200, 60, 200], [60, 190, 70], [225, 205, 60], [60, 80, 215]], np.float32
)
CAMERA_DISTANCE = 4.0  # in radii of the solid
FILL_FRACTION = 0.85  # diameter of the bounding sphere relative to the side of the image
MAX_SHIFT = 0.04  # of a solid from the center, relative to the side of the image
SUPERSAMPLING = 2  # rays per pixel and direction, for antialiasing
EVAL_SEEDS = {"val": 1, "test": 2}


def render_solid(
    rotation: np.ndarray,
    solid: Solid,
    image: np.ndarray,
    colors: np.ndarray,
    light: np.ndarray,
    shift: tuple[float, float] = (0.0, 0.0),
    ambient: float = 0.35,
) -> np.ndarray:
    """Render a solid onto an image by ray casting, in perspective, with Lambertian shading.

    Args:
        rotation: from solid axes to camera axes, float (3, 3).
        solid: which solid.
        image: background, float (S, S, 3), 0 to 255.
        colors: colors of the faces whose normals are -x, x, -y, y, -z and z, float (6, 3), 0 to 255.
        light: unit vector from the solid to the light in camera axes, float (3,).
        shift: (x, y) of the solid's center relative to the image center, in radii.
        ambient: brightness of a face without light, relative to its color.

    Returns:
        Image, float (S, S, 3), 0 to 255.
    """
    size = len(image)
    count = size * SUPERSAMPLING
    boxes = np.array(SOLIDS[solid], np.float32).reshape(-1, 3, 2)
    radius = np.linalg.norm(np.abs(boxes).max(-1), axis=-1).max()
    to_camera = rotation.astype(np.float32)
    # The outline of the bounding sphere is a cone; the sine of its half-angle is radius / distance.
    half = math.tan(math.asin(1 / CAMERA_DISTANCE)) / FILL_FRACTION
    steps = ((np.arange(count, dtype=np.float32) + 0.5) / count * 2 - 1) * half
    # Directions of the rays in solid axes, (3, rows, columns).
    rays = to_camera[0, :, None, None] * steps + to_camera[1, :, None, None] * steps[:, None]
    rays = rays + to_camera[2, :, None, None]
    rays[np.abs(rays) < 1e-9] = 1e-9
    inverse = 1 / rays
    center = radius * np.array([shift[0], shift[1], CAMERA_DISTANCE], np.float32)
    eye = -center @ to_camera
    depth = np.full((count, count), np.inf, np.float32)
    axis = np.zeros((count, count), np.intp)
    for box in boxes:
        # Only rays within the projection of a box can hit it.
        corners = np.stack(np.meshgrid(*box, indexing="ij"), -1).reshape(-1, 3) @ to_camera.T + center
        projected = (corners[:, :2] / corners[:, 2:] / half + 1) / 2 * count - 0.5
        (left, top), (right, bottom) = np.floor(projected.min(0)).astype(int), np.ceil(projected.max(0)).astype(int) + 1
        part = slice(max(0, top), max(0, bottom)), slice(max(0, left), max(0, right))
        # Slab test (Kay and Kajiya, "Ray Tracing Complex Scenes", SIGGRAPH 1986).
        first, second = ((box[:, k] - eye)[:, None, None] * inverse[:, *part] for k in (0, 1))
        near, far = np.minimum(first, second), np.maximum(first, second)
        entry = np.maximum(np.maximum(near[0], near[1]), near[2])
        leave = np.minimum(np.minimum(far[0], far[1]), far[2])
        hits = (entry < leave) & (entry < depth[part])
        depth[part] = np.where(hits, entry, depth[part])
        entry_axis = np.where(near[0] == entry, 0, np.where(near[1] == entry, 1, 2))
        axis[part] = np.where(hits, entry_axis, axis[part])
    hit = np.isfinite(depth)
    # The normal of the face that a ray enters points against the ray.
    sign = -np.sign(np.take_along_axis(rays, axis[None], 0)[0])
    cosine = sign * (light.astype(np.float32) @ to_camera)[axis]
    brightness = hit * (ambient + (1 - ambient) * cosine.clip(0))
    shaded = brightness[..., None] * colors.astype(np.float32)[2 * axis + (sign > 0)]
    samples = np.concatenate([hit[..., None], shaded], -1).astype(np.float32)
    pixels = cv2.resize(samples, (size, size), interpolation=cv2.INTER_AREA)
    return image * (1 - pixels[..., :1]) + pixels[..., 1:]


class SolidsDataset(Dataset):
    """One rendered solid per sample: ``image`` uint8 (3, S, S), ``rotation`` float32 (3, 3), ``id``.

    Args:
        split: samples of ``train`` are new in every epoch; those of ``val`` and ``test`` are fixed.
        size: number of samples.
        solids: the solids, in turn.
        image_size: side S in pixels.
        coloring: see `RenderedSolids`.
    """

    def __init__(
        self, split: Split, size: int, solids: Sequence[Solid], image_size: int, coloring: Coloring = "per_face"
    ) -> None:
        self.split, self.size, self.solids, self.image_size = split, size, solids, image_size
        self.coloring = coloring

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        # In training, the loader has seeded NumPy's global generator for this sample and epoch.
        seed = EVAL_SEEDS.get(self.split)
        rng = np.random.default_rng(np.random.randint(2**31, size=4) if seed is None else (seed, index))
        solid = self.solids[index % len(self.solids)]
        # A normalized vector of four normal numbers is a uniform random rotation.
        rotation = Rotation.from_quat(rng.normal(size=4)[[1, 2, 3, 0]]).as_matrix()
        image = draw_background(self.image_size, self.image_size, rng)
        for _ in range(rng.integers(0, 4)):
            draw_clutter(image, rng)
        # The light is above the camera, on either side.
        light = np.array([rng.uniform(-1, 1), rng.uniform(-1.2, -0.4), -1.0])
        shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * 2 / FILL_FRACTION
        if self.coloring == "per_face":
            colors = FACE_COLORS + rng.uniform(-25, 25, (6, 3))
        else:
            colors = np.tile(random_color(rng), (6, 1))
        light = light / np.linalg.norm(light)
        image = render_solid(rotation, solid, image, colors.clip(60, 240), light, (shift[0], shift[1]))
        return {
            "image": to_tensor(add_noise(image, rng)),
            "rotation": torch.from_numpy(rotation).float(),
            "id": f"{self.split}/{index}, {solid}",
        }


class RenderedSolids(VisionDataModule):
    """Rendered solids of known orientation, in random light and in front of clutter.

    Args:
        solids: some of ``aeroplane``, ``chair`` and ``corner``.
        image_size: side of the images in pixels.
        coloring: ``per_face`` gives each of the six face directions its own color; ``uniform`` gives each image one
            random color, so that only shape and shading show the orientation, which takes far longer to learn.
        train_size: training images per epoch; they are new in every epoch.
        val_size: validation images.
        test_size: test images.
        images: for prediction, an image or a folder of images; the center square of each is used.
        **kwargs: see `VisionDataModule`.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        solids: Sequence[Solid] = ("aeroplane", "chair", "corner"),
        image_size: int = 64,
        coloring: Coloring = "per_face",
        train_size: int = 9600,
        val_size: int = 600,
        test_size: int = 600,
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not solids or len(set(solids)) < len(solids) or not set(solids) <= SOLIDS.keys():
            raise UserError(f"solids: expected some of {', '.join(SOLIDS)}, each once, found {list(solids)}")
        if coloring not in ("per_face", "uniform"):
            raise UserError(f"coloring: expected per_face or uniform, found {coloring}")
        if image_size < 16:
            raise UserError(f"image_size: expected at least 16, found {image_size}")
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            if size < 1:
                raise UserError(f"{split}_size: expected at least 1, found {size}")
        self.solids, self.image_size, self.coloring, self.images = list(solids), image_size, coloring, images

    def source_name(self, split: Split) -> str | None:
        return split

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            transform = EvalTransform(self.image_size, self.image_size, self.exif_orientation)
            return ImageDataset(list_prediction_images(self.images), transform)
        return SolidsDataset(split, self.sizes[split], self.solids, self.image_size, self.coloring)
