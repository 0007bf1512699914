"""Documentation: links, names of files and options, line lengths, and the headers of the configs."""

from __future__ import annotations

import inspect
import re
import shlex
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import yaml

import datamodules
import lightning_modules
from datamodules.base import VisionDataModule
from lightning_modules.base import VisionModule

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "configs")
HEADER_KEYS = ["Paper", "Run", "Recipe", "Differs", "Variants"]
MAX_LINE = 120
MAX_PARAGRAPH = 6
COMMAND_OPTIONS = {"config", "ckpt_path", "experiment", "resume", "print_config", "model", "data", "help"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def split_page(path: Path) -> tuple[list[str], str]:
    """Return the lines of a page, empty where they are code, and its code."""
    prose, code, inside = [], [], False
    for line in path.read_text(encoding="utf-8").split("\n"):
        fence = line.lstrip().startswith("```")
        if inside and not fence:
            code.append(line)
        prose.append("" if inside or fence else line)
        inside ^= fence
    return prose, "\n".join(code)


def header_of(config: Path) -> list[str]:
    """Return the comment lines at the start of a config."""
    lines = config.read_text(encoding="utf-8").split("\n")
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def header_text(config: Path) -> str:
    return "\n".join(line[2:] for line in header_of(config))


SOURCES = {relative(path): path.read_text(encoding="utf-8") for path in PAGES}
SOURCES.update({relative(path): header_text(path) for path in CONFIGS})
# CHANGELOG.md names what no longer exists.
CURRENT = {name: text for name, text in SOURCES.items() if name != "CHANGELOG.md"}


def anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# --- links, files, lines --------------------------------------------------------------------------------------------


def test_links_exist() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(split_page(page)[0])):
            if target.startswith(("http://", "https://")):
                continue
            name, _, fragment = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            headings = [line.lstrip("# ") for line in split_page(path)[0] if line.startswith("#")] if fragment else []
            if not path.exists() or (fragment and fragment not in map(anchor, headings)):
                broken.append(f"{relative(page)}: {target}")
    assert broken == []


def test_files_exist() -> None:
    """Configs, tests, pages and modules are named as they exist."""
    missing = []
    for name, text in CURRENT.items():
        paths = set(re.findall(r"\bconfigs/[\w/]+\.yaml|\btests/[\w/]+\.py|\bdocs/[\w/]+\.md", text))
        modules = re.findall(r"\bpython -m ((?:tools|benchmarks|datamodules)(?:\.\w+)*)", text)
        paths |= {module.replace(".", "/") for module in modules}
        missing += [f"{name}: {p}" for p in paths if not any((ROOT / q).exists() for q in (p, f"{p}.py"))]
    assert missing == []


def test_every_config_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    others = ("demo", "resnet50_food101_scratch")  # variants of listed configs
    assert [p.stem for p in CONFIGS if relative(p) not in readme and p.stem not in others] == []


def test_lines_and_paragraphs_are_short() -> None:
    """Table rows are exempt."""
    problems = []
    for page in PAGES:
        paragraph = 0
        for number, line in enumerate(split_page(page)[0], start=1):
            table = line.lstrip().startswith("|")
            if len(line) > MAX_LINE and not table:
                problems.append(f"{relative(page)}:{number}: {len(line)} characters")
            starts = not line.strip() or table or re.match(r"\s*(- |#|\d+\. )", line) is not None
            paragraph = 0 if starts else paragraph + 1
            if paragraph == MAX_PARAGRAPH + 1:
                problems.append(f"{relative(page)}:{number}: paragraph of more than {MAX_PARAGRAPH} lines")
    assert problems == []


# --- headers of configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=relative)
def test_config_headers_have_the_fixed_order(config: Path) -> None:
    header = header_of(config)
    starts = [i for i, line in enumerate(header) if i > 0 and re.match(r"# [A-Z][a-z]+: ", line)]
    keys = [header[i][2:].split(":")[0] for i in starts]
    assert {"Paper", "Run", "Recipe"} <= set(keys)
    assert keys == [key for key in HEADER_KEYS if key in keys], f"expected {HEADER_KEYS} in this order"
    columns = {line[:12].rstrip() for line in header[starts[0] :]}
    assert columns <= {"#", *(f"# {key}:" for key in HEADER_KEYS)}, "text starts in column 13"
    assert len(header) <= 12
    assert max(map(len, header)) <= 100


