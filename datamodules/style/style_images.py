"""Images to be changed and images whose style they are to have: folders of both, or one of each."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.folders import PackedStrings
from datamodules.images import EncodedImage, list_images, predicted_images, resize
from datamodules.transforms import EvalTransform, to_tensor
from datamodules.video import VideoDataset, is_video
from errors import DatasetError, UserError

SHARE = 10  # one of so many images is held out where nothing says which


class CropTransform:
    """Reads a random square of an image, in training: path to uint8 (3,crop,crop).

    Args:
        crop: side of the square in pixels.
        shorter: length that the image's shorter side is resized to first.
    """

    def __init__(self, crop: int, shorter: int) -> None:
        self.crop, self.shorter = crop, shorter

    def __call__(self, path: str) -> Tensor:
        image = EncodedImage(path)
        part = max(1, round(min(image.height, image.width) * self.crop / self.shorter))
        top, left = random.randint(0, image.height - part), random.randint(0, image.width - part)
        return to_tensor(image.crop((top, left, part, part), (self.crop, self.crop)))


class WholeTransform:
    """Reads a whole image: path to uint8 (3,H,W).

    Args:
        longest: pixels of its longer side at most; None: as it is.
    """

    def __init__(self, longest: int | None = None) -> None:
        self.longest = longest

    def __call__(self, path: str) -> Tensor:
        image = EncodedImage(path, exif_orientation=True)
        size = self._size(image.height, image.width)
        return to_tensor(resize(image.decode(at_least=size), size))

    def apply(self, pixels: np.ndarray, boxes: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Of a video's frame, uint8 (H,W,3); boxes are handed on."""
        return to_tensor(resize(pixels, self._size(*pixels.shape[:2]))), boxes

    def _size(self, height: int, width: int) -> tuple[int, int]:
        scale = min(1.0, (self.longest or max(height, width)) / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))


