"""Shared behavior of the commands in ``tools/`` and ``benchmarks/``."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps

from errors import UserError, find_user_error

Main = Callable[[Sequence[str] | None], int]

_PROJECT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


def command(main: Main) -> Callable[..., int]:
    """Decorate the ``main`` of a command: it returns 2 after a `UserError`, printed as one line, and 130 after Ctrl-C.

    Every other exception is a bug and keeps its traceback.
    """

    @wraps(main)
    def wrapped(arguments: Sequence[str] | None = None) -> int:
        print_any_name()
        print_short_warnings()
        try:
            return main(arguments)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            message = find_user_error(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            return 2

    return wrapped


def print_any_name() -> None:
    """Let file names print that are not in the terminal's encoding, or not UTF-8: a byte 0xe9 becomes ``\\udce9``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_short_warnings() -> None:
    """Print a warning of this project as one line, without the source line that Python adds."""
    warnings.formatwarning = format_warning


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning. Those of other packages keep their origin, see ``warnings.formatwarning``."""
    path = os.path.abspath(filename)
    if path.startswith(_PROJECT) and "site-packages" not in path:  # .venv lies in the project
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def make_folder(option: str, folder: str) -> None:
    """Create an output folder.

    Args:
        option: the option that names it, for the error message.
        folder: the folder.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: expected a folder that can be created, found {error}") from None


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """Require each of these options to be at least 1; None and a list of such numbers are accepted.

    Raises:
        UserError: an option is smaller.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and min(value if isinstance(value, (list, tuple)) else [value]) < 1:
            raise UserError(f"{name}: expected at least 1, found {value}")


def names_or_file(classes: list[str] | None) -> list[str] | str | None:
    """Return the value of ``--classes`` as datamodules take it: a single existing file is a file of names."""
    if classes is not None and len(classes) == 1 and os.path.isfile(classes[0]):
        return classes[0]
    return classes
