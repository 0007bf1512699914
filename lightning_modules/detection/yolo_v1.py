"""YOLO v1: detection by one network in one pass, without proposals.

Redmon, Divvala, Girshick and Farhadi, "You Only Look Once: Unified, Real-Time Object Detection", CVPR 2016.

The image is divided into a grid of cells. The cell that contains the center of an object predicts its boxes with one
confidence each, and one distribution over the classes. Notation of the shapes:

    N images, S grid cells per side, B boxes per cell, C classes, K objects of a batch, M objects of an image
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from errors import UserError
from lightning_modules.base import IMAGENET_MEAN, IMAGENET_STD, OptimizerFactory
from lightning_modules.components.boxes import (
    concatenate_targets,
    constant_like,
    non_maximum_suppression,
    paired_iou,
)
from lightning_modules.components.image_batches import require_square
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.parameter_groups import weight_decay_groups
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.unsaved import Constant
from lightning_modules.detection.base import Detector
from lightning_modules.detection.yolo_weights import LoadedWeights, is_checkpoint_of, load_detector

# --- network ------------------------------------------------------------------------------------------------------

Backbone = Literal["darknet", "resnet18", "resnet34", "resnet50"]
CELL_SIZE = 64  # pixels per side of a grid cell
# Figure 3: (kernel size, channels) and the stride if it is not 1; M is max pooling by 2. The paper pretrains the first
# 20 convolutions on ImageNet; the last 4 are the detection layers.
LAYERS: tuple[tuple[int, ...] | str, ...] = (
    (7, 64, 2), "M", (3, 192), "M", (1, 128), (3, 256), (1, 256), (3, 512), "M",
    *((1, 256), (3, 512)) * 4, (1, 512), (3, 1024), "M",
    *((1, 512), (3, 1024)) * 2,
    (3, 1024), (3, 1024, 2), (3, 1024), (3, 1024),
)  # fmt: skip


class YOLOv1Network(nn.Module):
    """The network of figure 3, or its detection layers on top of a ResNet.

    Args:
        backbone: see `YOLOv1`.
        num_classes: number of classes, C.
        grid_size: grid cells per side, S.
        boxes_per_cell: boxes per cell, B.
        width_multiplier: see `YOLOv1`.
        batch_norm: see `YOLOv1`.
        hidden_units: units of the first fully connected layer.
        weights: see `YOLOv1`.

    Attributes:
        loaded: contents of a file of weights for the whole network; None without one.
    """

    def __init__(
        self,
        backbone: Backbone = "darknet",
        num_classes: int = 20,
        grid_size: int = 7,
        boxes_per_cell: int = 2,
        width_multiplier: float = 1.0,
        batch_norm: bool = False,
        hidden_units: int = 4096,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if weights is not None and backbone == "darknet" and not Path(weights).is_file():
            raise UserError(
                f"weights: expected null for backbone 'darknet' or a file (of the authors, or a checkpoint), found "
                f"{weights}; name a file, or use a ResNet backbone"
            )
        path = None if weights is None else find_weights(backbone, weights)
        is_whole = path is not None and (backbone == "darknet" or is_checkpoint_of(path, "fc2.weight"))
        self.grid_size, self.depth = grid_size, 5 * boxes_per_cell + num_classes
        trunk: list[nn.Module] = []
        layers, in_channels = LAYERS, 3
        if backbone != "darknet":
            resnet = torchvision.models.get_model(backbone, weights=None)
            if path is not None and not is_whole:
                load_weights(resnet, path, backbone, "fc")
            trunk = [module for name, module in resnet.named_children() if name not in ("avgpool", "fc")]
            layers, in_channels = LAYERS[-4:], resnet.fc.in_features
        convolutions, channels = make_convolutions(layers, in_channels, width_multiplier, batch_norm)
        self.features = nn.Sequential(*trunk, *convolutions)
        self.fc1 = nn.Linear(channels * grid_size**2, hidden_units)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(hidden_units, grid_size**2 * self.depth)
        for module in (convolutions, self.fc1, self.fc2):
            he_normal(module, negative_slope=0.1)
        # Outputs near 0: the gradients of large squared errors would destroy the pretrained layers.
        nn.init.normal_(self.fc2.weight, std=0.01)
        self.loaded: LoadedWeights | None = None
        if path is not None and is_whole:
            self.loaded = load_detector(self, path, "YOLOv1", num_classes)
            if self.loaded.is_darknet_detector:
                order = darknet_outputs(grid_size, boxes_per_cell, num_classes)
                for parameter in self.fc2.parameters():
                    parameter.data = parameter.data[order]

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images, float (N, 3, 64 S, 64 S), to (N, S, S, 5 B + C), see `CellPredictions`."""
        x = F.leaky_relu(self.fc1(self.features(x).flatten(1)), 0.1)
        return self.fc2(self.dropout(x)).view(-1, self.grid_size, self.grid_size, self.depth)


