"""Keypoint R-CNN: He, Gkioxari, Dollar and Girshick, "Mask R-CNN", ICCV 2017, section 5.

Faster R-CNN (`faster_rcnn.py`) finds people; a third branch looks at each one's region and gives every joint a map of
56x56 cells, of which exactly one is the joint's: a "one-hot mask". A softmax over the cells of a map makes them compete
for the joint, where a Mask R-CNN's cells are decided one by one; so the loss is the cross entropy of a choice among
3136, and what a person lacks, or has outside of the region, is left out of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import MetricCollection
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.backbones import Backbone, Trunk, make_trunk, maps_of
from lightning_modules.components.boxes import batched_box_iou, pad_targets, sample_balanced
from lightning_modules.components.image_batches import pad_images, resize_images
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.roi_heads import RegionNetwork, decode, draw_regions, fast_rcnn_loss
from lightning_modules.components.rpn import Normalizer, RegionProposalNetwork, propose, rpn_loss
from lightning_modules.components.torchvision_rcnn import load_rcnn
from lightning_modules.detection import rpn
from lightning_modules.pose.metrics import MPII_JOINTS, apply_affine, pose_metrics

POOLED = 14  # side of what is pooled from a region; the branch doubles it twice
CELLS = 4 * POOLED

# --- network ------------------------------------------------------------------------------------------------------


class KeypointRCNNNetwork(nn.Module):
    """Faster R-CNN's network for one class, and beside ``roi`` eight convolutions of 3x3 with 512 channels, one that
    doubles the side with a channel a joint, and bilinear interpolation that doubles it again.

    With ``resnet50_fpn`` and 17 joints it is torchvision's, tensor by tensor: 59,137,258 parameters if ``frozen``,
    else 59,190,378.

    Args:
        backbone, width, frozen: see `make_trunk`; ``width`` multiplies the branch's 512 channels too.
        trunk: what computes the maps.
        proposer: what proposes regions on them.
        joints: K.
    """

    def __init__(
        self,
        backbone: Backbone,
        trunk: Trunk,
        proposer: RegionProposalNetwork,
        joints: int,
        width: float,
        frozen: bool,
    ) -> None:
        super().__init__()
        self.trunk, self.rpn = trunk.layers, proposer
        self.roi = RegionNetwork(backbone, trunk, 1, width, frozen, "align")
        channels = max(1, round(512 * width))
        head = KeypointRCNNHeads(trunk.channels, [channels] * 8)
        self.keypoint = nn.Sequential(
            OrderedDict[str, nn.Module](head=head, predictor=KeypointRCNNPredictor(channels, joints))
        )

    def keypoints(self, maps: list[Tensor], boxes: Tensor) -> Tensor:
        """Logits of the joints' cells in the boxes: float32 (B,n,K,56,56) for (B,n,4) xyxy in pixels."""
        return self.keypoint(self.roi.pool(maps, boxes, POOLED)).unflatten(0, boxes.shape[:2]).float()


# --- target encoding ----------------------------------------------------------------------------------------------


