"""The layers of the package, what each may touch, and what importing it may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dcpconv"


@dataclass(frozen=True, slots=True)
class Row:
    """One layer: ``modules`` import what stands left of them or in rows above.

    ``touches`` are the distributions they may import, beside the standard library.  A row may name
    modules that do not exist yet.
    """

    name: str
    modules: tuple[str, ...]
    touches: frozenset[str] = frozenset()


LAYERS = (
    Row("words", ("errors", "dtypes")),
    Row("nouns", ("catalog", "outline", "layout", "spec"), frozenset({"pydantic"})),
    Row(
        "knowledge",
        ("formats", "keymaps", "configs"),
        frozenset({"huggingface_hub", "pydantic", "safetensors", "tomli"}),
    ),
    Row(
        "decide",
        ("selection", "recognition", "coverage", "derived", "sizes", "scales", "matching", "plan"),
    ),
    Row(
        "do",
        (
            "copying",
            "gather",
            "units",
            "blocks",
            "cast",
            "scaled",
            "crew",
            "engine",
            "space",
            "twins",
            "idle",
            "publish",
        ),
    ),
    Row(
        "adapt",
        ("naming", "hub", "supply", "live", "storage_reader"),
        frozenset({"huggingface_hub"}),
    ),
    Row(
        "verbs",
        (
            "report",
            "aside",
            "side_files",
            "parameters",
            "runs",
            "job",
            "training_state",
            "summary",
            "splitting",
            "torch_engine",
            "deciding",
            "conversion",
            "drafting",
            "families_page",
            "drop_in",
            "load_report",
            "init_weights",
            "keylist",
            "sides",
            "contracts",
            "suggestions",
            "checking",
            "reports",
            "testing",
            "inspection",
        ),
        frozenset({"huggingface_hub"}),
    ),
    Row(
        "shell",
        ("cli", "__main__", "pytest_plugin"),
        frozenset({"rich", "typer", "click", "pytest"}),
    ),
)
TORCH = frozenset({"cast", "live", "storage_reader", "init_weights", "torch_engine"})
"""Modules that work on tensors, and so may import torch when they are imported."""

PLACE = {
    module: (level, column)
    for level, row in enumerate(LAYERS)
    for column, module in enumerate(row.modules)
}
FILES = sorted(PACKAGE.rglob("*.py"))
# The table of contents is exempt: it names what is public, wherever that lives.
SOURCES = [file for file in FILES if file != PACKAGE / "__init__.py"]


def _name(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(file: Path) -> Iterator[str]:
    """Dotted names that ``file`` imports anywhere, also inside functions and for typing."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively: write the whole name"
            if node.module == "dcpconv":
                yield from (f"dcpconv.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def _id(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def test_no_module_stands_twice_in_the_table() -> None:
    assert len(PLACE) == sum(len(row.modules) for row in LAYERS)


@pytest.mark.parametrize("file", SOURCES, ids=_id)
def test_module_imports_only_from_above(file: Path) -> None:
    me = _name(file)
    assert me in PLACE, f"give {me} a place in LAYERS"
    others = {name.split(".")[1] for name in _imports(file) if name.startswith("dcpconv.")} - {me}
    wrong = sorted(other for other in others if PLACE.get(other, PLACE[me]) >= PLACE[me])
    assert not wrong, f"{me} ({LAYERS[PLACE[me][0]].name}) may not import {wrong}"


@pytest.mark.parametrize("file", SOURCES, ids=_id)
def test_module_touches_only_what_its_row_may(file: Path) -> None:
    me = _name(file)
    assert me in PLACE, f"give {me} a place in LAYERS"
    allowed = LAYERS[PLACE[me][0]].touches | ({"torch"} if me in TORCH else set())
    roots = {name.split(".")[0] for name in _imports(file)}
    wrong = sorted(roots - sys.stdlib_module_names - {"dcpconv", "typing_extensions"} - allowed)
    assert not wrong, f"{me} may not touch {wrong}"


@pytest.mark.parametrize("file", FILES, ids=_id)
def test_file_is_short_and_ascii(file: Path) -> None:
    text = file.read_text()
    assert text.isascii()
    assert len(text.splitlines()) <= 400


def _loaded_after(statements: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh interpreter once it ran ``statements``."""
    run = subprocess.run(
        [sys.executable, "-c", f"{statements}\nimport sys\nprint(*sys.modules)"],
        cwd=PACKAGE.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return set(run.stdout.split())


def test_importing_the_package_imports_no_tensor_library() -> None:
    assert not _loaded_after("import dcpconv") & {"torch", "numpy", "pydantic", "safetensors"}


def test_everything_that_needs_no_tensor_math_imports_without_torch() -> None:
    modules = [
        ".".join(("dcpconv", *file.relative_to(PACKAGE).with_suffix("").parts))
        for file in SOURCES
        if _name(file) not in TORCH and file.stem not in {"__init__", "__main__"}
    ]
    packages = [f"dcpconv.{_name(file)}" for file in SOURCES if file.stem == "__init__"]
    assert modules
    statements = "\n".join(f"import {name}" for name in sorted({*modules, *packages}))
    assert "torch" not in _loaded_after(statements)
