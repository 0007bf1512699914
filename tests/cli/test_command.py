"""Exit statuses and messages that the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest

from cli.command import command, format_warning, make_folder, names_or_file, require_positive
from errors import DatasetError, UserError
from tests.command import ROOT


def test_a_user_error_is_one_line_and_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(arguments: Sequence[str] | None) -> int:
        if arguments == ["user"]:
            raise DatasetError("root: expected a dataset, found none")
        if arguments == ["wrapped"]:
            raise RuntimeError("wrapped") from UserError("k: expected 1, found 2")
        if arguments == ["interrupt"]:
            raise KeyboardInterrupt
        if arguments == ["bug"]:
            raise ValueError("bug")
        return 1

    assert main(["user"]) == main(["wrapped"]) == 2
    assert capsys.readouterr().err == "error: root: expected a dataset, found none\nerror: k: expected 1, found 2\n"
    assert main(["interrupt"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert main() == 1
    with pytest.raises(ValueError, match="bug"):
        main(["bug"])


def test_a_warning_of_the_project_is_one_line() -> None:
    own = str(ROOT / "datamodules" / "voc.py")
    assert format_warning("val: 2 boxes", UserWarning, own, 12) == "warning: val: 2 boxes\n"
    for other in ("/usr/lib/x.py", str(ROOT / ".venv/lib/python3.11/site-packages/x.py")):
        assert format_warning("old", FutureWarning, other, 12) == f"{other}:12: FutureWarning: old\n"


def test_options(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("cat\n")
    assert names_or_file([str(file)]) == str(file)
    assert names_or_file(["cat", "dog"]) == ["cat", "dog"]
    assert names_or_file(None) is None
    make_folder("out", str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(UserError, match="out: expected a folder that can be created"):
        make_folder("out", str(file))


def test_positive_options() -> None:
    options = argparse.Namespace(one=1, none=None, sizes=[32, 64], zero=0, mixed=[3, -1])
    require_positive(options, "one", "none", "sizes")
    for name, found in (("zero", "0"), ("mixed", r"\[3, -1\]")):
        with pytest.raises(UserError, match=f"{name}: expected at least 1, found {found}"):
            require_positive(options, name)
