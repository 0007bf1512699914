"""YOLOv2: a fully convolutional YOLO with anchors, for images of any size in multiples of 32.

Redmon and Farhadi, "YOLO9000: Better, Faster, Stronger", CVPR 2017.

Each grid cell predicts one box per anchor. The box is predicted relative to the cell and the size of the anchor; it has
a confidence and a distribution over the classes of its own. Notation of the shapes:

    N images, S rows and T columns of grid cells, A anchors, C classes, K objects of a batch, M objects of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.v2.functional import resize

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.boxes import concatenate_targets, non_maximum_suppression, paired_iou
from lightning_modules.components.image_batches import require_equal_size, require_size
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.parameter_groups import weight_decay_groups
from lightning_modules.components.pretrained import find_weights
from lightning_modules.components.unsaved import Constant
from lightning_modules.detection.base import Detector
from lightning_modules.detection.darknet19 import Darknet19, conv_bn_leaky
from lightning_modules.detection.yolo_v1 import responsible_mask
from lightning_modules.detection.yolo_weights import load_detector

#: Side of a grid cell in pixels.
STRIDE = 32
#: Widths and heights in cells for VOC, from the authors' cfg/yolov2-voc.cfg.
VOC_ANCHORS = (
    (1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071),
)  # fmt: skip

# --- network ------------------------------------------------------------------------------------------------------

# Layers of Darknet-19 before the feature map of stride 16 that the passthrough layer takes.
PASSTHROUGH_LAYER = 17


class YOLOv2Network(nn.Module):
    """Darknet-19 without its classifier, three convolutions, the passthrough layer and the predictor (section 2).

    Args:
        num_classes: number of classes, C.
        num_anchors: number of anchors, A.
        width_multiplier: scales the channels of all layers but the last.
        batch_norm_momentum: momentum of the batch statistics.
    """

    def __init__(
        self,
        num_classes: int = 20,
        num_anchors: int = 5,
        width_multiplier: float = 1.0,
        batch_norm_momentum: float = 0.01,
    ) -> None:
        super().__init__()

        def conv(in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Sequential:
            return conv_bn_leaky(in_channels, out_channels, kernel_size, batch_norm_momentum)

        trunk = Darknet19(1, width_multiplier, batch_norm_momentum).features
        self.fine, self.coarse = trunk[:PASSTHROUGH_LAYER], trunk[PASSTHROUGH_LAYER:]
        middle, wide = (max(1, round(channels * width_multiplier)) for channels in (512, 1024))
        # Divisible by 4, as `reorg` requires.
        narrow = 4 * max(1, round(16 * width_multiplier))
        self.num_anchors = num_anchors
        self.deep = nn.Sequential(conv(wide, wide), conv(wide, wide))
        self.passthrough = conv(middle, narrow, 1)
        self.joined = conv(4 * narrow + wide, wide)
        self.output = nn.Conv2d(wide, num_anchors * (5 + num_classes), 1)
        he_normal(self)
        # Outputs near 0, so that the first boxes are the anchors.
        nn.init.normal_(self.output.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images, float (N, 3, 32 S, 32 T), to (N, S, T, A, 5 + C), see `AnchorPredictions`."""
        fine = self.fine(x)
        x = torch.cat([reorg(self.passthrough(fine)), self.deep(self.coarse(fine))], dim=1)
        return self.output(self.joined(x)).permute(0, 2, 3, 1).unflatten(-1, (self.num_anchors, -1))