class PairedDataset(Dataset):
    """A content image a sample, and an image of style: ``image``, ``style`` uint8 (3,S,S), ``id``.

    In training the style is drawn by the generator that the loader has seeded for this content of this epoch, so that
    the pairs are a function of (seed, epoch, index); else content i has style i modulo their number.

    Args:
        contents, styles: paths; no styles: ``image`` alone.
        transform: path to uint8 (3,S,S).
        training: see above.
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
            drawn = np.random.randint(len(self.styles)) if self.training else index % len(self.styles)
            sample["style"] = self.transform(self.styles[drawn])
        return sample


class StyleImages(VisionDataModule):
    """Folders of content and of style, flat or nested::

        root/content/**/<image>
        root/style/**/<image>

    Where no folder for validation is given, contents the CRC-32 of whose name is a multiple of ten are held out; with
    fewer than ten images all of them do both, and a line says so. Styles are the same, unless ``val_style`` differs.

    Args:
        root: folder of both. Only prediction can do without.
        content, style: other folders than root's; a system that takes one style for itself leaves ``style`` out.
        val_content, val_style: folders for validation and test.
        styled: give an image of style with each content.
        image_size: side of the squares in pixels.
        resize: pixels of the shorter side before a square is cut, in training at random, in evaluation in the middle,
            so that strokes are as large in both; None: a quarter more than ``image_size``.
        images: for prediction, an image, a folder or a video.
        longest: in prediction, pixels of the longer side at most; None: images are taken as they are.
        **kwargs: see `VisionDataModule`.

    Raises:
        DatasetError: there is no such folder, or no image in it.
        ValueError: an argument is out of its range.
    """

    predict_batch_size = 1

    def __init__(
        self,
        root: str | None = None,
        content: str | None = None,
        style: str | None = None,
        val_content: str | None = None,
        val_style: str | None = None,
        styled: bool = True,
        image_size: int = 256,
        resize: int | None = None,
        images: str | None = None,
        longest: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        resize = resize or round(1.25 * image_size)
        if image_size < 1 or resize < image_size:
            raise UserError(f"image_size: expected 1 to resize ({resize}), found {image_size}")
        if longest is not None and longest < 1:
            raise UserError(f"longest: expected 1 or more, found {longest}")
        self.root, self.styled, self.images = root, styled, images
        self.folders = {"content": content, "style": style, "val_content": val_content, "val_style": val_style}
        self.train_transform = CropTransform(image_size, resize)
        self.eval_transform = EvalTransform(image_size, resize)
        self.predict_transform = WholeTransform(longest)

    def dataset(self, split: Split) -> Dataset:
        if split == "predict":
            if is_video(self.images):
                assert self.images is not None
                return VideoDataset(self.images, self.predict_transform)
            return PairedDataset(predicted_images(self.images), [], self.predict_transform, training=False)
        training = split == "train"
        styles = list_images(self._folder("style" if training else "val_style")) if self.styled else []
        transform = self.train_transform if training else self.eval_transform
        return PairedDataset(self._contents(training), styles, transform, training)

    def _folder(self, name: str) -> str:
        given = self.folders[name] or (self.folders[name[4:]] if name.startswith("val_") else None)
        if given is None and self.root is None:
            raise DatasetError(f"{type(self).__name__}: no images given: --data.root FOLDER, with content/ and style/")
        return given or os.path.join(str(self.root), name.removeprefix("val_"))

    def _contents(self, training: bool) -> list[str]:
        folder = self._folder("content")
        if not training and self.folders["val_content"] is not None:
            return list_images(self._folder("val_content"))
        paths = list_images(folder)
        if self.folders["val_content"] is not None:
            return paths
        held_out = {path for path in paths if zlib.crc32(os.path.relpath(path, folder).encode()) % SHARE == 0}
        if len(paths) < SHARE or not held_out:
            if not training:
                rank_zero_warn(f"{folder}: with {len(paths)} images none is held out: validation sees the training's")
            return paths
        return [path for path in paths if (path in held_out) != training]


class RepeatedPair(Dataset):
    """The same images ``count`` times: ``image`` and, where given, ``style``, uint8 (3,H,W), and ``id``."""

    def __init__(self, content: str, style: str | None, content_size: int | None, style_size: int | None, count: int):
        self.content, self.style, self.count = content, style, count
        self.content_view, self.style_view = WholeTransform(content_size), WholeTransform(style_size)
        self._sample: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._sample is None:
            self._sample = {"image": self.content_view(self.content), "id": self.content}
            if self.style is not None:
                self._sample["style"] = self.style_view(self.style)
        return self._sample


class ImagePair(VisionDataModule):
    """One image, or one and another whose style it is to have, for systems that learn an image.

    Args:
        content: the image: what is inverted, whose texture is taken, or what is painted anew.
        style: the other, where there is one.
        image_size: pixels of the content's longer side at most; None: as it is.
        style_size: the same of the style; its strokes come out as large as they are in these pixels. None: as content.
        steps: of an epoch, after each of which the image is drawn.
        num_workers: see `VisionDataModule`. A batch is the one pair, read once.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        content: str | None = None,
        style: str | None = None,
        image_size: int | None = 256,
        style_size: int | None = None,
        steps: int = 50,
        num_workers: int | None = 0,
    ) -> None:
        super().__init__(batch_size=1, num_workers=num_workers)
        if steps < 1:
            raise UserError(f"steps: expected 1 or more an epoch, found {steps}")
        for name, size in (("image_size", image_size), ("style_size", style_size)):
            if size is not None and size < 1:
                raise UserError(f"{name}: expected 1 or more, found {size}")
        self.content, self.style, self.steps = content, style, steps
        self.sizes = image_size, style_size or image_size

    def dataset(self, split: Split) -> Dataset:
        if self.content is None:
            raise DatasetError(f"{type(self).__name__}: no image given: --data.content PICTURE")
        return RepeatedPair(self.content, self.style, *self.sizes, self.steps if split == "train" else 1)
