"""YOLOv2: Redmon and Farhadi, "YOLO9000: Better, Faster, Stronger", CVPR 2017.

YOLO with nothing but convolutions, so that it takes images of any size in multiples of 32. A cell predicts five
boxes, each as the change of an anchor, a box of typical shape; a box has its own confidence and its own classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.transforms.v2.functional import resize

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.average_precision import APMethod
from lightning_modules.components.boxes import concatenate_targets, non_maximum_suppression, paired_iou
from lightning_modules.components.image_batches import require_size
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.pretrained import find_weights
from lightning_modules.detection.darknet19 import Darknet19, conv_bn_leaky, load_darknet_weights
from lightning_modules.detection.metrics import detection_metrics

#: Pixels of a cell.
STRIDE = 32
#: Width and height in cells, for VOC: the authors' cfg/yolov2-voc.cfg.
VOC_ANCHORS = (
    (1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071),
)  # fmt: skip

# --- network ------------------------------------------------------------------------------------------------------

# How many layers of the trunk make the fine map, of 16 pixels a cell, that the passthrough layer takes.
FINE = 17


class YOLOv2Network(nn.Module):
    """Darknet-19 without its last layer, three convolutions and the passthrough, and one that predicts (section 2).

    Args:
        num_classes: C.
        anchors: A, boxes a cell.
        width: multiplies the channels of all layers but the last; 1 in the paper.
        momentum: of the batch statistics; the authors' is 0.01.
    """

    def __init__(self, num_classes: int = 20, anchors: int = 5, width: float = 1.0, momentum: float = 0.01) -> None:
        super().__init__()
        trunk = Darknet19(1, width, momentum).features
        self.fine, self.coarse = trunk[:FINE], trunk[FINE:]
        middle, wide = (max(1, round(channels * width)) for channels in (512, 1024))
        # By four, since reorg makes four channels of one.
        narrow = 4 * max(1, round(16 * width))
        self.anchors = anchors
        self.deep = nn.Sequential(conv_bn_leaky(wide, wide, 3, momentum), conv_bn_leaky(wide, wide, 3, momentum))
        self.passthrough = conv_bn_leaky(middle, narrow, 1, momentum)
        self.joined = conv_bn_leaky(4 * narrow + wide, wide, 3, momentum)
        self.output = nn.Conv2d(wide, anchors * (5 + num_classes), 1)
        he_normal(self)
        # Near zero, so that the boxes begin as the anchors.
        nn.init.normal_(self.output.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images float (N,3,32S,32T) to (N,S,T,A,5+C); what the numbers mean is said in `Grid`."""
        fine = self.fine(x)
        x = torch.cat([reorg(self.passthrough(fine)), self.deep(self.coarse(fine))], dim=1)
        return self.output(self.joined(x)).permute(0, 2, 3, 1).unflatten(-1, (self.anchors, -1))


