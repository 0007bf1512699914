"""Errors that are shown to the user in one line, without a traceback."""

from __future__ import annotations


class DatasetError(ValueError):
    """A dataset on disk is not what was expected; the message says what was found, what was expected, what to do."""


class BrokenImageError(OSError):
    """An image cannot be read. ``str`` is one line: the file and the reason.

    Args:
        path: the file. A DataLoader rebuilds a worker's exception from its traceback text alone; that text is taken
            too, and the line is found in it again.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str | None = None) -> None:
        if reason is None:
            line = path.strip().splitlines()[-1] if path.strip() else ""
            path, _, reason = line.rpartition("BrokenImageError: ")[2].partition(": ")
        self.path, self.reason = path, " ".join(reason.split())
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.path, self.reason)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message is one line that names the file and says what to do."""
