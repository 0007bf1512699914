"""Errors that the user can correct: the command line shows them in one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """The user gave something that cannot be used.

    ``str`` is one line, ``option or file: expected X, found Y; do Z``. Every other exception is a bug and keeps its
    traceback.
    """


class DatasetError(UserError):
    """A dataset on disk differs from what is expected."""


class CheckpointError(UserError):
    """A checkpoint cannot be used."""


class BrokenImageError(UserError, OSError):
    """An image cannot be read. ``str`` is ``path: reason`` in one line.

    Args:
        path: the file. If ``reason`` is None, the traceback text of a DataLoader worker: a DataLoader rebuilds an
            exception from that text alone, and the original line is recovered from it.
        reason: why the image cannot be read.
    """

    def __init__(self, path: str, reason: str | None = None) -> None:
        if reason is None:
            line = path.strip().splitlines()[-1] if path.strip() else ""
            path, _, reason = line.rpartition("BrokenImageError: ")[2].partition(": ")
        self.path, self.reason = path, " ".join(reason.split())
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.path, self.reason)


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the error, or the cause of it, that was raised for the user to correct; None for a bug."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error
