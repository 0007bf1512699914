"""How well each class of pixels is found: intersections over union as a table and as bars."""

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
from visualization.segmentation import palette

DRAWN = 60  # up to so many classes have a bar, beyond only the best and the worst ones


class ClassIoU(ClassTables):
    """Writes what a segmentation's metrics say of each class, after each evaluation.

    It takes ``iou`` (C,) and ``confusion_matrix`` (C,C), rows = truth, of ``epoch_results[split]``, see
    ``lightning_modules/segmentation/metrics.py``, and writes, split being ``val`` or ``test``:

    - ``<run>/per_class_iou_<split>.csv``: class, pixels, iou, accuracy; of the latest evaluation. ``train.py validate``
      and ``test`` print it too.
    - ``<run>/images/<split>_iou_step=<global step, 8 digits>.png``; also to W&B.
    """

    title = "intersections over union"
    takes = frozenset({"iou", "confusion_matrix"})

    def write(self, results: dict[str, Tensor], class_names: Any, split: str, trainer: pl.Trainer) -> None:
        rows = per_class_rows(results["iou"], results["confusion_matrix"], class_names)
        write_csv(Path(trainer.default_root_dir) / f"per_class_iou_{split}.csv", rows)
        picture = draw_bars(results["iou"], class_names, f"{split}, step {trainer.global_step}")
        self.save(picture, trainer, split, "iou", "class_iou")
        if asked_for(trainer):
            print(as_text(rows), flush=True)


def per_class_rows(iou: Tensor, counts: Tensor, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """One row a class: its true pixels, intersection over union and accuracy (0..1), empty where there are none."""
    pixels, right = counts.sum(1).tolist(), counts.diagonal().tolist()
    return [
        {
            "class": class_name(i, class_names),
            "pixels": pixels[i],
            "iou": "" if value != value else round(value, 4),
            "accuracy": round(right[i] / pixels[i], 4) if pixels[i] else "",
        }
        for i, value in enumerate(iou.tolist())
    ]


def as_text(rows: list[dict[str, Any]]) -> str:
    """The rows under their columns' names."""
    width = max(len("class"), *(len(row["class"]) for row in rows))
    digits = max(len("pixels"), *(len(str(row["pixels"])) for row in rows))

    def number(value: Any) -> str:
        return "     -" if value == "" else f"{value:.4f}"

    lines = [f"{'class':{width}}  {'pixels':>{digits}}     iou  accuracy"]
    lines += [
        f"{row['class']:{width}}  {row['pixels']:{digits}}  {number(row['iou'])}    {number(row['accuracy'])}"
        for row in rows
    ]
    return "\n".join(lines)


def draw_bars(iou: Tensor, class_names: Sequence[str] | None, title: str) -> Image.Image:
    """A bar a class in its color, the best on top, and the mean; classes that do not occur have none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = [i for i in iou.nan_to_num(-1).argsort(descending=True, stable=True).tolist() if iou[i] == iou[i]]
    drawn = order if len(order) <= DRAWN else [*order[: DRAWN // 2], *order[-DRAWN // 2 :]]
    figure = Figure(figsize=(7, max(2.2, 1 + 0.24 * len(drawn))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [float(iou[i]) for i in drawn]
    places = list(range(len(drawn)))
    colors = [tuple(palette()[i] / 255) for i in drawn]
    axes.barh(places, values, color=colors, edgecolor="#1c1e22", linewidth=0.5, height=0.75)
    names = [class_name(i, class_names)[:22] for i in drawn]
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    for place, value in zip(places, values, strict=True):
        axes.text(value + 0.01, place, f"{value:.3f}", va="center", fontsize=8)
    mean = float(iou.nanmean())
    axes.axvline(mean, color="#c82328", linewidth=1.2, linestyle="--")
    axes.set(xlim=(0, 1.08), xlabel="intersection over union")
    axes.set_title(f"{title}: mean intersection over union {mean:.3f}", fontsize=11, parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
