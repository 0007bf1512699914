"""What is measured of poses: PCKh as MPII's benchmark does it, PCK by the torso (PDJ) and PCP as LSP's papers do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from errors import UserError

MPII_JOINTS = [
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax",
    "upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow",
    "left_wrist",
]  # fmt: skip

#: What is reported together. The benchmark's head is the upper neck and the top of the head.
GROUPS = {
    "head": ("upper_neck", "head_top"),
    **{name: (f"right_{name}", f"left_{name}") for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")},
}
UNCOUNTED = ("pelvis", "thorax")
STEPS = 50  # thresholds are 0, 0.01, ... 0.5
TORSO = ("left_shoulder", "right_hip")

#: The ten sticks, each from the mean of some joints to the mean of others.
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
    """What every system that finds one person's joints is measured by; `update_pose_metrics` adds a batch.

    - ``pckh``, MPII's: `PCKh`, as ``pckh/total`` and so on.
    - ``pck``, for data without heads' boxes (LSP): `PCK` as ``pck/...``, `PCP` as ``pcp/...`` and ``pcp_relaxed/...``.

    Raises:
        ValueError: another metric.
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
    # No compute groups: torchmetrics would join two for good where their first batch has equal counts.
    return MetricCollection(metrics, compute_groups=False)


