"""YOLO: Redmon, Divvala, Girshick and Farhadi, "You Only Look Once: Unified, Real-Time Object Detection", CVPR 2016.

The image is divided into S x S cells. The cell that holds an object's center is to find it: it predicts B boxes, a
confidence for each, and one distribution over the C classes. One network, one pass, no proposals.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.average_precision import APMethod
from lightning_modules.components.boxes import concatenate_targets, non_maximum_suppression, paired_iou
from lightning_modules.components.image_batches import require_size
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.detection.metrics import detection_metrics

# --- network ------------------------------------------------------------------------------------------------------

# Figure 3: (kernel, channels), stride 2 where a third number says so; M is max pooling by 2. The first twenty
# convolutions are pretrained on ImageNet in the paper.
LAYERS: tuple[tuple[int, ...] | str, ...] = (
    (7, 64, 2), "M", (3, 192), "M", (1, 128), (3, 256), (1, 256), (3, 512), "M",
    *((1, 256), (3, 512)) * 4, (1, 512), (3, 1024), "M",
    *((1, 512), (3, 1024)) * 2,
    (3, 1024), (3, 1024, 2), (3, 1024), (3, 1024),
)  # fmt: skip


class YOLOv1Network(nn.Module):
    """Figure 3's network, or its detection layers upon a ResNet: images to S x S x (B*5 + C) numbers.

    Args:
        backbone: ``darknet`` is the paper's; a ResNet stands for its first twenty layers on small data.
        num_classes: C.
        grid: S.
        boxes: B.
        input_size: side of the images in pixels. The paper's network divides it by 64, a ResNet with the detection
            layers too.
        width: multiplies the channels of all layers that are made here; the paper's are 1.
        batch_norm: after each convolution that is made here, in place of its bias.
        hidden: units of the first fully connected layer, 4096 in the paper.
        weights: of a ResNet, see `find_weights`; None starts from nothing.
    """

    def __init__(
        self,
        backbone: Literal["darknet", "resnet18", "resnet34", "resnet50"] = "darknet",
        num_classes: int = 20,
        grid: int = 7,
        boxes: int = 2,
        input_size: int = 448,
        width: float = 1.0,
        batch_norm: bool = False,
        hidden: int = 4096,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if input_size != 64 * grid:
            raise UserError(
                f"input_size: expected 64 pixels a cell, {64 * grid} for a grid of {grid}, found {input_size}"
            )
        if weights is not None and backbone == "darknet":
            raise UserError(
                f"weights: there are none for the darknet backbone, found {weights}: take a ResNet, or null"
            )
        self.grid, self.depth = grid, 5 * boxes + num_classes
        if backbone == "darknet":
            self.features, channels = self._convolutions(LAYERS, 3, width, batch_norm)
        else:
            resnet = torchvision.models.get_model(backbone, weights=None)
            if weights is not None:
                load_weights(resnet, find_weights(backbone, weights), backbone, "fc")
            channels = resnet.fc.in_features
            trunk = [module for name, module in resnet.named_children() if name not in ("avgpool", "fc")]
            detection, channels = self._convolutions(LAYERS[-4:], channels, width, batch_norm)
            self.features = nn.Sequential(*trunk, *detection)
        self.fc1 = nn.Linear(channels * grid * grid, hidden)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(hidden, grid * grid * self.depth)
        for layer in self.modules() if backbone == "darknet" else (*detection.modules(), self.fc1, self.fc2):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, a=0.1, nonlinearity="leaky_relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # Near zero at the start, since squared errors of large numbers would tear the pretrained layers.
        nn.init.normal_(self.fc2.weight, std=0.01)

    @staticmethod
    def _convolutions(
        layers: tuple[tuple[int, ...] | str, ...], channels: int, width: float, batch_norm: bool
    ) -> tuple[nn.Sequential, int]:
        modules: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, str):
                modules.append(nn.MaxPool2d(2))
                continue
            kernel, out, stride = (*layer, 1)[:3]
            out = max(1, round(out * width))
            modules.append(nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=not batch_norm))
            modules += [nn.BatchNorm2d(out)] if batch_norm else []
            modules.append(nn.LeakyReLU(0.1, inplace=True))
            channels = out
        return nn.Sequential(*modules), channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images float (N,3,64S,64S) to (N,S,S,B*5+C); what the numbers mean is said in `Grid`."""
        x = F.leaky_relu(self.fc1(self.features(x).flatten(1)), 0.1)
        return self.fc2(self.dropout(x)).view(-1, self.grid, self.grid, self.depth)


