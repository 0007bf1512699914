"""Plots of evaluation results."""

from __future__ import annotations

import torch

from visualization.plots import plot_pck


def test_curves_are_drawn_where_nothing_was_labeled() -> None:
    curve = torch.linspace(0, 1, 51).repeat(8, 1)
    curve[3] = torch.nan
    rows = [{"joint": "nose", "instances": 0, "pckh": ""}, {"joint": "left_ear", "instances": 3, "pckh": 0.5}]
    assert plot_pck(curve, rows, "pckh", "val").size == (1200, 552)