def update_pose_metrics(metrics: MetricCollection, predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
    """Adds a batch, measured in the pixels of the images on disk.

    Args:
        metrics: of `pose_metrics`.
        predictions: ``keypoints`` float (B,K,2) in the pixels of the batch's images.
        batch: ``keypoints``, ``labeled``, ``head_size`` and ``to_original``, see the batch contract.
    """
    found, true = (apply_affine(points["keypoints"], batch["to_original"]) for points in (predictions, batch))
    metrics.update(found, true, batch["labeled"], batch["head_size"])


def apply_affine(points: Tensor, matrix: Tensor) -> Tensor:
    """Maps points (B,K,2) by matrices (B,2,3): float64 (B,K,2)."""
    matrix = matrix.double()
    return points.double() @ matrix[:, :, :2].mT + matrix[:, None, :, 2]


class JointAccuracy(Metric):
    """The part of the labeled joints that are found within a distance, for thresholds 0, 0.01, ... 0.5 of a unit.

    A subclass says with `units` what each person's unit is. A person without one is left out and counted. Hidden joints
    count where they are labeled. A joint counts as found at exactly the threshold.

    ``compute`` gives, over all samples of all ranks, at the metric's own threshold:

    - ``head``, ``shoulder``, ``elbow``, ``wrist``, ``hip``, ``knee``, ``ankle``: the mean of the two joints' values,
      0..1, float32 scalars, as are the next three.
    - ``total``: over all labeled joints but pelvis and thorax. Not the mean of the values above.
    - ``total_01``: the same at 0.1, which tells apart what 0.5 does not: a pixel's shift, too.
    - ``auc``: the area under the curve of ``total`` over all thresholds, divided by its width.
    - ``left_out``: how many people have no unit, float32 scalar.
    - ``curve``: float32 (8,51), at each threshold, of the seven groups and in total.
    - ``joints``: float32 (K,), of each joint.
    - ``instances``: int64 (K,), how many of each are labeled.

    What has no labeled joint is nan, and left out of the mean of two.

    Args:
        joint_names: K names; groups are found by them, on any list of joints.
        threshold: in hundredths of the unit, 0 to 50.
        prefix: put before the results' names.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    counts: Tensor
    left_out: Tensor

    def __init__(self, joint_names: Sequence[str], threshold: int, prefix: str = "") -> None:
        super().__init__()
        if not 0 <= threshold <= STEPS:
            raise UserError(f"threshold: expected 0 to {STEPS} hundredths, found {threshold}")
        self.joint_names, self.threshold, self.result_prefix = list(joint_names), threshold, prefix
        # How many instances of each joint reach their first threshold where; those beyond all come last.
        counts = torch.zeros(len(self.joint_names), STEPS + 2, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")
        self.add_state("left_out", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def units(self, keypoints: Tensor, labeled: Tensor, head_size: Tensor | None) -> Tensor:
        """What distances are divided by, float64 (B,) in pixels; nan or 0 where a person has none."""
        raise NotImplementedError

    def update(self, preds: Tensor, keypoints: Tensor, labeled: Tensor, head_size: Tensor | None = None) -> None:
        """Adds people, all in the pixels of the images on disk.

        Args:
            preds, keypoints: float (B,K,2), found and true.
            labeled: bool (B,K).
            head_size: float (B,), nan where there is no head box.

        Raises:
            ValueError: shapes do not agree.
        """
        _check(preds, keypoints, labeled, self.joint_names)
        unit = self.units(keypoints.double(), labeled, head_size)
        usable = unit > 0
        distance = torch.linalg.vector_norm(preds.double() - keypoints.double(), dim=-1) / unit[:, None]
        thresholds = torch.arange(STEPS + 1, dtype=torch.float64, device=distance.device) / 100
        reached = torch.bucketize(distance, thresholds)
        place = reached + (STEPS + 2) * torch.arange(len(self.joint_names), device=distance.device)
        counted = (labeled & usable[:, None]).long()
        self.counts = self.counts.view(-1).scatter_add(0, place.flatten(), counted.flatten()).view_as(self.counts)
        self.left_out = self.left_out + (~usable).sum()

    def compute(self) -> dict[str, Tensor]:
        """The results named above."""
        found, instances = self.counts.cumsum(1)[:, : STEPS + 1].double(), self.counts.sum(1)
        joints = found / instances[:, None]
        counted = [i for i, name in enumerate(self.joint_names) if name not in UNCOUNTED]
        total = found[counted].sum(0) / instances[counted].sum()
        rows = []
        for names in GROUPS.values():
            members = [self.joint_names.index(name) for name in names if name in self.joint_names]
            rows.append(joints[members].nanmean(0) if members else torch.full_like(total, torch.nan))
        curve = torch.stack([*rows, total])
        results = {
            **dict(zip((*GROUPS, "total"), curve[:, self.threshold], strict=True)),
            "total_01": total[10],
            "auc": (total[1:] + total[:-1]).mean() / 2,
            "left_out": self.left_out,
            "curve": curve,
            "joints": joints[:, self.threshold],
        }
        named = {f"{self.result_prefix}{name}": value.float() for name, value in results.items()}
        return {**named, f"{self.result_prefix}instances": instances}


class PCKh(JointAccuracy):
    """MPII's measure (Andriluka et al. 2014): the unit is ``head_size``, 0.6 of the diagonal of the head's box, of which
    a joint may be half away. See `JointAccuracy`.
    """

    def __init__(self, joint_names: Sequence[str] = MPII_JOINTS, prefix: str = "") -> None:
        super().__init__(joint_names, 50, prefix)

    def units(self, keypoints: Tensor, labeled: Tensor, head_size: Tensor | None) -> Tensor:
        if head_size is None:
            raise UserError("PCKh: expected head_size, found none: measure data without heads' boxes by PCK")
        return head_size.double()


class PCK(JointAccuracy):
    """PCK, or PDJ (Sapp and Taskar 2013; Toshev and Szegedy 2014): the unit is the torso's diameter, from the left
    shoulder to the right hip, of which a joint may be a fifth away. See `JointAccuracy`; ``curve`` is PDJ's.

    Raises:
        ValueError: the joints have no such torso.
    """

    def __init__(self, joint_names: Sequence[str], prefix: str = "") -> None:
        super().__init__(joint_names, 20, prefix)
        missing = [name for name in TORSO if name not in self.joint_names]
        if missing:
            raise UserError(f"PCK: expected joints {' and '.join(TORSO)} for the torso, found no {missing[0]}")

    def units(self, keypoints: Tensor, labeled: Tensor, head_size: Tensor | None) -> Tensor:
        a, b = (self.joint_names.index(name) for name in TORSO)
        diameter = torch.linalg.vector_norm(keypoints[:, a] - keypoints[:, b], dim=-1)
        return torch.where(labeled[:, a] & labeled[:, b], diameter, torch.nan)


class PCP(Metric):
    """Percentage of correct parts (Ferrari et al. 2008) of ten sticks: the head, the torso, from the middle of the
    shoulders to that of the hips, and four limbs of two sticks each.

    A stick is right if both its ends are at most half its true length away from the true ones (strict), or if they are
    so on average (relaxed). Both are in use under one name. A stick counts where all its joints are labeled.

    ``compute`` gives, over all samples of all ranks, float32 scalars in 0..1, nan where no such stick counts: ``head``,
    ``torso``, ``upper_arm``, ``forearm``, ``upper_leg``, ``lower_leg``, each the mean of its sticks' values, and
    ``total``, the mean of all ten sticks' values.

    Args:
        joint_names: K names; sticks are found by them.
        strict: see above.
        prefix: put before the results' names.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    right: Tensor
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
        for name in ("right", "counted"):
            self.add_state(name, torch.zeros(len(self.sticks), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, keypoints: Tensor, labeled: Tensor, head_size: Tensor | None = None) -> None:
        """Adds people; see `JointAccuracy`. ``head_size`` is not looked at."""
        _check(preds, keypoints, labeled, self.joint_names)
        right, counted = [], []
        for _, ends in self.sticks:
            found, true = ([points.double()[:, end].mean(1) for end in ends] for points in (preds, keypoints))
            length = torch.linalg.vector_norm(true[0] - true[1], dim=-1)
            errors = torch.stack([torch.linalg.vector_norm(f - t, dim=-1) for f, t in zip(found, true, strict=True)])
            known = labeled[:, [joint for end in ends for joint in end]].all(1)
            error = errors.amax(0) if self.strict else errors.mean(0)
            right.append((known & (error <= 0.5 * length)).sum())
            counted.append(known.sum())
        if self.sticks:
            self.right, self.counted = self.right + torch.stack(right), self.counted + torch.stack(counted)

    def compute(self) -> dict[str, Tensor]:
        """The results named above."""
        rates = self.right.double() / self.counted
        parts = {part: [i for i, (p, _) in enumerate(self.sticks) if p == part] for part in STICKS}
        means = {**{part: rates[members].nanmean() for part, members in parts.items()}, "total": rates.nanmean()}
        return {f"{self.result_prefix}{name}": value.float() for name, value in means.items()}


def _check(preds: Tensor, keypoints: Tensor, labeled: Tensor, joint_names: Sequence[str]) -> None:
    expected = (*labeled.shape, 2)
    if preds.shape != expected or keypoints.shape != expected or labeled.shape[1:] != (len(joint_names),):
        raise UserError(
            f"expected keypoints (B,{len(joint_names)},2), the true ones too, and labeled (B,{len(joint_names)}), "
            f"found {tuple(preds.shape)}, {tuple(keypoints.shape)} and {tuple(labeled.shape)}"
        )
