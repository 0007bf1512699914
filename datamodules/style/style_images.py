"""Content images and style images: folders of both, or one of each."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.folders import list_images, list_prediction_images
from datamodules.image_dataset import ImageDataset, PackedStrings
from datamodules.images import EncodedImage, resize
from datamodules.transforms import EvalTransform, scale_jitter_box, to_tensor
from datamodules.video import VideoDataset, is_video
from errors import DatasetError, UserError

HELD_OUT_ONE_IN = 10  # without a validation folder, one of so many images is held out


class RandomCropTransform:
    """Read a random square crop of a resized image, for training: from a path to uint8 (3, S, S).

    Args:
        crop_size: side of the square S.
        shorter: length of the image's shorter side after resizing.
        exif_orientation: apply the EXIF orientation.
    """

    def __init__(self, crop_size: int, shorter: int, exif_orientation: bool = True) -> None:
        self.crop_size, self.shorter, self.exif_orientation = crop_size, shorter, exif_orientation

    def __call__(self, path: str) -> Tensor:
        image = EncodedImage(path, self.exif_orientation)
        box = scale_jitter_box(image.height, image.width, self.crop_size, self.shorter)
        return to_tensor(image.crop(box, (self.crop_size, self.crop_size)))


class FullImageTransform:
    """Read a full image: from a path to uint8 (3, H, W).

    Args:
        max_size: maximum of the longer side in pixels; None does not resize.
        exif_orientation: apply the EXIF orientation.
    """

    def __init__(self, max_size: int | None = None, exif_orientation: bool = True) -> None:
        self.max_size, self.exif_orientation = max_size, exif_orientation

    def __call__(self, path: str) -> Tensor:
        image = EncodedImage(path, self.exif_orientation)
        size = self._size(image.height, image.width)
        return to_tensor(resize(image.decode(min_size=size), size))

    def apply(self, pixels: np.ndarray, boxes: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Resize a video frame, uint8 (H, W, 3); return the boxes unchanged."""
        return to_tensor(resize(pixels, self._size(*pixels.shape[:2]))), boxes

    def _size(self, height: int, width: int) -> tuple[int, int]:
        scale = min(1.0, (self.max_size or max(height, width)) / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))


class PairedDataset(Dataset):
    """Content images, each with a style image: ``image`` and ``style`` uint8 (3, S, S), ``id``.

    In training the style is random, drawn from the generator that the loader seeds by (seed, epoch, index). In
    evaluation, content i has style i modulo their number.

    Args:
        contents: paths of the content images.
        styles: paths of the style images; empty omits ``style``.
        transform: from a path to uint8 (3, S, S).
        training: draw random styles.
    """

    def __init__(self, contents: Sequence[str], styles: Sequence[str], transform: Any, training: bool) -> None:
        self.contents, self.styles = PackedStrings(contents), PackedStrings(styles)
        self.transform, self.training = transform, training

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.contents[index]
        sample = {"image": self.transform(path), "id": path}
        if len(self.styles):
            style = np.random.randint(len(self.styles)) if self.training else index % len(self.styles)
            sample["style"] = self.transform(self.styles[style])
        return sample


