"""Multi-scale and flip test, and refinement by a dense CRF: how the DeepLab systems predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from lightning_modules.segmentation.base import SemanticSegmenter, resize_logits
from lightning_modules.segmentation.crf import DEEPLAB_CRFS

CRFName = Literal["largefov", "vgg16", "resnet101"]


class PixelDecoder:
    """Decode images to class maps: average probabilities over scales and flips, then refine them with a CRF.

    Args:
        scales: factors by which the image is resized; [1] keeps its size.
        flip: also average over the horizontally flipped image.
        crf: name of DeepLab's CRF settings (`DEEPLAB_CRFS`); None for no CRF.
    """

    def __init__(self, scales: Sequence[float] = (1.0,), flip: bool = False, crf: CRFName | None = None) -> None:
        if not scales or min(scales) <= 0:
            raise UserError(f"eval_scales: expected one or more factors above 0, found {list(scales)}")
        if crf is not None and crf not in DEEPLAB_CRFS:
            raise UserError(f"crf: expected one of {', '.join(DEEPLAB_CRFS)}, found {crf}")
        self.scales, self.flip = tuple(scales), flip
        self.crf = None if crf is None else DEEPLAB_CRFS[crf]

    def __call__(
        self,
        network: Callable[[Tensor], Tensor],
        preprocess: Callable[[Tensor], Tensor],
        images: Tensor | list[Tensor],
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Tensor]:
        """Return the most probable class of every pixel.

        Args:
            network: maps normalized images float (N, 3, H, W) to logits float32 (N, C, H, W).
            preprocess: normalizes uint8 images.
            images: uint8 (N, 3, H, W), or a list of (3, H, W).
            sizes: (height, width) of each map; None for the sizes of the images.

        Returns:
            One map of class ids per image, int64 (height, width).

        Raises:
            UserError: there is a CRF, and an image differs in size from its map.
        """
        if sizes is None:
            sizes = [(image.shape[1], image.shape[2]) for image in images]
        if isinstance(images, Tensor):
            probabilities = self.probabilities(network, preprocess(images), sizes)
        else:
            pairs = zip(images, sizes, strict=True)
            probabilities = [self.probabilities(network, preprocess(i[None]), [size])[0] for i, size in pairs]
        if self.crf is not None:
            probabilities = [self.crf(p, image) for p, image in zip(probabilities, images, strict=True)]
        return [p.argmax(0) for p in probabilities]

    def probabilities(
        self, network: Callable[[Tensor], Tensor], pixels: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Average the softmax over scales and flips.

        Args:
            network: maps normalized images float (N, 3, H, W) to logits float32 (N, C, H, W).
            pixels: normalized images, float (N, 3, H, W).
            sizes: (height, width) of each result.

        Returns:
            Probabilities, float32 (C, height, width) per image.
        """
        height, width = pixels.shape[2:]
        averaged: list[list[Tensor]] = [[] for _ in sizes]
        for scale, flipped in product(self.scales, (False, True) if self.flip else (False,)):
            sides = (max(1, round(height * scale)), max(1, round(width * scale)))
            scaled = pixels if scale == 1 else F.interpolate(pixels, sides, mode="bilinear", antialias=True)
            logits = network(scaled.flip(3)).flip(3) if flipped else network(scaled)
            for i, size in enumerate(sizes):
                averaged[i].append(resize_logits(logits[i], size).softmax(0))
        return [torch.stack(each).mean(0) if len(each) > 1 else each[0] for each in averaged]


class MultiScaleSegmenter(SemanticSegmenter, ABC):
    """Base class of systems that predict with a `PixelDecoder`. Its options can be changed for a trained checkpoint.

    Args:
        eval_scales: factors by which images are resized for prediction; their probabilities are averaged.
        eval_flip: also average over horizontally flipped images.
        crf: refine the predictions with the dense CRF that DeepLab's authors tuned for ``largefov`` (v1), ``vgg16`` or
            ``resnet101`` (v2); null for none.
        **kwargs: see `SemanticSegmenter`.
    """

    def __init__(
        self,
        eval_scales: Sequence[float] = (1.0,),
        eval_flip: bool = False,
        crf: CRFName | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.decoder = PixelDecoder(eval_scales, eval_flip, crf)

    @abstractmethod
    def pixel_logits(self, pixels: Tensor) -> Tensor:
        """Compute logits of all pixels: normalized images float (N, 3, H, W) to float32 (N, C, H, W)."""

    def segment(self, images: Tensor | list[Tensor], sizes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
        return self.decoder(self.pixel_logits, self.preprocess, images, sizes)
