"""DeconvNet: Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015.

VGG16 down to a single cell, and its mirror image up again: unpooling puts each value back where the maximum was,
transposed convolutions fill in what lies between. It looks at one object at a time: proposals are cut out, and what it
says of them is put together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.models.vgg import make_layers

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.external_proposals import inference_proposals
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.upsampling import max_unpooling
from lightning_modules.components.vgg import conv_relu, vgg16_plan
from lightning_modules.segmentation.crf import DenseCRF
from lightning_modules.segmentation.fcn import FCN, convert_vgg16_weights
from lightning_modules.segmentation.metrics import segmentation_metrics
from lightning_modules.segmentation.scores import CROP_ADVICE, cross_entropy, resize, sizes_of

Inference = Literal["image", "proposals"]

CONTEXT = 1.2  # by which boxes are enlarged
AT_ONCE = 10  # crops that go through the network together in evaluation

# What the authors' script sets for 10 iterations.
CRF = DenseCRF(bilateral_weight=5.0, theta_alpha=20.0, theta_beta=3.0, gaussian_weight=3.0, theta_gamma=3.0)

# --- network --------------------------------------------------------------------------------------------------------

# What follows each unpooling, from the smallest map up.
DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64, 64))


class Deconvolution(nn.ConvTranspose2d):
    """A transposed convolution 3x3 of stride 1, which keeps the size, computed as the convolution that it is.

    Without a stride that is one with the kernel turned by half a circle. On a CPU it trains several times faster than
    PyTorch's transposed ones.
    """

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out, 3, padding=1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.conv2d(x, self.weight.transpose(0, 1).flip(2, 3), self.bias, padding=1)


def normalized(layer: nn.Module, channels: int, norm: bool) -> list[nn.Module]:
    """A layer, batch normalization if asked for, ReLU."""
    return [layer, *([nn.BatchNorm2d(channels)] if norm else []), nn.ReLU(inplace=True)]


class DeconvNetwork(nn.Module):
    """Figure 2's network: normalized images float (B,3,H,W), 193 pixels or more, to logits float32 (B,C,H,W).

    Parameters, for 21 classes: 251,805,653; without batch normalization 251,772,245. Of 224 pixels fc6 leaves one cell,
    which has to say all: what the object is and where its parts are. Of larger images, or with a smaller kernel, it
    leaves several, and where their parts overlap in the decoder they add up, which only a network that was trained on
    them knows.

    Args:
        num_classes: C.
        width: multiplies all channels.
        batch_norm: after each convolution.
        fc6_kernel: side of fc6 and of its deconvolution. Least images have 32 (fc6_kernel - 1) + 1 pixels.
    """

    def __init__(self, num_classes: int = 21, width: float = 1.0, batch_norm: bool = True, fc6_kernel: int = 7) -> None:
        super().__init__()
        self.least = 32 * (fc6_kernel - 1) + 1

        def scaled(channels: int) -> int:
            return max(1, round(channels * width))

        plan = vgg16_plan(width)
        self.features = make_layers(plan, batch_norm)
        self.fc6 = nn.Sequential(*conv_relu(scaled(512), scaled(4096), fc6_kernel, batch_norm))
        self.fc7 = nn.Sequential(*conv_relu(scaled(4096), scaled(4096), 1, batch_norm))
        up = nn.ConvTranspose2d(scaled(4096), scaled(512), fc6_kernel)
        self.fc6_deconv = nn.Sequential(*normalized(up, scaled(512), batch_norm))
        self.decoder = nn.ModuleList()
        into = 512
        for block in DECODER:
            layers: list[nn.Module] = []
            for out in block:
                layers += normalized(Deconvolution(scaled(into), scaled(out)), scaled(out), batch_norm)
                into = out
            self.decoder.append(nn.Sequential(*layers))
        self.score = nn.Conv2d(scaled(into), num_classes, 1)
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                if name.startswith(("features.", "fc6.", "fc7.")):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                else:
                    nn.init.normal_(layer.weight, std=0.01)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.least:
            raise UserError(
                f"DeconvNet: expected {self.least} pixels or more to either side, found {x.shape[3]}x{x.shape[2]}: "
                "take larger ones (--data.image_size, --data.crop_size, --model.side) or a smaller --model.fc6_kernel"
            )
        passed = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                size = (x.shape[2], x.shape[3])
                x, switches = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
                passed.append((switches, size))
            else:
                x = layer(x)
        x = self.fc6_deconv(self.fc7(self.fc6(x)))
        for block in self.decoder:
            x = block(max_unpooling(x, *passed.pop()))
        return self.score(x).float()


# --- decoding -------------------------------------------------------------------------------------------------------


def to_side(pixels: Tensor, side: int) -> Tensor:
    """Images float (B,3,h,w) as large as the network's, whatever their aspect: (B,3,side,side)."""
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)


