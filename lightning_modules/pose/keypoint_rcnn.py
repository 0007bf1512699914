"""Keypoint R-CNN: He, Gkioxari, Dollar and Girshick, "Mask R-CNN", ICCV 2017, section 5.

Faster R-CNN detects people, and a third branch predicts one heatmap of 56x56 cells per joint in each person's box. The
target is a one-hot mask: exactly one cell is the joint's. A softmax makes the cells of a heatmap compete, unlike the
cells of Mask R-CNN, which are decided independently. The loss is therefore the cross entropy over 3,136 cells; joints
that are unlabeled or outside of the box are ignored.

B images, n RoIs and M people per image, N detections of an image, K joints, heatmaps of S x S cells (56).
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
from lightning_modules.components.boxes import batched_box_iou
from lightning_modules.components.roi_heads import SampledRoIs

# The one import between case studies: in the paper as in the code, Keypoint R-CNN is Faster R-CNN with one more branch.
from lightning_modules.detection.faster_rcnn import BranchedRCNN
from lightning_modules.pose.joints import MPII_JOINTS
from lightning_modules.pose.metrics import apply_affine, choose_metric, pose_metrics

HEATMAP_SIZE = 56

# --- network ------------------------------------------------------------------------------------------------------


class KeypointBranch(nn.Sequential):
    """The branch: pooled features (N, in_channels, 14, 14) to logits (N, K, 56, 56).

    Eight 3x3 convolutions, a transposed convolution that doubles the size, with one channel per joint, and bilinear
    interpolation that doubles it again.

    Args:
        in_channels: channels of the feature maps.
        num_joints: K.
        width_multiplier: scales the 512 channels.
    """

    def __init__(self, in_channels: int, num_joints: int, width_multiplier: float) -> None:
        channels = max(1, round(512 * width_multiplier))
        head = KeypointRCNNHeads(in_channels, [channels] * 8)
        predictor = KeypointRCNNPredictor(channels, num_joints)
        super().__init__(OrderedDict[str, nn.Module](head=head, predictor=predictor))


# --- target encoding ----------------------------------------------------------------------------------------------


def match_keypoints(target: Sequence[dict[str, Tensor]], object_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keypoints of the person of each RoI.

    Args:
        target: one dict per image with ``keypoints`` float (M, K, 2) and ``labeled`` bool (M, K).
        object_indices: index of each RoI's person in its image, int64 (B, n).

    Returns:
        Keypoints, float (B, n, K, 2), and which of them are labeled, bool (B, n, K).
    """
    keypoints = F.pad(pad_sequence([t["keypoints"] for t in target], batch_first=True), (0, 0, 0, 0, 0, 1))
    labeled = F.pad(pad_sequence([t["labeled"] for t in target], batch_first=True), (0, 0, 0, 1))
    index = object_indices[..., None].expand(-1, -1, labeled.shape[2])
    return keypoints.gather(1, index[..., None].expand(-1, -1, -1, 2)), labeled.gather(1, index)


