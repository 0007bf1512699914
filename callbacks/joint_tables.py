"""PCKh or PCK per joint, and its curves over the distance."""

from __future__ import annotations

from typing import Any, Literal

from PIL import Image
from torch import Tensor

from callbacks.class_tables import ClassTables, Rows, rounded
from visualization.drawing import class_name
from visualization.plots import plot_pck


class JointTables(ClassTables):
    """Write instances and the metric (0..1, empty without instances) per joint, and plot the curves.

    Reads ``<metric>/curve`` (8, 51), ``<metric>/joints`` and ``<metric>/instances`` (K,) of ``epoch_results[split]``
    (see ``lightning_modules/pose/metrics.py``). Writes ``per_joint_<metric>_<split>.csv`` and
    ``<split>_<metric>_step=...png``; see `ClassTables`.

    Args:
        metric: the metric of the table.
        keep: see `ClassTables`.
    """

    title = "joints"
    names_attribute = "joint_names"

    def __init__(self, metric: Literal["pckh", "pck"], keep: int = 20) -> None:
        super().__init__(keep)
        self.metric = metric
        self.requires = frozenset(f"{metric}/{name}" for name in ("curve", "joints", "instances"))
        self.table, self.figure, self.wandb_key = f"per_joint_{metric}", metric, f"{metric}_curve"

    def rows(self, results: dict[str, Tensor], names: Any) -> Rows:
        values, counts = (results[f"{self.metric}/{name}"].tolist() for name in ("joints", "instances"))
        return [
            {"joint": class_name(k, names), "instances": counts[k], self.metric: rounded(value)}
            for k, value in enumerate(values)
        ]

    def plot(self, results: dict[str, Tensor], rows: Rows, names: Any, title: str) -> Image.Image:
        return plot_pck(results[f"{self.metric}/curve"], rows, self.metric, title)
