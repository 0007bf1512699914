"""Pose metrics: PCKh as in MPII's benchmark, and PCK (PDJ) and PCP as in the papers on LSP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from errors import UserError
from lightning_modules.pose.joints import MPII_JOINTS

#: Joints that are reported together. The benchmark's "head" consists of the upper neck and the top of the head.
JOINT_GROUPS = {
    "head": ("upper_neck", "head_top"),
    **{name: (f"right_{name}", f"left_{name}") for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")},
}
EXCLUDED_JOINTS = ("pelvis", "thorax")  # not part of the total
MAX_THRESHOLD = 50  # hundredths; thresholds are 0, 0.01, ..., 0.5
TORSO = ("left_shoulder", "right_hip")

#: The ten sticks of PCP: each connects the mean of some joints with the mean of others.
STICKS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "head": ((("upper_neck",), ("head_top",)),),
    "torso": ((("right_shoulder", "left_shoulder"), ("right_hip", "left_hip")),),
    **{
        name: tuple(((f"{side}_{a}",), (f"{side}_{b}",)) for side in ("right", "left"))
        for name, a, b in (
            ("upper_arm", "shoulder", "elbow"),
            ("forearm", "elbow", "wrist"),
            ("upper_leg", "hip", "knee"),
            ("lower_leg", "knee", "ankle"),
        )
    },
}


def pose_metrics(joint_names: Sequence[str], metric: Literal["pckh", "pck"] = "pckh") -> MetricCollection:
    """Build the metrics of single-person pose estimation; `update_pose_metrics` adds a batch.

    Args:
        joint_names: K names.
        metric: ``pckh`` for `PCKh` (MPII), with results ``pckh/total`` and so on; ``pck`` for data without head boxes
            (LSP): `PCK` as ``pck/...``, and `PCP` as ``pcp/...`` and ``pcp_relaxed/...``.
    """
    if metric not in ("pckh", "pck"):
        raise UserError(f"metric: expected pckh or pck, found {metric}")
    metrics: dict[str, Metric | MetricCollection]
    if metric == "pckh":
        metrics = {"pckh": PCKh(joint_names, prefix="pckh/")}
    else:
        metrics = {
            "pck": PCK(joint_names, prefix="pck/"),
            "pcp": PCP(joint_names, prefix="pcp/"),
            "pcp_relaxed": PCP(joint_names, strict=False, prefix="pcp_relaxed/"),
        }
    # No compute groups: torchmetrics would merge two metrics for good if their first batch has equal states.
    return MetricCollection(metrics, compute_groups=False)


def choose_metric(
    metric: Literal["pckh", "pck"], joint_names: Sequence[str], head_boxes: bool
) -> Literal["pckh", "pck"]:
    """Return the metric, or ``pck`` in place of ``pckh`` for data without head boxes, with one line that says so.

    Args:
        metric: see `pose_metrics`.
        joint_names: K names.
        head_boxes: whether the data has head boxes.

    Raises:
        UserError: neither metric can be computed.
    """
    if metric != "pckh" or head_boxes:
        return metric
    if missing := [name for name in TORSO if name not in joint_names]:
        raise UserError(
            f"metric: expected head boxes for pckh, or joints {' and '.join(TORSO)} for pck, found no head boxes and "
            f"no {missing[0]}"
        )
    rank_zero_warn("metric: the data has no head boxes, so val/pck/total (pck) replaces val/pckh/total")
    return "pck"


def update_pose_metrics(metrics: MetricCollection, predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
    """Add a batch, in pixels of the images on disk.

    Args:
        metrics: result of `pose_metrics`.
        predictions: ``keypoints`` float (B, K, 2) in pixels of the batch's images.
        batch: ``keypoints``, ``labeled``, ``head_size`` and ``to_original``, see the batch contract.
    """
    found, true = (apply_affine(points["keypoints"], batch["to_original"]) for points in (predictions, batch))
    metrics.update(found, true, batch["labeled"], batch["head_size"])


def apply_affine(points: Tensor, matrix: Tensor) -> Tensor:
    """Map points (B, K, 2) by affine matrices (B, 2, 3), in float64."""
    matrix = matrix.double()
    return points.double() @ matrix[:, :, :2].mT + matrix[:, None, :, 2]


class JointAccuracy(Metric):
    """Percentage of correct keypoints: the fraction of labeled joints within a distance of their ground truth.

    Distances are relative to a reference length of each person, see `reference_lengths`. A person without one is
    skipped and counted. Occluded joints count if they are labeled. A distance equal to the threshold is correct.

    ``compute`` returns, at the metric's threshold unless stated otherwise; values without labeled joints are nan:

    - ``head``, ``shoulder``, ``elbow``, ``wrist``, ``hip``, ``knee``, ``ankle``: mean over the two joints, in 0..1.
    - ``total``: over all labeled joints except pelvis and thorax, not the mean of the values above.
    - ``total_01``: the same at a threshold of 0.1, which reveals a shift of one pixel.
    - ``auc``: normalized area under the curve of ``total`` over the thresholds 0, 0.01, ..., 0.5.
    - ``skipped``: number of people without a reference length.
    - ``curve``: float32 (8, 51), at each threshold, of the seven groups and in total.
    - ``joints``: float32 (K,), of each joint.
    - ``instances``: int64 (K,), number of labeled instances of each joint.

    Args:
        joint_names: K names, which define the groups.
        threshold: hundredths of the reference length, 0 to 50.
        prefix: prefix of the result names.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    counts: Tensor
    skipped: Tensor

    def __init__(self, joint_names: Sequence[str], threshold: int, prefix: str = "") -> None:
        super().__init__()
        if not 0 <= threshold <= MAX_THRESHOLD:
            raise UserError(f"threshold: expected 0 to {MAX_THRESHOLD} hundredths, found {threshold}")
        self.joint_names, self.threshold, self.result_prefix = list(joint_names), threshold, prefix
        self.array_results = {f"{prefix}curve": 2, f"{prefix}joints": 1, f"{prefix}instances": 1}
        # Histogram of the smallest threshold that is not below the distance; the last bin is beyond all thresholds.
        counts = torch.zeros(len(self.joint_names), MAX_THRESHOLD + 2, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")
        self.add_state("skipped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def reference_lengths(self, keypoints: Tensor, labeled: Tensor, head_size: Tensor | None) -> Tensor:
        """Return the length that distances are divided by, float64 (B,) in pixels; nan or 0 if there is none."""
        raise NotImplementedError

    def update(self, preds: Tensor, keypoints: Tensor, labeled: Tensor, head_size: Tensor | None = None) -> None:
        """Add people, in pixels of the images on disk.

        Args:
            preds: predicted keypoints, float (B, K, 2).
            keypoints: ground truth, float (B, K, 2).
            labeled: bool (B, K).
            head_size: float (B,), nan without a head box.

        Raises:
            UserError: the shapes differ.
        """
        _check_shapes(preds, keypoints, labeled, self.joint_names)
        reference = self.reference_lengths(keypoints.double(), labeled, head_size)
        valid = reference > 0
        distance = torch.linalg.vector_norm(preds.double() - keypoints.double(), dim=-1) / reference[:, None]
        thresholds = torch.arange(MAX_THRESHOLD + 1, dtype=torch.float64, device=distance.device) / 100
        bins = torch.bucketize(distance, thresholds)
        cells = bins + (MAX_THRESHOLD + 2) * torch.arange(len(self.joint_names), device=distance.device)
        counted = (labeled & valid[:, None]).long()
        self.counts = self.counts.view(-1).scatter_add(0, cells.flatten(), counted.flatten()).view_as(self.counts)
        self.skipped = self.skipped + (~valid).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the results listed above."""
        correct, instances = self.counts.cumsum(1)[:, : MAX_THRESHOLD + 1].double(), self.counts.sum(1)
        joints = correct / instances[:, None]
        counted = [i for i, name in enumerate(self.joint_names) if name not in EXCLUDED_JOINTS]
        total = correct[counted].sum(0) / instances[counted].sum()
        rows = []
        for names in JOINT_GROUPS.values():
            members = [self.joint_names.index(name) for name in names if name in self.joint_names]
            rows.append(joints[members].nanmean(0) if members else torch.full_like(total, torch.nan))
        curve = torch.stack([*rows, total])
        results = {
            **dict(zip((*JOINT_GROUPS, "total"), curve[:, self.threshold], strict=True)),
            "total_01": total[10],
            "auc": (total[1:] + total[:-1]).mean() / 2,
            "skipped": self.skipped,
            "curve": curve,
            "joints": joints[:, self.threshold],
        }
        named = {f"{self.result_prefix}{name}": value.float() for name, value in results.items()}
        return {**named, f"{self.result_prefix}instances": instances}


class PCKh(JointAccuracy):
    """MPII's metric (Andriluka et al., CVPR 2014): distances of at most 0.5 ``head_size`` are correct.

    ``head_size`` is 0.6 times the diagonal of the head box. Results: see `JointAccuracy`.

    Args:
        joint_names: K names.
        prefix: prefix of the result names.
    """

    def __init__(self, joint_names: Sequence[str] = MPII_JOINTS, prefix: str = "") -> None:
        super().__init__(joint_names, 50, prefix)

    def reference_lengths(self, keypoints: Tensor, labeled: Tensor, head_size: Tensor | None) -> Tensor:
        if head_size is None:
            raise UserError("PCKh: expected head_size, found none; use PCK for data without head boxes")
        return head_size.double()


class PCK(JointAccuracy):
    """PCK, or PDJ: distances of at most 0.2 torso diameters are correct (Sapp and Taskar, CVPR 2013).

    The torso diameter is the distance from the left shoulder to the right hip. ``curve`` is the PDJ curve of Toshev and
    Szegedy, CVPR 2014. Results: see `JointAccuracy`.

    Args:
        joint_names: K names, those of the torso included.
        prefix: prefix of the result names.
    """

    def __init__(self, joint_names: Sequence[str], prefix: str = "") -> None:
        super().__init__(joint_names, 20, prefix)
        missing = [name for name in TORSO if name not in self.joint_names]
        if missing:
            raise UserError(f"PCK: expected joints {' and '.join(TORSO)} for the torso, found no {missing[0]}")

    def reference_lengths(self, keypoints: Tensor, labeled: Tensor, head_size: Tensor | None) -> Tensor:
        a, b = (self.joint_names.index(name) for name in TORSO)
        diameter = torch.linalg.vector_norm(keypoints[:, a] - keypoints[:, b], dim=-1)
        return torch.where(labeled[:, a] & labeled[:, b], diameter, torch.nan)


class PCP(Metric):
    """Percentage of correct parts (Ferrari et al., CVPR 2008) of ten sticks: head, torso and four limbs of two sticks.

    The torso connects the centers of shoulders and hips. A stick is correct if the errors of its ends are at most half
    its true length: both of them (strict), or their mean (relaxed). The literature uses both under one name. A stick
    counts if all its joints are labeled.

    ``compute`` returns values in 0..1, nan without sticks: ``head``, ``torso``, ``upper_arm``, ``forearm``,
    ``upper_leg``, ``lower_leg``, each the mean over its sticks, and ``total``, the mean over all sticks.

    Args:
        joint_names: K names, which define the sticks.
        strict: see above.
        prefix: prefix of the result names.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    correct: Tensor
    counted: Tensor

    def __init__(self, joint_names: Sequence[str], strict: bool = True, prefix: str = "") -> None:
        super().__init__()
        self.joint_names, self.strict, self.result_prefix = list(joint_names), strict, prefix
        self.sticks = [
            (part, tuple([self.joint_names.index(name) for name in end] for end in stick))
            for part, sticks in STICKS.items()
            for stick in sticks
            if all(name in self.joint_names for end in stick for name in end)
        ]
        for name in ("correct", "counted"):
            self.add_state(name, torch.zeros(len(self.sticks), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, keypoints: Tensor, labeled: Tensor, head_size: Tensor | None = None) -> None:
        """Add people, see `JointAccuracy.update`; ``head_size`` is not used."""
        _check_shapes(preds, keypoints, labeled, self.joint_names)
        correct, counted = [], []
        for _, ends in self.sticks:
            found, true = ([points.double()[:, end].mean(1) for end in ends] for points in (preds, keypoints))
            length = torch.linalg.vector_norm(true[0] - true[1], dim=-1)
            errors = torch.stack([torch.linalg.vector_norm(f - t, dim=-1) for f, t in zip(found, true, strict=True)])
            known = labeled[:, [joint for end in ends for joint in end]].all(1)
            error = errors.amax(0) if self.strict else errors.mean(0)
            correct.append((known & (error <= 0.5 * length)).sum())
            counted.append(known.sum())
        if self.sticks:
            self.correct, self.counted = self.correct + torch.stack(correct), self.counted + torch.stack(counted)

    def compute(self) -> dict[str, Tensor]:
        """Return the results listed above."""
        rates = self.correct.double() / self.counted
        parts = {part: [i for i, (p, _) in enumerate(self.sticks) if p == part] for part in STICKS}
        means = {**{part: rates[members].nanmean() for part, members in parts.items()}, "total": rates.nanmean()}
        return {f"{self.result_prefix}{name}": value.float() for name, value in means.items()}


def _check_shapes(preds: Tensor, keypoints: Tensor, labeled: Tensor, joint_names: Sequence[str]) -> None:
    expected = (*labeled.shape, 2)
    if preds.shape != expected or keypoints.shape != expected or labeled.shape[1:] != (len(joint_names),):
        raise UserError(
            f"keypoints: expected predictions and ground truth (B,{len(joint_names)},2), labeled "
            f"(B,{len(joint_names)}), found {tuple(preds.shape)}, {tuple(keypoints.shape)} and {tuple(labeled.shape)}"
        )