# --- commands -------------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """One command of a page or a header."""

    source: str
    words: list[str]

    @property
    def text(self) -> str:
        return f"{self.source}: {' '.join(self.words)}"


def commands() -> list[Command]:
    """Return the commands in the code of the pages and in the headers of the configs."""
    found = []
    for name, text in CURRENT.items():
        code = split_page(ROOT / name)[1] if name.endswith(".md") else text
        for line in re.sub(r"\\\n\s*", " ", code).split("\n"):
            if match := re.search(r"python (train\.py|-m \w+\.\w+) .*", line):
                with suppress(ValueError):  # prose of a header with an apostrophe
                    found.append(Command(name, shlex.split(re.sub(r"\s#.*", "", match[0]))))
    return found


COMMANDS = commands()


@cache
def classes(base: type) -> dict[str, type]:
    """Return all subclasses by name."""
    lightning_modules.import_all()
    datamodules.import_all()
    found = {base.__name__: base}
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        found.update(classes(subclass))
    return found


@cache
def options_of(cls: type) -> frozenset[str]:
    """Return the names of a class's options, those that it passes on to its bases included."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in base.__dict__ and base.__module__.startswith(("lightning_modules.", "datamodules.")):
            names |= inspect.signature(base.__init__).parameters.keys()  # type: ignore[misc]
    return frozenset(names - {"self", "kwargs"})


def class_of(command: Command, slot: str, base: type) -> list[type]:
    """Return the class that a command uses for ``--model`` or ``--data``; all of them if it does not say."""
    name = None
    for option, value in zip(command.words, command.words[1:], strict=False):
        if option == "--config":
            config: dict[str, Any] = yaml.safe_load((ROOT / value).read_text(encoding="utf-8"))
            name = config[slot]["class_path"]
        if option == f"--{slot}":
            name = value
    known = classes(base)
    return list(known.values()) if name is None or name not in known else [known[name]]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 100


def is_option(command: Command, option: str) -> bool:
    """Whether train.py has an option, given without dashes, for the classes of a command."""
    group, _, rest = option.partition(".")
    name = rest.split(".")[0]
    if group == "trainer":
        return name in inspect.signature(pl.Trainer.__init__).parameters
    if group in ("model", "data") and rest and name != "help":
        base = VisionModule if group == "model" else VisionDataModule
        return any(name in options_of(cls) for cls in class_of(command, group, base))
    return group in COMMAND_OPTIONS


def test_options_of_train_exist() -> None:
    unknown = [
        f"{word} in {command.text}"
        for command in COMMANDS
        if command.words[1] == "train.py"
        for word in command.words
        if word.startswith("--") and not is_option(command, word[2:].split("=")[0])
    ]
    assert unknown == []


def test_options_in_prose_exist() -> None:
    """Each ``--model.<option>`` or ``--data.<option>`` belongs to some system or datamodule."""
    unknown = []
    for source, text in CURRENT.items():
        for option in re.findall(r"--((?:model|data)\.\w+)", text):
            if not is_option(Command(source, []), option):
                unknown.append(f"{source}: --{option}")
    assert unknown == []


def test_options_of_modules_exist() -> None:
    """Options of tools and benchmarks occur in their source; those of ``tools.check`` are the datamodule's."""
    unknown = []
    for command in COMMANDS:
        if command.words[1] != "-m" or command.words[2] == "tools.check":
            continue
        path = ROOT / command.words[2].replace(".", "/")
        source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        for word in command.words[3:]:
            if word.startswith("--") and word != "--help" and f'"{word}"' not in source:
                unknown.append(f"{word} in {command.text}")
    assert unknown == []