class StyleImages(VisionDataModule):
    """Folders of content and style images, flat or nested::

        root/content/**/<image>
        root/style/**/<image>

    Without a validation folder, content images are held out if the CRC-32 of their name is a multiple of ten. With
    fewer than ten images, all of them are used for both, with a warning. Styles are the same in both, unless
    ``val_style`` differs.

    Args:
        root: folder of both. Optional for prediction.
        content: another folder of content images than root's.
        style: another folder of style images than root's.
        val_content: folder of content images for validation and testing.
        val_style: folder of style images for validation and testing.
        with_style: load a style image with each content image. Systems with one fixed style set it to false.
        image_size: side of the square crops in pixels.
        resize: length of the shorter side before the crop, which is random in training and central in evaluation, so
            that strokes have the same size in both; null uses 1.25 times image_size.
        images: for prediction, an image, a folder or a video.
        max_size: in prediction, maximum of the longer side in pixels; null does not resize.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: a folder does not exist or contains no image.
        UserError: an argument is out of range.
    """

    predict_batch_size = 1

    def __init__(
        self,
        root: str | None = None,
        content: str | None = None,
        style: str | None = None,
        val_content: str | None = None,
        val_style: str | None = None,
        with_style: bool = True,
        image_size: int = 256,
        resize: int | None = None,
        images: str | None = None,
        max_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        resize = resize or round(1.25 * image_size)
        if image_size < 1 or resize < image_size:
            raise UserError(f"image_size: expected 1 to resize ({resize}), found {image_size}")
        if max_size is not None and max_size < 1:
            raise UserError(f"max_size: expected 1 or more, found {max_size}")
        self.root, self.with_style, self.images = root, with_style, images
        self.folders = {"content": content, "style": style, "val_content": val_content, "val_style": val_style}
        self.train_transform = RandomCropTransform(image_size, resize, self.exif_orientation)
        self.eval_transform = EvalTransform(image_size, resize, self.exif_orientation)
        self.predict_transform = FullImageTransform(max_size, self.exif_orientation)

    def source_name(self, split: Split) -> str | None:
        return "training images" if split == "train" else "validation images"

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            if self.images is not None and is_video(self.images):
                return VideoDataset(self.images, self.predict_transform)
            return ImageDataset(list_prediction_images(self.images), self.predict_transform)
        training = split == "train"
        styles = list_images(self._folder("style" if training else "val_style")) if self.with_style else []
        transform = self.train_transform if training else self.eval_transform
        return PairedDataset(self._contents(training), styles, transform, training)

    def _folder(self, name: str) -> str:
        given = self.folders[name] or (self.folders[name[4:]] if name.startswith("val_") else None)
        if given is None and self.root is None:
            raise DatasetError("root: expected a folder with content/ and style/, found none; set --data.root FOLDER")
        return given or os.path.join(str(self.root), name.removeprefix("val_"))

    def _contents(self, training: bool) -> list[str]:
        folder = self._folder("content")
        if not training and self.folders["val_content"] is not None:
            return list_images(self._folder("val_content"))
        paths = list_images(folder)
        if self.folders["val_content"] is not None:
            return paths
        names = {path: os.fsencode(os.path.relpath(path, folder)) for path in paths}
        held_out = {path for path, name in names.items() if zlib.crc32(name) % HELD_OUT_ONE_IN == 0}
        if len(paths) < HELD_OUT_ONE_IN or not held_out:
            if not training:
                rank_zero_warn(f"{folder}: {len(paths)} images are too few to hold out some; validation uses them all")
            return paths
        return [path for path in paths if (path in held_out) != training]


class RepeatedPair(Dataset):
    """The same image pair ``count`` times: ``image`` and, if given, ``style``, uint8 (3, H, W), and ``id``."""

    def __init__(
        self,
        content: str,
        style: str | None,
        content_size: int | None,
        style_size: int | None,
        count: int,
        exif_orientation: bool = True,
    ) -> None:
        self.content, self.style, self.count = content, style, count
        self.content_transform = FullImageTransform(content_size, exif_orientation)
        self.style_transform = FullImageTransform(style_size, exif_orientation)
        self._sample: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._sample is None:
            self._sample = {"image": self.content_transform(self.content), "id": self.content}
            if self.style is not None:
                self._sample["style"] = self.style_transform(self.style)
        return self._sample


class ImagePair(VisionDataModule):
    """One content image and optionally one style image, for systems that optimize an image.

    Args:
        content: the image to invert, to stylize, or to take the texture of.
        style: the style image, if the system uses one.
        image_size: maximum of the content image's longer side in pixels; null does not resize.
        style_size: maximum of the style image's longer side in pixels, which scales its strokes; null uses image_size.
        steps: steps per epoch. The image is drawn after each epoch.
        num_workers: see `VisionDataModule`. A batch is the one pair, read once.
        exif_orientation: apply the EXIF orientation of both images; false reads them as stored.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        content: str | None = None,
        style: str | None = None,
        image_size: int | None = 256,
        style_size: int | None = None,
        steps: int = 50,
        num_workers: int | None = 0,
        exif_orientation: bool = True,
    ) -> None:
        super().__init__(batch_size=1, num_workers=num_workers, exif_orientation=exif_orientation)
        if steps < 1:
            raise UserError(f"steps: expected 1 or more, found {steps}")
        for name, size in (("image_size", image_size), ("style_size", style_size)):
            if size is not None and size < 1:
                raise UserError(f"{name}: expected 1 or more, found {size}")
        self.content, self.style, self.steps = content, style, steps
        self.sizes = image_size, style_size or image_size

    def dataset(self, split: Split) -> Dataset:
        if self.content is None:
            raise DatasetError("content: expected an image, found none; set --data.content IMAGE")
        count = self.steps if split == "train" else 1
        return RepeatedPair(self.content, self.style, *self.sizes, count, self.exif_orientation)
