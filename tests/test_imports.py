"""Import directions of the layout: imports only point downwards, and case studies do not import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASE_STUDIES = ("classification", "detection", "segmentation", "pose", "style")
# From top to bottom. Entry points (train.py, tools, benchmarks) stand beside each other; nothing imports them.
LAYERS = (
    {"train", "tools", "benchmarks"},
    {"cli"},
    {"callbacks"},
    {"visualization"},
    {"lightning_modules", "datamodules"},
    {"errors"},
)
PACKAGES = set.union(*LAYERS)
# Mask R-CNN and Keypoint R-CNN are Faster R-CNN with one more branch, in their papers as in their classes.
EXTENSIONS = {
    ("lightning_modules.segmentation.mask_rcnn", "lightning_modules.detection.faster_rcnn"),
    ("lightning_modules.pose.keypoint_rcnn", "lightning_modules.detection.faster_rcnn"),
}


class Import(NamedTuple):
    """One import of a module of the project; ``name`` is None for ``import module``."""

    file: str
    importer: str
    module: str
    name: str | None
    at_top: bool


def module_of(path: Path) -> str:
    """Return the dotted name of a file's module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[Import]:
    """Yield the imports of the project's own modules in a file, those inside functions included."""
    file, importer = str(path.relative_to(ROOT)), module_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        at_top = node in tree.body
        if isinstance(node, ast.Import):
            names: list[tuple[str, str | None]] = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if module.split(".")[0] in PACKAGES | {"tests"}:
                # ``from package import module`` imports that module.
                if name is not None and ROOT.joinpath(*module.split("."), f"{name}.py").exists():
                    module, name = f"{module}.{name}", None
                yield Import(file, importer, module, name, at_top)


def files_of(*packages: str) -> list[Path]:
    """Return the Python files of packages or single modules."""
    found = [ROOT / f"{package}.py" for package in packages if (ROOT / f"{package}.py").exists()]
    return sorted(found + [path for package in packages for path in (ROOT / package).rglob("*.py")])


IMPORTS = [found for path in files_of(*PACKAGES) for found in imports_of(path)]


def layer_of(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module.split(".")[0] in layer)


def room_of(module: str) -> str | None:
    """Return the case study of a module of lightning_modules or datamodules; None for what they share."""
    parts = module.split(".")
    is_case_study = parts[0] in ("lightning_modules", "datamodules") and len(parts) > 1 and parts[1] in CASE_STUDIES
    return parts[1] if is_case_study else None


def test_imports_point_downwards() -> None:
    upwards = [
        f"{found.file} imports {found.module}"
        for found in IMPORTS
        if found.importer.split(".")[0] != found.module.split(".")[0]
        and layer_of(found.importer) >= layer_of(found.module)
    ]
    assert upwards == []


def test_case_studies_do_not_import_each_other() -> None:
    across = [
        f"{found.file} imports {found.module}"
        for found in IMPORTS
        if (room := room_of(found.module)) is not None
        and found.importer.split(".")[0] == found.module.split(".")[0]
        and found.importer not in ("lightning_modules", "datamodules")  # their __init__ imports all
        and not found.importer.startswith("datamodules.synthetic.")  # draws every layout
        and room_of(found.importer) != room
        and (found.importer, found.module) not in EXTENSIONS
    ]
    assert across == []


def test_no_import_is_circular() -> None:
    """Imports inside functions count: they would only hide a circle."""
    modules = {module_of(path) for path in files_of(*PACKAGES)}
    registries = {"lightning_modules", "datamodules"}
    graph = {
        module: {
            found.module
            for found in IMPORTS
            if found.importer == module and found.module in modules and found.module not in registries
        }
        for module in modules - registries
    }
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("library", ["albumentations"])
def test_one_file_imports_it(library: str) -> None:
    importers = set()
    for path in files_of(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == library for name in names):
                importers.add(module_of(path))
    assert importers == {"datamodules.transforms"}


def test_no_benchmark_imports_a_private_name() -> None:
    private = [
        f"{found.file}: {found.module}.{found.name}"
        for found in IMPORTS
        if found.importer.startswith("benchmarks.") and (found.name or "").startswith("_")
    ]
    assert private == []


def test_no_test_imports_a_benchmark_and_no_code_imports_a_test() -> None:
    tests = [found for path in files_of("tests") for found in imports_of(path)]
    wrong = [found.file for found in tests if found.module.split(".")[0] == "benchmarks"]
    wrong += [found.file for found in IMPORTS if found.module.split(".")[0] == "tests"]
    assert wrong == []