def reorg(x: Tensor) -> Tensor:
    """Four channels of half the resolution for one: (N,C,2H,2W) to (N,4C,H,W), as the authors' code permutes them.

    It is not space-to-depth: darknet (blas.c, reorg_cpu) counts positions as if the map had C/4 channels of twice the
    sides, which mixes channels with neighboring places. The authors' weights were trained with it.
    """
    n, c, h, w = x.shape
    # In the order of memory, which is NCHW there.
    x = x.contiguous().view(n, c // 4, h, 2, w, 2)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


class Grid(NamedTuple):
    """The network's numbers by their meaning, float32; anchor a of cell (row, column) is at [:, row, column, a].

    Attributes:
        xy: (N,S,T,A,2), sigmoid(t_x), sigmoid(t_y): a box's center within the cell, 0..1 from its upper left corner.
        wh: (N,S,T,A,2), t_w, t_h: logarithms of its width and height as multiples of the anchor's.
        confidence: (N,S,T,A), sigmoid(t_o), the IoU that the box is thought to have with an object.
        classes: (N,S,T,A,C), logits of the classes if there is an object.
    """

    xy: Tensor
    wh: Tensor
    confidence: Tensor
    classes: Tensor

    @classmethod
    def of(cls, output: Tensor) -> Grid:
        """Takes the network's (N,S,T,A,5+C) apart."""
        output = output.float()
        return cls(output[..., :2].sigmoid(), output[..., 2:4], output[..., 4].sigmoid(), output[..., 5:])

    def corners(self, anchors: Tensor) -> Tensor:
        """The boxes in cells of the image, xyxy (N,S,T,A,4), for anchors float (A,2) in cells (figure 3)."""
        rows, columns = (torch.arange(n, device=self.xy.device) for n in self.xy.shape[1:3])
        corner = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[:, :, None]
        # Further than e^10 is nowhere, and infinity times zero would be no number.
        center, half = self.xy + corner, self.wh.clamp(-10, 10).exp() * anchors / 2
        return torch.cat([center - half, center + half], dim=-1)


# --- target encoding ----------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """All objects of a batch, K of them, and which are to be found.

    Attributes:
        counts: bool (K,), is an object at all: wider and higher than ``least`` of the image.
        found: bool (K,), is to be found by the box at ``place``; of the others the rest has no meaning.
        image: int64 (K,).
        place: int64 (K,), ((image * S + row) * T + column) * A + anchor.
        xy: float (K,2), the center within the cell, 0..1.
        wh: float (K,2), logarithms of width and height as multiples of the anchor's.
        corners: float (K,4), the box in cells.
        scale: float (K,), 2 - the part of the image that the box fills.
        label: int64 (K,).
    """

    counts: Tensor
    found: Tensor
    image: Tensor
    place: Tensor
    xy: Tensor
    wh: Tensor
    corners: Tensor
    scale: Tensor
    label: Tensor


def encode(
    target: list[dict[str, Tensor]],
    anchors: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    least: float = 0.001,
) -> Targets:
    """Gives each object to the anchor of the most similar shape (IoU with both centerd) in the cell of its center.

    Of several that meet there the last is to be found, as in the authors' code (darknet, region_layer.c), where each
    overwrites the one before.

    Args:
        target: boxes float (M,4) xyxy in pixels and labels int64 (M,) of each image.
        anchors: float (A,2), widths and heights in cells.
        grid: (S, T), rows and columns of cells.
        size: (height, width) in pixels of the images that the boxes lie in.
        least: part of the image's side; what is narrower or lower is no object (darknet, data.c).
    """
    boxes, label, image = concatenate_targets(target)
    rows, columns = grid
    left, top, right, bottom = boxes.unbind(1)
    x, y = columns / size[1], rows / size[0]
    corners = torch.stack([left * x, top * y, right * x, bottom * y], dim=1)
    sides = corners[:, 2:] - corners[:, :2]
    counts = (sides[:, 0] >= least * columns) & (sides[:, 1] >= least * rows)
    # Logarithms need sides; those of what does not count are thrown away.
    sides = sides.clamp_min(1e-6)
    center = (corners[:, :2] + corners[:, 2:]) / 2
    column = center[:, 0].floor().clamp(0, columns - 1)
    row = center[:, 1].floor().clamp(0, rows - 1)
    shared = torch.minimum(sides[:, None], anchors).prod(-1)
    anchor = (shared / (sides.prod(-1)[:, None] + anchors.prod(-1) - shared)).argmax(1)
    place = ((image * rows + row.long()) * columns + column.long()) * len(anchors) + anchor
    # The last of those that share a place, without a loop: its greatest number.
    number = torch.arange(len(boxes), device=boxes.device)
    last = torch.full((len(target) * rows * columns * len(anchors),), -1, device=boxes.device)
    last = last.scatter_reduce(0, place, torch.where(counts, number, -1), "amax")
    xy = center - torch.stack([column, row], dim=1)
    wh = (sides / anchors[anchor]).log()
    scale = 2 - sides.prod(-1) / (rows * columns)
    return Targets(counts, last[place] == number, image, place, xy, wh, corners, scale, label)


# --- loss ---------------------------------------------------------------------------------------------------------


def region_loss(output: Tensor, targets: Targets, anchors: Tensor, early: Tensor) -> dict[str, Tensor]:
    """The region layer's loss: sums over the boxes, the mean over the images of the batch.

    The paper does not write it down; this is the function whose gradient the authors' code computes (darknet,
    region_layer.c with yolov2-voc.cfg), hence the halves:

    - ``center``: 1/2 scale ((x - x*)^2 + (y - y*)^2) of the boxes that are to find an object, see `Targets`.
    - ``size``: the same of t_w and t_h.
    - ``object``: 5/2 (confidence - IoU)^2 of them, where no gradient flows through the IoU.
    - ``no_object``: 1/2 confidence^2 of all others, but for those that overlap any object by more than 0.6.
    - ``class``: the cross entropy of the boxes that are to find an object.
    - ``prior``: .01/2 ((x - 0.5)^2 + (y - 0.5)^2 + t_w^2 + t_h^2) of the others, which draws them to their anchors, early
      in the training; then 0.

    Args:
        output: the network's (N,S,T,A,5+C).
        targets: see `encode`.
        anchors: float (A,2) in cells.
        early: bool, no dimensions.
    """
    images = len(output)
    predicted = Grid.of(output)
    found, place = targets.found, targets.place
    with torch.no_grad():
        # Every object with all boxes of its image.
        boxes = predicted.corners(anchors).view(images, -1, 4)
        per_image = boxes.shape[1]
        pairs = boxes[targets.image]
        truth = targets.corners[:, None].expand_as(pairs)
        iou = paired_iou(pairs.reshape(-1, 4), truth.reshape(-1, 4)).float().view(-1, per_image)
        iou = torch.where(targets.counts[:, None], iou, 0)
        best = torch.zeros(images, per_image, device=output.device)
        best = best.scatter_reduce(0, targets.image[:, None].expand_as(iou), iou, "amax").view_as(predicted.confidence)
        iou = iou.gather(1, (place % per_image)[:, None])[:, 0]
        # One place more, for what is not to be found.
        responsible = torch.zeros(best.numel() + 1, dtype=torch.bool, device=output.device)
        responsible = responsible.index_fill(0, torch.where(found, place, best.numel()), True)[:-1].view_as(best)
    xy, wh, confidence, classes = (part.flatten(0, 3)[place] for part in predicted)
    to_anchor = (predicted.xy - 0.5).square().sum(-1) + predicted.wh.square().sum(-1)

    def total(errors: Tensor) -> Tensor:
        return torch.where(found, errors, 0).sum() / images

    return {
        "center": total(targets.scale * (xy - targets.xy).square().sum(1)) / 2,
        "size": total(targets.scale * (wh - targets.wh).square().sum(1)) / 2,
        "object": 5 * total((confidence - iou).square()) / 2,
        "no_object": torch.where(responsible | (best > 0.6), 0, predicted.confidence.square()).sum() / (2 * images),
        "class": total(F.cross_entropy(classes, targets.label, reduction="none")),
        "prior": 0.01 * torch.where(responsible | ~early, 0, to_anchor).sum() / (2 * images),
    }


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(
    output: Tensor, anchors: Tensor, score_threshold: float = 0.005, nms_threshold: float = 0.45
) -> list[dict[str, Tensor]]:
    """What the network found: for each image ``boxes`` float (K,4) xyxy in pixels, ``scores``, ``labels``, best first.

    A box has the score confidence * class probability for every class, and stays where that is above the threshold and
    no better box of its class overlaps it by more than the NMS threshold.

    Args:
        output: the network's (N,S,T,A,5+C).
        anchors: float (A,2) in cells.
        score_threshold, nms_threshold: the authors' for VOC.
    """
    grid = Grid.of(output)
    rows, columns = output.shape[1:3]
    left, top, right, bottom = grid.corners(anchors).unbind(-1)
    sides = [left.clamp(0, columns), top.clamp(0, rows), right.clamp(0, columns), bottom.clamp(0, rows)]
    corners = torch.stack(sides, dim=-1) * STRIDE
    scores = grid.confidence[..., None] * grid.classes.softmax(-1)
    image, *box, label = (scores > score_threshold).nonzero(as_tuple=True)
    return non_maximum_suppression(corners[image, *box], scores[image, *box, label], label, image, len(output), nms_threshold)


# --- module -------------------------------------------------------------------------------------------------------


def size_at(step: int, sizes: Sequence[int]) -> int:
    """The size of the images at an optimizer step: another one is drawn every ten steps, of the step alone.

    The authors' code ends with 200 steps at the largest; here nothing depends on the length of the run.
    """
    return sizes[int(np.random.SeedSequence(step // 10).generate_state(1)[0]) % len(sizes)]


class YOLOv2(VisionModule):
    """YOLOv2. Batch: see detection in the batch contract, images of one size. Predictions: see `decode`.

    Metrics: ``map`` and what else `VOCMeanAP` gives, and COCO's (`COCOMeanAP`).

    Weight decay is for the weights of convolutions alone, as in the authors' code.

    Args:
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        anchors: widths and heights in cells of 32 pixels; ``python -m tools.anchors`` finds those of a dataset.
        width: multiplies the channels of all layers but the last.
        momentum: of the batch statistics. The authors' 0.01 wants some thousand steps; 0.1 is for short runs.
        weights: None to train from scratch, or one of the authors' files, see `load_darknet_weights`: a detector's
            (yolov2-voc.weights), or the classifier's trunk (darknet19_448.conv.23).
        train_sizes: sides in pixels, multiples of 32: in training the images are resized on the device, antialiased, to
            one of them, another every ten steps (section 2, multi-scale training). --data.image_size had best be the
            largest. None trains at the size of the data.
        early_images: for how many images all boxes are drawn to their anchors; 12,800 in the authors' code.
        score_threshold, nms_threshold: what is kept of the predictions.
        ap: how average precision is computed, see `VOCMeanAP`.
        coco: measure COCO's average precision too.
        mean, std: of the pixels; the authors' weights take them as they are, on 0..1.
        optimizer: see `VisionModule`; the paper's.
        kwargs: schedule and channels_last of `VisionModule`.
    """

    monitor = ("val/map", "max")

    seen: Tensor

    def __init__(
        self,
        num_classes: int = 20,
        class_names: list[str] | None = None,
        anchors: Sequence[tuple[float, float]] = VOC_ANCHORS,
        width: float = 1.0,
        momentum: float = 0.01,
        weights: str | None = None,
        train_sizes: list[int] | None = None,
        early_images: int = 12_800,
        score_threshold: float = 0.005,
        nms_threshold: float = 0.45,
        ap: APMethod = "area",
        coco: bool = True,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, mean=mean, std=std, **kwargs)
        if not anchors or not all(len(anchor) == 2 and min(anchor) > 0 for anchor in anchors):
            raise UserError(f"anchors: expected pairs of a width and a height above 0, found {anchors}")
        if train_sizes is not None and (not train_sizes or any(s < STRIDE or s % STRIDE for s in train_sizes)):
            raise UserError(f"train_sizes: expected multiples of {STRIDE}, found {train_sizes}")
        self.num_classes, self.class_names = num_classes, class_names
        self.train_sizes, self.early_images = train_sizes, early_images
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.ap, self.coco = ap, coco
        # A constant, no buffer: see VisionModule.
        self._anchors = torch.tensor([list(anchor) for anchor in anchors])
        # Images of all ranks that were trained on. Optimizer steps would miscount accumulated and incomplete batches.
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.network = YOLOv2Network(num_classes, len(anchors), width, momentum)
        if weights is not None:
            load_darknet_weights(self.network, find_weights("yolo_v2", weights))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = batch["image"]
        output = self.network(self.preprocess(self._checked(self._at_train_size(images))))
        anchors = self._anchors_on(output.device)
        targets = encode(batch["target"], anchors, output.shape[1:3], images.shape[-2:])
        early = self.seen < self.early_images
        if self.training:
            self.seen += len(images) * (self.trainer.world_size if self._trainer is not None else 1)
        return region_loss(output, targets, anchors, early)

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        output = self.network(self.preprocess(self._checked(images)))
        return decode(output, self._anchors_on(output.device), self.score_threshold, self.nms_threshold)

    def build_metrics(self) -> MetricCollection:
        return detection_metrics(self.num_classes, self.ap, self.coco)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The convolutions' weights, and all else, which does not decay."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        weights, others = ([p for p in parameters if (p.ndim == 4) == four] for four in (True, False))
        return [{"params": weights}, {"params": others, "weight_decay": 0.0}]

    def _at_train_size(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if self.train_sizes is None or not isinstance(images, Tensor):
            return images
        side = size_at(self.global_step, self.train_sizes)
        return images if images.shape[-2:] == (side, side) else resize(images, [side, side], antialias=True)

    def _anchors_on(self, device: torch.device) -> Tensor:
        if self._anchors.device != device:
            self._anchors = self._anchors.to(device)
        return self._anchors

    @staticmethod
    def _checked(images: Tensor | list[Tensor]) -> Tensor:
        expected = f"sides that are multiples of {STRIDE} pixels"
        return require_size(images, lambda height, width: height % STRIDE == width % STRIDE == 0, expected, 416)
