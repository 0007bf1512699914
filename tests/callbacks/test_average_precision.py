"""Tables and curves of average precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from callbacks.average_precision import AveragePrecision
from callbacks.class_tables import format_table
from callbacks.metrics_file import MetricsFile
from lightning_modules.components.average_precision import VOCMeanAP
from tests.callbacks.tiny import Tiny, loader, trainer
from tests.visualization.predictions import DETECTIONS, GROUND_TRUTH
from visualization.plots import plot_precision_recall


class Detected(Tiny):
    """A module whose validation has average precisions; the third class has no object."""

    def on_validation_epoch_end(self) -> None:
        metric = VOCMeanAP(3)
        metric.update([DETECTIONS], [GROUND_TRUTH["target"]])
        self.epoch_results["val"] = {key: value for key, value in metric.compute().items() if value.ndim}


def test_average_precisions_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t = trainer(tmp_path, callbacks=[AveragePrecision()], logger=[MetricsFile(tmp_path)])
    t.fit(Detected(), loader(), loader())
    assert "no object" not in capsys.readouterr().out
    assert list((tmp_path / "figures").glob("val_precision_recall_step=*.png"))
    lines = (tmp_path / "per_class_ap_val.csv").read_text().splitlines()
    assert lines[0] == "class,objects,detections,ap"
    assert lines[1].startswith("red,1,2,1.0")
    assert lines[3].endswith("0,1,")
    trainer(tmp_path, callbacks=[AveragePrecision()]).validate(Detected(), loader(), verbose=False)
    out = capsys.readouterr().out
    assert "no object" in out
    assert "1.0000" in out


def test_curves_of_many_classes() -> None:
    metric = VOCMeanAP(40)
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(40, 1)
    labels = torch.arange(40)
    metric.update([{"boxes": boxes, "scores": torch.rand(40), "labels": labels}], [{"boxes": boxes, "labels": labels}])
    results = metric.compute()
    rows = AveragePrecision().rows(results, None)
    assert len(rows) == 40
    assert format_table(rows).count("1.0000") == 40
    assert plot_precision_recall(results["precision"], results["ap"], None, "$title$").width == 900
