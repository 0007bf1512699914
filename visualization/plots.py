"""Plots of evaluation results: confusion matrices, precision-recall curves, IoU bars and PCK curves."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visualization.drawing import class_name
from visualization.segmentation import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RED_LINE, DARK = "#c82328", "#1c1e22"
MAX_LABEL = 22  # characters of a class name
MAX_CELL_TEXTS = 20  # classes up to which the cells of a confusion matrix show numbers
MAX_AXIS_LABELS = 60  # classes up to which its axes show names
MAX_CURVES = 20  # named precision-recall curves; of more classes the best and the worst
MAX_BARS = 60  # IoU bars; of more classes the best and the worst
PCK_GROUPS = ("head", "shoulder", "elbow", "wrist", "hip", "knee", "ankle", "total")  # rows of ``curve``
PCK_TITLES = {"pckh": "PCKh", "pck": "PCK"}


def plot_confusion_matrix(counts: Tensor, class_names: Sequence[str] | None, title: str) -> Image.Image:
    """Plot a confusion matrix with normalized rows; the row of a class without samples is empty.

    Args:
        counts: (C, C), rows are true classes, columns predicted classes.
        class_names: C names; None for ``class <index>``.
        title: text above the plot, followed by the accuracy.
    """
    from matplotlib.colors import Normalize, PowerNorm

    classes = len(counts)
    totals = counts.sum(dim=1, keepdim=True)
    rates = torch.where(totals > 0, counts / totals.clamp(min=1), torch.nan).double().numpy()
    accuracy = counts.diagonal().sum().item() / max(1, counts.sum().item())
    side = max(4.5, 3.2 + (0.42 * classes if classes <= MAX_CELL_TEXTS else min(10.0, 0.16 * classes)))
    figure = _new_figure(side + 0.8, side)
    axes = figure.add_subplot()
    # With many classes most confusions are a few percent: the square root makes them visible.
    norm = Normalize(0, 1) if classes <= MAX_CELL_TEXTS else PowerNorm(0.5, 0, 1)
    mesh = axes.imshow(rates, cmap="Blues", norm=norm, interpolation="nearest")
    axes.set_facecolor("#e4e4e4")
    axes.set_title(f"{title}: {100 * accuracy:.1f}% correct", fontsize=11, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("ground truth (rows sum to 1)")
    figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02)
    if classes <= MAX_AXIS_LABELS:
        names = [class_name(i, class_names) for i in range(classes)]
        labels = [name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + "…" for name in names]
        size = 9 if classes <= MAX_CELL_TEXTS else 6
        axes.set_xticks(range(classes), labels, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(classes), labels, fontsize=size, parse_math=False)
        axes.tick_params(length=0)
    if classes <= MAX_CELL_TEXTS:
        # Most cells are zero; their text would hide the others.
        for i, j in np.argwhere(np.nan_to_num(rates) >= 0.005).tolist():
            text = "1" if rates[i, j] > 0.995 else f"{rates[i, j]:.2f}".lstrip("0")
            color = "white" if rates[i, j] > 0.55 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    return _render(figure, bbox_inches="tight")


def plot_precision_recall(precision: Tensor, ap: Tensor, class_names: Sequence[str] | None, title: str) -> Image.Image:
    """Plot one precision-recall curve per class; the legend lists average precisions, best first.

    Args:
        precision: (C, 101), at recalls 0, 0.01 ... 1.
        ap: average precision (C,), nan for a class without objects.
        class_names: C names; None for ``class <index>``.
        title: text above the plot, followed by the mean.
    """
    from matplotlib import colormaps

    figure = _new_figure(7.5, 5)
    axes = figure.add_subplot()
    measured = _ranked(ap)
    named = _best_and_worst(measured, MAX_CURVES)
    recall = [k / 100 for k in range(101)]
    for rank, i in enumerate(measured):
        label = f"{class_name(i, class_names)[:MAX_LABEL]} {float(ap[i]):.3f}" if i in named else None
        color = colormaps["turbo"](0.05 + 0.9 * rank / max(1, len(measured) - 1)) if label else "#cccccc"
        # The precision is 0 at recalls that are not reached; end the curve before them.
        curve = precision[i].tolist()
        reached = sum(value > 0 for value in curve)
        axes.plot(recall[:reached], curve[:reached], color=color, label=label, linewidth=1.6)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(f"{title}: mean average precision {float(ap.nanmean()):.3f}", fontsize=11, parse_math=False)
    axes.grid(alpha=0.3)
    if named:
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _render(figure)


def plot_class_iou(iou: Tensor, class_names: Sequence[str] | None, title: str) -> Image.Image:
    """Plot one IoU bar per class in its color, best on top, and the mean.

    Args:
        iou: (C,), nan for a class that does not occur; it has no bar.
        class_names: C names; None for ``class <index>``.
        title: text above the plot, followed by the mean.
    """
    drawn = _best_and_worst(_ranked(iou), MAX_BARS)
    figure = _new_figure(7, max(2.2, 1 + 0.24 * len(drawn)))
    axes = figure.add_subplot()
    values, rows = [float(iou[i]) for i in drawn], list(range(len(drawn)))
    colors = [tuple(PALETTE[i] / 255) for i in drawn]
    axes.barh(rows, values, color=colors, edgecolor=DARK, linewidth=0.5, height=0.75)
    names = [class_name(i, class_names)[:MAX_LABEL] for i in drawn]
    axes.set_yticks(rows, names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    for row, value in zip(rows, values, strict=True):
        axes.text(value + 0.01, row, f"{value:.3f}", va="center", fontsize=8)
    mean = float(iou.nanmean())
    axes.axvline(mean, color=RED_LINE, linewidth=1.2, linestyle="--")
    axes.set(xlim=(0, 1.08), xlabel="intersection over union")
    axes.set_title(f"{title}: mean intersection over union {mean:.3f}", fontsize=11, parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return _render(figure)


def plot_pck(curve: Tensor, rows: Sequence[dict[str, Any]], metric: Literal["pckh", "pck"], title: str) -> Image.Image:
    """Plot the fraction of joints within each distance, one line per group of joints, beside a table of all joints.

    Args:
        curve: (8, 51), rows as in `PCK_GROUPS`, at distances 0, 0.01 ... 0.5.
        rows: ``joint``, ``instances`` and the metric, "" if there are no instances.
        metric: the distance is in head sizes for ``pckh``, in torso sizes for ``pck``.
        title: text above the plot.
    """
    figure = _new_figure(10, 4.6)
    axes, beside = figure.subplots(1, 2, width_ratios=(7, 3))
    distances, threshold = np.arange(51) / 100, {"pckh": 50, "pck": 20}[metric]
    for name, values in zip(PCK_GROUPS, curve.tolist(), strict=True):
        style = {"color": DARK, "linewidth": 2.6} if name == "total" else {"linewidth": 1.2}
        axes.plot(distances, values, label=f"{name} {values[threshold]:.3f}", **style)
    axes.axvline(threshold / 100, color=RED_LINE, linewidth=1, linestyle="--")
    unit = {"pckh": "heads", "pck": "torsos"}[metric]
    axes.set(xlim=(0, 0.5), ylim=(0, 1), xlabel=f"distance in {unit}", ylabel="joints found")
    axes.set_title(f"{title}: {PCK_TITLES[metric]}", fontsize=11, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right", framealpha=0.9)
    beside.axis("off")
    cells = [[row["joint"], row["instances"], "" if row[metric] == "" else f"{row[metric]:.3f}"] for row in rows]
    columns = ["joint", "labeled", PCK_TITLES[metric]]
    table = beside.table(cells, colLabels=columns, colWidths=(0.5, 0.25, 0.25), bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for cell in table.get_celld().values():
        cell.set_linewidth(0.3)
    return _render(figure)


def _ranked(values: Tensor) -> list[int]:
    """Return the classes with a value, best first."""
    order = values.nan_to_num(-1).argsort(descending=True, stable=True).tolist()
    return [i for i in order if values[i] == values[i]]


def _best_and_worst(ranked: list[int], count: int) -> list[int]:
    return ranked if len(ranked) <= count else [*ranked[: count // 2], *ranked[-count // 2 :]]


def _new_figure(width: float, height: float) -> Figure:
    """Create a figure in inches without pyplot, which keeps global state and looks for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _render(figure: Figure, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The font draws boxes for scripts that it lacks; one warning per glyph does not help.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", **options)
    return Image.open(buffer).convert("RGB")
