"""Metrics of a run as CSV, one row per step: a kill loses no row, a resume duplicates none."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

FILE_NAME = "metrics.csv"
Row = dict[str, str]


class MetricsFile(Logger):
    """Write every logged scalar to ``<run_directory>/metrics.csv``.

    One row per global step; the columns are ``step``, ``epoch`` and the metrics in order of appearance. Values of the
    same step share a row. A row has been passed to the operating system when ``log_metrics`` returns, so SIGKILL loses
    nothing. Floats are written with ``repr`` and read back to the same bits. Values that are not scalars are skipped.

    An existing file is continued: a half-written last line is removed. ``resume(k)`` also removes the rows beyond step
    k, which the resumed run logs again. Row k is kept; later values replace its values.

    Args:
        run_directory: directory of the run; created if missing.
        resume_step: as if ``resume(resume_step)`` were called.
    """

    def __init__(self, run_directory: str | os.PathLike[str], resume_step: int | None = None) -> None:
        super().__init__()
        self.run_directory = os.fspath(run_directory)
        self.path = Path(run_directory) / FILE_NAME
        self._resume_step = resume_step
        self._columns: list[str] = []
        self._last: Row = {}
        self._last_offset = 0
        self._fd: int | None = None

    @property
    def name(self) -> str:
        """Empty: the run directory belongs to one experiment."""
        return ""

    @property
    def version(self) -> str:
        """Empty, see ``name``."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return self.run_directory

    @property
    def root_dir(self) -> str:
        """The run directory."""
        return self.run_directory

    @property
    def log_dir(self) -> str:
        """The run directory."""
        return self.run_directory

    def resume(self, step: int) -> None:
        """Continue from a checkpoint with this global step; call it before the first log."""
        if self._fd is not None:
            raise RuntimeError(f"{self.path}: resume({step}) is too late, metrics have been logged already")
        self._resume_step = step

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml in the run directory has the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write the scalars of ``metrics`` to the row of ``step``; without a step to the last row."""
        values = {name: text for name, value in metrics.items() if (text := _text(value)) is not None}
        if not values:
            return
        if self._fd is None:
            self._start()
        if step is None:
            step = int(self._last.get("step", 0))
        values["step"] = str(step)
        new = [name for name in values if name not in self._columns]
        behind = bool(self._last) and step < int(self._last["step"])
        if new or behind:
            self._columns += new
            self._rewrite(_merge(self._read(), values))
        elif self._last.get("step") == values["step"]:
            self._last.update(values)
            self._put_last()
        else:
            assert self._fd is not None
            self._last_offset = os.fstat(self._fd).st_size
            self._last = values
            self._put_last()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Sync the file to disk; logging may continue afterwards."""
        if self._fd is not None:
            os.fsync(self._fd)

    def __getstate__(self) -> dict[str, Any]:
        # A file descriptor is not valid in another process; the copy opens its own.
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)  # type: ignore[arg-type]

    def _start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        self._columns = ["step", "epoch"]
        if self.path.exists():
            rows = self._read()
            self._columns += [name for name in _header(self.path) if name not in self._columns]
            if self._resume_step is not None:
                rows = [row for row in rows if int(row["step"]) <= self._resume_step]
        self._rewrite(rows)

    def _read(self) -> list[Row]:
        return _rows(self.path)

    def _rewrite(self, rows: list[Row]) -> None:
        """Replace the file atomically, so that after a kill it is either the old or the new one."""
        lines = [_line(self._columns), *(self._format(row) for row in rows)]
        temporary = self.path.with_name(FILE_NAME + ".tmp")
        with open(temporary, "wb") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        if self._fd is not None:
            os.close(self._fd)
        self._fd = os.open(self.path, os.O_WRONLY)
        self._last = rows[-1] if rows else {}
        self._last_offset = sum(map(len, lines[:-1])) if rows else len(lines[0])

    def _put_last(self) -> None:
        # Overwrite the old row, then truncate: at no moment is a logged value missing from the file.
        assert self._fd is not None
        line = self._format(self._last)
        os.pwrite(self._fd, line, self._last_offset)
        os.ftruncate(self._fd, self._last_offset + len(line))

    def _format(self, row: Row) -> bytes:
        return _line([row.get(name, "") for name in self._columns])


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, int | float]]:
    """Read the rows of a metrics.csv, in order of step; a row has only the metrics that were logged at its step.

    ``step`` and ``epoch`` are int, all others float, bit for bit as logged. A half-written last line is skipped.
    """
    return [
        {name: int(text) if name in ("step", "epoch") else float(text) for name, text in row.items()}
        for row in _rows(Path(path))
    ]


def _header(path: Path) -> list[str]:
    with open(path, newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _rows(path: Path) -> list[Row]:
    """Read complete rows, without their empty cells."""
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    header, *rows = list(csv.reader(io.StringIO(whole))) or [[]]
    return [
        {name: cell for name, cell in zip(header, row, strict=True) if cell}
        for row in rows
        if len(row) == len(header) and row[0].isdigit()
    ]


def _merge(rows: list[Row], values: Row) -> list[Row]:
    by_step = {int(row["step"]): row for row in rows}
    step = int(values["step"])
    by_step[step] = {**by_step.get(step, {}), **values}
    return [by_step[key] for key in sorted(by_step)]


def _line(cells: list[str]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode()


def _text(value: Any) -> str | None:
    """Format a scalar so that it reads back to the same value; None for anything else."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    elif hasattr(value, "item") and getattr(value, "size", None) == 1:
        value = value.item()
    if isinstance(value, (bool, int)):
        return str(int(value))
    return repr(value) if isinstance(value, float) else None
