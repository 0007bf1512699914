"""Turns jsonargparse's error reports into one line with the nearest valid name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningArgumentParser


class FriendlyParser(LightningArgumentParser):
    """A parser that answers a mistake with one line: what was found, what is known, what to do; exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser inside the parser: the outer one reports
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {explain(message, parser._option_names())}\n")
        sys.exit(2)

    def _option_names(self) -> list[str]:
        names = {action.dest for action in self._actions} - {"help", "print_config", "print_shtab", "subcommand"}
        for action in self._actions:  # the outer parser meets words that the command's own parser left over
            for parser in (getattr(action, "choices", None) or {}).values() if isinstance(action.choices, dict) else ():
                names.update(parser._option_names())
        return sorted(names)


def explain(message: str, options: list[str]) -> str:
    """One line for a jsonargparse error message.

    Args:
        message: the report, often of many lines: one for every member of a union that did not fit.
        options: dotted names of the options that the parser knows.
    """
    key = _first(r'Parser key "([^"]+)"', message)
    if name := _first(r"[Uu]nrecognized arguments: -*([^\s=]+)", message):
        return f"no option --{name}{_nearest(name, options)}"
    if name := _first(r"does not accept (?:option|nested key) '([^']+)'", message):
        return f"no option {name}{_nearest(name, options)}"
    if name := _first(r"[Oo]ption '([^']+)' is not accepted", message):
        where, known = _accepted(message, key)
        return f"{where} has no option {name}{_nearest(name, known)}"
    if name := _first(r"Expected a dot import path string: (\S+)", message):
        slot = _slot(message, key)
        known = _class_names(slot)
        if name in known:
            return f"--{slot}: {name} is of no use here: it is not of the kind that is asked for"
        return f"--{slot}: no class {name}{_nearest(name, known)}"
    if names := _first(r"following arguments are required: ([^\n]+)", message):
        missing = [name.strip() for name in names.split(",")]
        if missing[0].split(".")[-1] in ("model", "data"):
            return f"--{missing[0].split('.')[-1]} is missing: name a class, or a --config that does"
        where, _ = _accepted(message, key)
        return f"{where} needs {', '.join(f'--{key}.{name}' for name in missing)}"
    if name := _first(r"File does not exist: '?([^'\n]+)", message):
        return f"--{key or 'config'}: no such file: {name}"
    if "Problems parsing config" in message or "while parsing" in message or "while scanning" in message:
        return f"--{key or 'config'}: not valid YAML: {' '.join(message.split())[:300]}"
    if (match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)) is not None:
        known = re.findall(r"[\w]+", match[2])
        return f"no command {match[1]}{_nearest(match[1], known)}"
    inner = re.findall(r'Parser key "([^"]+)":\s+(Expected [^\n]+|Does not [^\n]+)', message)
    values = re.findall(r"(Expected [^\n]+?\. Got value: [^\n]+)", message)
    if values:
        path = ".".join(dict.fromkeys([key or "", *(name for name, _ in inner)])).strip(".")
        expected = re.sub(r"<class '([\w.]+)'>", r"\1", values[0]).replace(". Got value:", ", found")
        return f"--{path}: {expected[0].lower()}{expected[1:]}"
    if "Union subtypes" in message and (found := _first(r"Given value: ([^\n]+)", message)):
        types = " or ".join(re.findall(r"(\w+)'>", _first(r"Subtypes: \[([^\n]+)\]", message) or "")) or "another type"
        return f"--{key}: expected {types.replace('NoneType', 'null')}, found {found}"
    return " ".join(message.split())[:400]


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _nearest(name: str, known: list[str]) -> str:
    """``; did you mean A or B?``, comparing whole dotted names, then first parts, then last parts."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    if not near and "." in name:
        head, rest = name.split(".", 1)
        heads = list({option.split(".", 1)[0] for option in known})
        near = [f"{other}.{rest}" for other in difflib.get_close_matches(head, heads, n=1) if other != head]
    if not near:
        tails = {option.rsplit(".", 1)[-1]: option for option in known}
        near = [tails[tail] for tail in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(tails), n=2)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known: {', '.join(sorted(known))}" if 0 < len(known) <= 40 else ""


def _slot(message: str, key: str | None) -> str:
    """The dotted option that a class was meant for: model, data, model.optimizer ..."""
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    nested = _first(r"NestedArg\(key='([\w.]+)'", message)
    slot = ".".join(part for part in keys if part) or (key or "")
    return f"{slot}.{nested}" if nested and not slot.endswith(nested) else slot


def _accepted(message: str, key: str | None) -> tuple[str, list[str]]:
    """The class that refused an option, and the options that it has."""
    paths = re.findall(r"class_path[=']*[ ]*'([\w.]+)'", message) or re.findall(r"'([\w]+(?:\.[\w]+)+)'", message)
    if not paths:
        return f"--{key}", []
    before = message.split("is not accepted")[0]
    inside = re.findall(r"given class_path '([\w.]+)'", before)
    class_path = inside[-1] if inside else paths[0]
    if (refused := _first(r"is not accepted\. Got value: Namespace\(class_path='([\w.]+)'", message)) is not None:
        class_path = refused
    module, _, name = class_path.rpartition(".")
    try:
        classes = getattr(importlib.import_module(module), name).__mro__
    except (ImportError, AttributeError):
        return name, []
    known: list[str] = []
    for cls in classes:  # **kwargs hands the rest to the next class
        if "__init__" in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters
            known += [parameter for parameter in parameters if parameter not in ("self", "args", "kwargs")]
            if "kwargs" not in parameters:
                break
    return name, list(dict.fromkeys(known))


def _class_names(slot: str) -> list[str]:
    base: Any
    if slot.endswith("optimizer"):
        base, modules = torch.optim.Optimizer, ["torch.optim"]
    elif slot.endswith("schedule"):
        base, modules = torch.optim.lr_scheduler.LRScheduler, ["torch.optim", "lightning_modules"]
    elif slot.startswith("data"):
        base, modules = pl.LightningDataModule, ["datamodules"]
    elif slot.startswith("model"):
        base, modules = pl.LightningModule, ["lightning_modules"]
    else:
        base, modules = pl.Callback, ["pytorch_lightning", "callbacks"]
    return sorted(
        {c.__name__ for c in _subclasses(base) if c.__module__.startswith(tuple(modules)) and c.__name__[0] != "_"}
    )


def _subclasses(base: type) -> set[type]:
    direct: set[type] = set(base.__subclasses__())
    return direct.union(*(_subclasses(c) for c in direct)) if direct else direct
