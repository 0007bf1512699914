"""How well each class is detected: average precisions as a table, precision-recall curves as an image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from torch import Tensor

from callbacks.class_tables import ClassTables, asked_for, write_csv
from visualization.drawing import class_name

NAMED = 20  # up to so many classes have a curve with a name, beyond only the best and the worst ones


class AveragePrecision(ClassTables):
    """Writes what a detector's metrics say of each class, after each evaluation.

    It takes ``ap`` (C,), ``precision`` (C,101), ``objects`` (C,) and ``detections`` (C,) of ``epoch_results[split]``,
    see ``lightning_modules/detection/metrics.py``, and writes, split being ``val`` or ``test``:

    - ``<run>/per_class_<split>.csv``: class, objects, detections, average precision; of the latest evaluation.
      ``train.py validate`` and ``test`` print it too.
    - ``<run>/images/<split>_precision_recall_step=<global step, 8 digits>.png``; also to W&B.
    """

    title = "average precision"
    takes = frozenset({"ap", "precision", "objects", "detections"})

    def write(self, results: dict[str, Tensor], class_names: Any, split: str, trainer: pl.Trainer) -> None:
        rows = per_class_rows(results, class_names)
        write_csv(Path(trainer.default_root_dir) / f"per_class_{split}.csv", rows)
        picture = draw_curves(results, class_names, f"{split}, step {trainer.global_step}")
        self.save(picture, trainer, split, "precision_recall", "precision_recall")
        if asked_for(trainer):
            print(as_text(rows), flush=True)


def per_class_rows(results: dict[str, Tensor], class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """One row a class; the average precision (0..1) of one without objects is empty."""
    columns = (results[name].tolist() for name in ("objects", "detections", "ap"))
    return [
        {
            "class": class_name(i, class_names),
            "objects": objects,
            "detections": detections,
            "ap": "" if ap != ap else round(ap, 4),
        }
        for i, (objects, detections, ap) in enumerate(zip(*columns, strict=True))
    ]


def as_text(rows: list[dict[str, Any]]) -> str:
    """The rows under their columns' names."""
    width = max(len("class"), *(len(row["class"]) for row in rows))
    lines = [f"{'class':{width}}  objects  detections  ap"]
    lines += [
        f"{row['class']:{width}}  {row['objects']:7}  {row['detections']:10}  "
        + ("no object" if row["ap"] == "" else f"{row['ap']:.4f}")
        for row in rows
    ]
    return "\n".join(lines)


def draw_curves(results: dict[str, Tensor], class_names: Sequence[str] | None, title: str) -> Image.Image:
    """Precision over recall, a curve a class; the legend has their average precisions, best first."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ap = results["ap"]
    measured = [i for i in ap.nan_to_num(-1).argsort(descending=True).tolist() if ap[i] == ap[i]]
    named = measured if len(measured) <= NAMED else [*measured[: NAMED // 2], *measured[-NAMED // 2 :]]
    recall = [k / 100 for k in range(101)]
    for place, i in enumerate(measured):
        label = f"{class_name(i, class_names)[:22]} {float(ap[i]):.3f}" if i in named else None
        color = colormaps["turbo"](0.05 + 0.9 * place / max(1, len(measured) - 1)) if label else "#cccccc"
        # A recall that is not reached has precision 0: the curve ends before it.
        curve = results["precision"][i].tolist()
        reached = sum(value > 0 for value in curve)
        axes.plot(recall[:reached], curve[:reached], color=color, label=label, linewidth=1.6)
    mean = float(ap.nanmean())
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(f"{title}: mean average precision {mean:.3f}", fontsize=11, parse_math=False)
    axes.grid(alpha=0.3)
    if named:
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
