"""DeconvNet: semantic segmentation by a deep deconvolution network.

Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015.

The encoder is VGG-16 down to a single cell; the decoder is its mirror image. Unpooling places each value where the
maximum was, and transposed convolutions fill the gaps. The network sees one object proposal at a time, and the
predictions of all proposals of an image are combined. Shapes: N images of H x W pixels, P proposals, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.external_proposals import inference_proposals
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.unsaved import FrozenNetwork
from lightning_modules.components.upsampling import max_unpooling
from lightning_modules.components.vgg import conv_relu, vgg16_plan
from lightning_modules.segmentation.base import SemanticSegmenter, class_maps, original_sizes, resize_logits
from lightning_modules.segmentation.crf import DenseCRF
from lightning_modules.segmentation.fcn import FCN, convert_vgg16_weights

Inference = Literal["image", "proposals"]

CONTEXT_FACTOR = 1.2  # boxes are enlarged by it
WINDOW_BATCH_SIZE = 10  # windows per forward pass in evaluation

# Settings of the authors' script for 10 iterations.
CRF = DenseCRF(bilateral_weight=5.0, theta_alpha=20.0, theta_beta=3.0, gaussian_weight=3.0, theta_gamma=3.0)

# --- network --------------------------------------------------------------------------------------------------------

#: Channels of the transposed convolutions after each unpooling, from the smallest feature map to the largest.
DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64, 64))


def deconv_relu(in_channels: int, out_channels: int, kernel_size: int, batch_norm: bool, padding: int) -> nn.Sequential:
    """Build a transposed convolution, batch normalization if asked for, and a ReLU."""
    deconv = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, padding=padding)
    norm = [nn.BatchNorm2d(out_channels)] if batch_norm else []
    return nn.Sequential(deconv, *norm, nn.ReLU(inplace=True))


class DeconvNetwork(nn.Module):
    """Network of figure 2: normalized images (N, 3, H, W), at least 193 pixels per side, to logits (N, C, H, W).

    It has 251,805,653 parameters for 21 classes, and 251,772,245 without batch normalization. An image of 224 pixels
    has one cell at fc6, which encodes class and shape of the object. Larger images or a smaller kernel have several
    cells, whose contributions overlap in the decoder; the network must be trained on such images.

    Args:
        num_classes: number of classes, C.
        width_multiplier: factor on all channels.
        batch_norm: batch normalization after each convolution.
        fc6_kernel: kernel size of fc6 and of its deconvolution. Images have at least 32 (fc6_kernel - 1) + 1 pixels.
    """

    def __init__(
        self, num_classes: int = 21, width_multiplier: float = 1.0, batch_norm: bool = True, fc6_kernel: int = 7
    ) -> None:
        super().__init__()
        self.min_size = 32 * (fc6_kernel - 1) + 1

        def scaled(channels: int) -> int:
            return max(1, round(channels * width_multiplier))

        self.features = make_layers(vgg16_plan(width_multiplier), batch_norm)
        self.fc6 = nn.Sequential(*conv_relu(scaled(512), scaled(4096), fc6_kernel, batch_norm))
        self.fc7 = nn.Sequential(*conv_relu(scaled(4096), scaled(4096), 1, batch_norm))
        self.fc6_deconv = deconv_relu(scaled(4096), scaled(512), fc6_kernel, batch_norm, padding=0)
        self.decoder = nn.ModuleList()
        channels = scaled(512)
        for block in DECODER:
            layers: list[nn.Module] = []
            for out in map(scaled, block):
                layers += deconv_relu(channels, out, 3, batch_norm, padding=1)
                channels = out
            self.decoder.append(nn.Sequential(*layers))
        self.score = nn.Conv2d(channels, num_classes, 1)
        for part in (self.features, self.fc6, self.fc7):
            he_normal(part)
        for part in (self.fc6_deconv, self.decoder, self.score):
            for layer in part.modules():
                if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                    nn.init.normal_(layer.weight, std=0.01)
                    assert layer.bias is not None
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.min_size:
            raise UserError(
                f"DeconvNet: expected at least {self.min_size} pixels per side, found {x.shape[3]}x{x.shape[2]}; "
                "increase --data.image_size, --data.crop_size or --model.input_size, or decrease --model.fc6_kernel"
            )
        pooled = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                size = (x.shape[2], x.shape[3])
                x, switches = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
                pooled.append((switches, size))
            else:
                x = layer(x)
        x = self.fc6_deconv(self.fc7(self.fc6(x)))
        for block in self.decoder:
            x = block(max_unpooling(x, *pooled.pop()))
        return self.score(x).float()


# --- decoding -------------------------------------------------------------------------------------------------------


def resize_to_square(pixels: Tensor, side: int) -> Tensor:
    """Resize images (N, 3, h, w) to (N, 3, side, side); the aspect ratio is not kept."""
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)


def select_windows(boxes: Tensor, count: int, min_size: int) -> list[list[int]]:
    """Enlarge boxes by 1.2 and select the first ``count`` of at least ``min_size`` pixels per side.

    Args:
        boxes: float (P, 4), xyxy in pixels, best first.
        count: maximum number of windows.
        min_size: at least 1.

    Returns:
        (left, top, right, bottom) of each window in integer pixels; windows may exceed the image.
    """
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * CONTEXT_FACTOR / 2
    edges = torch.cat([center - half, center + half], 1).round().long()
    return edges[(edges[:, 2:] - edges[:, :2] >= min_size).all(1)][:count].tolist()


def combine_windows(
    network: nn.Module, pixels: Tensor, windows: Sequence[Sequence[int]], num_classes: int, side: int
) -> Tensor:
    """Return the maximum over all windows of each pixel's logits, at least 0: float32 (C, h, w) (section 4.4).

    The authors' code combines logits, not softmax probabilities.

    Args:
        network: maps (N, 3, side, side) to logits (N, C, side, side).
        pixels: normalized image, float (3, h, w); windows are padded with 0, the mean color.
        windows: see `select_windows`.
        num_classes: C.
        side: input side of the network in pixels.
    """
    height, width = pixels.shape[1:]
    combined = pixels.new_zeros(num_classes, height, width, dtype=torch.float32)
    for first in range(0, len(windows), WINDOW_BATCH_SIZE):
        crops, positions = [], []
        for left, top, right, bottom in windows[first : first + WINDOW_BATCH_SIZE]:
            rows, columns = slice(max(0, top), min(height, bottom)), slice(max(0, left), min(width, right))
            padding = (columns.start - left, right - columns.stop, rows.start - top, bottom - rows.stop)
            crops.append(resize_to_square(F.pad(pixels[:, rows, columns], padding)[None], side))
            positions.append((rows, columns, padding, (bottom - top, right - left)))
        for logits, (rows, columns, padding, size) in zip(network(torch.cat(crops)), positions, strict=True):
            inside = F.pad(resize_logits(logits, size), [-pad for pad in padding])
            combined[:, rows, columns] = torch.maximum(combined[:, rows, columns], inside)
    return combined


# --- module ---------------------------------------------------------------------------------------------------------


class DeconvNet(SemanticSegmenter):
    """DeconvNet (Noh et al. 2015). See `SemanticSegmenter` for batch, predictions and metrics.

    The two training stages are two fits with different data: crops of objects, then proposals (`VOCInstanceCrops`).
    Network, loss and optimizer are the same in both, so that the second fit only starts from the first one's checkpoint
    (``weights``); `StagedModule` is for stages that train different parts on the same data. A batch without proposals
    is searched by Selective Search, about a second per image.

    Args:
        width_multiplier: factor on all channels.
        batch_norm: batch normalization after each convolution.
        fc6_kernel: kernel size of fc6, 1 to 7; smaller ones accept smaller images.
        weights: null to train from scratch; DEFAULT or the name of torchvision's weights for VGG-16, including fc6 and
            fc7; or a file: such weights, the checkpoint of the previous stage, or an `FCN`'s, without its scores.
        inference: ``proposals`` combines windows, as in the paper; ``image`` segments whole images, for networks that
            were trained so.
        input_size: windows or images are warped to this side in pixels for inference.
        num_proposals: number of proposals per image; the paper's is 50.
        min_window_size: smaller windows, with context, are skipped; the authors' is 112 pixels.
        ensemble: checkpoint of an `FCN`, whose class probabilities are multiplied with those of this network. The paper
            averages them; the authors' code multiplies the scores.
        crf: refine the class probabilities with a dense CRF, with the authors' settings.
        optimizer: makes the optimizer from parameter groups. Default: the authors' SGD. Biases get twice the learning
            rate and no weight decay.
        **kwargs: see `SemanticSegmenter`.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        width_multiplier: float = 1.0,
        batch_norm: bool = True,
        fc6_kernel: int = 7,
        weights: str | None = None,
        inference: Inference = "proposals",
        input_size: int = 224,
        num_proposals: int = 50,
        min_window_size: int = 112,
        ensemble: str | None = None,
        crf: bool = False,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if inference not in ("image", "proposals"):
            raise UserError(f"inference: expected image or proposals, found {inference}")
        if not 1 <= fc6_kernel <= 7:
            raise UserError(f"fc6_kernel: expected 1 to 7, found {fc6_kernel}")
        for name, value in (("num_proposals", num_proposals), ("min_window_size", min_window_size)):
            if value < 1:
                raise UserError(f"{name}: expected 1 or more, found {value}")
        self.inference, self.input_size, self.crf = inference, input_size, crf
        self.num_proposals, self.min_window_size = num_proposals, min_window_size
        self.network = DeconvNetwork(self.num_classes, width_multiplier, batch_norm, fc6_kernel)
        if weights is not None:
            name = "vgg16_bn" if batch_norm else "vgg16"
            new_layers = ["fc6", "fc7", "fc6_deconv", "decoder", "score"]
            new_layers += ["score_fr", "up", "upscore"]  # of an FCN
            load_weights(self.network, find_weights(name, weights), name, *new_layers, convert=convert_vgg16_weights)
        self.ensemble = None if ensemble is None else FrozenNetwork(load_fcn(ensemble, self.num_classes))

    def logits(
        self,
        images: Tensor | list[Tensor],
        sizes: Sequence[tuple[int, int]] | None = None,
        proposals: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Compute the logits of each image; those of an ensemble are the sum of both networks'.

        The normalized product of two softmaxes is the softmax of the sum of their logits.

        Args:
            images: uint8 (N, 3, H, W), or a list of (3, H, W).
            sizes: (height, width) of the logits of each image; None for the sizes of the images.
            proposals: float (P, 4), xyxy in pixels, best first, per image; None for Selective Search.

        Returns:
            Logits, float32 (C, height, width) per image.
        """
        pixels = [self.preprocess(image[None]) for image in images]
        if self.inference == "image":
            logits = list(self.network(torch.cat([resize_to_square(p, self.input_size) for p in pixels])))
        else:
            logits = []
            for p, boxes, valid in zip(pixels, *inference_proposals(images, proposals), strict=True):
                windows = select_windows(boxes[valid], self.num_proposals, self.min_window_size)
                logits.append(combine_windows(self.network, p[0], windows, self.num_classes, self.input_size))
        sizes = [(image.shape[1], image.shape[2]) for image in images] if sizes is None else sizes
        logits = [resize_logits(one, size) for one, size in zip(logits, sizes, strict=True)]
        if self.ensemble is not None:
            others = self.ensemble.network.logits(images)  # type: ignore[operator]
            logits = [a + resize_logits(b, size) for a, b, size in zip(logits, others, sizes, strict=True)]
        return logits

    def predict(self, images: Tensor | list[Tensor], proposals: Sequence[Tensor] | None = None) -> list[Tensor]:
        return self.decode(self.logits(images, None, proposals), images)

    def predict_batch(self, batch: dict[str, Any]) -> list[Tensor]:
        images = batch["image"]
        return self.decode(self.logits(images, original_sizes(batch), batch.get("proposals")), images)

    def decode(self, logits: Sequence[Tensor], images: Tensor | list[Tensor]) -> list[Tensor]:
        """Return the most probable class of each pixel, after the CRF if there is one: int64 (h, w) per image.

        Raises:
            UserError: the CRF is enabled and an image differs in size from its logits.
        """
        if not self.crf:
            return class_maps(logits)
        return [CRF(one.softmax(0), image).argmax(0) for one, image in zip(logits, images, strict=True)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)


def load_fcn(path: str, num_classes: int) -> FCN:
    """Load the FCN of an ensemble from its checkpoint.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of an FCN with this number of classes.
    """
    if not os.path.isfile(path):
        raise UserError(f"ensemble: expected a checkpoint of an FCN, found no file {path}")
    try:
        fcn = FCN.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"ensemble: expected a checkpoint of an FCN, found {path} ({type(error).__name__}); train one with "
            "--model FCN"
        ) from None
    if fcn.num_classes != num_classes:
        raise UserError(
            f"ensemble: expected an FCN with {num_classes} classes, found {fcn.num_classes} in {path}; train both with "
            "the same classes"
        )
    return fcn