def reorg(x: Tensor) -> Tensor:
    """Reorganize (N, D, 2 H, 2 W) to (N, 4 D, H, W) as the authors' code does, with which their weights were trained.

    It differs from space-to-depth: darknet (src/blas.c: reorg_cpu) indexes a map with D / 4 channels of twice the
    sides, which mixes channels and neighboring cells.
    """
    n, c, h, w = x.shape
    # darknet's memory is NCHW.
    x = x.contiguous().view(n, c // 4, h, 2, w, 2)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


class AnchorPredictions(NamedTuple):
    """The output of the network, float32; anchor a of cell (row, column) is at [:, row, column, a].

    Attributes:
        xy: (N, S, T, A, 2), sigmoid(t_x) and sigmoid(t_y), center of the box relative to the upper left corner of the
            cell, in cells.
        log_wh: (N, S, T, A, 2), t_w and t_h, logarithms of width and height relative to the anchor.
        confidence: (N, S, T, A), sigmoid(t_o), predicted IoU of the box with an object.
        logits: (N, S, T, A, C), of the classes if the box contains an object.
    """

    xy: Tensor
    log_wh: Tensor
    confidence: Tensor
    logits: Tensor

    @classmethod
    def split(cls, output: Tensor) -> AnchorPredictions:
        """Split the output of the network, (N, S, T, A, 5 + C)."""
        output = output.float()
        return cls(output[..., :2].sigmoid(), output[..., 2:4], output[..., 4].sigmoid(), output[..., 5:])

    def boxes(self, anchors: Tensor) -> Tensor:
        """Return the boxes, (N, S, T, A, 4), xyxy in cells, for anchors float (A, 2) in cells (figure 3)."""
        rows, columns = (torch.arange(n, device=self.xy.device) for n in self.xy.shape[1:3])
        corner = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[:, :, None]
        # The limit of e^10 avoids infinite sides, whose IoU is NaN.
        center, half = self.xy + corner, self.log_wh.clamp(-10, 10).exp() * anchors / 2
        return torch.cat([center - half, center + half], dim=-1)


# --- target encoding ----------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """All objects of a batch.

    Attributes:
        valid: bool (K,), the object has at least the minimum size.
        assigned: bool (K,), the object is the target of its predictor; the fields from ``predictor`` on have no meaning
            for all others.
        image: int64 (K,), index of the image.
        boxes: float (K, 4), xyxy in cells.
        predictor: int64 (K,), index of the anchor, ((image * S + row) * T + column) * A + anchor.
        xy: float (K, 2), center relative to the upper left corner of the cell, in cells, 0..1.
        log_wh: float (K, 2), logarithms of width and height relative to the anchor.
        scale: float (K,), 2 - area relative to the image, weight of the errors of the coordinates.
        labels: int64 (K,).
    """

    valid: Tensor
    assigned: Tensor
    image: Tensor
    boxes: Tensor
    predictor: Tensor
    xy: Tensor
    log_wh: Tensor
    scale: Tensor
    labels: Tensor


def encode(
    target: list[dict[str, Tensor]],
    anchors: Tensor,
    grid_size: Sequence[int],
    image_size: Sequence[int],
    min_size: float = 0.001,
) -> Targets:
    """Assign each object to the anchor with the most similar shape in the grid cell that contains its center.

    The similarity is the IoU of boxes with a common center. If several objects share an anchor, only the last one is a
    target: in the authors' code (darknet, src/region_layer.c), each overwrites the one before. `VOCDetection` shuffles
    the objects in training (src/data.c: randomize_boxes), so that they take turns. Objects whose width or height is
    below ``min_size`` (relative to the image) are ignored (src/data.c).

    Args:
        target: one dict per image with ``boxes`` float (M, 4), xyxy in pixels, and ``labels`` int64 (M,).
        anchors: widths and heights in cells, float (A, 2).
        grid_size: (rows, columns) of cells, (S, T).
        image_size: (height, width) in pixels of the images that the boxes refer to.
        min_size: smallest relative width and height of a target.

    Returns:
        Targets of all K objects of the batch.
    """
    boxes, labels, image = concatenate_targets(target)
    rows, columns = grid_size
    x_scale, y_scale = columns / image_size[1], rows / image_size[0]
    left, top, right, bottom = boxes.unbind(1)
    boxes = torch.stack([left * x_scale, top * y_scale, right * x_scale, bottom * y_scale], dim=1)
    size = boxes[:, 2:] - boxes[:, :2]
    valid = (size[:, 0] >= min_size * columns) & (size[:, 1] >= min_size * rows)
    # Keep the logarithms of ignored objects finite.
    size = size.clamp_min(1e-6)
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    column = center[:, 0].floor().clamp(0, columns - 1)
    row = center[:, 1].floor().clamp(0, rows - 1)
    intersection = torch.minimum(size[:, None], anchors).prod(-1)
    anchor = (intersection / (size.prod(-1)[:, None] + anchors.prod(-1) - intersection)).argmax(1)
    predictor = ((image * rows + row.long()) * columns + column.long()) * len(anchors) + anchor
    # Vectorized "last object wins": keep the largest object index per anchor.
    index = torch.arange(len(boxes), device=boxes.device)
    last = torch.full((len(target) * rows * columns * len(anchors),), -1, device=boxes.device)
    last = last.scatter_reduce(0, predictor, torch.where(valid, index, -1), "amax")
    xy = center - torch.stack([column, row], dim=1)
    log_wh = (size / anchors[anchor]).log()
    scale = 2 - size.prod(-1) / (rows * columns)
    return Targets(valid, last[predictor] == index, image, boxes, predictor, xy, log_wh, scale, labels)


# --- loss ---------------------------------------------------------------------------------------------------------


def region_loss(output: Tensor, targets: Targets, anchors: Tensor, early: Tensor) -> dict[str, Tensor]:
    """Compute the loss of the region layer, summed over the predictors and averaged over the images of the batch.

    The paper does not define it. This function has the gradient of the authors' code (darknet, src/region_layer.c with
    cfg/yolov2-voc.cfg), hence the factors 1/2.

    Args:
        output: output of the network, (N, S, T, A, 5 + C).
        targets: see `encode`.
        anchors: widths and heights in cells, float (A, 2).
        early: whether the prior term is active, bool ().

    Returns:
        ``center``: 1/2 scale ((x - x*)^2 + (y - y*)^2), summed over the responsible predictors;
        ``size``: 1/2 scale ((t_w - t_w*)^2 + (t_h - t_h*)^2) of the same;
        ``object``: 5/2 (confidence - IoU)^2 of the same, without gradient through the IoU;
        ``no_object``: 1/2 confidence^2 of all other predictors, except boxes with an IoU above 0.6 with any object;
        ``class``: cross entropy of the responsible predictors;
        ``prior``: 0.01/2 ((x - 0.5)^2 + (y - 0.5)^2 + t_w^2 + t_h^2) of all other predictors, which pulls them to their
        anchors early in the training.
    """
    num_images = len(output)
    predictions = AnchorPredictions.split(output)
    with torch.no_grad():
        # The IoU of each object with all boxes of its image, (K, S * T * A).
        boxes = predictions.boxes(anchors).view(num_images, -1, 4)
        per_image = boxes.shape[1]
        iou = paired_iou(boxes[targets.image], targets.boxes[:, None]).float()
        iou = torch.where(targets.valid[:, None], iou, 0)
        best = torch.zeros(num_images, per_image, device=output.device)
        best = best.scatter_reduce(0, targets.image[:, None].expand_as(iou), iou, "amax")
        best = best.view_as(predictions.confidence)
        iou = iou.gather(1, (targets.predictor % per_image)[:, None])[:, 0]
        responsible = responsible_mask(targets.predictor, targets.assigned, predictions.confidence)
    xy, log_wh, confidence, logits = (part.flatten(0, 3)[targets.predictor] for part in predictions)
    anchor_errors = (predictions.xy - 0.5).square().sum(-1) + predictions.log_wh.square().sum(-1)

    def total(errors: Tensor) -> Tensor:
        return torch.where(targets.assigned, errors, 0).sum() / num_images

    no_object = torch.where(responsible | (best > 0.6), 0, predictions.confidence.square())
    return {
        "center": total(targets.scale * (xy - targets.xy).square().sum(1)) / 2,
        "size": total(targets.scale * (log_wh - targets.log_wh).square().sum(1)) / 2,
        "object": 5 * total((confidence - iou).square()) / 2,
        "no_object": no_object.sum() / (2 * num_images),
        "class": total(F.cross_entropy(logits, targets.labels, reduction="none")),
        "prior": 0.01 * torch.where(responsible | ~early, 0, anchor_errors).sum() / (2 * num_images),
    }


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(
    output: Tensor, anchors: Tensor, score_threshold: float = 0.005, nms_threshold: float = 0.45
) -> list[dict[str, Tensor]]:
    """Decode detections; the score of a class is confidence * class probability.

    Args:
        output: output of the network, (N, S, T, A, 5 + C).
        anchors: widths and heights in cells, float (A, 2).
        score_threshold: detections with a lower score are dropped; the default is the authors' for VOC.
        nms_threshold: largest IoU of two detections of one class; the default is the authors' for VOC.

    Returns:
        One dict per image, see `Detector`.
    """
    predictions = AnchorPredictions.split(output)
    rows, columns = output.shape[1:3]
    boxes = clip_boxes_to_image(predictions.boxes(anchors), (rows, columns)) * STRIDE
    scores = predictions.confidence[..., None] * predictions.logits.softmax(-1)
    image, *box, labels = (scores > score_threshold).nonzero(as_tuple=True)
    return non_maximum_suppression(
        boxes[image, *box], scores[image, *box, labels], labels, image, len(output), nms_threshold
    )


# --- module -------------------------------------------------------------------------------------------------------


def train_size_at(step: int, sizes: Sequence[int]) -> int:
    """Return the image size of an optimizer step: a new random one every 10 steps, which depends on the step alone.

    The authors' code trains the last 200 steps at the largest size; here, the length of the run does not matter.
    """
    return sizes[int(np.random.SeedSequence(step // 10).generate_state(1)[0]) % len(sizes)]


class YOLOv2(Detector):
    """YOLOv2; all images of a batch have one size. Weight decay applies to convolution weights only, as in darknet.

    Args:
        anchors: widths and heights in cells of 32 pixels; ``python -m tools.anchors`` finds those of a dataset.
        width_multiplier: scales the channels of all layers but the last.
        batch_norm_momentum: momentum of the batch statistics. The authors' 0.01 needs some thousand steps; use 0.1 for
            short runs.
        weights: None to train from scratch; a file of the authors, that of a detector (yolov2-voc.weights) or of the
            pretrained trunk (darknet19_448.conv.23), see `load_darknet_weights`; or one of our checkpoints. The names
            of the classes, if not given, are those of the checkpoint or of the authors' VOC and COCO detectors.
        train_sizes: sides in pixels, multiples of 32, for multi-scale training (section 2): every 10 steps, a new one
            is drawn and the training images are resized to it on the device. Set ``--data.image_size`` to the largest.
            None trains at the size of the data.
        early_images: number of training images during which all boxes are pulled to their anchors; 12,800 in the
            authors' code.
        score_threshold: detections with a lower score are dropped.
        nms_threshold: IoU above which non-maximum suppression drops the weaker of two boxes of one class.
        mean: mean of the pixels in 0..1 per RGB channel; 0, since the authors' weights take pixels in 0..1.
        std: standard deviation of the pixels in 0..1 per RGB channel; 1 for the same reason.
        optimizer: see `VisionModule`. Default: the paper's SGD.
        **kwargs: see `Detector`.
    """

    seen: Tensor

    def __init__(
        self,
        anchors: Sequence[tuple[float, float]] = VOC_ANCHORS,
        width_multiplier: float = 1.0,
        batch_norm_momentum: float = 0.01,
        weights: str | None = None,
        train_sizes: list[int] | None = None,
        early_images: int = 12_800,
        score_threshold: float = 0.005,
        nms_threshold: float = 0.45,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            mean=mean,
            std=std,
            optimizer=optimizer,
            **kwargs,
        )
        if not anchors or not all(len(anchor) == 2 and min(anchor) > 0 for anchor in anchors):
            raise UserError(f"anchors: expected pairs of a width and a height above 0, found {anchors}")
        if train_sizes is not None and (not train_sizes or any(s < STRIDE or s % STRIDE for s in train_sizes)):
            raise UserError(f"train_sizes: expected multiples of {STRIDE}, found {train_sizes}")
        self.train_sizes, self.early_images = train_sizes, early_images
        self.anchors = Constant(torch.tensor([list(anchor) for anchor in anchors]))
        # Training images of all ranks. Optimizer steps would miscount accumulated and incomplete batches.
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.network = YOLOv2Network(self.num_classes, len(anchors), width_multiplier, batch_norm_momentum)
        if weights is not None:
            path = find_weights("yolo_v2", weights)
            self.name_classes(load_detector(self.network, path, "YOLOv2", self.num_classes).class_names)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        """Map uint8 images to the output of the network, (N, S, T, A, 5 + C)."""
        expected = f"sides that are multiples of {STRIDE} pixels"
        images = require_size(images, lambda height, width: height % STRIDE == width % STRIDE == 0, expected, 416)
        return self.network(self.preprocess(images))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, anchors = require_equal_size(batch["image"]), self.anchors.value
        output = self(self._resize(images))
        targets = encode(batch["target"], anchors, output.shape[1:3], images.shape[-2:])
        early = self.seen < self.early_images
        if self.training:
            self.seen += len(images) * (self.trainer.world_size if self._trainer is not None else 1)
        return region_loss(output, targets, anchors, early)

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        return decode(self(images), self.anchors.value, self.score_threshold, self.nms_threshold)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return weight_decay_groups(self.network)

    def _resize(self, images: Tensor) -> Tensor:
        if self.train_sizes is None:
            return images
        side = train_size_at(self.global_step, self.train_sizes)
        return images if images.shape[-2:] == (side, side) else resize(images, [side, side], antialias=True)
