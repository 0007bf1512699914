"""Answers to mistakes on the command line: one line with what was found, what was expected, and the nearest name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import traceback
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import get_loader, set_loader
from pytorch_lightning.cli import LightningArgumentParser

# Options whose value is a class, given by name.
CLASS_SLOTS = ("model", "data", "optimizer", "schedule", "callbacks", "logger", "strategy", "profiler", "plugins")
CASE_STUDIES = ("classification", "detection", "segmentation", "pose", "style")

# Python represents a byte of a file name that is not UTF-8 as a surrogate, which YAML's C parser refuses. A character
# for private use stands in for it there.
_PRIVATE = {surrogate: 0x100000 + surrogate for surrogate in range(0xDC80, 0xDD00)}
_SURROGATES = {private: surrogate for surrogate, private in _PRIVATE.items()}
_load_yaml = get_loader("yaml")


def load_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does; file names may have bytes that are not UTF-8."""
    text = re.sub(r"(?<!\\)\\u(DC[89A-F][0-9A-F])", r"\\U0010\1", text.translate(_PRIVATE), flags=re.IGNORECASE)
    return _restore_surrogates(_load_yaml(text))


def _restore_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_SURROGATES)
    if isinstance(value, list):
        return [_restore_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_restore_surrogates(key): _restore_surrogates(item) for key, item in value.items()}
    return value


set_loader("yaml", load_yaml, (yaml.YAMLError,))


class FriendlyParser(LightningArgumentParser):
    """A parser that answers a mistake with one line on standard error and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a nested parser: the outer one reports
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {explain(message, parser._option_names())}\n")
        sys.exit(2)

    def _option_names(self) -> list[str]:
        names = {action.dest for action in self._actions} - {"help", "print_config", "print_shtab", "subcommand"}
        for action in self._actions:  # the outer parser sees options that the command's own parser did not take
            for parser in (getattr(action, "choices", None) or {}).values() if isinstance(action.choices, dict) else ():
                names.update(parser._option_names())
        return sorted(names)


# --- help ---------------------------------------------------------------------------------------------------------


def list_classes(slot: str) -> str:
    """Return all systems, or all datamodules, by case study, one line each.

    Args:
        slot: ``model`` or ``data``.
    """
    names = class_names(slot)
    classes = [cls for cls in _subclasses(_bases(slot)[0]) if cls.__name__ in names]
    width = max(len(cls.__name__) for cls in classes)
    lines = [f"Options of one of them: python train.py fit --{slot}.help NAME"]
    for case_study in CASE_STUDIES:
        lines += ["", case_study]
        for cls in sorted((c for c in classes if c.__module__.split(".")[1] == case_study), key=lambda c: c.__name__):
            lines.append(f"  {cls.__name__:{width}}  {_first_sentence(cls)}")
    return "\n".join(lines)


def unknown_class(slot: str, name: str) -> str:
    """Return the answer to a class name that is not one of the slot's."""
    names = class_names(slot)
    if name in names:
        return f"--{slot}: expected a class that this command supports, found {name}"
    kind = {"model": "a system", "data": "a datamodule"}.get(slot, f"a class for {slot}")
    return f"--{slot}: expected {kind}, found {name}{nearest(name, names)}"


def class_names(slot: str) -> list[str]:
    """Return the short names of the classes that an option accepts.

    Base classes are not among them: they are abstract, or in the ``base.py`` of their case study.

    Args:
        slot: dotted option: ``model``, ``data``, ``model.optimizer``, ``model.schedule``, ``trainer.callbacks`` ...
    """
    base, modules = _bases(slot)
    return sorted(
        {
            cls.__name__
            for cls in _subclasses(base)
            if cls.__module__.startswith(modules)
            and not cls.__module__.endswith(".base")
            and not inspect.isabstract(cls)
            and not cls.__name__.startswith("_")
            and not (slot in ("model", "data") and cls.__module__.count(".") < 2)
        }
    )


def _bases(slot: str) -> tuple[Any, tuple[str, ...]]:
    if slot.endswith("optimizer"):
        return torch.optim.Optimizer, ("torch.optim", "lightning_modules")
    if slot.endswith("schedule"):
        return torch.optim.lr_scheduler.LRScheduler, ("torch.optim", "lightning_modules")
    if slot.startswith("data"):
        return pl.LightningDataModule, ("datamodules",)
    if slot.startswith("model"):
        return pl.LightningModule, ("lightning_modules",)
    return pl.Callback, ("pytorch_lightning", "callbacks")


def _subclasses(base: type) -> set[type]:
    direct: set[type] = set(base.__subclasses__())
    return direct.union(*(_subclasses(c) for c in direct)) if direct else direct


def _first_sentence(cls: type) -> str:
    paragraph = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0].replace("::", ".")


# --- mistakes -----------------------------------------------------------------------------------------------------


