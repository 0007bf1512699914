"""Recall of proposals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_bad_input_is_one_line(run_benchmark: Callable[..., Any]) -> None:
    arguments = ["--ckpt_path", "missing.ckpt", "--data.root", "missing", "--data.proposals", "missing"]
    assert run_benchmark("proposal_recall", *arguments).is_user_error("proposal_recall")
