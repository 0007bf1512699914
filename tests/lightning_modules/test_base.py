"""VisionModule: losses, metrics, normalization, parameter groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics import MetricCollection

from callbacks.metrics_file import read_metrics
from errors import UserError
from lightning_modules.base import VisionModule, compute_arrays
from lightning_modules.classification.metrics import ClassificationMetrics
from lightning_modules.detection.metrics import detection_metrics
from lightning_modules.pose.metrics import pose_metrics
from lightning_modules.schedules import Cosine
from lightning_modules.segmentation.metrics import instance_metrics, segmentation_metrics
from tests.small_system import BlobsData, SmallNet, fit

BOX, ZERO = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.zeros(1, dtype=torch.int64)
MASK = torch.ones(1, 2, 2, dtype=torch.bool)


def test_terms_and_their_sum_are_logged(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=1, log_every_n_steps=1)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "train/loss" in row]
    assert len(rows) == 6
    for row in rows:
        assert row["train/cross_entropy"] + row["train/size"] == pytest.approx(row["train/loss"], rel=1e-6)


def test_validation_is_measured_over_the_whole_set(tmp_path: Path) -> None:
    """With 13 samples in batches of 4, the mean over batches would give the last sample four times its weight."""
    trainer = fit(tmp_path, max_epochs=1)
    module = trainer.lightning_module.eval()
    data = BlobsData(batch_size=4, num_workers=0, seed=3)
    batches = list(data.val_dataloader())
    with torch.no_grad():
        confidences = [module.predict(batch["image"])["probabilities"].amax(1) for batch in batches]
    whole = float(torch.cat(confidences).mean())
    of_batches = float(torch.stack([c.mean() for c in confidences]).mean())
    logged = [row["val/confidence"] for row in read_metrics(tmp_path / "metrics.csv") if "val/confidence" in row][-1]
    assert logged == pytest.approx(whole, rel=1e-5)
    assert logged != pytest.approx(of_batches, rel=1e-5)


def test_pixels_are_normalized_by_the_module() -> None:
    module = VisionModule(mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0))
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    expected = torch.tensor([(0 - 0.5) / 0.5, (0.2 - 0.25) / 0.5, 1.0])
    torch.testing.assert_close(module.preprocess(image)[0, :, 0, 0], expected)
    with pytest.raises(TypeError, match="expected uint8"):
        module.preprocess(image.float())


def test_channels_last_reaches_weights_and_images(tmp_path: Path) -> None:
    module = SmallNet()
    module.setup("fit")
    assert module.network[0].weight.is_contiguous(memory_format=torch.channels_last)
    image = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert module.preprocess(image).is_contiguous(memory_format=torch.channels_last)


class Grouped(SmallNet):
    """The last layer has 10x the learning rate and no weight decay."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        head = self.network[5]
        rest = [p for name, p in self.network.named_parameters() if not name.startswith("5.")]
        return [{"params": rest}, {"params": list(head.parameters()), "lr_scale": 10.0, "weight_decay": 0.0}]


class FakeTrainer:
    estimated_stepping_batches: float = 100


def test_parameter_groups_scale_the_rate() -> None:
    module = Grouped()
    module._trainer = FakeTrainer()  # type: ignore[assignment]
    made = module.configure_optimizers()
    first, second = made["optimizer"].param_groups
    assert second["lr"] == pytest.approx(10 * first["lr"])
    assert second["initial_lr"] == pytest.approx(10 * first["initial_lr"])
    assert second["weight_decay"] == 0
    assert made["lr_scheduler"]["interval"] == "step"


def test_what_cannot_be_scheduled_is_refused() -> None:
    module = SmallNet()
    module._trainer = FakeTrainer()  # type: ignore[assignment]
    module.schedule_factory = lambda o, n: torch.optim.lr_scheduler.ReduceLROnPlateau(o)  # type: ignore[assignment]
    with pytest.raises(UserError, match="does not resume exactly"):
        module.configure_optimizers()
    module.schedule_factory = lambda o, n: Cosine(o, n)
    module._trainer.estimated_stepping_batches = float("inf")  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"trainer\.max_epochs"):
        module.configure_optimizers()
    module.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        module.configure_optimizers()


def test_overfitting_a_few_batches_sees_the_same_ones(tmp_path: Path) -> None:
    """With overfit_batches Lightning would replace other samplers."""
    seen: list[list[str]] = []

    class Watching(SmallNet):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            seen.append(batch["id"])
            return super().training_step(batch, batch_idx)

    import tests.small_system as small

    original = small.SmallNet
    small.SmallNet = Watching  # type: ignore[misc]
    try:
        fit(tmp_path, max_epochs=3, overfit_batches=2)
    finally:
        small.SmallNet = original  # type: ignore[misc]
    assert seen == 3 * [["0", "1", "2", "3"], ["4", "5", "6", "7"]]


def test_fast_dev_run_writes_no_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, fast_dev_run=True)
    assert not list(tmp_path.glob("checkpoints/*"))


METRICS: dict[str, tuple[Any, list[tuple[Any, ...]], dict[str, tuple[int, ...]]]] = {
    "classification": (
        MetricCollection({"classification": ClassificationMetrics(1)}),
        [(torch.ones(3, 1), torch.zeros(3, dtype=torch.int64))],
        {"per_class_accuracy": (1,), "confusion_matrix": (1, 1), "top1": (), "loss": ()},
    ),
    "segmentation": (
        segmentation_metrics(1),
        [([torch.zeros(2, 2, dtype=torch.int64)], [torch.zeros(2, 2, dtype=torch.int64)])],
        {"iou": (1,), "confusion_matrix": (1, 1), "miou": ()},
    ),
    "detection": (
        detection_metrics(1, "area", False),
        [([{"boxes": BOX, "scores": torch.ones(1), "labels": ZERO}], [{"boxes": BOX, "labels": ZERO}])],
        {"ap": (1,), "precision": (1, 101), "objects": (1,), "detections": (1,), "map": ()},
    ),
    "instances": (
        instance_metrics(1, compute_coco_ap=False),
        [([{"boxes": BOX, "masks": MASK, "scores": torch.ones(1), "labels": ZERO}],
          [{"boxes": BOX, "masks": MASK, "labels": ZERO}])],
        {"ap": (1,), "objects": (1,), "detections": (1,), "apr_50": (), "apr_70": ()},
    ),
    "one joint": (
        pose_metrics(["nose"]),
        [(torch.zeros(2, 1, 2), torch.zeros(2, 1, 2), torch.ones(2, 1, dtype=torch.bool), torch.ones(2))],
        {"pckh/joints": (1,), "pckh/instances": (1,), "pckh/curve": (8, 51), "pckh/total": ()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_results_of_a_single_class_keep_their_dimensions(name: str) -> None:
    """torchmetrics squeezes them to scalars, which would be logged and missing in the tables."""
    metrics, updates, shapes = METRICS[name]
    for update in updates:
        metrics.update(*update)
    results = compute_arrays(metrics)
    assert {key: tuple(results[key].shape) for key in shapes} == shapes
    for key, shape in shapes.items():
        if len(shape) == 1 and key not in ("objects", "detections", "pckh/instances"):
            assert results[key].tolist() == [1.0]