def windows(boxes: Tensor, count: int, least: int) -> list[list[int]]:
    """What is looked at: the first ``count`` boxes that, enlarged by 1.2, are ``least`` pixels wide and high.

    Args:
        boxes: float (P,4) xyxy in pixels, best first.
        count: how many at most.
        least: 1 or more.

    Returns:
        [left, top, right, bottom] of each in whole pixels; they may reach beyond the image.
    """
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * CONTEXT / 2
    edges = torch.cat([middle - half, middle + half], 1).round().long()
    return edges[(edges[:, 2:] - edges[:, :2] >= least).all(1)][:count].tolist()


def score_windows(
    network: nn.Module, pixels: Tensor, boxes: Sequence[Sequence[int]], num_classes: int, side: int
) -> Tensor:
    """For each pixel and class the highest score in any window, and no less than 0: float32 (C,h,w) (section 4.4).

    Those are the network's logits, as in the authors' code, not their softmax.

    Args:
        network: float (B,3,side,side) to logits (B,C,side,side).
        pixels: a normalized image, float (3,h,w); beyond it there is the mean color.
        boxes: see `windows`.
        num_classes: C.
        side: of what the network looks at.
    """
    height, width = pixels.shape[1:]
    scores = pixels.new_zeros(num_classes, height, width, dtype=torch.float32)
    for first in range(0, len(boxes), AT_ONCE):
        crops, places = [], []
        for left, top, right, bottom in boxes[first : first + AT_ONCE]:
            rows, columns = slice(max(0, top), min(height, bottom)), slice(max(0, left), min(width, right))
            beyond = (columns.start - left, right - columns.stop, rows.start - top, bottom - rows.stop)
            crops.append(to_side(F.pad(pixels[:, rows, columns], beyond)[None], side))
            places.append((rows, columns, beyond, (bottom - top, right - left)))
        for found, (rows, columns, beyond, size) in zip(network(torch.cat(crops)), places, strict=True):
            inner = F.pad(resize(found, size), [-side for side in beyond])
            scores[:, rows, columns] = torch.maximum(scores[:, rows, columns], inner)
    return scores


# --- module ---------------------------------------------------------------------------------------------------------