class Grid(NamedTuple):
    """The network's numbers by their meaning; cell (row, column) is at [:, row, column].

    Attributes:
        xy: (N,S,S,B,2), a box's center within the cell: 0..1 from the cell's upper left corner.
        root: (N,S,S,B,2), square roots of its width and height, which are parts of the image's.
        confidence: (N,S,S,B), the IoU that the box is thought to have with an object.
        classes: (N,S,S,C), the classes' probabilities if there is an object.
    """

    xy: Tensor
    root: Tensor
    confidence: Tensor
    classes: Tensor

    @classmethod
    def of(cls, output: Tensor, boxes: int) -> Grid:
        """Takes the network's output (N,S,S,B*5+C) apart: first B times (x, y, root w, root h, confidence)."""
        box, classes = output.float().split([5 * boxes, output.shape[-1] - 5 * boxes], dim=-1)
        box = box.unflatten(-1, (boxes, 5))
        return cls(box[..., :2], box[..., 2:4], box[..., 4], classes)

    def corners(self) -> Tensor:
        """The boxes on a 0..1 scale of the image: xyxy (N,S,S,B,4)."""
        size = self.xy.shape[1]
        cells = torch.arange(size, device=self.xy.device, dtype=self.xy.dtype)
        corner = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), dim=-1)[:, :, None]
        center, half = (self.xy + corner) / size, self.root.square() / 2
        return torch.cat([center - half, center + half], dim=-1)