def one_hot_cells(keypoints: Tensor, labeled: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The cell of each joint in a box: int64 (...,K), counted row by row, and whether there is one, bool (...,K).

    Args:
        keypoints: float (...,K,2) in pixels, their middles at whole numbers.
        labeled: bool (...,K).
        boxes: float (...,4) xyxy in pixels, edges: the first pixel's are 0 and 1.
    """
    corner, far = boxes[..., None, :2], boxes[..., None, 2:]
    part = (keypoints + 0.5 - corner) / (far - corner).clamp_min(1e-6)
    # The last cell takes what lies on the box's far edge.
    cell = torch.where(part == 1, CELLS - 1, (part * CELLS).floor())
    inside = ((cell >= 0) & (cell < CELLS)).all(-1)
    x, y = cell.clamp(0, CELLS - 1).long().unbind(-1)
    return y * CELLS + x, inside & labeled


# --- loss ---------------------------------------------------------------------------------------------------------


def keypoint_loss(logits: Tensor, cells: Tensor, there: Tensor) -> Tensor:
    """L_keypoint: the cross entropy of each joint's cell under the softmax over its map, the mean over the joints.

    Args:
        logits: float (...,K,56,56).
        cells: int64 (...,K), see `one_hot_cells`.
        there: bool (...,K), the joints that are learned from. Without any the loss is 0.
    """
    entropy = F.cross_entropy(logits.float().flatten(-2).flatten(0, -2), cells.flatten(), reduction="none")
    return torch.where(there.flatten(), entropy, 0).sum() / there.sum().clamp_min(1)


# --- whose joints are whose -----------------------------------------------------------------------------------------


def of_each_person(found: dict[str, Tensor], boxes: Tensor) -> Tensor:
    """The joints that were found of each person: float (M,K,2), nan of those whom no detection was left for.

    Detections and people are paired such that the sum of the boxes' IoUs is the greatest; boxes apart are no pair.

    Args:
        found: ``boxes`` float (N,4) and ``keypoints`` float (N,K,2).
        boxes: float (M,4), the people's.
    """
    keypoints = found["keypoints"]
    joints = keypoints.new_full((len(boxes), *keypoints.shape[1:]), torch.nan)
    if len(boxes) and len(keypoints):
        shared = batched_box_iou(boxes[None].float(), found["boxes"][None].float())[0].cpu()
        people, detections = linear_sum_assignment(shared.numpy(), maximize=True)
        pairs = [(p, d) for p, d in zip(people.tolist(), detections.tolist(), strict=True) if shared[p, d] > 0]
        for person, detection in pairs:
            joints[person] = keypoints[detection]
    return joints


# --- module -------------------------------------------------------------------------------------------------------


class KeypointRCNN(VisionModule):
    """Keypoint R-CNN. Batch: whole images of people, see the batch contract; they may differ in size.

    Predictions: for each image, best first, ``boxes`` float32 (N,4) xyxy in pixels, ``scores`` float32 (N,), ``labels``
    int64 (N,) of 0, ``keypoints`` float32 (N,K,2) in pixels, their middles at whole numbers, and ``keypoint_scores``
    float32 (N,K), logits. Joints are looked for in the final boxes.

    Metrics: those of `pose_metrics`, over all people: each is given the detection that fits (`of_each_person`), and
    who has none has found no joint. They are not comparable with those of systems that are told where the person is.

    Args:
        joint_names: K names; ``train.py`` takes them from the data. None: MPII's.
        metric: ``pckh`` for MPII, ``pck`` for LSP.
        backbone, width, batch_norm, frozen, stride: see `make_trunk`; ``frozen`` with weights.
        weights: None to train from scratch; COCO_V1 for torchvision's Keypoint R-CNN (``resnet50_fpn``, ``width`` 1),
            of which all is taken but what depends on the number of joints; DEFAULT or a name of torchvision's weights
            for the backbone; or a file: of these, or a checkpoint of ours.
        anchor_sizes, anchor_ratios: see `RegionProposalNetwork`.
        normalizer, rpn_box_weight: see `rpn_loss`.
        crossing: learn from anchors that reach beyond the image too.
        train_proposals, test_proposals: boxes of each image, before the suppression and after it (`propose`).
        least: the least side of a proposal in pixels.
        regions: regions of each image that are learned from, a quarter of them with a person at most.
        score_threshold, nms_threshold: what is kept of the predictions.
        eval_size: what images are resized to in evaluation and prediction, (shorter side, longest at most): the
            ``image_size`` of the data, which does not resize then. Predictions are in the pixels of the image given.
        optimizer: see `VisionModule`; the paper's, for 16 images a step.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    def __init__(
        self,
        joint_names: list[str] | None = None,
        metric: Literal["pckh", "pck"] = "pckh",
        backbone: Backbone = "resnet50_fpn",
        width: float = 1.0,
        batch_norm: bool = False,
        frozen: bool = False,
        stride: Literal[8, 16] = 16,
        weights: str | None = None,
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        anchor_ratios: Sequence[float] = (0.5, 1, 2),
        normalizer: Normalizer = "authors",
        rpn_box_weight: float = 10.0,
        crossing: bool = True,
        train_proposals: tuple[int, int] = (2000, 2000),
        test_proposals: tuple[int, int] = (1000, 1000),
        least: float = 0.001,
        regions: int = 512,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        eval_size: tuple[int, int] | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if eval_size is not None and not 1 <= eval_size[0] <= eval_size[1]:
            raise UserError(f"eval_size: expected (shorter side, longest at most) in pixels, found {eval_size}")
        self.joint_names = list(joint_names or MPII_JOINTS)
        self.metric: Literal["pckh", "pck"] = metric
        self.monitor = (f"val/{metric}/total", "max")
        self.class_names = ["person"]
        self.normalizer: Normalizer = normalizer
        self.rpn_box_weight, self.crossing = rpn_box_weight, crossing
        self.train_proposals, self.test_proposals, self.least = train_proposals, test_proposals, least
        self.regions = regions
        self.score_threshold, self.nms_threshold, self.eval_size = score_threshold, nms_threshold, eval_size
        trunk = make_trunk(backbone, width, batch_norm, frozen, stride)
        proposer = RegionProposalNetwork(trunk, anchor_sizes, anchor_ratios)
        self.network = KeypointRCNNNetwork(backbone, trunk, proposer, len(self.joint_names), width, frozen)
        if weights is not None:
            load_rcnn(self.network, "keypointrcnn", backbone, batch_norm, weights)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if "target" not in batch:
            raise UserError("target: expected whole images, found crops of people: take --data.crop image")
        target = batch["target"]
        pixels, size = pad_images(batch["image"], self.preprocess)
        maps = maps_of(self.network.trunk(pixels))
        output = self.network.rpn(maps)
        targets = rpn.encode(target, output.anchors, size, self.crossing)
        drawn = sample_balanced(targets.positive, targets.negative, 256, 0.5)
        terms = rpn_loss(output, targets, drawn, self.normalizer, self.rpn_box_weight)
        found = propose(output, size, *self.train_proposals, least=self.least)
        share = 0.25
        regions = draw_regions(found.boxes, found.there, target, self.regions, share)
        logits, offset = self.network.roi(maps, regions.boxes)
        # No more than these can have a person; how many do is known only to the device.
        boxes, label, chosen = (
            x[:, : round(share * self.regions)] for x in (regions.boxes, regions.label, regions.object)
        )
        keypoints, labeled = self._of_regions(target, chosen)
        cells, there = one_hot_cells(keypoints, labeled & (label > 0)[..., None], boxes)
        joints = keypoint_loss(self.network.keypoints(maps, boxes), cells, there)
        return {**terms, **fast_rcnn_loss(logits, offset, regions), "keypoint": joints}

    @staticmethod
    def _of_regions(target: Sequence[dict[str, Tensor]], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Joints (B,n,K,2) and which of them are labeled (B,n,K), of the people chosen (B,n)."""
        keypoints = F.pad(pad_sequence([t["keypoints"] for t in target], batch_first=True), (0, 0, 0, 0, 0, 1))
        labeled = F.pad(pad_sequence([t["labeled"] for t in target], batch_first=True), (0, 0, 0, 1))
        index = chosen[..., None].expand(-1, -1, labeled.shape[2])
        return keypoints.gather(1, index[..., None].expand(-1, -1, -1, 2)), labeled.gather(1, index)

    def predict(self, images: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        pixels, size = pad_images(resize_images(images, self.eval_size), self.preprocess)
        maps = maps_of(self.network.trunk(pixels))
        found = propose(self.network.rpn(maps), size, *self.test_proposals, least=self.least)
        logits, offset = self.network.roi(maps, found.boxes)
        detections = decode(logits, offset, found.boxes, found.there, size, self.score_threshold, self.nms_threshold)
        boxes, _ = pad_targets(detections)
        heatmaps = self.network.keypoints(maps, boxes)
        for image, entry, heatmap, resized in zip(images, detections, heatmaps, size, strict=True):
            points, scores = heatmaps_to_keypoints(heatmap[: len(entry["boxes"])], entry["boxes"])
            height, width = image.shape[-2:]
            scale = resized.new_tensor([width, height]) / resized
            entry["boxes"] = entry["boxes"] * scale.repeat(2)
            # Torchvision's coordinates begin at the first pixel's edge.
            entry["keypoints"], entry["keypoint_scores"] = points[..., :2] * scale - 0.5, scores
        return detections

    def build_metrics(self) -> MetricCollection:
        return pose_metrics(self.joint_names, self.metric)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        for found, target, matrix in zip(predictions, batch["target"], batch["to_original"], strict=True):
            pair = torch.stack([of_each_person(found, target["boxes"]), target["keypoints"].float()])
            mine, true = apply_affine(pair.flatten(1, 2), matrix.expand(2, -1, -1)).view(pair.shape)
            metrics.update(mine, true, target["labeled"], target["head_size"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return caffe_groups(self.network)