def encode_cells(keypoints: Tensor, labeled: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Encode keypoints as cells of their box.

    Args:
        keypoints: float (..., K, 2) in pixels; pixel centers are integers.
        labeled: bool (..., K).
        boxes: float (..., 4), xyxy in pixels; the edges of the first pixel are 0 and 1.

    Returns:
        Row-major cell indices, int64 (..., K), and which joints are labeled and in the box, bool (..., K).
    """
    corner, far = boxes[..., None, :2], boxes[..., None, 2:]
    relative = (keypoints + 0.5 - corner) / (far - corner).clamp_min(1e-6)
    # The last cell includes the far edge of the box.
    cell = torch.where(relative == 1, HEATMAP_SIZE - 1, (relative * HEATMAP_SIZE).floor())
    inside = ((cell >= 0) & (cell < HEATMAP_SIZE)).all(-1)
    x, y = cell.clamp(0, HEATMAP_SIZE - 1).long().unbind(-1)
    return y * HEATMAP_SIZE + x, inside & labeled


# --- loss ---------------------------------------------------------------------------------------------------------


def keypoint_loss(logits: Tensor, cells: Tensor, valid: Tensor) -> Tensor:
    """Compute the cross entropy of the softmax over each heatmap, averaged over the valid joints.

    Args:
        logits: float (..., K, S, S).
        cells: int64 (..., K), see `encode_cells`.
        valid: bool (..., K), False for ignored joints. The loss is 0 if all are ignored.
    """
    entropy = F.cross_entropy(logits.float().flatten(-2).flatten(0, -2), cells.flatten(), reduction="none")
    return torch.where(valid.flatten(), entropy, 0).sum() / valid.sum().clamp_min(1)


# --- evaluation ---------------------------------------------------------------------------------------------------


def assign_to_people(detections: dict[str, Tensor], gt_boxes: Tensor) -> Tensor:
    """Assign one detection to each person, such that the sum of their IoUs is maximal.

    Args:
        detections: ``boxes`` float (N, 4) and ``keypoints`` float (N, K, 2).
        gt_boxes: boxes of the people, float (M, 4).

    Returns:
        Keypoints, float (M, K, 2); nan for people without a detection that overlaps them.
    """
    keypoints = detections["keypoints"]
    assigned = keypoints.new_full((len(gt_boxes), *keypoints.shape[1:]), torch.nan)
    if len(gt_boxes) and len(keypoints):
        iou = batched_box_iou(gt_boxes[None].float(), detections["boxes"][None].float())[0].cpu()
        for person, detection in zip(*linear_sum_assignment(iou.numpy(), maximize=True), strict=True):
            if iou[person, detection] > 0:
                assigned[person] = keypoints[detection]
    return assigned


# --- module -------------------------------------------------------------------------------------------------------


class KeypointRCNN(BranchedRCNN):
    """Keypoint R-CNN (He et al. 2017). Batch: whole images of people, see the batch contract (``datamodules/base.py``).

    With ``resnet50_fpn`` and 17 joints it is torchvision's network, tensor by tensor: 59,137,258 parameters with
    ``freeze_backbone``, else 59,190,378. ``predict`` returns the dicts of `Detector` with ``keypoints`` float32
    (N, K, 2), in pixels with integer pixel centers, and ``keypoint_scores`` float32 (N, K), logits.

    Metrics: those of `pose_metrics` over all people. Each person is assigned one detection (`assign_to_people`);
    without one, all joints count as wrong. They are not comparable to systems that are given each person's location.

    Args:
        weights: None to train from scratch; COCO_V1 for torchvision's Keypoint R-CNN (``resnet50_fpn``), without the
            layers for another number of joints; IMAGENET1K_V1, IMAGENET1K_V2 or DEFAULT, the newest, for the
            backbone's; or a file of such weights or one of our checkpoints.
        joint_names: K names, MPII's 16 by default; ``train.py`` takes them from the data.
        metric: ``pckh`` for MPII, ``pck`` for LSP; data without head boxes has only ``pck``.
        head_boxes: whether the data has head boxes; ``train.py`` takes it from the data.
        **kwargs: see `BranchedRCNN`.
    """

    branch = "keypoint"

    def __init__(
        self,
        weights: str | None = None,
        joint_names: list[str] | None = None,
        metric: Literal["pckh", "pck"] = "pckh",
        head_boxes: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=1, class_names=["person"], ap_method="area", compute_coco_ap=False, **kwargs)
        self.joint_names = list(joint_names or MPII_JOINTS)
        self.metric = choose_metric(metric, self.joint_names, head_boxes)
        self.monitor = (f"val/{self.metric}/total", "max")
        branch = KeypointBranch(self.network.channels, len(self.joint_names), self.width_multiplier)
        self.add_branch(branch, weights)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if "target" not in batch:
            raise UserError("target: expected whole images, found crops of people; use --data.crop image")
        return super().losses(batch)

    def branch_loss(self, logits: Tensor, rois: SampledRoIs, target: Sequence[dict[str, Tensor]]) -> Tensor:
        keypoints, labeled = match_keypoints(target, rois.object_indices)
        return keypoint_loss(logits, *encode_cells(keypoints, labeled & (rois.labels > 0)[..., None], rois.boxes))

    def predict_image(self, image: Tensor, original_size: Tensor | None = None) -> dict[str, Tensor]:
        detections, logits = self.detect(image, original_size)
        points, scores = heatmaps_to_keypoints(logits, detections["boxes"])
        # Torchvision's coordinates start at the edge of the first pixel.
        return {**detections, "keypoints": points[..., :2] - 0.5, "keypoint_scores": scores}

    def build_metrics(self) -> MetricCollection:
        return pose_metrics(self.joint_names, self.metric)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        for detections, target, matrix in zip(predictions, batch["target"], batch["to_original"], strict=True):
            pair = torch.stack([assign_to_people(detections, target["boxes"]), target["keypoints"].float()])
            found, true = apply_affine(pair.flatten(1, 2), matrix.expand(2, -1, -1)).view(pair.shape)
            metrics.update(found, true, target["labeled"], target["head_size"])