def make_convolutions(
    layers: tuple[tuple[int, ...] | str, ...], in_channels: int, width_multiplier: float, batch_norm: bool
) -> tuple[nn.Sequential, int]:
    """Return the convolutions and poolings of a part of `LAYERS`, and their number of output channels."""
    modules: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, str):
            modules.append(nn.MaxPool2d(2))
            continue
        kernel_size, out_channels, stride = (*layer, 1)[:3]
        out_channels = max(1, round(out_channels * width_multiplier))
        padding = kernel_size // 2
        modules.append(nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=not batch_norm))
        modules += [nn.BatchNorm2d(out_channels)] if batch_norm else []
        modules.append(nn.LeakyReLU(0.1, inplace=True))
        in_channels = out_channels
    return nn.Sequential(*modules), in_channels


def darknet_outputs(grid_size: int, boxes_per_cell: int, num_classes: int) -> Tensor:
    """Return where darknet's network has each output of ours, int64 (S * S * (5 B + C),).

    Darknet's outputs are the classes of all cells, then all confidences, then all boxes (src/detection_layer.c).
    """
    cells = grid_size**2
    sizes = cells * num_classes, cells * boxes_per_cell, cells * boxes_per_cell * 4
    classes, confidence, boxes = torch.arange(sum(sizes)).split(sizes)
    predictors = torch.cat([boxes.view(cells, boxes_per_cell, 4), confidence.view(cells, boxes_per_cell, 1)], 2)
    return torch.cat([predictors.flatten(1), classes.view(cells, num_classes)], 1).flatten()


class CellPredictions(NamedTuple):
    """The output of the network, float32; cell (row, column) is at [:, row, column].

    Attributes:
        xy: (N, S, S, B, 2), center of the box relative to the upper left corner of the cell, in cells.
        sqrt_wh: (N, S, S, B, 2), square roots of width and height relative to the image.
        confidence: (N, S, S, B), predicted IoU of the box with an object.
        classes: (N, S, S, C), probabilities of the classes if the cell contains an object.
    """

    xy: Tensor
    sqrt_wh: Tensor
    confidence: Tensor
    classes: Tensor

    @classmethod
    def split(cls, output: Tensor, boxes_per_cell: int) -> CellPredictions:
        """Split the output (N, S, S, 5 B + C): B times (x, y, sqrt w, sqrt h, confidence), then the classes."""
        boxes, classes = output.float().tensor_split([5 * boxes_per_cell], dim=-1)
        boxes = boxes.unflatten(-1, (boxes_per_cell, 5))
        return cls(boxes[..., :2], boxes[..., 2:4], boxes[..., 4], classes)

    def boxes(self) -> Tensor:
        """Return the boxes, (N, S, S, B, 4), xyxy relative to the image."""
        grid_size = self.xy.shape[1]
        cells = torch.arange(grid_size, device=self.xy.device, dtype=self.xy.dtype)
        corner = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), dim=-1)[:, :, None]
        center, half = (self.xy + corner) / grid_size, self.sqrt_wh.square() / 2
        return torch.cat([center - half, center + half], dim=-1)


