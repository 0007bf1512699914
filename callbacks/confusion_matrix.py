"""Which classes are taken for which: the confusion matrix as an image, the classes as a table."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from callbacks.class_tables import ClassTables, write_csv
from visualization.drawing import class_name

ANNOTATED = 20  # up to so many classes the numbers are written into the cells
NAMED = 60  # up to so many the axes carry names
LISTED = 100  # beyond so many the most confused pairs are listed too
PAIRS = 20


class ConfusionMatrix(ClassTables):
    """Draws ``epoch_results[split]["confusion_matrix"]``, (C,C) counts with rows = truth, after each evaluation.

    Writes, split being ``val`` or ``test``:

    - ``<run>/images/<split>_confusion_step=<global step, 8 digits>.png``, each row divided by its sum; also to W&B.
    - ``<run>/per_class_<split>.csv``: class, count, accuracy, most confused with, and the share of that; of the latest
      evaluation.
    - ``<run>/confused_pairs_<split>.csv`` for more than 100 classes: the 20 most frequent confusions.
    """

    title = "confusion matrix"
    takes = frozenset({"confusion_matrix"})

    def write(self, results: dict[str, Tensor], class_names: Any, split: str, trainer: pl.Trainer) -> None:
        counts, run = results["confusion_matrix"], Path(trainer.default_root_dir)
        write_csv(run / f"per_class_{split}.csv", per_class_rows(counts, class_names))
        if len(counts) > LISTED:
            write_csv(run / f"confused_pairs_{split}.csv", confused_pairs(counts, class_names))
        picture = draw_confusion(counts, class_names, f"{split}, step {trainer.global_step}")
        self.save(picture, trainer, split, "confusion", "confusion_matrix")


def per_class_rows(counts: Tensor, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """One row a class: its number of samples, its accuracy (0..1) and what it is most often taken for."""
    rows = []
    for i, row in enumerate(counts.long()):
        total = int(row.sum())
        others = row.clone()
        others[i] = 0
        j = int(others.argmax())
        confused = int(others[j])
        rows.append(
            {
                "class": class_name(i, class_names),
                "count": total,
                "accuracy": round(int(row[i]) / total, 6) if total else "",
                "most_confused_with": class_name(j, class_names) if confused else "",
                "confused_share": round(confused / total, 6) if confused else "",
            }
        )
    return rows


def confused_pairs(counts: Tensor, class_names: Sequence[str] | None, count: int = PAIRS) -> list[dict[str, Any]]:
    """The most frequent confusions, most frequent first: truth, predicted, count, share of the truth's samples."""
    wrong = counts.long().clone().fill_diagonal_(0)
    values, flat = wrong.flatten().topk(min(count, wrong.numel()))
    totals = counts.long().sum(dim=1)
    rows = []
    for value, index in zip(values.tolist(), flat.tolist(), strict=True):
        truth, predicted = divmod(index, len(counts))
        if value:
            share = round(value / int(totals[truth]), 6)
            names = class_name(truth, class_names), class_name(predicted, class_names)
            rows.append({"truth": names[0], "predicted": names[1], "count": value, "share": share})
    return rows


def draw_confusion(counts: Tensor, class_names: Sequence[str] | None, title: str) -> Image.Image:
    """The matrix with every row divided by its sum, as an image; a class without samples has an empty row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure

    classes = len(counts)
    totals = counts.sum(dim=1, keepdim=True)
    shares = torch.where(totals > 0, counts / totals.clamp(min=1), torch.nan).double().numpy()
    accuracy = counts.diagonal().sum().item() / max(1, counts.sum().item())
    side = 3.2 + (0.42 * classes if classes <= ANNOTATED else min(10.0, 0.16 * classes))
    side = max(4.5, side)
    figure = Figure(figsize=(side + 0.8, side), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Among many classes a confusion is a few per cent: the square root makes it visible.
    scale = Normalize(0, 1) if classes <= ANNOTATED else PowerNorm(0.5, 0, 1)
    mesh = axes.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
    axes.set_facecolor("#e4e4e4")
    axes.set_title(f"{title}: {100 * accuracy:.1f}% right", fontsize=11, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth (rows sum to 1)")
    figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02)
    if classes <= NAMED:
        labels = [_clip(class_name(i, class_names)) for i in range(classes)]
        size = 9 if classes <= ANNOTATED else 6
        axes.set_xticks(range(classes), labels, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(classes), labels, fontsize=size, parse_math=False)
        axes.tick_params(length=0)
    if classes <= ANNOTATED:
        for i in range(classes):
            for j in range(classes):
                share = shares[i, j]
                # Zeros are most of the cells and would hide the rest.
                if share == share and share >= 0.005:
                    text = "1" if share > 0.995 else f"{share:.2f}".lstrip("0")
                    color = "white" if share > 0.55 else "black"
                    axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; a warning a glyph helps nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", bbox_inches="tight")
    return Image.open(buffer).convert("RGB")


def _clip(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
