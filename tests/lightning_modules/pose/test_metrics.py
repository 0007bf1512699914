"""PCKh against the published table; PCKh, PCK and PCP against loops and over ranks; common mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from errors import UserError
from lightning_modules.pose.joints import MPII_JOINTS
from lightning_modules.pose.metrics import (
    JOINT_GROUPS,
    PCK,
    PCP,
    PCKh,
    apply_affine,
    choose_metric,
    pose_metrics,
    update_pose_metrics,
)

GOLDEN = Path(__file__).parents[3].parent / "shared" / "data" / "pckh"
TABLE = {
    "tompson": (96.66, 92.71, 83.36, 76.74, 81.93, 73.36, 65.45, 82.34, 28.97),
    "bearpaw-hg_s1_b1": (96.35, 93.61, 85.53, 79.56, 84.51, 78.28, 73.38, 85.08, 22.81),
    "bearpaw-hg_s8_b1": (97.44, 95.19, 90.08, 85.32, 87.48, 84.26, 80.73, 89.09, 24.49),
}
COLUMNS = (*JOINT_GROUPS, "total", "total_01")
LSP_JOINTS = MPII_JOINTS[:6] + MPII_JOINTS[10:] + MPII_JOINTS[8:10]


# --- the published table --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    if not (GOLDEN / "ground_truth.npz").is_file():
        pytest.skip("../shared/data/pckh is missing")
    content = np.load(GOLDEN / "ground_truth.npz")
    heads = 0.6 * np.linalg.norm(content["headboxes"][:, 1] - content["headboxes"][:, 0], axis=-1)
    found = {name: np.load(GOLDEN / f"{name}.npz")["preds"] for name in TABLE}
    return {"keypoints": content["joints"], "labeled": ~content["missing"], "head_size": heads, **found}


def measured(golden: dict[str, np.ndarray], name: str, shift: float = 0.0) -> dict[str, Tensor]:
    target = [torch.from_numpy(golden[key]) for key in ("keypoints", "labeled", "head_size")]
    metric = PCKh()
    for part in zip(*(t.split(100) for t in (torch.from_numpy(golden[name] + shift), *target)), strict=True):
        metric.update(*part)
    return metric.compute()


@pytest.mark.shared_data
@pytest.mark.parametrize("name", TABLE)
def test_it_equals_the_published_table(golden: dict[str, np.ndarray], name: str) -> None:
    results = measured(golden, name)
    assert tuple(round(100 * float(results[column]), 2) for column in COLUMNS) == TABLE[name]
    assert int(results["instances"][[i for i in range(16) if i not in (6, 7)]].sum()) == 38430
    assert results["skipped"] == 0


@pytest.mark.shared_data
def test_auc_equals_a_loop(golden: dict[str, np.ndarray]) -> None:
    distance = np.linalg.norm(golden["tompson"] - golden["keypoints"], axis=-1) / golden["head_size"][:, None]
    counted = np.delete(distance, [6, 7], 1)[np.delete(golden["labeled"], [6, 7], 1)]
    curve = [np.mean(counted <= t) for t in np.arange(51) / 100]
    results = measured(golden, "tompson")
    assert float(results["auc"]) == pytest.approx(np.trapezoid(curve, dx=0.01) / 0.5, abs=1e-6)
    np.testing.assert_allclose(results["curve"][-1], curve, atol=1e-6)


@pytest.mark.shared_data
def test_a_pixel_is_seen_at_a_tenth(golden: dict[str, np.ndarray]) -> None:
    """A shift of one pixel hardly changes PCKh at 0.5, but PCKh at 0.1."""
    shifted = measured(golden, "bearpaw-hg_s8_b1", -1.0)
    assert round(100 * float(shifted["total"]), 2) == 88.88
    assert round(100 * float(shifted["total_01"]), 2) == 19.29


# --- loops ----------------------------------------------------------------------------------------------------------


def some_people(seed: int, people: int = 17, joints: int = 16) -> dict[str, Tensor]:
    """Return people with errors near the thresholds; some joints are unlabeled, some people have no head box."""
    rng = np.random.default_rng(seed)
    keypoints = rng.uniform(0, 200, (people, joints, 2))
    preds = keypoints + rng.normal(0, 15, keypoints.shape)
    heads = np.where(rng.random(people) < 0.2, np.nan, rng.uniform(20, 60, people))
    arrays = {"preds": preds, "keypoints": keypoints, "labeled": rng.random((people, joints)) < 0.8}
    return {name: torch.from_numpy(array) for name, array in {**arrays, "head_size": heads}.items()}


def accuracy_by_loops(data: dict[str, Tensor], names: list[str], threshold: float, torso: bool) -> dict[str, float]:
    preds, true_points, labeled, heads = (data[k].numpy() for k in ("preds", "keypoints", "labeled", "head_size"))
    correct: dict[str, list[bool]] = {name: [] for name in names}
    skipped = 0
    for p in range(len(preds)):
        unit = heads[p]
        if torso:
            a, b = names.index("left_shoulder"), names.index("right_hip")
            unit = np.hypot(*(true_points[p, a] - true_points[p, b])) if labeled[p, a] and labeled[p, b] else np.nan
        if np.isnan(unit):
            skipped += 1
            continue
        for k, name in enumerate(names):
            if labeled[p, k]:
                correct[name].append(bool(np.hypot(*(preds[p, k] - true_points[p, k])) / unit <= threshold))
    results = {"skipped": float(skipped)}
    for group, members in JOINT_GROUPS.items():
        results[group] = float(np.mean([np.mean(correct[m]) for m in members if correct[m]]))
    results["total"] = float(np.mean([r for name in names if name not in ("pelvis", "thorax") for r in correct[name]]))
    return results


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("names", [MPII_JOINTS, LSP_JOINTS])
@pytest.mark.parametrize("kind", [PCKh, PCK])
def test_accuracies_equal_loops(seed: int, names: list[str], kind: type[Metric]) -> None:
    data = some_people(seed, joints=len(names))
    metric = kind(names)
    metric.update(**data)
    results = metric.compute()
    for name, value in accuracy_by_loops(data, names, 0.5 if kind is PCKh else 0.2, kind is PCK).items():
        assert float(results[name]) == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("strict", [True, False])
def test_pcp_equals_loops(seed: int, strict: bool) -> None:
    data = some_people(seed, joints=14)
    preds, true_points, labeled = (data[k].numpy() for k in ("preds", "keypoints", "labeled"))
    # Sticks by index in LSP's order; 14 and 15 are the centers of shoulders and hips.
    sticks = {"head": [(12, 13)], "torso": [(14, 15)], "upper_arm": [(8, 7), (9, 10)], "forearm": [(7, 6), (10, 11)]}
    sticks |= {"upper_leg": [(2, 1), (3, 4)], "lower_leg": [(1, 0), (4, 5)]}
    rates, expected = [], {}
    for part, pairs in sticks.items():
        mine = []
        for a, b in pairs:
            right = []
            for p in range(len(preds)):
                found, true = (
                    np.vstack([x[p], (x[p, 8] + x[p, 9]) / 2, (x[p, 2] + x[p, 3]) / 2]) for x in (preds, true_points)
                )
                known = [*labeled[p], labeled[p, 8] and labeled[p, 9], labeled[p, 2] and labeled[p, 3]]
                if known[a] and known[b]:
                    ends = [np.hypot(*(found[i] - true[i])) / np.hypot(*(true[a] - true[b])) for i in (a, b)]
                    right.append(max(ends) <= 0.5 if strict else sum(ends) / 2 <= 0.5)
            mine.append(np.mean(right))
        expected[part] = np.mean(mine)
        rates += mine
    metric = PCP(LSP_JOINTS, strict)
    metric.update(**data)
    results = metric.compute()
    for part, value in {**expected, "total": np.mean(rates)}.items():
        assert float(results[part]) == pytest.approx(value, abs=1e-6), part


def test_relaxed_forgives_what_strict_does_not() -> None:
    keypoints = torch.zeros(1, 14, 2)
    keypoints[0, :, 1] = 10 * torch.arange(14)
    preds = keypoints.clone()
    preds[0, LSP_JOINTS.index("right_wrist"), 0] = 6  # the forearm is 10 long
    totals = []
    for strict in (True, False):
        metric = PCP(LSP_JOINTS, strict)
        metric.update(preds, keypoints, torch.ones(1, 14, dtype=torch.bool))
        totals.append(float(metric.compute()["forearm"]))
    assert totals == [0.5, 1.0]


# --- sets, ranks, bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [PCKh, lambda: PCK(MPII_JOINTS), lambda: PCP(MPII_JOINTS)])
def test_two_unequal_ranks_equal_one(make) -> None:
    data = some_people(1, 30)
    whole, ranks = make(), [make(), make()]
    whole.update(**data)
    for metric, part in zip(ranks, (slice(0, 23), slice(23, 30)), strict=True):
        metric.update(**{name: value[part] for name, value in data.items()})
    merged = make()
    for name, reduction in merged._reductions.items():  # as torchmetrics does in compute
        setattr(merged, name, reduction(torch.stack([getattr(metric, name) for metric in ranks])))
    expected = whole.compute()
    assert all(torch.equal(value, expected[name]) for name, value in merged.compute().items())
    batches = [metric.compute() for metric in ranks]
    mean = sum(float(result["total"]) for result in batches) / 2
    assert mean != pytest.approx(float(expected["total"]), abs=1e-4)  # otherwise this test could not fail


def test_what_is_unknown_is_skipped() -> None:
    names = ["left_knee", "right_knee", "nose"]
    metric = PCKh(names)
    labeled = torch.tensor([[True, False, False], [True, True, False]])
    keypoints = torch.zeros(2, 3, 2)
    metric.update(torch.full((2, 3, 2), 1.0), keypoints, labeled, torch.tensor([10.0, float("nan")]))
    results = metric.compute()
    assert results["knee"] == results["total"] == 1
    assert results["skipped"] == 1
    assert results["head"].isnan()
    assert results["joints"][2].isnan()
    assert results["instances"].tolist() == [1, 0, 0]


def test_a_joint_that_is_not_found_is_wrong() -> None:
    metric = PCKh(["left_knee"])
    metric.update(torch.full((1, 1, 2), torch.nan), torch.zeros(1, 1, 2), torch.tensor([[True]]), torch.tensor([10.0]))
    assert metric.compute()["total"] == 0


def test_exactly_the_threshold_is_right() -> None:
    metric = PCKh(["left_knee", "right_knee"])
    preds = torch.tensor([[[5.0, 0.0], [5.001, 0.0]]])
    metric.update(preds, torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.bool), torch.tensor([10.0]))
    assert metric.compute()["joints"].tolist() == [1, 0]


def test_nothing_measured_is_nan() -> None:
    for metric in (PCKh(), PCK(MPII_JOINTS), PCP(MPII_JOINTS)):
        assert metric.compute()["total"].isnan()


def test_a_collection_measures_in_the_pixels_of_the_images() -> None:
    """In a crop at half the image's scale 6 pixels are 12, more than half of a head of 20."""
    batch = {
        "keypoints": torch.full((1, 16, 2), 10.0),
        "labeled": torch.ones(1, 16, dtype=torch.bool),
        "head_size": torch.tensor([20.0]),
        "to_original": torch.tensor([[[2.0, 0.0, 7.0], [0.0, 2.0, -3.0]]]),
    }
    assert apply_affine(batch["keypoints"], batch["to_original"])[0, 0].tolist() == [27, 17]
    predictions = {"keypoints": batch["keypoints"] + torch.tensor([6.0, 0.0])}
    metrics = pose_metrics(MPII_JOINTS)
    update_pose_metrics(metrics, predictions, batch)
    results = metrics.compute()
    assert results["pckh/total"] == 0
    expected = {f"pckh/{name}" for name in (*COLUMNS, "auc", "skipped", "curve", "joints", "instances")}
    assert results.keys() == expected
    metrics = pose_metrics(LSP_JOINTS, "pck")
    batch["labeled"] = batch["labeled"][:, :14]
    batch["keypoints"] = torch.rand(1, 14, 2)
    update_pose_metrics(metrics, {"keypoints": batch["keypoints"]}, {**batch, "head_size": torch.tensor([torch.nan])})
    results = metrics.compute()
    assert results["pck/total"] == results["pcp/total"] == results["pcp_relaxed/total"] == 1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected pckh or pck, found oks"):
        pose_metrics(MPII_JOINTS, "oks")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no left_shoulder"):
        PCK(["nose"])
    with pytest.raises(ValueError, match="expected head_size"):
        PCKh(["nose"]).update(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"keypoints: expected .* \(B,16,2\)"):
        PCKh().update(torch.zeros(1, 14, 2), torch.zeros(1, 14, 2), torch.ones(1, 14, dtype=torch.bool))


def test_data_without_head_boxes_is_measured_by_pck() -> None:
    assert choose_metric("pckh", MPII_JOINTS, True) == "pckh"
    assert choose_metric("pck", MPII_JOINTS, False) == "pck"
    with pytest.warns(UserWarning, match="no head boxes, so val/pck/total .* replaces val/pckh/total"):
        assert choose_metric("pckh", MPII_JOINTS, False) == "pck"
    with pytest.raises(UserError, match="found no head boxes and no left_shoulder"):
        choose_metric("pckh", ["nose"], False)