# --- target encoding ----------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """All objects of a batch, K of them, and which are to be found.

    Attributes:
        found: bool (K,), to be found; what the others hold has no meaning.
        cell: int64 (K,), (image * S + row) * S + column.
        xy: float (K,2), the center within the cell, 0..1.
        root: float (K,2), square roots of width and height as parts of the image's.
        corners: float (K,4), the box on a 0..1 scale.
        label: int64 (K,).
    """

    found: Tensor
    cell: Tensor
    xy: Tensor
    root: Tensor
    corners: Tensor
    label: Tensor


def encode(target: list[dict[str, Tensor]], grid: int, height: int, width: int, least: float = 0.005) -> Targets:
    """Gives each object to the cell of its center.

    Of two in one cell the first is to be found. Objects narrower or lower than ``least`` of the image are not. Both
    are what the authors' code does (darknet, data.c and detection_layer.c).

    Args:
        target: boxes float (M,4) xyxy in pixels and labels int64 (M,) of each image.
        grid: S.
        height, width: of the images in pixels.
        least: see above.
    """
    boxes, label, image = concatenate_targets(target)
    corners = boxes / boxes.new_tensor([width, height, width, height])
    size = corners[:, 2:] - corners[:, :2]
    center = (corners[:, :2] + corners[:, 2:]) / 2 * grid
    place = center.floor().clamp(0, grid - 1)
    column, row = place.long().unbind(1)
    cell = (image * grid + row) * grid + column
    # The first of those that share a cell, without a loop: its least number.
    number = torch.arange(len(boxes), device=boxes.device)
    large = (size >= least).all(1)
    first = torch.full((len(target) * grid * grid,), len(boxes), device=boxes.device)
    first = first.scatter_reduce(0, cell, torch.where(large, number, len(boxes)), "amin")
    return Targets(first[cell] == number, cell, center - place, size.clamp_min(0).sqrt(), corners, label)


# --- loss ---------------------------------------------------------------------------------------------------------


def yolo_loss(
    output: Tensor, targets: Targets, boxes: int, lambda_coord: float = 5.0, lambda_noobj: float = 0.5
) -> dict[str, Tensor]:
    """Equation 3: the sum of squared errors, the mean over the images of the batch.

    - ``center``: lambda_coord * sum over the responsible boxes of (x - x*)^2 + (y - y*)^2.
    - ``size``: lambda_coord * the same of the square roots of width and height.
    - ``object``: (confidence - IoU)^2 of the responsible boxes.
    - ``no_object``: lambda_noobj * confidence^2 of all other boxes, those in cells with an object too.
    - ``class``: the squared error of the class probabilities, once a cell with an object.

    Responsible is the box of the cell that overlaps the object most; where none does, the one whose (x, y, width,
    height) are nearest. The IoU that a confidence is drawn to is that of the decoded box; no gradient flows through it.

    Args:
        output: the network's (N,S,S,B*5+C).
        targets: see `encode`.
        boxes: B.
        lambda_coord, lambda_noobj: the paper's weights.
    """
    images = len(output)
    predicted = Grid.of(output, boxes)
    cell, found = targets.cell, targets.found
    with torch.no_grad():
        corners = predicted.corners().flatten(0, 2)[cell]
        truth = targets.corners[:, None].expand_as(corners)
        iou = paired_iou(corners.reshape(-1, 4), truth.reshape(-1, 4)).view(-1, boxes).float()
        nearest = (_center_size(corners) - _center_size(truth)).square().sum(-1).argmin(1)
        chosen = torch.where(iou.amax(1) > 0, iou.argmax(1), nearest)
        iou = iou.gather(1, chosen[:, None])[:, 0]
        # One place more, for what is not to be found.
        responsible = torch.zeros(predicted.confidence.numel() + 1, dtype=torch.bool, device=output.device)
        place = torch.where(found, cell * boxes + chosen, len(responsible) - 1)
        responsible = responsible.index_fill(0, place, True)[:-1].view_as(predicted.confidence)
    row = torch.arange(len(cell), device=output.device)
    xy = predicted.xy.flatten(0, 2)[cell][row, chosen]
    root = predicted.root.flatten(0, 2)[cell][row, chosen]
    confidence = predicted.confidence.flatten(0, 2)[cell][row, chosen]
    classes = predicted.classes.flatten(0, 2)[cell]
    one_hot = F.one_hot(targets.label, classes.shape[-1])

    def total(errors: Tensor) -> Tensor:
        return torch.where(found, errors, 0).sum() / images

    return {
        "center": lambda_coord * total((xy - targets.xy).square().sum(1)),
        "size": lambda_coord * total((root - targets.root).square().sum(1)),
        "object": total((confidence - iou).square()),
        "no_object": lambda_noobj * torch.where(responsible, 0, predicted.confidence.square()).sum() / images,
        "class": total((classes - one_hot).square().sum(1)),
    }


def _center_size(corners: Tensor) -> Tensor:
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(
    output: Tensor, boxes: int, height: int, width: int, score_threshold: float = 0.001, nms_threshold: float = 0.5
) -> list[dict[str, Any]]:
    """What the network found: for each image ``boxes`` float (K,4) xyxy in pixels, ``scores``, ``labels``, best first.

    A box has the score confidence * class probability for every class (equation 1), negative factors counted as 0, and
    stays where that is above the threshold and no better box of its class overlaps it by more than the NMS threshold.
    ``cells`` has what each cell says, for images of it: ``boxes`` (S,S,B,4), ``confidence`` (S,S,B), ``classes``
    (S,S,C).

    Args:
        output: the network's (N,S,S,B*5+C).
        boxes: B.
        height, width: of the images in pixels.
        score_threshold, nms_threshold: the authors' for VOC.
    """
    grid = Grid.of(output, boxes)
    corners = grid.corners() * output.new_tensor([width, height, width, height]).float()
    corners = torch.minimum(corners.clamp_min(0), corners.new_tensor([width, height, width, height]))
    scores = grid.confidence.clamp_min(0)[..., None] * grid.classes.clamp_min(0)[:, :, :, None]
    image, *cell, label = (scores > score_threshold).nonzero(as_tuple=True)
    found, boxes_found = scores[image, *cell, label], corners[image, *cell]
    results = non_maximum_suppression(boxes_found, found, label, image, len(output), nms_threshold)
    cells = zip(corners, grid.confidence, grid.classes, strict=True)
    names = ("boxes", "confidence", "classes")
    return [{**r, "cells": dict(zip(names, cell, strict=True))} for r, cell in zip(results, cells, strict=True)]


# --- module -------------------------------------------------------------------------------------------------------


class YOLOv1(VisionModule):
    """YOLO. Batch: see detection in the batch contract, images of one size. Predictions: see `decode`.

    Metrics: ``map`` and what else `VOCMeanAP` gives, and COCO's (`COCOMeanAP`).

    Args:
        backbone: ``darknet`` is the paper's network of 24 convolutions; a ResNet with the four detection layers learns
            from less data.
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        grid, boxes: S and B, 7 and 2 in the paper.
        input_size: side of the images in pixels, 64 a cell; --data.image_size must say the same.
        width: multiplies the channels of the layers that are not a ResNet's.
        batch_norm: after each convolution, which the paper does not have and training from scratch wants.
        hidden: units of the first fully connected layer.
        weights: None to train from scratch; DEFAULT for torchvision's ImageNet weights of a ResNet backbone; or a file.
        lambda_coord, lambda_noobj: weights in the loss.
        score_threshold, nms_threshold: what is kept of the predictions.
        ap: how average precision is computed, see `VOCMeanAP`.
        coco: measure COCO's average precision too.
        optimizer: see `VisionModule`; the paper's SGD at the rate that its warm-up begins with.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/map", "max")

    def __init__(
        self,
        backbone: Literal["darknet", "resnet18", "resnet34", "resnet50"] = "darknet",
        num_classes: int = 20,
        class_names: list[str] | None = None,
        grid: int = 7,
        boxes: int = 2,
        input_size: int = 448,
        width: float = 1.0,
        batch_norm: bool = False,
        hidden: int = 4096,
        weights: str | None = None,
        lambda_coord: float = 5.0,
        lambda_noobj: float = 0.5,
        score_threshold: float = 0.001,
        nms_threshold: float = 0.5,
        ap: APMethod = "area",
        coco: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.num_classes, self.class_names = num_classes, class_names
        self.grid, self.boxes, self.input_size = grid, boxes, input_size
        self.lambda_coord, self.lambda_noobj = lambda_coord, lambda_noobj
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.ap, self.coco = ap, coco
        self.network = YOLOv1Network(backbone, num_classes, grid, boxes, input_size, width, batch_norm, hidden, weights)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = self._checked(batch["image"])
        targets = encode(batch["target"], self.grid, images.shape[-2], images.shape[-1])
        output = self.network(self.preprocess(images))
        return yolo_loss(output, targets, self.boxes, self.lambda_coord, self.lambda_noobj)

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Any]]:
        images = self._checked(images)
        output = self.network(self.preprocess(images))
        height, width = images.shape[-2:]
        return decode(output, self.boxes, height, width, self.score_threshold, self.nms_threshold)

    def build_metrics(self) -> MetricCollection:
        return detection_metrics(self.num_classes, self.ap, self.coco)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])

    def _checked(self, images: Tensor | list[Tensor]) -> Tensor:
        side = self.input_size
        return require_size(images, lambda height, width: height == width == side, f"{side}x{side} pixels", side)
