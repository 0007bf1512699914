"""How well each joint is found: PCKh or PCK as a table, and its curves over the distance."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from torch import Tensor

from callbacks.class_tables import ClassTables, asked_for, write_csv
from visualization.drawing import class_name

GROUPS = ("head", "shoulder", "elbow", "wrist", "hip", "knee", "ankle", "total")  # the rows of ``curve``
PRINTED = {"pckh": "PCKh", "pck": "PCK"}


class JointTables(ClassTables):
    """Writes what PCKh or PCK says of each joint, after each evaluation.

    It takes ``<metric>/curve`` (8,51), ``<metric>/joints`` and ``<metric>/instances`` (K,) of ``epoch_results[split]``,
    see ``lightning_modules/pose/metrics.py``, and writes, split being ``val`` or ``test``:

    - ``<run>/per_joint_<metric>_<split>.csv``: joint, instances and the metric; of the latest evaluation.
      ``train.py validate`` and ``test`` print it too.
    - ``<run>/images/<split>_<metric>_step=<global step, 8 digits>.png``: the curves and the table; also to W&B.

    Args:
        metric: whose results.
        keep: see `ClassTables`.
    """

    title = "joints"
    names = "joint_names"

    def __init__(self, metric: Literal["pckh", "pck"], keep: int = 20) -> None:
        super().__init__(keep)
        self.metric = metric
        self.takes = frozenset(f"{metric}/{name}" for name in ("curve", "joints", "instances"))

    def write(self, results: dict[str, Tensor], class_names: Any, split: str, trainer: pl.Trainer) -> None:
        values, counts = (results[f"{self.metric}/{name}"].tolist() for name in ("joints", "instances"))
        rows: list[dict[str, Any]] = [
            {
                "joint": class_name(k, class_names),
                "instances": counts[k],
                self.metric: "" if value != value else round(value, 4),
            }
            for k, value in enumerate(values)
        ]
        write_csv(Path(trainer.default_root_dir) / f"per_joint_{self.metric}_{split}.csv", rows)
        title = f"{split}, step {trainer.global_step}"
        picture = draw_curves(results[f"{self.metric}/curve"], rows, self.metric, title)
        self.save(picture, trainer, split, self.metric, f"{self.metric}_curve")
        if asked_for(trainer):
            width = max(len(row["joint"]) for row in rows)
            for row in rows:
                value = row[self.metric]
                print(f"{row['joint']:{width}} {row['instances']:7d}  {value if value == '' else format(value, '.4f')}")


def draw_curves(
    curve: Tensor, rows: Sequence[dict[str, Any]], metric: Literal["pckh", "pck"], title: str
) -> Image.Image:
    """The part of the joints that are found within each distance, a line a group and a wide one in total; and a table.

    Args:
        curve: float (8,51), at distances 0, 0.01, ... 0.5, rows as in `GROUPS`.
        rows: ``joint``, ``instances`` and the metric of each joint, as `JointTables` writes them.
        metric: names the distances' unit.
        title: put above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, beside = figure.subplots(1, 2, width_ratios=(7, 3))
    distances, decided = np.arange(51) / 100, {"pckh": 50, "pck": 20}[metric]
    for name, values in zip(GROUPS, curve.tolist(), strict=True):
        total = name == "total"
        label = f"{name} {values[decided]:.3f}"
        style = {"color": "#1c1e22", "linewidth": 2.6} if total else {"linewidth": 1.2}
        axes.plot(distances, values, label=label, **style)
    axes.axvline(decided / 100, color="#c82328", linewidth=1, linestyle="--")
    unit = {"pckh": "heads", "pck": "torsos"}[metric]
    axes.set(xlim=(0, 0.5), ylim=(0, 1), xlabel=f"distance in {unit}", ylabel="joints found")
    axes.set_title(f"{title}: {PRINTED[metric]}", fontsize=11, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right", framealpha=0.9)
    beside.axis("off")
    cells = [[row["joint"], row["instances"], "" if row[metric] == "" else f"{row[metric]:.3f}"] for row in rows]
    table = beside.table(
        cells, colLabels=["joint", "labeled", PRINTED[metric]], colWidths=(0.5, 0.25, 0.25), bbox=(0, 0, 1, 1)
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for cell in table.get_celld().values():
        cell.set_linewidth(0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