def explain(message: str, options: list[str]) -> str:
    """Return one line for an error message of jsonargparse.

    Args:
        message: the message, often of many lines: one for each member of a union that the value does not fit.
        options: dotted names of the options that the parser has.
    """
    key = _first(r'Parser key "([^"]+)"', message)
    if name := _first(r"[Uu]nrecognized arguments: -*([^\s=]+)", message):
        return f"--{name}: no such option{nearest(name, options)}"
    if name := _first(r"does not accept (?:option|nested key) '([^']+)'", message):
        return f"{name}: no such option{nearest(name, options)}"
    if name := _first(r"[Oo]ption '([^']+)' is not accepted", message):
        where, known = _accepted(message, key)
        return f"{where}: expected one of its options, found {name}{nearest(name, known)}"
    if name := _first(r"Expected a dot import path string: (\S+)", message):
        slot = _slot(message, key)
        if slot.rsplit(".", 1)[-1] in CLASS_SLOTS:
            return unknown_class(slot, name)
    if names := _first(r"following arguments are required: ([^\n]+)", message):
        missing = [name.strip() for name in names.split(",")]
        if missing[0].split(".")[-1] in ("model", "data"):
            return missing_class(missing[0].split(".")[-1])
        where, _ = _accepted(message, key)
        return f"{where}: expected {', '.join(f'--{key}.{name}' for name in missing)}, found nothing"
    if name := _first(r"File does not exist: '?([^'\n]+)", message):
        return f"--{key or 'config'}: expected a file, found no such file: {name}"
    if "Problems parsing config" in message or "while parsing" in message or "while scanning" in message:
        return f"--{key or 'config'}: expected YAML, found {' '.join(message.split())[:300]}"
    if (match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)) is not None:
        known = re.findall(r"[\w]+", match[2])
        return f"expected a command, found {match[1]}{nearest(match[1], known)}"
    inner = re.findall(r'Parser key "([^"]+)":\s+(Expected [^\n]+|Does not [^\n]+)', message)
    values = re.findall(r"(Expected [^\n]+?\. Got value: [^\n]+)", message)
    if values:
        path = ".".join(dict.fromkeys([key or "", *(name for name, _ in inner)])).strip(".")
        expected = re.sub(r"^(Expected) an? (?=int|float|bool|str)", r"\1 ", _plain_type(values[0]).split(", found")[0])
        expected = re.sub(r"\. Got value: (\S+?)(\. Got value: .*)?$", r", found \1", expected)
        return f"--{path}: {expected[0].lower()}{expected[1:]}"
    if "Union subtypes" in message and (
        found := _first(r"Given value: ([^\n]+?)(?:\. Got value: [^\n]*)?(?:\n|$)", message)
    ):
        # Unions are nested: the last one listed is the innermost, whose value is the first one listed.
        types = re.findall(r"Subtypes: \[([^\n]+)\]", message)[-1]
        slot = _slot(message, key)
        if slot.rsplit(".", 1)[-1] in CLASS_SLOTS and (problem := _class_problem(slot, found, types)) is not None:
            return problem
        return f"--{_slot(message, key)}: expected {_plain_types(types)}, found {found}"
    return " ".join(message.split())[:400]


def _class_problem(slot: str, path: str, types: str) -> str | None:
    """Return why a class of the user's own module cannot be taken: its import fails, it is missing or another kind."""
    module_name, _, name = path.strip("'").rpartition(".")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", module_name):
        return None
    try:
        module = importlib.import_module(module_name)
    except SyntaxError as error:
        return (
            f"--{slot}: expected a class, found {path} with SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
        )
    except Exception as error:
        traced = traceback.extract_tb(error.__traceback__)
        frames = [f for f in traced if f.filename != __file__ and "importlib" not in f.filename]
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        return f"--{slot}: expected a class, found {path} with {type(error).__name__}: {error}{place}"
    found = getattr(module, name, None)
    if found is None:
        known = [n for n, value in vars(module).items() if isinstance(value, type)]
        return f"--{slot}: expected a class of {module.__file__}, found no {name}{nearest(name, known)}"
    return f"--{slot}: expected a {_plain_types(types)}, found {path}, which is not one"


def missing_class(slot: str) -> str:
    """Return the answer to a command line without a model or data."""
    return f"--{slot}: expected a class, found none; add --{slot} NAME (see --{slot}.help), or a --config with one"


def nearest(name: str, known: list[str]) -> str:
    """Return ``; did you mean A or B?``; compare whole dotted names, then first parts, then last parts.

    Without a similar name, list the known names if there are at most 40.
    """
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
    return f"; use one of {', '.join(sorted(known))}" if 0 < len(known) <= 40 else ""


def _plain_type(text: str) -> str:
    """Replace Python's notation of types: ``a <class 'int'>`` and ``a typing.Literal[300, 512]``."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    return re.sub(r"an? typing\.Literal\[([^\]]*)\]", lambda match: "one of " + re.sub("['\"]", "", match[1]), text)


def _plain_types(types: str) -> str:
    """Return ``list[str] or null`` for ``list[str], <class 'NoneType'>``, the subtypes of a union."""
    names = re.split(r", (?![^\[]*\])", _plain_type(types).replace("NoneType", "null"))
    return " or ".join(re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name) for name in names)


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _slot(message: str, key: str | None) -> str:
    """Return the dotted option that a class was given for: model, data, model.optimizer ..."""
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    nested = _first(r"NestedArg\(key='([\w.]+)'", message)
    slot = ".".join(part for part in keys if part) or (key or "")
    return f"{slot}.{nested}" if nested and not slot.endswith(nested) else slot


def _accepted(message: str, key: str | None) -> tuple[str, list[str]]:
    """Return the class that refused an option, and the options that it has."""
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
    for cls in classes:  # **kwargs passes the rest on to the next class
        if "__init__" in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters
            known += [parameter for parameter in parameters if parameter not in ("self", "args", "kwargs")]
            if "kwargs" not in parameters:
                break
    return name, list(dict.fromkeys(known))