# --- target encoding ----------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """All objects of a batch.

    Attributes:
        assigned: bool (K,), the object is the target of its cell; the other fields of all others have no meaning.
        cell: int64 (K,), index of the cell, (image * S + row) * S + column.
        xy: float (K, 2), center relative to the upper left corner of the cell, in cells, 0..1.
        sqrt_wh: float (K, 2), square roots of width and height relative to the image.
        boxes: float (K, 4), xyxy relative to the image.
        labels: int64 (K,).
    """

    assigned: Tensor
    cell: Tensor
    xy: Tensor
    sqrt_wh: Tensor
    boxes: Tensor
    labels: Tensor


def encode(
    target: list[dict[str, Tensor]], grid_size: int, image_size: tuple[int, int], min_size: float = 0.005
) -> Targets:
    """Assign each object to the grid cell that contains its center.

    If several objects share a cell, only the first one is a target; `VOCDetection` shuffles the objects in training, so
    that they take turns. Objects whose width or height is below ``min_size`` (relative to the image) are ignored. These
    rules follow the authors' code (darknet, src/data.c: fill_truth_region, randomize_boxes).

    Args:
        target: one dict per image with ``boxes`` float (M, 4), xyxy in pixels, and ``labels`` int64 (M,).
        grid_size: cells per side, S.
        image_size: (height, width) in pixels.
        min_size: smallest relative width and height of a target.

    Returns:
        Targets of all K objects of the batch.
    """
    boxes, labels, image = concatenate_targets(target)
    height, width = image_size
    boxes = boxes / constant_like([width, height, width, height], boxes)
    size = boxes[:, 2:] - boxes[:, :2]
    center = (boxes[:, :2] + boxes[:, 2:]) / 2 * grid_size
    corner = center.floor().clamp(0, grid_size - 1)
    column, row = corner.long().unbind(1)
    cell = (image * grid_size + row) * grid_size + column
    # Vectorized "first object wins": keep the smallest object index per cell.
    index = torch.arange(len(boxes), device=boxes.device)
    first = torch.full((len(target) * grid_size**2,), len(boxes), device=boxes.device)
    first = first.scatter_reduce(0, cell, torch.where((size >= min_size).all(1), index, len(boxes)), "amin")
    return Targets(first[cell] == index, cell, center - corner, size.clamp_min(0).sqrt(), boxes, labels)


# --- loss ---------------------------------------------------------------------------------------------------------


def yolo_loss(
    output: Tensor, targets: Targets, boxes_per_cell: int, lambda_coord: float = 5.0, lambda_noobj: float = 0.5
) -> dict[str, Tensor]:
    """Compute half the sum of squared errors of equation 3, averaged over the images of the batch.

    The half gives the gradient of the authors' code (darknet, src/detection_layer.c: scale * (target - output)), for
    which the learning rates of the paper are meant.

    The responsible predictor of an object is the box of its cell with the highest IoU. If no box overlaps the object,
    it is the box with the smallest distance in (x, y, w, h).

    Args:
        output: output of the network, (N, S, S, 5 B + C).
        targets: see `encode`.
        boxes_per_cell: B.
        lambda_coord: weight of the errors of the coordinates.
        lambda_noobj: weight of the confidence of predictors without an object.

    Returns:
        ``center``: 1/2 lambda_coord ((x - x*)^2 + (y - y*)^2), summed over the responsible predictors;
        ``size``: 1/2 lambda_coord times the same of the square roots of width and height;
        ``object``: 1/2 (confidence - IoU)^2 of the responsible predictors, without gradient through the IoU;
        ``no_object``: 1/2 lambda_noobj confidence^2 of all other predictors, also of cells with an object;
        ``class``: 1/2 of the squared error of the class probabilities, once per cell with an object.
    """
    num_images = len(output)
    predictions = CellPredictions.split(output, boxes_per_cell)
    with torch.no_grad():
        boxes = predictions.boxes().flatten(0, 2)[targets.cell]
        gt_boxes = targets.boxes[:, None].expand_as(boxes)
        iou = paired_iou(boxes, gt_boxes).float()
        distance = (box_convert(boxes, "xyxy", "cxcywh") - box_convert(gt_boxes, "xyxy", "cxcywh")).square().sum(-1)
        chosen = torch.where(iou.amax(1) > 0, iou.argmax(1), distance.argmin(1))
        iou = iou.gather(1, chosen[:, None])[:, 0]
        predictor = targets.cell * boxes_per_cell + chosen
        responsible = responsible_mask(predictor, targets.assigned, predictions.confidence)
    xy, sqrt_wh, confidence = (part.flatten(0, 3)[predictor] for part in predictions[:3])
    classes = predictions.classes.flatten(0, 2)[targets.cell]
    one_hot = F.one_hot(targets.labels, classes.shape[-1])

    def total(errors: Tensor) -> Tensor:
        return torch.where(targets.assigned, errors, 0).sum() / (2 * num_images)

    no_object = torch.where(responsible, 0, predictions.confidence.square())
    return {
        "center": lambda_coord * total((xy - targets.xy).square().sum(1)),
        "size": lambda_coord * total((sqrt_wh - targets.sqrt_wh).square().sum(1)),
        "object": total((confidence - iou).square()),
        "no_object": lambda_noobj * no_object.sum() / (2 * num_images),
        "class": total((classes - one_hot).square().sum(1)),
    }


def responsible_mask(predictor: Tensor, assigned: Tensor, confidence: Tensor) -> Tensor:
    """Mark the responsible predictors.

    Args:
        predictor: int64 (K,), index into the flattened ``confidence`` for each object.
        assigned: bool (K,), whether the object has a responsible predictor.
        confidence: a tensor with one element per predictor.

    Returns:
        Bool, of the shape of ``confidence``.
    """
    # One extra element collects the objects that are not assigned.
    mask = torch.zeros(confidence.numel() + 1, dtype=torch.bool, device=confidence.device)
    mask = mask.index_fill(0, torch.where(assigned, predictor, confidence.numel()), True)
    return mask[:-1].view_as(confidence)


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(
    output: Tensor,
    boxes_per_cell: int,
    image_size: tuple[int, int],
    score_threshold: float = 0.001,
    nms_threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """Decode detections; the score of a class is confidence * class probability (equation 1), both clamped to 0.

    Args:
        output: output of the network, (N, S, S, 5 B + C).
        boxes_per_cell: B.
        image_size: (height, width) in pixels.
        score_threshold: detections with a lower score are dropped; the default is the authors' for VOC.
        nms_threshold: largest IoU of two detections of one class; the default is the authors' for VOC.

    Returns:
        One dict per image, see `Detector`. ``cells`` has the raw predictions for figures: ``boxes`` (S, S, B, 4), xyxy
        in pixels, ``confidence`` (S, S, B) and ``classes`` (S, S, C).
    """
    predictions = CellPredictions.split(output, boxes_per_cell)
    height, width = image_size
    boxes = predictions.boxes()
    boxes = clip_boxes_to_image(boxes * constant_like([width, height, width, height], boxes), image_size)
    confidence, classes = predictions.confidence, predictions.classes
    scores = confidence.clamp_min(0)[..., None] * classes.clamp_min(0)[:, :, :, None]
    image, *box, labels = (scores > score_threshold).nonzero(as_tuple=True)
    detections = non_maximum_suppression(
        boxes[image, *box], scores[image, *box, labels], labels, image, len(output), nms_threshold
    )
    cells = [{"boxes": b, "confidence": p, "classes": c} for b, p, c in zip(boxes, confidence, classes, strict=True)]
    return [{**found, "cells": raw} for found, raw in zip(detections, cells, strict=True)]


# --- module -------------------------------------------------------------------------------------------------------


class YOLOv1(Detector):
    """YOLO v1; all images have one size. Predictions have the key ``cells`` in addition, see `decode`.

    Weight decay applies to the weights of convolutions and fully connected layers only, as in darknet
    (src/convolutional_layer.c, src/connected_layer.c: not to biases and batch normalization).

    Args:
        backbone: ``darknet`` is the paper's network of 24 convolutions; a ResNet with the 4 detection layers needs less
            data.
        grid_size: grid cells per side, S.
        boxes_per_cell: boxes that each cell predicts, B.
        input_size: side of the images in pixels, 64 per grid cell; ``--data.image_size`` must be equal.
        width_multiplier: scales the channels of all convolutions except a ResNet's.
        batch_norm: batch normalization after each convolution, in place of its bias; not in the paper, but useful for
            training from scratch.
        hidden_units: units of the first fully connected layer.
        weights: None to train from scratch; IMAGENET1K_V1, IMAGENET1K_V2 or DEFAULT, the newest, for torchvision's
            ImageNet weights of a ResNet backbone, or a file of them; one of our checkpoints; or, for ``darknet``, a
            file of the authors for the paper's network or its first layers, see `load_darknet_weights`. The later
            yolov1.weights has a locally connected layer and is another network. Class names, if not given, are those
            of the checkpoint or of VOC. With a whole network of the authors, default mean and std become theirs.
        lambda_coord: weight of the errors of the coordinates in the loss.
        lambda_noobj: weight of the confidence of predictors without an object in the loss.
        score_threshold: detections with a lower score are dropped.
        optimizer: see `VisionModule`. Default: the paper's SGD with the first learning rate of its warm-up.
        **kwargs: see `Detector`.
    """

    def __init__(
        self,
        backbone: Backbone = "darknet",
        grid_size: int = 7,
        boxes_per_cell: int = 2,
        input_size: int = 448,
        width_multiplier: float = 1.0,
        batch_norm: bool = False,
        hidden_units: int = 4096,
        weights: str | None = None,
        lambda_coord: float = 5.0,
        lambda_noobj: float = 0.5,
        score_threshold: float = 0.001,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(score_threshold=score_threshold, optimizer=optimizer, **kwargs)
        if input_size != CELL_SIZE * grid_size:
            raise UserError(
                f"input_size: expected {CELL_SIZE * grid_size}, {CELL_SIZE} pixels per cell of grid_size {grid_size}, "
                f"found {input_size}; change one of them"
            )
        self.grid_size, self.boxes_per_cell = grid_size, boxes_per_cell
        self.image_size = (input_size, input_size)
        self.lambda_coord, self.lambda_noobj = lambda_coord, lambda_noobj
        self.network = YOLOv1Network(
            backbone, self.num_classes, grid_size, boxes_per_cell, width_multiplier, batch_norm, hidden_units, weights
        )
        if self.network.loaded is not None:
            self.name_classes(self.network.loaded.class_names)
            if self.network.loaded.is_darknet_detector:
                # Pixels of -1 to 1 (src/crop_layer.c, in the cfg files of the paper's time), later 0 to 1.
                self.normalize_as(*((0.0, 1.0) if batch_norm else (0.5, 0.5)))

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        """Map uint8 images to the output of the network, (N, S, S, 5 B + C)."""
        return self.network(self.preprocess(require_square(images, self.image_size[0])))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        output = self(batch["image"])
        targets = encode(batch["target"], self.grid_size, self.image_size)
        return yolo_loss(output, targets, self.boxes_per_cell, self.lambda_coord, self.lambda_noobj)

    def normalize_as(self, mean: float, std: float) -> None:
        """Replace the default ``mean`` and ``std`` by those of a file of weights; given ones are kept."""
        given = [tuple(self.hparams.get(name, ())) for name in ("mean", "std")]
        if given in ([(), ()], [IMAGENET_MEAN, IMAGENET_STD]):
            self.hparams.update(mean=[mean] * 3, std=[std] * 3)
            self.pixel_mean, self.pixel_std = (Constant(torch.full((1, 3, 1, 1), 255 * v)) for v in (mean, std))
            rank_zero_only(print)(f"weights: mean {mean} and std {std} of the pixels, as in the authors' network")

    def parameter_groups(self) -> list[dict[str, Any]]:
        return weight_decay_groups(self.network)

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Any]]:
        output = self(images)
        return decode(output, self.boxes_per_cell, self.image_size, self.score_threshold, self.nms_threshold)