class DeconvNet(VisionModule):
    """DeconvNet. Batch: see segmentation in the batch contract. Predictions: a map of class ids int64 (h,w) an image.

    It is trained first on objects and then on proposals, see `VOCInstanceCrops`, each 224 pixels to either side. Where
    a batch has no proposals, Selective Search computes them, about a second an image. Metrics: see
    `SegmentationMetrics`; images are scored at their own size.

    Args:
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        width, batch_norm, fc6_kernel: see `DeconvNetwork`.
        weights: None to train from scratch; DEFAULT or a name of torchvision's weights of VGG16, of which fc6 and fc7
            are taken too; or a file: of these, the checkpoint of the stage before, or an `FCN`'s, of which all is taken
            but its scores.
        inference: ``proposals`` is the paper's, see `score_windows`; ``image`` looks at the whole image once, for a
            network that was trained so.
        side: what it looks at in inference is warped to side x side pixels.
        proposals: how many proposals are looked at; the paper's 50.
        least_side: proposals that are smaller, with the context around them, are passed over; the authors' 112 pixels.
        ensemble: checkpoint of an `FCN`, whose class probabilities are multiplied with this network's. The paper takes
            their mean, the authors' code the product of the scores.
        crf: refine the probabilities by a dense CRF, with the authors' settings.
        optimizer: see `VisionModule`; the authors', with whom biases learn at twice the rate and do not decay.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/miou", "max")

    def __init__(
        self,
        num_classes: int = 21,
        class_names: list[str] | None = None,
        width: float = 1.0,
        batch_norm: bool = True,
        fc6_kernel: int = 7,
        weights: str | None = None,
        inference: Inference = "proposals",
        side: int = 224,
        proposals: int = 50,
        least_side: int = 112,
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
        if proposals < 1 or least_side < 1:
            raise UserError(f"proposals, least_side: expected 1 or more, found {proposals} and {least_side}")
        self.num_classes, self.class_names, self.side = num_classes, class_names, side
        self.inference, self.proposals, self.least_side, self.crf = inference, proposals, least_side, crf
        self.network = DeconvNetwork(num_classes, width, batch_norm, fc6_kernel)
        if weights is not None:
            name = "vgg16_bn" if batch_norm else "vgg16"
            free = ["fc6", "fc7", "fc6_deconv", "decoder", "score"]
            free += ["score_fr", "up", "upscore"]  # an FCN's own
            load_weights(self.network, find_weights(name, weights), name, *free, convert=convert_vgg16_weights)
        # In a list it is no part of this module: neither trained nor written to checkpoints.
        self.others = [] if ensemble is None else [load_fcn(ensemble, num_classes)]

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = require_equal_size(batch["image"], CROP_ADVICE)
        return {"cross_entropy": cross_entropy(self.network(self.preprocess(images)), batch["mask"])}

    def scores(
        self,
        images: Tensor | list[Tensor],
        sizes: Sequence[tuple[int, int]] | None = None,
        proposals: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Logits float32 (C,height,width) of each image; those of an ensemble are the sums of both networks'.

        The product of two softmaxes, made to add up to 1, is the softmax of the sum of their logits.

        Args:
            images: uint8 (B,3,h,w) or a list of (3,h,w).
            sizes: (height, width) for each image; None for its own.
            proposals: float (P,4) xyxy in pixels of each image, best first; None to search for them.
        """
        pixels = [self.preprocess(image[None]) for image in images]
        if self.inference == "image":
            found = list(self.network(torch.cat([to_side(p, self.side) for p in pixels])))
        else:
            boxes, there = inference_proposals(images, proposals)
            chosen = [windows(b[t], self.proposals, self.least_side) for b, t in zip(boxes, there, strict=True)]
            pairs = zip(pixels, chosen, strict=True)
            found = [
                score_windows(self.network, p[0], looked_at, self.num_classes, self.side) for p, looked_at in pairs
            ]
        sizes = [(image.shape[1], image.shape[2]) for image in images] if sizes is None else sizes
        found = [resize(scores, size) for scores, size in zip(found, sizes, strict=True)]
        for other in self.others:
            theirs = other.to(self.device).scores(images)
            found = [ours + resize(t, size) for ours, t, size in zip(found, theirs, sizes, strict=True)]
        return found

    def predict(self, images: Tensor | list[Tensor], proposals: Sequence[Tensor] | None = None) -> list[Tensor]:
        return self.decode(self.scores(images, None, proposals), images)

    def predict_batch(self, batch: dict[str, Any]) -> list[Tensor]:
        images = batch["image"]
        return self.decode(self.scores(images, sizes_of(batch), batch.get("proposals")), images)

    def decode(self, scores: Sequence[Tensor], images: Tensor | list[Tensor]) -> list[Tensor]:
        """The most probable class of each pixel, after the CRF if there is one: int64 (h,w) an image.

        Raises:
            ValueError: a CRF is asked for, and an image has not the size of its scores.
        """
        if not self.crf:
            return [s.argmax(0) for s in scores]
        pairs = list(zip(scores, images, strict=True))
        for s, image in pairs:
            if s.shape[1:] != image.shape[1:]:
                raise UserError(
                    f"crf: expected images at their own size, found {image.shape[2]}x{image.shape[1]} of "
                    f"{s.shape[2]}x{s.shape[1]}: set --data.eval_image_size null"
                )
        return [CRF(s.softmax(0), image).argmax(0) for s, image in pairs]

    def build_metrics(self) -> MetricCollection:
        return segmentation_metrics(self.num_classes)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["original_mask"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)


def load_fcn(path: str, num_classes: int) -> FCN:
    """The FCN of a checkpoint, to look and not to learn.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an FCN's checkpoint, or one of another number of classes.
    """
    if not os.path.isfile(path):
        raise UserError(f"ensemble: no file {path}: expected a checkpoint of an FCN")
    try:
        fcn = FCN.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"ensemble: {path} is not a checkpoint of an FCN ({type(error).__name__}): train one with --model FCN"
        ) from None
    if fcn.num_classes != num_classes:
        raise UserError(
            f"ensemble: expected an FCN of {num_classes} classes, found {fcn.num_classes} in {path}: train both on one "
            "list of classes"
        )
    return fcn.eval().requires_grad_(False)
